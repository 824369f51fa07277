/* The socket API of tproxy (tproxy.md section 4), as a program of its time would declare it. */
#ifndef TPROXY_H
#define TPROXY_H

#define _GNU_SOURCE /* so this header comes before the system's */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define IP_TPROXY 11274
#ifndef IP_RECVORIGADDRS /* a test puts an option that the kernel has in its place */
#define IP_RECVORIGADDRS 11273
#endif

enum tproxy_op { TPROXY_VERSION, TPROXY_ASSIGN, TPROXY_UNASSIGN, TPROXY_QUERY, TPROXY_FLAGS, TPROXY_ALLOC, TPROXY_CONNECT };

#define ITP_CONNECT 0x00000001
#define ITP_LISTEN 0x00000002
#define ITP_ESTABLISHED 0x00000004
#define ITP_ONCE 0x00010000
#define ITP_UNIDIR 0x00080000

struct in_tproxy {
	uint32_t op;
	union {
		uint32_t version;
		struct {
			struct in_addr faddr;
			uint16_t fport;
		} addr;
		uint32_t flags;
	} v;
};

struct in_origaddrs {
	struct in_addr source;
	struct in_addr destination;
	uint16_t source_port;
	uint16_t destination_port;
};

/* A step that failed is named on stdout with its errno, and ends the program. */
static inline void need(int result, const char *step)
{
	if (result >= 0)
		return;
	printf("%s: %s\n", step, strerrorname_np(errno));
	exit(1);
}

static inline struct sockaddr_in address(const char *ip, const char *port)
{
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};

	if (inet_pton(AF_INET, ip, &a.sin_addr) != 1) {
		fprintf(stderr, "no IPv4 address: %s\n", ip);
		exit(2);
	}
	return a;
}

static inline void print_address(const char *name, struct in_addr ip, uint16_t port)
{
	printf("%s %s:%u\n", name, inet_ntoa(ip), ntohs(port));
	fflush(stdout);
}

static inline int bound_socket(int type, struct sockaddr_in local)
{
	int fd = socket(AF_INET, type, 0), on = 1;

	need(fd, "socket");
	need(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on), "SO_REUSEADDR");
	need(bind(fd, (struct sockaddr *)&local, sizeof local), "bind");
	return fd;
}

static inline void print_local(int fd)
{
	struct sockaddr_in a;
	socklen_t length = sizeof a;

	need(getsockname(fd, (struct sockaddr *)&a, &length), "getsockname");
	print_address("local", a.sin_addr, a.sin_port);
}

static inline int tproxy_set(int fd, struct in_tproxy *argument)
{
	return setsockopt(fd, SOL_IP, IP_TPROXY, argument, sizeof *argument);
}

static inline void set_address(int fd, enum tproxy_op op, struct sockaddr_in foreign, const char *step)
{
	struct in_tproxy t = {.op = op};

	t.v.addr.faddr = foreign.sin_addr;
	t.v.addr.fport = foreign.sin_port;
	need(tproxy_set(fd, &t), step);
}

static inline void set_flags(int fd, uint32_t flags)
{
	struct in_tproxy t = {.op = TPROXY_FLAGS, .v.flags = flags};

	need(tproxy_set(fd, &t), "FLAGS");
}

/* Connect, say hello, print the answer. */
static inline void talk(int fd, struct sockaddr_in server)
{
	char answer[1500];
	ssize_t length;

	need(connect(fd, (struct sockaddr *)&server, sizeof server), "connect");
	need(send(fd, "hello\n", 6, 0), "send");
	length = recv(fd, answer, sizeof answer, 0);
	need(length, "recv");
	printf("answer %.*s", (int)length, answer);
}

/* Give back what comes until the peer ends. */
static inline void echo(int fd)
{
	char data[65536];
	ssize_t length;

	while ((length = read(fd, data, sizeof data)) > 0)
		need(write(fd, data, length), "write");
	need(length, "read");
}

/* A datagram, its source as the socket sees it, and its original addresses; the program ends if they are not told. */
static inline ssize_t receive_original(int fd, void *data, size_t size, struct sockaddr_in *peer,
				       struct in_origaddrs *original)
{
	union {
		char bytes[CMSG_SPACE(sizeof *original)];
		struct cmsghdr align;
	} control;
	struct iovec where = {.iov_base = data, .iov_len = size};
	struct msghdr message = {
		.msg_name = peer, .msg_namelen = sizeof *peer, .msg_iov = &where, .msg_iovlen = 1,
		.msg_control = &control, .msg_controllen = sizeof control,
	};
	ssize_t length = recvmsg(fd, &message, 0);
	struct cmsghdr *c;

	need(length, "recvmsg");
	for (c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
		if (c->cmsg_level == SOL_IP && c->cmsg_type == IP_RECVORIGADDRS) {
			memcpy(original, CMSG_DATA(c), sizeof *original);
			return length;
		}
	printf("no original addresses\n");
	exit(1);
}

static inline void arguments(int wanted, int argc, const char *usage)
{
	if (argc == wanted + 1)
		return;
	fprintf(stderr, "usage: %s\n", usage);
	exit(2);
}

#endif
