/* Threads and children that all call at once; prints how many calls failed. */
#include "tproxy.h"

#include <pthread.h>
#include <sys/wait.h>

enum { THREADS = 8, CHILDREN = 8, CALLS = 50 };

static int calls(void)
{
	struct in_tproxy t = {.op = TPROXY_FLAGS, .v.flags = ITP_LISTEN};
	int fd = socket(AF_INET, SOCK_STREAM, 0), failed = 0;

	for (int i = 0; i < CALLS; i++)
		failed += tproxy_set(fd, &t) != 0;
	close(fd);
	return failed;
}

static void *thread(void *failed)
{
	*(int *)failed = calls();
	return NULL;
}

int main(void)
{
	pthread_t threads[THREADS];
	int failed[THREADS], sum = 0, status;

	for (int i = 0; i < THREADS; i++)
		pthread_create(&threads[i], NULL, thread, &failed[i]);
	for (int i = 0; i < CHILDREN; i++)
		if (fork() == 0)
			_exit(calls());
	for (int i = 0; i < THREADS; i++) {
		pthread_join(threads[i], NULL);
		sum += failed[i];
	}
	while (wait(&status) > 0)
		sum += WEXITSTATUS(status);
	printf("failed %d of %d\n", sum, (THREADS + CHILDREN) * CALLS);
	return 0;
}
