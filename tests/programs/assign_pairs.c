/*
 * How fast sockets are assigned: FADDR COUNT; makes COUNT pairs of ASSIGN and UNASSIGN with one socket, each with
 * another foreign port, and prints the pairs a second.
 */
#include "tproxy.h"

#include <time.h>

enum { FIRST_PORT = 1024, PORTS = 60000 };

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	struct in_tproxy off = {.op = TPROXY_UNASSIGN};
	struct sockaddr_in foreign;
	double begin;
	int fd, count;

	arguments(2, argc, "assign_pairs FADDR COUNT");
	foreign = address(argv[1], "0");
	count = atoi(argv[2]);
	fd = bound_socket(SOCK_DGRAM, address("127.0.0.1", "0"));
	begin = seconds();
	for (int i = 0; i < count; i++) {
		foreign.sin_port = htons(FIRST_PORT + i % PORTS);
		set_address(fd, TPROXY_ASSIGN, foreign, "ASSIGN");
		need(tproxy_set(fd, &off), "UNASSIGN");
	}
	printf("%.1f\n", count / (seconds() - begin));
	return 0;
}
