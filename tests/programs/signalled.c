/*
 * A timer's signal comes again and again while calls are under way (its handler installed as signal(3) does, so that
 * calls are restarted); prints, after ALARMS of them, how many calls were made and how many failed.
 */
#include "tproxy.h"

#include <signal.h>
#include <sys/time.h>

static volatile sig_atomic_t alarms;

static void count(int number)
{
	(void)number;
	alarms++;
}

int main(int argc, char **argv)
{
	struct in_tproxy t = {.op = TPROXY_FLAGS, .v.flags = ITP_CONNECT};
	struct sigaction action = {.sa_handler = count, .sa_flags = SA_RESTART};
	struct itimerval every = {.it_interval.tv_usec = 500, .it_value.tv_usec = 500};
	int fd = socket(AF_INET, SOCK_STREAM, 0), calls = 0, failed = 0;

	arguments(1, argc, "signalled ALARMS");
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &every, NULL);
	for (; alarms < atoi(argv[1]); calls++)
		failed += tproxy_set(fd, &t) < 0;
	printf("calls %d failed %d\n", calls, failed);
	return 0;
}
