/* Narrowed to a peer, as Zorp does it: bind, ASSIGN, CONNECT(peer), FLAGS=CONNECT, connect. */
#include "tproxy.h"

int main(int argc, char **argv)
{
	struct sockaddr_in server;
	int fd;

	arguments(5, argc, "zorp_connect LOCAL_IP FOREIGN_IP FOREIGN_PORT SERVER_IP SERVER_PORT");
	server = address(argv[4], argv[5]);
	fd = bound_socket(SOCK_STREAM, address(argv[1], "0"));
	set_address(fd, TPROXY_ASSIGN, address(argv[2], argv[3]), "ASSIGN");
	set_address(fd, TPROXY_CONNECT, server, "CONNECT");
	set_flags(fd, ITP_CONNECT);
	talk(fd, server);
	return 0;
}
