/*
 * What one system call costs: CALL COUNT; makes COUNT calls in ten parts and prints the nanoseconds of one call in the
 * quickest part. IP_TPROXY's argument is a QUERY.
 */
#include "tproxy.h"

#include <sys/syscall.h>
#include <time.h>

enum { PARTS = 10 };

static int fd;

static int do_getppid(void)
{
	return syscall(SYS_getppid) < 0;
}

static int do_send(void)
{
	return send(fd, "x", 1, MSG_DONTWAIT) < 0;
}

static int do_getsockopt(void)
{
	int value;
	socklen_t length = sizeof value;

	return getsockopt(fd, SOL_IP, IP_TTL, &value, &length);
}

static int do_setsockopt(void)
{
	int value = 64;

	return setsockopt(fd, SOL_IP, IP_TTL, &value, sizeof value);
}

static int do_tproxy_set(void)
{
	struct in_tproxy t = {.op = TPROXY_QUERY};

	return tproxy_set(fd, &t);
}

static int do_tproxy_get(void)
{
	struct in_tproxy t = {.op = TPROXY_QUERY};
	socklen_t length = sizeof t;

	return getsockopt(fd, SOL_IP, IP_TPROXY, &t, &length);
}

static const struct {
	const char *name;
	int (*make)(void);
} calls[] = {
	{"getppid", do_getppid},	   {"send", do_send},
	{"getsockopt", do_getsockopt},	   {"setsockopt", do_setsockopt},
	{"tproxy-set", do_tproxy_set}, {"tproxy-get", do_tproxy_get},
};

static double nanoseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e9 + now.tv_nsec;
}

static double measure(int (*make)(void), int count)
{
	double best = 1e18;

	for (int part = 0; part < PARTS; part++) {
		double begin = nanoseconds(), cost;

		for (int i = 0; i < count / PARTS; i++)
			need(make() ? -1 : 0, "the call");
		cost = (nanoseconds() - begin) / (count / PARTS);
		if (cost < best)
			best = cost;
	}
	return best;
}

int main(int argc, char **argv)
{
	struct sockaddr_in self;
	socklen_t length = sizeof self;

	arguments(2, argc, "syscall_cost CALL COUNT");
	fd = bound_socket(SOCK_DGRAM, address("127.0.0.1", "0"));
	need(getsockname(fd, (struct sockaddr *)&self, &length), "getsockname");
	need(connect(fd, (struct sockaddr *)&self, sizeof self), "connect");
	for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
		if (strcmp(argv[1], calls[i].name) == 0) {
			printf("%.1f\n", measure(calls[i].make, atoi(argv[2])));
			return 0;
		}
	fprintf(stderr, "no such call: %s\n", argv[1]);
	return 2;
}
