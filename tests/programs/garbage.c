/*
 * Garbage as the option's value: SEED COUNT; COUNT calls of setsockopt and getsockopt with IP_TPROXY, lengths of 0 to 40,
 * ops mostly known ones, on sockets of all kinds, closed descriptors and what is no socket. Prints how many calls ended
 * how, one line each. The numbers are always the same for one seed.
 */
#include "tproxy.h"

#include <fcntl.h>

enum { KINDS = 8, MOST = 40, ERRNOS = 200 };

static uint64_t state;

static uint32_t chance(void) /* splitmix64 */
{
	uint64_t z = state += 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

int main(int argc, char **argv)
{
	static unsigned ended[ERRNOS];
	int kinds[KINDS], count;

	arguments(2, argc, "garbage SEED COUNT");
	state = atoi(argv[1]);
	kinds[0] = socket(AF_INET, SOCK_STREAM, 0);
	kinds[1] = bound_socket(SOCK_STREAM, address("127.0.0.1", "0"));
	kinds[2] = bound_socket(SOCK_DGRAM, address("127.0.0.1", "0"));
	kinds[3] = socket(AF_INET6, SOCK_DGRAM, 0);
	kinds[4] = socket(AF_UNIX, SOCK_STREAM, 0);
	kinds[5] = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
	kinds[6] = open("/dev/null", O_RDWR);
	kinds[7] = 99;
	for (count = atoi(argv[2]); count > 0; count--) {
		unsigned char value[MOST];
		socklen_t length = chance() % (MOST + 1);
		int fd = kinds[chance() % KINDS], result;

		for (int i = 0; i < MOST; i++)
			value[i] = chance();
		if (chance() % 4)
			*(uint32_t *)value = chance() % 8;
		if (chance() % 2)
			result = setsockopt(fd, SOL_IP, IP_TPROXY, value, length);
		else
			result = getsockopt(fd, SOL_IP, IP_TPROXY, value, &length);
		ended[result < 0 ? errno % ERRNOS : 0]++;
	}
	for (int i = 0; i < ERRNOS; i++)
		if (ended[i])
			printf("%s %u\n", i ? strerrorname_np(i) : "OK", ended[i]);
	return 0;
}
