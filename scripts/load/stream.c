/*
 * One TCP connection, as full as it gets.
 *
 *   stream serve PORT FD              reads all that comes, one connection after another; a newline to FD when it listens
 *   stream send ADDRESS PORT SECONDS  prints the bytes sent and the seconds until the other end had read them all
 */
#include <arpa/inet.h>
#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static char buffer[256 << 10];

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

static int serve(struct sockaddr_in to, int notify)
{
	int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);

	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) < 0 ||
	    bind(fd, (struct sockaddr *)&to, sizeof(to)) < 0 || listen(fd, 16) < 0)
		err(1, "listen");
	if (write(notify, "\n", 1) != 1)
		err(1, "notify");
	close(notify);
	for (;;) {
		int stream = accept(fd, NULL, NULL);

		while (read(stream, buffer, sizeof(buffer)) > 0)
			;
		close(stream);
	}
}

static int send_for(struct sockaddr_in to, double duration)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	double begin = seconds();
	long long sent = 0;

	if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof(to)) < 0)
		err(1, "connect");
	while (seconds() - begin < duration) {
		ssize_t count = write(fd, buffer, sizeof(buffer));

		if (count < 0)
			err(1, "write");
		sent += count;
	}
	if (shutdown(fd, SHUT_WR) < 0 || read(fd, buffer, 1) != 0)
		err(1, "end");
	printf("%lld %.6f\n", sent, seconds() - begin);
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET};

	if (argc == 4 && !strcmp(argv[1], "serve")) {
		to.sin_port = htons(atoi(argv[2]));
		return serve(to, atoi(argv[3]));
	}
	if (argc == 5 && !strcmp(argv[1], "send") && inet_aton(argv[2], &to.sin_addr)) {
		to.sin_port = htons(atoi(argv[3]));
		return send_for(to, atof(argv[4]));
	}
	errx(2, "usage: stream serve PORT FD | stream send ADDRESS PORT SECONDS");
}
