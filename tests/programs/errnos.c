/*
 * Each way in which IP_TPROXY succeeds or fails, each on fresh sockets: PROTOCOL (tcp, udp); one line each, its name and the
 * result. Every case has local and foreign ports of its own. Needs an engine whose local ports are FIRST_PORT to LAST_PORT.
 */
#include "tproxy.h"

#include <linux/capability.h>
#include <sys/syscall.h>

enum { FIRST_PORT = 40000, LAST_PORT = 40003, SHORT = 9, TOO_SHORT = 7, IPV6 = 24, UNKNOWN_OP = 99 };

#define LOCAL "127.0.0.1"
#define FOREIGN "198.51.100.7"
#define CROWDED "198.51.100.8" /* of whose ports none is free */

static int type;
static const char *nobody = "0.0.0.0";

static int another_port(void)
{
	static int last = 5000;

	return ++last;
}

static struct sockaddr_in at(const char *ip, int port)
{
	char text[8];

	snprintf(text, sizeof text, "%d", port);
	return address(ip, text);
}

static int fresh_at(struct sockaddr_in local)
{
	int fd = socket(AF_INET, type, 0);

	need(fd, "socket");
	need(bind(fd, (struct sockaddr *)&local, sizeof local), "bind");
	return fd;
}

static int fresh(void)
{
	return fresh_at(at(LOCAL, another_port()));
}

static int set(int fd, uint32_t op, uint32_t value)
{
	struct in_tproxy t = {.op = op, .v.flags = value};

	return tproxy_set(fd, &t);
}

static int set_to(int fd, uint32_t op, const char *ip, int port, socklen_t length)
{
	struct sockaddr_in foreign = at(ip, port);
	struct {
		struct in_tproxy t;
		char rest[IPV6 - sizeof(struct in_tproxy)];
	} argument = {.t.op = op, .rest = {1}};

	argument.t.v.addr.faddr = foreign.sin_addr;
	argument.t.v.addr.fport = foreign.sin_port;
	return setsockopt(fd, SOL_IP, IP_TPROXY, &argument, length);
}

static int get(int fd, uint32_t op, struct in_tproxy *t, socklen_t length)
{
	*t = (struct in_tproxy){.op = op};
	return getsockopt(fd, SOL_IP, IP_TPROXY, t, &length);
}

static int assign(int fd, const char *ip, int port)
{
	return set_to(fd, TPROXY_ASSIGN, ip, port, sizeof(struct in_tproxy));
}

static int narrow(int fd)
{
	return set_to(fd, TPROXY_CONNECT, FOREIGN, 9, sizeof(struct in_tproxy));
}

static int assigned(void)
{
	int fd = fresh();

	need(assign(fd, FOREIGN, another_port()), "ASSIGN");
	return fd;
}

static int assigned_without_port(const char *ip)
{
	int fd = fresh();

	need(assign(fd, ip, 0), "ASSIGN");
	return fd;
}

static int mark_only(void)
{
	int fd = fresh();

	need(assign(fd, nobody, 0), "ASSIGN");
	return fd;
}

/* The second of two sockets with one foreign address, or -1 when it may not have it. */
static int sharing(int on)
{
	int port = another_port(), first = fresh(), second = fresh();

	need(assign(first, FOREIGN, port), "ASSIGN");
	need(setsockopt(second, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on), "SO_REUSEADDR");
	return assign(second, FOREIGN, port) < 0 ? -1 : second;
}

static int assign_foreign_or_nobody(int fd, const char *ip)
{
	return assign(fd, ip, ip == nobody ? 0 : another_port());
}

static int two_at_one_local_address(const char *first_foreign, const char *second_foreign)
{
	struct sockaddr_in local = at(LOCAL, another_port());
	int first = bound_socket(type, local), second = bound_socket(type, local);

	need(assign_foreign_or_nobody(first, first_foreign), "ASSIGN");
	return assign_foreign_or_nobody(second, second_foreign);
}

static int connected(void)
{
	struct sockaddr_in peer = at(LOCAL, another_port());
	int listener = fresh_at(peer), fd = fresh();

	if (type == SOCK_STREAM)
		need(listen(listener, 1), "listen");
	need(connect(fd, (struct sockaddr *)&peer, sizeof peer), "connect");
	return assign(fd, FOREIGN, another_port());
}

static int none_free(void)
{
	int fd = assigned_without_port(CROWDED);

	for (int port = FIRST_PORT; port <= LAST_PORT; port++)
		need(assign(fresh(), CROWDED, port), "ASSIGN");
	return set(fd, TPROXY_ALLOC, 0);
}

