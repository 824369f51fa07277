/* A listener on a foreign address, as Zorp does it: bind, ASSIGN, listen, FLAGS=LISTEN; serves one connection. */
#include "tproxy.h"

int main(int argc, char **argv)
{
	struct sockaddr_in peer;
	socklen_t length = sizeof peer;
	int listener, fd;

	arguments(4, argc, "zorp_listener LOCAL_IP LOCAL_PORT FOREIGN_IP FOREIGN_PORT");
	listener = bound_socket(SOCK_STREAM, address(argv[1], argv[2]));
	set_address(listener, TPROXY_ASSIGN, address(argv[3], argv[4]), "ASSIGN");
	need(listen(listener, 16), "listen");
	set_flags(listener, ITP_LISTEN);
	print_local(listener);

	fd = accept(listener, (struct sockaddr *)&peer, &length);
	need(fd, "accept");
	print_address("peer", peer.sin_addr, peer.sin_port);
	echo(fd);
	return 0;
}
