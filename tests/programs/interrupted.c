/*
 * Signals while recvmsg waits, on a UDP socket with IP_RECVORIGADDRS that is connected to itself; one line each: which
 * signal, and what recvmsg returned. A handler that "says" sends a datagram, so a call that is restarted finds it.
 * With an argument: say that it waits, wait for one datagram, and tell it (stopped and continued meanwhile from outside).
 */
#include "tproxy.h"

#include "alarm.h"
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>

enum { LATER = 20000, MUCH_LATER = 150000 }; /* microseconds */

static int fd;
static volatile int is_done; /* read from memory each time; a look too late is no harm */

static void quiet(int number)
{
	(void)number;
}

static void say(int number)
{
	(void)number;
	alarm_every(0);
	need(send(fd, "said", 4, 0), "send");
}

static void handle(void (*handler)(int), int flags)
{
	struct sigaction action = {.sa_handler = handler, .sa_flags = flags};

	need(sigaction(SIGALRM, &action, NULL), "sigaction");
}

static void limit_time(int seconds)
{
	struct timeval limit = {.tv_sec = seconds};

	need(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit), "RCVTIMEO");
}

static void block(int how)
{
	sigset_t alarm;

	sigemptyset(&alarm);
	sigaddset(&alarm, SIGALRM);
	pthread_sigmask(how, &alarm, NULL);
}

static void receive(const char *what)
{
	char data[10], control[100];
	struct iovec vector = {data, sizeof data};
	struct msghdr m = {
		.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control,
	};
	ssize_t length = recvmsg(fd, &m, 0);

	if (length < 0)
		printf("%s %s\n", what, errno == 512 ? "512!" : strerrorname_np(errno));
	else
		printf("%s %.*s %s\n", what, (int)length, data, m.msg_controllen ? "with-addresses" : "without");
	fflush(stdout);
}

/* A handler may be late, and say its word twice. */
static void drain(void)
{
	char data[10];

	while (recv(fd, data, sizeof data, MSG_DONTWAIT) >= 0)
		;
}

static void wait_for_alarm(const char *what)
{
	alarm_every(LATER);
	receive(what);
	alarm_every(0);
	drain();
}

static void *sleep_on(void *unused)
{
	block(SIG_BLOCK);
	pause();
	return unused;
}

static void *say_much_later(void *unused)
{
	block(SIG_BLOCK);
	usleep(MUCH_LATER);
	say(0);
	return unused;
}

/* Again and again: the thread may not wait yet. */
static void *signal_until_it_is_done(void *thread)
{
	block(SIG_BLOCK);
	for (usleep(LATER); !is_done; usleep(LATER))
		pthread_kill(*(pthread_t *)thread, SIGALRM);
	return NULL;
}

static void receive_signalled(const char *what)
{
	pthread_t self = pthread_self(), thread;

	is_done = 0;
	pthread_create(&thread, NULL, signal_until_it_is_done, &self);
	receive(what);
	is_done = 1;
	pthread_join(thread, NULL);
	drain();
}

static void *take_signals(void *unused)
{
	block(SIG_UNBLOCK);
	usleep(MUCH_LATER);
	usleep(MUCH_LATER);
	return unused;
}

static void *wait_in_thread(void *what)
{
	receive(what);
	return NULL;
}

/* The first thread is told of the signal, and takes it only once its child has gone. */
static void have_a_child_that_takes_its_time(void)
{
	alarm_every(LATER);
	if (vfork() == 0) {
		usleep(MUCH_LATER);
		_exit(0);
	}
	alarm_every(0);
	wait(NULL);
}

static void alone(void)
{
	handle(quiet, 0);
	wait_for_alarm("alone");
	handle(say, SA_RESTART);
	wait_for_alarm("alone-restart");
	limit_time(5);
	handle(quiet, SA_RESTART);
	wait_for_alarm("alone-restart-time-limit");
	limit_time(0);
}

static void with_a_thread(const char *what, void *(*run)(void *), void *argument)
{
	pthread_t thread;

	pthread_create(&thread, NULL, run, argument);
	wait_for_alarm(what);
	pthread_join(thread, NULL);
	drain();
}

static void in_threads(void)
{
	pthread_t thread;

	handle(quiet, 0);
	pthread_create(&thread, NULL, sleep_on, NULL);
	wait_for_alarm("process");
	handle(say, SA_RESTART);
	wait_for_alarm("process-restart");
	handle(quiet, SA_RESTART);
	limit_time(5);
	wait_for_alarm("process-restart-time-limit");
	limit_time(0);
	pthread_cancel(thread);
	pthread_join(thread, NULL);
	block(SIG_BLOCK);
	with_a_thread("process-blocked", say_much_later, NULL);
	block(SIG_UNBLOCK);
	handle(SIG_IGN, 0);
	with_a_thread("process-ignored", say_much_later, NULL);
	handle(say, 0);
	block(SIG_BLOCK);
	with_a_thread("other-thread-takes-it", take_signals, NULL);
	block(SIG_UNBLOCK);

	handle(quiet, 0);
	receive_signalled("thread");
	handle(say, SA_RESTART);
	receive_signalled("thread-restart");

	handle(quiet, 0);
	pthread_create(&thread, NULL, wait_in_thread, "second-goes-on");
	usleep(LATER);
	wait_for_alarm("first-of-two-waiting");
	usleep(MUCH_LATER);
	say(0);
	pthread_join(thread, NULL);
	pthread_create(&thread, NULL, wait_in_thread, "second-goes-on-while-first-is-slow");
	usleep(LATER);
	have_a_child_that_takes_its_time();
	say(0);
	pthread_join(thread, NULL);
}

int main(int argc, char **argv)
{
	struct sockaddr_in self;
	socklen_t length = sizeof self;
	pthread_t thread;
	int on = 1;

	fd = bound_socket(SOCK_DGRAM, address("127.0.0.1", "0"));
	need(getsockname(fd, (struct sockaddr *)&self, &length), "getsockname");
	need(setsockopt(fd, SOL_IP, IP_RECVORIGADDRS, &on, sizeof on), "RECVORIGADDRS");
	if (argc > 1) {
		if (strcmp(argv[1], "threads") == 0)
			pthread_create(&thread, NULL, sleep_on, NULL);
		print_local(fd);
		receive("stopped");
		return 0;
	}
	need(connect(fd, (struct sockaddr *)&self, sizeof self), "connect");
	alone();
	in_threads();
	return 0;
}
