/* COUNT calls one after another; prints how many failed and with what the last one failed. */
#include "tproxy.h"

int main(int argc, char **argv)
{
	struct in_tproxy t = {.op = TPROXY_FLAGS, .v.flags = ITP_CONNECT};
	int fd = socket(AF_INET, SOCK_STREAM, 0), failed = 0, last = 0;

	arguments(1, argc, "flood COUNT");
	for (int i = atoi(argv[1]); i; i--)
		if (tproxy_set(fd, &t) < 0) {
			failed++;
			last = errno;
		}
	printf("failed %d %s\n", failed, last ? strerrorname_np(last) : "-");
	return 0;
}
