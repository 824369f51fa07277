/*
 * A UDP service behind a redirect: tells each datagram's original addresses and sends it back. HOW it receives: "blocking",
 * "nonblocking" (poll, then recvmsg until EAGAIN), "many" (recvmmsg of up to four). Ends after COUNT datagrams.
 */
#include "tproxy.h"

#include <fcntl.h>
#include <poll.h>

enum { MANY = 4 };

static struct {
	char data[1500];
	struct sockaddr_in peer;
	union {
		char bytes[CMSG_SPACE(sizeof(struct in_origaddrs))];
		struct cmsghdr align;
	} control;
	struct iovec where;
} slots[MANY];

static struct mmsghdr messages[MANY];

static void prepare(void)
{
	for (int i = 0; i < MANY; i++) {
		slots[i].where = (struct iovec){slots[i].data, sizeof slots[i].data};
		messages[i].msg_hdr = (struct msghdr){
			.msg_name = &slots[i].peer, .msg_namelen = sizeof slots[i].peer,
			.msg_iov = &slots[i].where, .msg_iovlen = 1,
			.msg_control = &slots[i].control, .msg_controllen = sizeof slots[i].control,
		};
	}
}

static void tell(int fd, int i)
{
	struct msghdr *m = &messages[i].msg_hdr;
	struct in_origaddrs *o = NULL;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c))
		if (c->cmsg_level == SOL_IP && c->cmsg_type == IP_RECVORIGADDRS)
			o = (struct in_origaddrs *)CMSG_DATA(c);
	printf("%.*s", (int)messages[i].msg_len, slots[i].data);
	if (o) {
		printf(" from %s:%u", inet_ntoa(o->source), ntohs(o->source_port));
		printf(" to %s:%u\n", inet_ntoa(o->destination), ntohs(o->destination_port));
	} else {
		printf(" without addresses\n");
	}
	fflush(stdout);
	need(sendto(fd, slots[i].data, messages[i].msg_len, 0, m->msg_name, m->msg_namelen), "sendto");
}

static int receive(int fd, const char *how)
{
	struct pollfd ready = {.fd = fd, .events = POLLIN};
	ssize_t length;

	prepare();
	if (strcmp(how, "many") == 0) {
		int count = recvmmsg(fd, messages, MANY, MSG_WAITFORONE, NULL);

		need(count, "recvmmsg");
		return count;
	}
	length = recvmsg(fd, &messages[0].msg_hdr, 0);
	if (length < 0 && errno == EAGAIN && strcmp(how, "nonblocking") == 0) {
		need(poll(&ready, 1, -1), "poll");
		return 0;
	}
	need(length, "recvmsg");
	messages[0].msg_len = length;
	return 1;
}

int main(int argc, char **argv)
{
	int fd, on = 1, left;

	arguments(4, argc, "udp_origins HOW LOCAL_IP LOCAL_PORT COUNT");
	fd = bound_socket(SOCK_DGRAM, address(argv[2], argv[3]));
	need(setsockopt(fd, SOL_IP, IP_RECVORIGADDRS, &on, sizeof on), "RECVORIGADDRS");
	if (strcmp(argv[1], "nonblocking") == 0)
		need(fcntl(fd, F_SETFL, O_NONBLOCK), "fcntl");
	print_local(fd);
	for (left = atoi(argv[4]); left > 0;) {
		int count = receive(fd, argv[1]);

		for (int i = 0; i < count; i++)
			tell(fd, i);
		left -= count;
	}
	return 0;
}