static int picked_port_is_told(void)
{
	struct in_tproxy t;
	int fd = assigned_without_port(FOREIGN);

	need(set(fd, TPROXY_ALLOC, 0), "ALLOC");
	need(get(fd, TPROXY_QUERY, &t, sizeof t), "QUERY");
	return ntohs(t.v.addr.fport) >= FIRST_PORT && ntohs(t.v.addr.fport) <= LAST_PORT ? 0 : -1;
}

static int version_is_told(void)
{
	struct in_tproxy t;

	need(get(fresh(), TPROXY_VERSION, &t, sizeof t), "VERSION");
	return t.v.version >> 16 == 2 << 8 ? 0 : -1;
}

static int flags_are_told(void)
{
	struct in_tproxy t;
	int fd = assigned();

	need(set(fd, TPROXY_FLAGS, ITP_CONNECT | ITP_ONCE), "FLAGS");
	need(get(fd, TPROXY_FLAGS, &t, sizeof t), "FLAGS");
	return t.v.flags == (ITP_CONNECT | ITP_ONCE) ? 0 : -1;
}

static int established_with_a_remote(void)
{
	int fd = assigned();

	need(narrow(fd), "CONNECT");
	return set(fd, TPROXY_FLAGS, ITP_ESTABLISHED);
}

static int assign_over_ipv6(void)
{
	int fd = socket(AF_INET6, type, 0);
	struct sockaddr_in6 local = {.sin6_family = AF_INET6, .sin6_port = htons(another_port()), .sin6_addr = IN6ADDR_LOOPBACK_INIT};

	need(bind(fd, (struct sockaddr *)&local, sizeof local), "bind IPv6");
	return assign(fd, FOREIGN, another_port());
}

static int unassigned_again(void)
{
	int fd = assigned();

	need(set(fd, TPROXY_UNASSIGN, 0), "UNASSIGN");
	return set(fd, TPROXY_UNASSIGN, 0);
}

static void give_up_net_admin(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct sets[2];

	need(syscall(SYS_capget, &header, sets), "capget");
	sets[0].effective &= ~(1u << CAP_NET_ADMIN);
	need(syscall(SYS_capset, &header, sets), "capset");
}

static void report(const char *name, int result)
{
	printf("%s: %s\n", name, result >= 0 ? "OK" : errno ? strerrorname_np(errno) : "wrong");
	errno = 0;
}

static void arguments_and_versions(void)
{
	struct in_tproxy t;

	report("set too short", set_to(fresh(), TPROXY_ASSIGN, FOREIGN, 1, TOO_SHORT));
	report("set unknown op", set(fresh(), UNKNOWN_OP, 0));
	report("set QUERY", set(assigned(), TPROXY_QUERY, 0));
	report("get too short", get(assigned(), TPROXY_QUERY, &t, TOO_SHORT));
	report("get unknown op", get(assigned(), UNKNOWN_OP, &t, sizeof t));
	report("get ASSIGN", get(assigned(), TPROXY_ASSIGN, &t, sizeof t));
	report("VERSION of ours", set(fresh(), TPROXY_VERSION, 2 << 24));
	report("VERSION of another major", set(fresh(), TPROXY_VERSION, 1 << 24));
	report("VERSION of a newer minor", set(fresh(), TPROXY_VERSION, 2 << 24 | 1 << 16));
	report("VERSION is told", version_is_told());
}

