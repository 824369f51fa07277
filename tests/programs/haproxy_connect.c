/* With the client's port too, as HAProxy does it (usesrc client): bind, ASSIGN(client, port), FLAGS=CONNECT|ONCE. */
#include "tproxy.h"

int main(int argc, char **argv)
{
	int fd;

	arguments(5, argc, "haproxy_connect LOCAL_IP CLIENT_IP CLIENT_PORT SERVER_IP SERVER_PORT");
	fd = bound_socket(SOCK_STREAM, address(argv[1], "0"));
	set_address(fd, TPROXY_ASSIGN, address(argv[2], argv[3]), "ASSIGN");
	set_flags(fd, ITP_CONNECT | ITP_ONCE);
	talk(fd, address(argv[4], argv[5]));
	return 0;
}
