"""Scenarios of UDP and of ICMP errors."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet import UDP as DATAGRAM
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6TimeExceeded, IPv6, IPv6ExtHdrFragment
from scapy.packet import Packet, Raw
from scenario import ENGINES, UNMANAGED, Scenario, scenario
from stage import LOOPBACK, TCP, UDP, Stage, ask_and_answer, converse, silent

from nfq_engine.client import Flag

SCENARIOS: list[Scenario] = []
LARGE = random.Random(1).randbytes(4000)
IP_MTU_DISCOVER, IP_PMTUDISC_DO, IPV6_MTU_DISCOVER = 10, 2, 23


def client_of(stage: Stage, number: int = 2, address: str | None = None) -> socket.socket:
    """A socket of the client's, connected to port 0 of the foreign address."""
    near = stage.at_client(UDP, number, address)
    near.connect((stage.foreign, stage.port(0)))
    return near


def passed_on(stage: Stage) -> tuple[socket.socket, socket.socket]:
    """A client, and the server that a rule brings its datagrams to."""
    stage.redirect(UDP, 0, 1, stage.server_address)
    return client_of(stage), stage.at_server(UDP, 1)


def packet(stage: Stage, source: str, destination: str, **fields: int) -> Packet:
    """An IP header of the stage's family; `hops` sets the hop limit, the rest are fields of the header."""
    hops = fields.pop("hops", 64)
    if stage.version == 4:
        return IP(src=source, dst=destination, ttl=hops, **fields)
    return IPv6(src=source, dst=destination, hlim=hops, **fields)


def question(stage: Stage, data: bytes, number: int = 2, **fields: int) -> Packet:
    """A datagram from the client to port 0 of the foreign address."""
    ports = DATAGRAM(sport=stage.port(number), dport=stage.port(0))
    return packet(stage, stage.client_address, stage.foreign, **fields) / ports / Raw(data)


