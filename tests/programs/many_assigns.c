/*
 * Threads and children that assign at once, each on sockets of its own: ASSIGN, FLAGS, QUERY, UNASSIGN or just close.
 * Prints how many steps failed.
 */
#include "tproxy.h"

#include <pthread.h>
#include <sys/wait.h>

enum { THREADS = 4, CHILDREN = 4, ROUNDS = 20 };

static const char *local_ip, *foreign_ip;

static int step_failures(int round)
{
	struct sockaddr_in foreign = address(foreign_ip, "0");
	struct in_tproxy t = {.op = TPROXY_ASSIGN, .v.addr.faddr = foreign.sin_addr};
	socklen_t length = sizeof t;
	int fd = bound_socket(SOCK_STREAM, address(local_ip, "0")), failed;

	failed = tproxy_set(fd, &t) != 0;
	t = (struct in_tproxy){.op = TPROXY_FLAGS, .v.flags = ITP_CONNECT};
	failed += tproxy_set(fd, &t) != 0;
	t = (struct in_tproxy){.op = TPROXY_QUERY};
	failed += getsockopt(fd, SOL_IP, IP_TPROXY, &t, &length) != 0 || t.v.addr.faddr.s_addr != foreign.sin_addr.s_addr;
	t = (struct in_tproxy){.op = TPROXY_UNASSIGN};
	if (round % 2)
		failed += tproxy_set(fd, &t) != 0;
	close(fd);
	return failed;
}

static int failures(void)
{
	int failed = 0;

	for (int round = 0; round < ROUNDS; round++)
		failed += step_failures(round);
	return failed;
}

static void *thread(void *failed)
{
	*(int *)failed = failures();
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	int failed[THREADS], sum = 0, status;

	arguments(2, argc, "many_assigns LOCAL_IP FOREIGN_IP");
	local_ip = argv[1];
	foreign_ip = argv[2];
	for (int i = 0; i < THREADS; i++)
		pthread_create(&threads[i], NULL, thread, &failed[i]);
	for (int i = 0; i < CHILDREN; i++)
		if (fork() == 0)
			_exit(failures());
	for (int i = 0; i < THREADS; i++) {
		pthread_join(threads[i], NULL);
		sum += failed[i];
	}
	while (wait(&status) > 0)
		sum += WIFEXITED(status) ? WEXITSTATUS(status) : 1;
	printf("failed %d\n", sum);
	return sum != 0;
}
