/*
 * UDP for any destination: RECVORIGADDRS, bind, FLAGS=LISTEN|UNIDIR. The first datagram's peer gets a socket of its own
 * that speaks from the address which the peer meant: bind, ASSIGN(original destination), CONNECT(peer), FLAGS=ESTABLISHED.
 */
#include "tproxy.h"

static char data[65536];

int main(int argc, char **argv)
{
	struct in_origaddrs original;
	struct sockaddr_in peer, meant = {.sin_family = AF_INET};
	ssize_t length;
	int listener, fd, on = 1;

	arguments(2, argc, "udp_listener LOCAL_IP LOCAL_PORT");
	listener = socket(AF_INET, SOCK_DGRAM, 0);
	need(listener, "socket");
	need(setsockopt(listener, SOL_IP, IP_RECVORIGADDRS, &on, sizeof on), "RECVORIGADDRS");
	meant = address(argv[1], argv[2]);
	need(bind(listener, (struct sockaddr *)&meant, sizeof meant), "bind");
	set_flags(listener, ITP_LISTEN | ITP_UNIDIR);
	print_local(listener);

	length = receive_original(listener, data, sizeof data, &peer, &original);
	print_address("source", original.source, original.source_port);
	print_address("destination", original.destination, original.destination_port);

	fd = bound_socket(SOCK_DGRAM, address(argv[1], "0"));
	meant.sin_addr = original.destination;
	meant.sin_port = original.destination_port;
	set_address(fd, TPROXY_ASSIGN, meant, "ASSIGN");
	set_address(fd, TPROXY_CONNECT, peer, "CONNECT");
	set_flags(fd, ITP_ESTABLISHED);
	need(sendto(fd, data, length, 0, (struct sockaddr *)&peer, sizeof peer), "sendto");
	return 0;
}
