/*
 * UDP datagrams at a steady rate.
 *
 *   datagrams ADDRESS PORT BYTES RATE SECONDS   BYTES of payload each, RATE of them a second; prints how many
 *                                               were sent, and the seconds that took
 *
 * A burst every half millisecond; what a busy machine delays is made up for.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

#define BURST 256

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	static char payload[65536];
	static struct mmsghdr messages[BURST];
	struct timespec pause = { .tv_nsec = 500000 };
	struct sockaddr_in to = { .sin_family = AF_INET };
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	if (argc != 6 || inet_pton(AF_INET, argv[1], &to.sin_addr) != 1)
		errx(2, "usage: datagrams ADDRESS PORT BYTES RATE SECONDS");
	to.sin_port = htons(atoi(argv[2]));
	if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof(to)) < 0)
		err(1, "connect");

	struct iovec part = { .iov_base = payload, .iov_len = atoi(argv[3]) };
	double rate = atof(argv[4]), begin = seconds();
	long long sent = 0, total = rate * atof(argv[5]);

	for (int i = 0; i < BURST; i++)
		messages[i].msg_hdr = (struct msghdr){ .msg_iov = &part, .msg_iovlen = 1 };
	while (sent < total) {
		long long due = (seconds() - begin) * rate + 1;

		if (due > total)
			due = total;
		while (sent < due) {
			int count = sendmmsg(fd, messages, due - sent < BURST ? due - sent : BURST, 0);

			if (count < 0)
				err(1, "send");
			sent += count;
		}
		nanosleep(&pause, NULL);
	}
	printf("%lld %f\n", sent, seconds() - begin);
	return 0;
}
