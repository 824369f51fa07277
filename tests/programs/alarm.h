/* SIGALRM again and again: a program that loses the processor may not wait yet when the first one comes. */
#ifndef ALARM_H
#define ALARM_H

#include <sys/time.h>

static void alarm_every(int microseconds)
{
	struct itimerval every = {.it_value.tv_usec = microseconds, .it_interval.tv_usec = microseconds};

	setitimer(ITIMER_REAL, &every, NULL);
}

#endif
