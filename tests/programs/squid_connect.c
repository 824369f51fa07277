/* A connection from the client's own address, as Squid does it: bind, ASSIGN(client, 0), FLAGS=CONNECT, connect. */
#include "tproxy.h"

int main(int argc, char **argv)
{
	int fd;

	arguments(4, argc, "squid_connect LOCAL_IP CLIENT_IP SERVER_IP SERVER_PORT");
	fd = bound_socket(SOCK_STREAM, address(argv[1], "0"));
	set_address(fd, TPROXY_ASSIGN, address(argv[2], "0"), "ASSIGN");
	set_flags(fd, ITP_CONNECT);
	talk(fd, address(argv[3], argv[4]));
	return 0;
}
