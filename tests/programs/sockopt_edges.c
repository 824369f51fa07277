/* Calls that a kernel refuses, and calls that are not tproxy's: one line each, its name and what came back. */
#include "tproxy.h"

#include <fcntl.h>
#include <sys/mman.h>

static struct in_tproxy version = {.op = TPROXY_VERSION, .v.version = 2 << 24};

static void report(const char *name, int result)
{
	printf("%s %s\n", name, result < 0 ? strerrorname_np(errno) : "OK");
}

static int set(int fd, const void *value, socklen_t length)
{
	return setsockopt(fd, SOL_IP, IP_TPROXY, value, length);
}

static int get(int fd, void *value, void *length)
{
	return getsockopt(fd, SOL_IP, IP_TPROXY, value, length);
}

static void report_get(const char *name, int fd, void *value, socklen_t length)
{
	int result = get(fd, value, &length);

	printf("%s %s %d\n", name, result < 0 ? strerrorname_np(errno) : "OK", (int)length);
}

int main(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0), number = 1, back = 0;
	int file = open("/dev/null", O_RDWR), path = open("/dev/null", O_PATH);
	size_t page = sysconf(_SC_PAGESIZE);
	char large[4096] = {0};
	socklen_t length = sizeof back;
	/* Two pages, the second with no access: values that end, or do not end, in the first. */
	char *edge = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	munmap(edge + page, page);
	memcpy(edge + page - sizeof version, &version, sizeof version);
	edge += page;

	report("set", set(fd, &version, sizeof version));
	report("set-closed", set(99, &version, sizeof version));
	report("set-minus-one", set(-1, &version, sizeof version));
	report("set-file", set(file, &version, sizeof version));
	report("set-path", set(path, &version, sizeof version));
	report("set-null", set(fd, NULL, sizeof version));
	report("set-kernel-address", set(fd, (void *)-4096L, sizeof version));
	report("set-negative-length", set(fd, &version, -1));
	report("set-empty", set(fd, &version, 0));
	report("set-short", set(fd, &version, 7));
	report("set-large", set(fd, large, sizeof large));
	report("set-ends-with-page", set(fd, edge - sizeof version, sizeof version));
	report("set-claims-beyond-page", set(fd, edge - sizeof version, 4096));
	report("set-crosses-page", set(fd, edge - 4, sizeof version));

	version.op = TPROXY_QUERY;
	report_get("get", fd, &version, sizeof version);
	report_get("get-closed", 99, &version, sizeof version);
	report_get("get-room-for-eight", fd, &version, 8);
	report_get("get-room-for-much", fd, large, sizeof large);
	report_get("get-negative-length", fd, &version, -5);
	report_get("get-null", fd, NULL, sizeof version);
	report("get-null-length", get(fd, &version, NULL));
	report("get-bad-length", get(fd, &version, edge));

	report("other-option", setsockopt(fd, SOL_IP, IP_TTL, &number, sizeof number));
	report("other-option-get", getsockopt(fd, SOL_IP, IP_TTL, &back, &length));
	printf("other-option-value %d\n", back);
	report("other-level", setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &number, sizeof number));
	report("other-level-same-number", setsockopt(fd, IPPROTO_TCP, IP_TPROXY, &number, sizeof number));
	report("other-option-closed", setsockopt(99, SOL_IP, IP_TTL, &number, sizeof number));
	return 0;
}