def fragments(stage: Stage, whole: Packet, size: int = 1400) -> list[Packet]:
    """The fragments of a packet, in order, with `size` bytes each; `size` is a multiple of 8."""
    built = bytes(whole)
    head = 20 if stage.version == 4 else 40
    body = built[head:]
    parts = []
    for at in range(0, len(body), size):
        more, piece = at + size < len(body), Raw(body[at : at + size])
        if stage.version == 4:
            flags = "MF" if more else 0
            header = IP(src=whole.src, dst=whole.dst, ttl=whole.ttl, id=77, flags=flags, frag=at // 8, proto=17)
        else:
            header = IPv6(src=whole.src, dst=whole.dst, hlim=whole.hlim, nh=44)
            header /= IPv6ExtHdrFragment(nh=17, offset=at // 8, m=int(more), id=77)
        parts.append(header / piece)
    return parts


@scenario(SCENARIOS)
def udp_untouched(stage: Stage) -> None:
    stage.redirect(UDP, 0, 1)
    near = stage.at_client(UDP, 2)
    near.connect((stage.server_address, stage.port(3)))
    ask_and_answer(near, stage.at_server(UDP, 3))


@scenario(SCENARIOS)
def udp_redirect_to_the_gateway(stage: Stage) -> None:
    stage.redirect(UDP, 0, 1)
    proxy = stage.at_gateway(UDP, 1, stage.near)
    ask_and_answer(client_of(stage), proxy)


@scenario(SCENARIOS)
def udp_redirect_to_the_server(stage: Stage) -> None:
    near, far = passed_on(stage)
    for number in range(5):
        ask_and_answer(near, far, b"?" * number, b"!" * (5 - number))


@scenario(SCENARIOS)
def udp_question_without_answer(stage: Stage) -> None:
    near, far = passed_on(stage)
    for _ in range(3):
        near.send(b"the same")
    assert [far.recv(100) for _ in range(3)] == [b"the same"] * 3


@scenario(SCENARIOS)
def udp_foreign_listen(stage: Stage) -> None:
    service = stage.at_gateway(UDP, 1, stage.near)
    stage.listen_as(service, 0)
    ask_and_answer(client_of(stage), service)


@scenario(SCENARIOS)
def udp_foreign_connect(stage: Stage) -> None:
    server = stage.at_server(UDP, 0)
    near = stage.at_gateway(UDP, 1, stage.far)
    stage.connect_as(near, stage.client_address, 2)
    near.connect((stage.server_address, stage.port(0)))
    ask_and_answer(near, server)


@scenario(SCENARIOS, chosen_at=("client",))
def udp_foreign_connect_with_a_port_left_to_nat(stage: Stage) -> None:
    server = stage.at_server(UDP, 0)
    near = stage.at_gateway(UDP, 1, stage.far)
    stage.connect_as(near, stage.client_address)
    near.connect((stage.server_address, stage.port(0)))
    ask_and_answer(near, server)


@scenario(SCENARIOS)
def udp_relay(stage: Stage) -> None:
    """Foreign both ways, with the client's own port."""
    server = stage.at_server(UDP, 0)
    stage.redirect(UDP, 0, 1)
    proxy = stage.at_gateway(UDP, 1, stage.near)
    near = stage.at_client(UDP, 2)
    near.connect((stage.server_address, stage.port(0)))
    near.send(b"question")
    data, peer = proxy.recvfrom(100)
    outer = stage.at_gateway(UDP, 3, stage.far)
    stage.connect_as(outer, stage.client_address, 2)
    outer.connect((stage.server_address, stage.port(0)))
    ask_and_answer(outer, server, data, b"answer")
    proxy.sendto(b"answer", peer)
    assert near.recv(100) == b"answer"


@scenario(SCENARIOS)
def udp_several_clients(stage: Stage) -> None:
    service = stage.at_gateway(UDP, 1, stage.near)
    stage.listen_as(service, 0)
    for address in stage.clients():
        for number in (2, 3):
            ask_and_answer(client_of(stage, number, address), service, address.encode(), b"%d" % number)


@scenario(SCENARIOS, stays_inside=True)
def udp_local_origin(stage: Stage) -> None:
    stage.redirect(UDP, 0, 1, hook="output")
    service = stage.at_gateway(UDP, 1, LOOPBACK[stage.version])
    near = stage.at_gateway(UDP, 2, stage.far)
    near.connect((stage.server_address, stage.port(0)))
    ask_and_answer(near, service)


@scenario(SCENARIOS)
def udp_empty_datagram(stage: Stage) -> None:
    near, far = passed_on(stage)
    ask_and_answer(near, far, b"", b"")


@scenario(SCENARIOS, versions=(4,))
def udp_checksum_0_stays_0(stage: Stage) -> None:
    """IPv6 does not allow it."""
    _, far = passed_on(stage)
    whole = question(stage, b"no checksum")
    whole[DATAGRAM].chksum = 0
    stage.inject("client", whole)
    data, peer = far.recvfrom(100)
    assert data == b"no checksum"
    answer = packet(stage, stage.server_address, peer[0]) / DATAGRAM(sport=stage.port(1), dport=peer[1], chksum=0)
    stage.inject("server", answer / Raw(b"none either"))


@scenario(SCENARIOS)
def udp_hop_limit_and_traffic_class_are_kept(stage: Stage) -> None:
    _, far = passed_on(stage)
    service = {"tos": 0xB8} if stage.version == 4 else {"tc": 0xB8}
    stage.inject("client", question(stage, b"urgent", hops=9, **service))
    assert far.recv(100) == b"urgent"


@scenario(SCENARIOS)
def udp_fragments_in_order(stage: Stage) -> None:
    """Both ways, cut by the senders themselves."""
    near, far = passed_on(stage)
    ask_and_answer(near, far, LARGE, LARGE[::-1])


@scenario(SCENARIOS)
def udp_of_every_size_about_the_queues_limit(stage: Stage) -> None:
    """NetfilterQueue reads 4096 bytes, of which the kernel's attributes take some, more of them at POSTROUTING."""
    near, far = passed_on(stage)
    for size in range(3840, 4120, 8):
        ask_and_answer(near, far, LARGE[:1] * size, b"!")


@scenario(SCENARIOS)
def udp_fragments_out_of_order(stage: Stage) -> None:
    _, far = passed_on(stage)
    for part in reversed(fragments(stage, question(stage, LARGE))):
        stage.inject("client", part)
    assert far.recv(1 << 16) == LARGE


@scenario(SCENARIOS)
def udp_fragments_out_of_order_to_the_gateway(stage: Stage) -> None:
    service = stage.at_gateway(UDP, 1, stage.near)
    stage.listen_as(service, 0)
    near = client_of(stage)
    first, *others = fragments(stage, question(stage, LARGE), 800)
    for part in (*others[::2], first, *others[1::2]):
        stage.inject("client", part)
    data, peer = service.recvfrom(1 << 16)
    assert data == LARGE
    service.sendto(LARGE[::-1], peer)
    assert near.recv(1 << 16) == LARGE[::-1]


@scenario(SCENARIOS)
def udp_fragment_that_is_missing(stage: Stage) -> None:
    _, far = passed_on(stage)
    parts = fragments(stage, question(stage, LARGE))
    for part in (parts[0], *parts[2:]):
        stage.inject("client", part)
    silent(far)


@scenario(SCENARIOS, views=UNMANAGED)
def udp_beside_the_users_nat(stage: Stage) -> None:
    host = stage.server_address if stage.version == 4 else f"[{stage.server_address}]"
    stage.users(
        f"chain prerouting {{ type nat hook prerouting priority -100; "
        f"udp dport {{ {stage.port(0)}, {stage.port(4)} }} dnat to {host}:{stage.port(5)}\n}}"
    )
    service = stage.at_gateway(UDP, 1, stage.near)
    stage.listen_as(service, 0)
    ask_and_answer(client_of(stage), service)
    other = stage.at_client(UDP, 6)
    other.connect((stage.foreign, stage.port(4)))
    ask_and_answer(other, stage.at_server(UDP, 5))


@scenario(SCENARIOS, ways=ENGINES)
def udp_one_way(stage: Stage) -> None:
    service = stage.at_gateway(UDP, 1, stage.near)
    stage.listen_as(service, 0, flags=Flag.LISTEN | Flag.UNIDIR)
    near = client_of(stage)
    for number in range(3):
        near.send(b"%d" % number)
        assert service.recv(100) == b"%d" % number


@scenario(SCENARIOS, ways=ENGINES)
def udp_unassigned(stage: Stage) -> None:
    """Afterwards the client's datagrams go where they are sent to."""
    service = stage.at_gateway(UDP, 1, stage.near)
    stage.listen_as(service, 0, stage.server_address)
    server = stage.at_server(UDP, 0)
    near = stage.at_client(UDP, 2)
    near.connect((stage.server_address, stage.port(0)))
    ask_and_answer(near, service)
    assert stage.house.tproxy is not None
    stage.house.tproxy.unassign(service)
    ask_and_answer(near, server)


# ICMP errors.


@scenario(SCENARIOS)
def port_unreachable_from_the_server(stage: Stage) -> None:
    stage.redirect(UDP, 0, 1, stage.server_address)
    near = client_of(stage)
    near.send(b"?")
    with pytest.raises(ConnectionRefusedError):
        near.recv(100)


@scenario(SCENARIOS)
def port_unreachable_from_the_gateway(stage: Stage) -> None:
    stage.redirect(UDP, 0, 1)
    near = client_of(stage)
    near.send(b"?")
    with pytest.raises(ConnectionRefusedError):
        near.recv(100)


@scenario(SCENARIOS)
def port_unreachable_from_the_client(stage: Stage) -> None:
    """The answer finds nobody; the server is told, by the address that it answered to."""
    near, far = passed_on(stage)
    near.send(b"?")
    _, peer = far.recvfrom(100)
    near.close()
    far.connect(peer[:2])
    far.send(b"!")
    with pytest.raises(ConnectionRefusedError):
        far.recv(100)


@scenario(SCENARIOS)
def port_unreachable_from_the_client_to_a_foreign_listener(stage: Stage) -> None:
    service = stage.at_gateway(UDP, 1, stage.near)
    stage.listen_as(service, 0)
    near = client_of(stage)
    near.send(b"?")
    _, peer = service.recvfrom(100)
    near.close()
    service.connect(peer[:2])
    service.send(b"!")
    with pytest.raises(ConnectionRefusedError):
        service.recv(100)


@scenario(SCENARIOS)
def port_unreachable_to_a_foreign_connect(stage: Stage) -> None:
    near = stage.at_gateway(UDP, 1, stage.far)
    stage.connect_as(near, stage.client_address, 2)
    near.connect((stage.server_address, stage.port(0)))
    near.send(b"?")
    with pytest.raises(ConnectionRefusedError):
        near.recv(100)


@scenario(SCENARIOS)
def time_exceeded_in_the_gateway(stage: Stage) -> None:
    """The last hop is here: the gateway complains about the datagram as the client sent it."""
    near, far = passed_on(stage)
    ask_and_answer(near, far)
    begin = stage.house.capture.mark()
    stage.inject("client", question(stage, b"too far", hops=1))
    stage.until_seen("client:eth0", 2, begin)


@scenario(SCENARIOS, views=UNMANAGED)
def time_exceeded_in_the_gateway_of_a_first_packet_that_is_left_alone(stage: Stage) -> None:
    stage.redirect(UDP, 4, 1)
    begin = stage.house.capture.mark()
    stage.inject("client", question(stage, b"too far", hops=1))
    stage.until_seen("client:eth0", 2, begin)


@scenario(SCENARIOS)
def time_exceeded_from_the_server(stage: Stage) -> None:
    errors_from(stage, lambda: ICMP(type=11, code=0) if stage.version == 4 else ICMPv6TimeExceeded())


@scenario(SCENARIOS)
def fragmentation_needed_from_the_server(stage: Stage) -> None:
    errors_from(
        stage, lambda: ICMP(type=3, code=4, nexthopmtu=1300) if stage.version == 4 else ICMPv6PacketTooBig(mtu=1300)
    )


@scenario(SCENARIOS)
def host_unreachable_from_the_server(stage: Stage) -> None:
    errors_from(stage, lambda: ICMP(type=3, code=1) if stage.version == 4 else ICMPv6DestUnreach(code=3))


def errors_from(stage: Stage, error: Callable[[], Packet]) -> None:
    """A datagram gets through; then a router at the server's side complains about it."""
    stage.stack.callback(stage.forget_paths)
    near, far = passed_on(stage)
    near.send(b"question")
    data, peer = far.recvfrom(100)
    ports = DATAGRAM(sport=peer[1], dport=stage.port(1))
    about = packet(stage, peer[0], stage.server_address, hops=63) / ports / Raw(data)
    begin = stage.house.capture.mark()
    stage.inject("server", packet(stage, stage.server_address, peer[0]) / error() / about)
    stage.until_seen("client:eth0", 1, begin)


@scenario(SCENARIOS)
def fragmentation_needed_from_the_client(stage: Stage) -> None:
    """A router at the client's side complains about the answer."""
    stage.stack.callback(stage.forget_paths)
    near, far = passed_on(stage)
    ask_and_answer(near, far)
    ports = DATAGRAM(sport=stage.port(0), dport=stage.port(2))
    about = packet(stage, stage.foreign, stage.client_address, hops=63) / ports / Raw(b"!")
    error = ICMP(type=3, code=4, nexthopmtu=1300) if stage.version == 4 else ICMPv6PacketTooBig(mtu=1300)
    begin = stage.house.capture.mark()
    stage.inject("client", packet(stage, stage.client_address, stage.foreign) / error / about)
    stage.until_seen("server:eth0", 1, begin)


@scenario(SCENARIOS)
def path_mtu_discovery_by_udp(stage: Stage) -> None:
    """The gateway's way to the server takes 1300 bytes; the client may not cut, and learns it from the gateway."""
    near, far = passed_on(stage)
    narrow(stage)
    level, option = (
        (socket.IPPROTO_IP, IP_MTU_DISCOVER) if stage.version == 4 else (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER)
    )
    near.setsockopt(level, option, IP_PMTUDISC_DO)
    ask_and_answer(near, far)
    near.send(LARGE[:1400])
    with pytest.raises(OSError, match="Message too long"):
        near.recv(100)
    near.send(LARGE[:1200])
    assert far.recv(1 << 16) == LARGE[:1200]


@scenario(SCENARIOS)
def path_mtu_discovery_by_tcp(stage: Stage) -> None:
    """A transfer through a redirect to the server, its segments at first too large for the gateway's way there."""
    stage.redirect(TCP, 0, 1, stage.server_address)
    server = stage.at_server(TCP, 1)
    narrow(stage)
    near = stage.at_client(TCP, 2)
    near.connect((stage.foreign, stage.port(0)))
    converse(near, stage.accept(server), 1 << 15)


def narrow(stage: Stage) -> None:
    """Let the gateway's way to the server take 1300 bytes; all forget it when the scenario is over."""
    family = f"-{stage.version}"
    prefix = ("10.2.0.0/24",) if stage.version == 4 else ("fd02::/64", "metric", "256")  # of the kernel's own route
    change = ("ip", family, "route", "replace", *prefix, "dev", "eth1")

    stage.stack.callback(stage.forget_paths)
    stage.stack.callback(stage.run, "gateway", *change)
    stage.run("gateway", *change, "mtu", "lock", "1300")
