/*
 * recvmsg and recvmmsg in all ways, on a UDP socket with IP_RECVORIGADDRS that is connected to itself; one line each: its
 * name, the result, the flags that came back, and the control messages: 'o' original addresses, 'p' IP_PKTINFO.
 */
#include "tproxy.h"

#include "alarm.h"
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>

static char first[4], second[100], control[256];
static struct sockaddr_in name;

static struct msghdr message(void)
{
	static struct iovec vectors[] = {{first, sizeof first}, {second, sizeof second}};

	memset(first, 0, sizeof first);
	memset(second, 0, sizeof second);
	return (struct msghdr){
		.msg_name = &name, .msg_namelen = sizeof name, .msg_iov = vectors, .msg_iovlen = 2,
		.msg_control = control, .msg_controllen = sizeof control,
	};
}

static void report(const char *what, ssize_t result, struct msghdr *m)
{
	struct cmsghdr *c;

	printf("%s ", what);
	if (result < 0) {
		printf("%s\n", strerrorname_np(errno));
		return;
	}
	printf("%zd flags %#x data %.4s|%s controls ", result, m->msg_flags, first, second);
	for (c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
		struct in_origaddrs *o = (struct in_origaddrs *)CMSG_DATA(c);

		if (c->cmsg_level == SOL_IP && c->cmsg_type == IP_PKTINFO)
			printf("p");
		else if (c->cmsg_level == SOL_IP && c->cmsg_type == IP_RECVORIGADDRS && c->cmsg_len < CMSG_LEN(sizeof *o))
			printf("o(cut)");
		else if (c->cmsg_level == SOL_IP && c->cmsg_type == IP_RECVORIGADDRS)
			printf("o(%s:%u)", inet_ntoa(o->destination), ntohs(o->destination_port));
		else
			printf("?");
	}
	printf("\n");
}

static int self_connected(void)
{
	int fd = bound_socket(SOCK_DGRAM, address("127.0.0.1", "0"));
	struct sockaddr_in self;
	socklen_t length = sizeof self;

	need(getsockname(fd, (struct sockaddr *)&self, &length), "getsockname");
	need(connect(fd, (struct sockaddr *)&self, sizeof self), "connect");
	return fd;
}

static void set(int fd, int option, int value, const char *step)
{
	need(setsockopt(fd, SOL_IP, option, &value, sizeof value), step);
}

static void say(int fd, const char *text)
{
	need(send(fd, text, strlen(text), 0), "send");
}

static void one(const char *what, int fd, int flags)
{
	struct msghdr m = message();
	ssize_t result = recvmsg(fd, &m, flags);

	report(what, result, &m);
}

static void *say_later(void *fd)
{
	usleep(20000);
	set(*(int *)fd, IP_RECVORIGADDRS, 1, "RECVORIGADDRS"); /* the call that waits is in nobody's way */
	say(*(int *)fd, "late");
	return NULL;
}

static void interrupted(int number)
{
	(void)number;
}

static void plain(int fd)
{
	int on = 0;
	socklen_t length = sizeof on;

	need(getsockopt(fd, SOL_IP, IP_RECVORIGADDRS, &on, &length), "RECVORIGADDRS");
	printf("is-on %d\n", on);
	say(fd, "abcdefgh");
	one("peek", fd, MSG_PEEK);
	one("take", fd, 0);
	printf("name %s\n", inet_ntoa(name.sin_addr));
	one("nothing-nonblocking", fd, MSG_DONTWAIT);
	say(fd, "");
	one("empty", fd, 0);
	set(fd, IP_PKTINFO, 1, "PKTINFO");
	say(fd, "abcd");
	one("with-pktinfo", fd, 0);
	set(fd, IP_PKTINFO, 0, "PKTINFO");
}

static void limits(int fd)
{
	struct msghdr m = message();

	say(fd, "abcdefgh");
	m.msg_iovlen = 1;
	report("truncated", recvmsg(fd, &m, 0), &m);
	say(fd, "abcdefgh");
	m = message();
	m.msg_iovlen = 1;
	report("truncated-true-length", recvmsg(fd, &m, MSG_TRUNC), &m);
	say(fd, "abcd");
	m = message();
	m.msg_controllen = CMSG_SPACE(0);
	report("little-control", recvmsg(fd, &m, 0), &m);
	say(fd, "abcd");
	m = message();
	m.msg_name = NULL;
	m.msg_control = NULL;
	m.msg_controllen = 0;
	report("no-name-no-control", recvmsg(fd, &m, 0), &m);
	say(fd, "abcd");
	m = message();
	m.msg_iovlen = 2000;
	report("many-vectors", recvmsg(fd, &m, 0), &m);
	m = message();
	m.msg_iov = (struct iovec *)8;
	report("bad-vectors", recvmsg(fd, &m, 0), &m);
	report("bad-message", recvmsg(fd, (struct msghdr *)8, 0), &m);
	one("still-there", fd, 0);
	say(fd, "abcd");
	m = message();
	m.msg_name = (void *)8;
	report("bad-name", recvmsg(fd, &m, 0), &m);
	report("closed", recvmsg(99, &m, 0), &m);
	report("file", recvmsg(1, &m, 0), &m);
}

