/* Where a redirected TCP connection was going: accept, getsockopt(SO_ORIGINAL_DST). */
#include "tproxy.h"

#define SO_ORIGINAL_DST 80

int main(int argc, char **argv)
{
	struct sockaddr_in meant;
	socklen_t length = sizeof meant;
	int listener, fd;

	arguments(2, argc, "original_destination LOCAL_IP LOCAL_PORT");
	listener = bound_socket(SOCK_STREAM, address(argv[1], argv[2]));
	need(listen(listener, 16), "listen");
	print_local(listener);
	fd = accept(listener, NULL, NULL);
	need(fd, "accept");
	need(getsockopt(fd, SOL_IP, SO_ORIGINAL_DST, &meant, &length), "SO_ORIGINAL_DST");
	print_address("destination", meant.sin_addr, meant.sin_port);
	echo(fd);
	return 0;
}
