/*
 * New TCP connections as fast as they come, by several processes.
 *
 *   connections serve PORT PROCESSES FD            accepts and closes; a newline to FD when all of them listen
 *   connections open ADDRESS PORT PROCESSES SECONDS  opens and closes; prints the connections a second
 *
 * Who opened a connection closes it, with a reset: nothing stays behind that would use up the ports. The other end lets
 * go of it a while later.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

static int tcp_socket(void)
{
	struct linger reset = {.l_onoff = 1, .l_linger = 0};
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)) < 0)
		err(1, "socket");
	return fd;
}

static int listener(struct sockaddr_in to)
{
	int on = 1, fd = tcp_socket();

	if (setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on)) < 0 ||
	    bind(fd, (struct sockaddr *)&to, sizeof(to)) < 0 || listen(fd, 4096) < 0)
		err(1, "listen");
	return fd;
}

enum { HELD = 800 }; /* of 1024 descriptors: who opened them may have to wait for a processor */

static void accept_all(int listening)
{
	int held[HELD];

	memset(held, -1, sizeof(held));
	for (unsigned i = 0;; i++) {
		close(held[i % HELD]);
		held[i % HELD] = accept(listening, NULL, NULL); /* one that was reset meanwhile is none */
	}
}

/* Each process has a listening socket of its own. */
static int serve(struct sockaddr_in to, int processes, int notify)
{
	for (int i = 0; i < processes; i++) {
		int fd = listener(to);

		if (fork() == 0)
			accept_all(fd);
		close(fd);
	}
	if (write(notify, "\n", 1) != 1)
		err(1, "notify");
	close(notify);
	while (wait(NULL) > 0)
		;
	return 0;
}

static long open_until(struct sockaddr_in to, double end)
{
	long count;

	for (count = 0; seconds() < end; count++) {
		int fd = tcp_socket();

		if (connect(fd, (struct sockaddr *)&to, sizeof(to)) < 0)
			err(1, "connection %ld", count);
		close(fd);
	}
	return count;
}

static int open_many(struct sockaddr_in to, int processes, double duration)
{
	int counts[2], status, failed = 0;
	long count, total = 0;
	double begin = seconds();

	if (pipe(counts) < 0)
		err(1, "pipe");
	for (int i = 0; i < processes; i++)
		if (fork() == 0) {
			count = open_until(to, begin + duration);
			_exit(write(counts[1], &count, sizeof(count)) != sizeof(count));
		}
	while (wait(&status) > 0)
		failed |= status;
	if (failed)
		errx(1, "a process failed");
	duration = seconds() - begin;
	for (int i = 0; i < processes; i++) {
		if (read(counts[0], &count, sizeof(count)) != sizeof(count))
			err(1, "count");
		total += count;
	}
	printf("%ld %.6f\n", total, duration);
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET};

	if (argc == 5 && !strcmp(argv[1], "serve")) {
		to.sin_port = htons(atoi(argv[2]));
		return serve(to, atoi(argv[3]), atoi(argv[4]));
	}
	if (argc == 6 && !strcmp(argv[1], "open") && inet_aton(argv[2], &to.sin_addr)) {
		to.sin_port = htons(atoi(argv[3]));
		return open_many(to, atoi(argv[4]), atof(argv[5]));
	}
	errx(2, "usage: connections serve PORT PROCESSES FD | connections open ADDRESS PORT PROCESSES SECONDS");
}
