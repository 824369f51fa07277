/* Where a redirected datagram was going: RECVORIGADDRS, bind, recvmsg. */
#include "tproxy.h"

int main(int argc, char **argv)
{
	struct in_origaddrs original;
	struct sockaddr_in peer;
	char data[1500];
	int fd, on = 1;

	arguments(2, argc, "udp_origin LOCAL_IP LOCAL_PORT");
	fd = bound_socket(SOCK_DGRAM, address(argv[1], argv[2]));
	need(setsockopt(fd, SOL_IP, IP_RECVORIGADDRS, &on, sizeof on), "RECVORIGADDRS");
	print_local(fd);
	receive_original(fd, data, sizeof data, &peer, &original);
	print_address("source", original.source, original.source_port);
	print_address("destination", original.destination, original.destination_port);
	return 0;
}
