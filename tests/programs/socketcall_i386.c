/*
 * A 32-bit program without a C library (none may be installed): setsockopt and getsockopt by the old socketcall and by
 * the calls of their own; exits with the number of the first step that did not answer as expected.
 */
enum { SYS_EXIT = 1, SYS_SOCKETCALL = 102, SYS_GETSOCKOPT = 365, SYS_SETSOCKOPT = 366 };
enum { CALL_SOCKET = 1, CALL_SETSOCKOPT = 14, CALL_GETSOCKOPT = 15 };
enum { AF_INET = 2, SOCK_STREAM = 1, SOL_IP = 0, IP_TTL = 2, IP_TPROXY = 11274, IP_RECVORIGADDRS = 11273 };
enum { EFAULT = 14, ENOPROTOOPT = 92 };

static long call(long number, long a, long b, long c, long d, long e)
{
	long result;

	__asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e) : "memory");
	return result;
}

static long socketcall(long number, long a, long b, long c, long d, long e)
{
	long arguments[] = {a, b, c, d, e};

	return call(SYS_SOCKETCALL, number, (long)arguments, 0, 0, 0);
}

static int first_failure(void)
{
	static unsigned argument[3] = {4, 2};
	int ttl = 7, length = sizeof argument, ttl_length = sizeof ttl;
	long fd = socketcall(CALL_SOCKET, AF_INET, SOCK_STREAM, 0, 0, 0);

	if (fd < 0)
		return 1;
	if (socketcall(CALL_SETSOCKOPT, fd, SOL_IP, IP_TPROXY, (long)argument, length))
		return 2;
	if (call(SYS_SETSOCKOPT, fd, SOL_IP, IP_TPROXY, (long)argument, length))
		return 3;
	if (socketcall(CALL_GETSOCKOPT, fd, SOL_IP, IP_TPROXY, (long)argument, (long)&length))
		return 4;
	if (call(SYS_GETSOCKOPT, fd, SOL_IP, IP_TPROXY, (long)argument, (long)&length))
		return 5;
	if (socketcall(CALL_SETSOCKOPT, fd, SOL_IP, IP_TTL, (long)&ttl, sizeof ttl))
		return 6;
	ttl = 0;
	if (socketcall(CALL_GETSOCKOPT, fd, SOL_IP, IP_TTL, (long)&ttl, (long)&ttl_length) || ttl != 7)
		return 7;
	if (call(SYS_SOCKETCALL, CALL_SETSOCKOPT, 16, 0, 0, 0) != -EFAULT)
		return 8;
	/* Whoever cannot be told addresses with its datagrams is told so at once. */
	if (socketcall(CALL_SETSOCKOPT, fd, SOL_IP, IP_RECVORIGADDRS, (long)argument, 4) != -ENOPROTOOPT)
		return 9;
	if (call(SYS_SETSOCKOPT, fd, SOL_IP, IP_RECVORIGADDRS, (long)argument, 4) != -ENOPROTOOPT)
		return 10;
	return 0;
}

void _start(void)
{
	call(SYS_EXIT, first_failure(), 0, 0, 0, 0);
}
