/* A thread whose descriptors are its own (unshare), in a process whose first thread has ended. */
#include "tproxy.h"

#include <pthread.h>
#include <sched.h>

static void *thread(void *main_thread)
{
	struct in_tproxy t = {.op = TPROXY_FLAGS, .v.flags = ITP_LISTEN};

	pthread_join(*(pthread_t *)main_thread, NULL);
	need(unshare(CLONE_FILES), "unshare");
	need(tproxy_set(socket(AF_INET, SOCK_STREAM, 0), &t), "FLAGS");
	printf("done\n");
	exit(0);
}

int main(void)
{
	static pthread_t self, other;

	self = pthread_self();
	pthread_create(&other, NULL, thread, &self);
	pthread_exit(NULL);
}