static void waiting(int fd)
{
	struct timeval limit = {.tv_usec = 30000}, none = {0};
	struct sigaction action = {.sa_handler = interrupted};
	pthread_t thread;

	pthread_create(&thread, NULL, say_later, &fd);
	one("wait", fd, 0);
	pthread_join(thread, NULL);
	need(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit), "RCVTIMEO");
	one("time-limit", fd, 0);
	need(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &none, sizeof none), "RCVTIMEO");
	need(fcntl(fd, F_SETFL, O_NONBLOCK), "fcntl");
	one("nonblocking-socket", fd, 0);
	need(fcntl(fd, F_SETFL, 0), "fcntl");
	sigaction(SIGALRM, &action, NULL);
	alarm_every(20000);
	one("signal", fd, 0);
	alarm_every(0);
	say(fd, "abcd");
	one("after-signal", fd, 0);
	action.sa_flags = SA_RESTART;
	sigaction(SIGALRM, &action, NULL);
	alarm_every(20000);
	pthread_create(&thread, NULL, say_later, &fd);
	one("restarted", fd, 0);
	alarm_every(0);
	pthread_join(thread, NULL);
}

/* A socket whose recvmsg a signal ended is closed by its close. */
static void let_go(void)
{
	struct sigaction action = {.sa_handler = interrupted};
	struct sockaddr_in self = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t length = sizeof self;
	int fd = socket(AF_INET, SOCK_DGRAM, 0), tries = 10000;

	need(bind(fd, (struct sockaddr *)&self, sizeof self), "bind");
	need(getsockname(fd, (struct sockaddr *)&self, &length), "getsockname");
	set(fd, IP_RECVORIGADDRS, 1, "RECVORIGADDRS");
	sigaction(SIGALRM, &action, NULL);
	alarm_every(20000);
	one("signal-then-close", fd, 0);
	alarm_every(0);
	close(fd);
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	while (bind(fd, (struct sockaddr *)&self, sizeof self) < 0 && --tries)
		usleep(1000);
	printf("port is %s\n", tries ? "free" : "taken");
}

/* Messages for recvmmsg; each has its own buffer, and the second one may lie where nothing is. */
static void many_with(const char *what, int fd, int sent, unsigned room, struct msghdr second_message)
{
	static char data[3][4];
	struct iovec vectors[3];
	struct mmsghdr m[3] = {{.msg_hdr = message()}, {.msg_hdr = second_message}, {.msg_hdr = message()}};
	int result;

	for (int i = 0; i < 3; i++) {
		vectors[i] = (struct iovec){data[i], sizeof data[i]};
		m[i].msg_hdr.msg_iov = &vectors[i];
		m[i].msg_hdr.msg_iovlen = 1;
	}
	while (sent--)
		say(fd, "abcd");
	result = recvmmsg(fd, m, room, MSG_WAITFORONE, NULL);
	printf("%s %d lengths", what, result);
	for (int i = 0; i < result; i++)
		printf(" %u", m[i].msg_len);
	printf("\n");
	report(what, result, &m[0].msg_hdr);
}

static void many(int fd)
{
	struct msghdr bad = message();
	struct mmsghdr m = {.msg_hdr = message()};
	int left_behind;
	socklen_t length = sizeof left_behind;

	bad.msg_name = (void *)8;
	many_with("many-one", fd, 1, 3, message());
	many_with("many-two", fd, 2, 3, message());
	many_with("many-more-than-room", fd, 3, 2, message());
	many_with("many-rest", fd, 0, 1, message());
	many_with("many-no-room", fd, 0, 0, message());
	report("many-none", recvmmsg(fd, &m, 1, MSG_DONTWAIT, NULL), &m.msg_hdr);
	many_with("many-second-bad", fd, 2, 3, bad);
	getsockopt(fd, SOL_SOCKET, SO_ERROR, &left_behind, &length); /* what the kernel's recvmmsg leaves for the next call */
}

int main(void)
{
	int fd = self_connected(), other = self_connected();

	set(fd, IP_RECVORIGADDRS, 1, "RECVORIGADDRS");
	plain(fd);
	limits(fd);
	waiting(fd);
	let_go();
	many(fd);
	say(other, "abcd");
	one("other-socket", other, 0);
	set(fd, IP_RECVORIGADDRS, 0, "RECVORIGADDRS");
	say(fd, "abcd");
	one("switched-off", fd, 0);
	set(fd, IP_RECVORIGADDRS, 1, "RECVORIGADDRS");
	need(shutdown(fd, SHUT_RD), "shutdown");
	one("shut-down", fd, 0);
	return 0;
}
