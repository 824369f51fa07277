/* The name of a foreign-bound socket: ASSIGN with port 0, then ALLOC, then QUERY; and UNASSIGN, after which it has none. */
#include "tproxy.h"

static int query(int fd, struct in_tproxy *t)
{
	socklen_t length = sizeof *t;

	memset(t, 0, sizeof *t);
	t->op = TPROXY_QUERY;
	return getsockopt(fd, SOL_IP, IP_TPROXY, t, &length);
}

int main(int argc, char **argv)
{
	struct in_tproxy t;
	int fd;

	arguments(2, argc, "foreign_name LOCAL_IP FOREIGN_IP");
	fd = bound_socket(SOCK_STREAM, address(argv[1], "0"));
	set_address(fd, TPROXY_ASSIGN, address(argv[2], "0"), "ASSIGN");
	need(query(fd, &t), "QUERY");
	print_address("assigned", t.v.addr.faddr, t.v.addr.fport);

	t = (struct in_tproxy){.op = TPROXY_ALLOC};
	need(tproxy_set(fd, &t), "ALLOC");
	need(query(fd, &t), "QUERY");
	print_address("allocated", t.v.addr.faddr, t.v.addr.fport);

	t = (struct in_tproxy){.op = TPROXY_UNASSIGN};
	need(tproxy_set(fd, &t), "UNASSIGN");
	printf("unassigned %s\n", query(fd, &t) < 0 ? strerrorname_np(errno) : "still there");
	return 0;
}