static void assigning(void)
{
	int fd;

	report("ASSIGN", assign(fresh(), FOREIGN, another_port()));
	report("ASSIGN without a foreign port", assign(fresh(), FOREIGN, 0));
	report("ASSIGN nobody", assign(fresh(), nobody, 0));
	report("ASSIGN cut short", set_to(fresh(), TPROXY_ASSIGN, FOREIGN, another_port(), SHORT));
	report("ASSIGN an IPv6 address", set_to(fresh(), TPROXY_ASSIGN, FOREIGN, another_port(), IPV6));
	report("ASSIGN an IPv4 address over IPv6", assign_over_ipv6());
	report("ASSIGN when connected", connected());
	report("ASSIGN when not bound", assign(socket(AF_INET, type, 0), FOREIGN, another_port()));
	report("ASSIGN when bound to any address", assign(fresh_at(at(nobody, another_port())), FOREIGN, another_port()));
	report("ASSIGN twice", assign(assigned(), FOREIGN, another_port()));
	report("ASSIGN nobody after another", assign(assigned(), nobody, 0));
	report("ASSIGN another after nobody", assign(mark_only(), FOREIGN, another_port()));
	report("ASSIGN at a taken local address", two_at_one_local_address(FOREIGN, FOREIGN));
	report("ASSIGN nobody at a taken local address", two_at_one_local_address(FOREIGN, nobody));
	report("ASSIGN nobody at an address of nobody's", two_at_one_local_address(nobody, nobody));
	report("ASSIGN a taken foreign address", sharing(0));
	fd = sharing(1);
	report("ASSIGN a taken foreign address with SO_REUSEADDR", fd);
	report("FLAGS=LISTEN on a connect-only entry", set(fd, TPROXY_FLAGS, ITP_LISTEN));
	report("FLAGS=CONNECT on a connect-only entry", set(fd, TPROXY_FLAGS, ITP_CONNECT));
}

static void using(void)
{
	struct in_tproxy t;

	report("UNASSIGN", set(assigned(), TPROXY_UNASSIGN, 0));
	report("UNASSIGN without", set(fresh(), TPROXY_UNASSIGN, 0));
	report("UNASSIGN twice", unassigned_again());
	report("QUERY", get(assigned(), TPROXY_QUERY, &t, sizeof t));
	report("QUERY without", get(fresh(), TPROXY_QUERY, &t, sizeof t));
	report("FLAGS are told", flags_are_told());
	report("get FLAGS without", get(fresh(), TPROXY_FLAGS, &t, sizeof t));
	report("FLAGS without", set(fresh(), TPROXY_FLAGS, ITP_CONNECT));
	report("FLAGS=LISTEN|UNIDIR without", set(fresh(), TPROXY_FLAGS, ITP_LISTEN | ITP_UNIDIR));
	report("FLAGS of no kind", set(assigned(), TPROXY_FLAGS, ITP_ONCE));
	report("FLAGS of two kinds", set(assigned(), TPROXY_FLAGS, ITP_CONNECT | ITP_LISTEN));
	report("FLAGS that nobody knows", set(assigned(), TPROXY_FLAGS, ITP_CONNECT | 0x100));
	report("FLAGS that are not for setting", set(assigned(), TPROXY_FLAGS, ITP_CONNECT | 0x40000));
	report("FLAGS=ESTABLISHED without a remote", set(assigned(), TPROXY_FLAGS, ITP_ESTABLISHED));
	report("FLAGS=ESTABLISHED", established_with_a_remote());
	report("FLAGS of a mark-only entry", set(mark_only(), TPROXY_FLAGS, ITP_LISTEN));
	report("ALLOC is told", picked_port_is_told());
	report("ALLOC without", set(fresh(), TPROXY_ALLOC, 0));
	report("ALLOC with a port", set(assigned(), TPROXY_ALLOC, 0));
	report("ALLOC when none is free", none_free());
	report("ALLOC of a mark-only entry", set(mark_only(), TPROXY_ALLOC, 0));
	report("CONNECT", narrow(assigned()));
	report("CONNECT without", narrow(fresh()));
	report("CONNECT cut short", set_to(assigned(), TPROXY_CONNECT, FOREIGN, 9, SHORT));
	report("CONNECT to an IPv6 address", set_to(assigned(), TPROXY_CONNECT, FOREIGN, 9, IPV6));
	report("CONNECT of a mark-only entry", narrow(mark_only()));
}

static void without_privilege(void)
{
	struct in_tproxy t;
	int fd = assigned_without_port(FOREIGN);

	give_up_net_admin();
	report("ASSIGN without privilege", assign(fresh(), FOREIGN, another_port()));
	report("ALLOC without privilege", set(fd, TPROXY_ALLOC, 0));
	report("CONNECT without privilege", narrow(fd));
	report("FLAGS without privilege", set(fd, TPROXY_FLAGS, ITP_CONNECT));
	report("QUERY without privilege", get(fd, TPROXY_QUERY, &t, sizeof t));
	report("UNASSIGN without privilege", set(fd, TPROXY_UNASSIGN, 0));
}

int main(int argc, char **argv)
{
	arguments(1, argc, "errnos PROTOCOL");
	type = strcmp(argv[1], "tcp") ? SOCK_DGRAM : SOCK_STREAM;
	errno = 0;
	arguments_and_versions();
	assigning();
	using();
	without_privilege();
	return 0;
}
