"""Which frames are one packet, whatever happened to its addresses, and which packets are one connection."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, UDPerror, fragment
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet
from scenes import CLIENT, GATEWAY_IN, GATEWAY_OUT, POINTS, ROUTED, SENT, SERVER, Scene, ip, talk

from testbed.connections import Connection, connections
from testbed.frames import Frame
from testbed.trace import trace

Net = Callable[[int, int, int], Packet]


def ipv6(source: int, destination: int, hops: int) -> Packet:
    return IPv6(src=f"fd00::{source}", dst=f"fd00::{destination}", hlim=hops)


BOTH = pytest.mark.parametrize("net", [ip, ipv6], ids=["ipv4", "ipv6"])


def ways(frames: list[Frame]) -> list[tuple[str, ...]]:
    return [journey.points for journey in trace(frames)]


def forward(net: Net, transport: Packet, translated: Packet, source: int = 3) -> list[tuple[str, Packet]]:
    """From 1 to 2 through a gateway that makes 1 to 3, and the transport header to `translated`."""
    before, after = net(1, 2, SENT) / transport, net(source, 2, ROUTED) / translated
    return [(CLIENT, before), (GATEWAY_IN, before), (GATEWAY_OUT, after), (SERVER, after)]


@BOTH
def test_a_translated_packet_is_one_journey_with_what_changed_where_it_did(net: Net) -> None:
    scene = Scene()
    scene.go(*forward(net, TCP(sport=4000, dport=80, seq=9), TCP(sport=1025, dport=80, seq=9)))
    (journey,) = trace(scene.frames)
    name, hops, one, three = (
        ("ip", "ttl", *("10.0.0.1", "10.0.0.3")) if net is ip else ("ipv6", "hlim", "fd00::1", "fd00::3")
    )
    assert journey.points == POINTS
    assert [[str(change) for change in hop.changes] for hop in journey.hops] == [
        [],
        [],
        [f"{name}.src {one}→{three}", f"{name}.{hops} 64→63", "tcp.sport 4000→1025"],
        [],
    ]


@BOTH
def test_a_reply_with_the_payload_of_the_request_is_a_packet_of_its_own(net: Net) -> None:
    scene = Scene()
    request, reply = UDP(sport=4000, dport=7) / b"echo", UDP(sport=7, dport=4000) / b"echo"
    scene.go((CLIENT, net(1, 2, SENT) / request), (SERVER, net(1, 2, SENT) / request))
    scene.go((SERVER, net(2, 1, SENT) / reply), (CLIENT, net(2, 1, SENT) / reply))
    assert ways(scene.frames) == [(CLIENT, SERVER), (SERVER, CLIENT)]


@BOTH
def test_a_translated_reply_with_the_payload_of_the_request_is_a_packet_of_its_own(net: Net) -> None:
    scene = Scene()
    scene.go(*forward(net, *[UDP(sport=4000, dport=7) / b"echo"] * 2))
    reply = UDP(sport=7, dport=4000) / b"echo"
    answer, translated = net(2, 3, SENT) / reply, net(2, 1, ROUTED) / reply
    scene.go((SERVER, answer), (GATEWAY_OUT, answer), (GATEWAY_IN, translated), (CLIENT, translated))
    assert ways(scene.frames) == [POINTS, POINTS[::-1]]


@pytest.mark.parametrize("hops", [SENT - 1, SENT], ids=["from afar", "from next door"])
def test_a_relayed_datagram_with_the_same_payload_is_a_packet_of_its_own(hops: int) -> None:
    scene = Scene()
    datagram = UDP(sport=4000, dport=53) / b"question"
    scene.go((CLIENT, ip(1, 2, hops) / datagram), (GATEWAY_IN, ip(1, 2, hops) / datagram), sender=1)
    scene.go((GATEWAY_OUT, ip(3, 2, SENT) / datagram), (SERVER, ip(3, 2, SENT) / datagram), sender=2)
    assert ways(scene.frames) == [(CLIENT, GATEWAY_IN), (GATEWAY_OUT, SERVER)]


def test_a_bridged_datagram_is_one_packet() -> None:
    scene = Scene()
    datagram = ip(1, 2, SENT) / UDP(sport=4000, dport=53) / b"question"
    scene.go(*((point, datagram) for point in POINTS))
    assert ways(scene.frames) == [POINTS]


def test_a_packet_routed_back_out_by_the_door_it_came_in_is_one_journey() -> None:
    scene = Scene()
    sent, routed = ip(1, 2, SENT) / UDP(dport=9), ip(1, 2, ROUTED) / UDP(dport=9)
    scene.go((CLIENT, sent), (GATEWAY_IN, sent), (GATEWAY_IN, routed), (SERVER, routed))
    assert ways(scene.frames) == [(CLIENT, GATEWAY_IN, GATEWAY_IN, SERVER)]


@BOTH
def test_equal_datagrams_in_a_burst_are_paired_in_their_order(net: Net) -> None:
    scene = Scene()
    datagram = net(1, 2, SENT) / UDP(dport=9) / b"again"
    sent = [scene.see(CLIENT, datagram, outgoing=True) for _ in range(100)]
    received = [scene.see(SERVER, datagram, outgoing=False) for _ in range(100)]
    assert [[hop.frame for hop in journey.hops] for journey in trace(scene.frames)] == [
        [first, second] for first, second in zip(sent, received, strict=True)
    ]


def test_the_identification_tells_equal_datagrams_apart_when_one_is_lost() -> None:
    scene = Scene()
    scene.go((CLIENT, IP(id=1, dst="10.0.0.2") / UDP(dport=9)))
    second = IP(id=2, dst="10.0.0.2") / UDP(dport=9)
    scene.go((CLIENT, second), (SERVER, second))
    assert ways(scene.frames) == [(CLIENT,), (CLIENT, SERVER)]


@BOTH
def test_a_datagram_is_found_again_behind_many_equal_ones_that_ended_before(net: Net) -> None:
    scene = Scene()
    for port in range(1000, 1100):
        redirected = net(1, 2, SENT) / UDP(sport=4000, dport=port) / b"x"
        scene.go((CLIENT, redirected), (GATEWAY_IN, redirected))
    datagram = UDP(sport=4000, dport=81) / b"x"
    scene.go(*forward(net, datagram, datagram, source=1))
    assert ways(scene.frames)[-1] == POINTS


def test_what_was_not_seen_for_a_second_is_lost() -> None:
    scene = Scene()
    datagram = ipv6(1, 2, SENT) / UDP(dport=9)
    scene.go((CLIENT, datagram))
    scene.wait(milliseconds=1100)
    scene.go((CLIENT, datagram), (SERVER, datagram))
    assert ways(scene.frames) == [(CLIENT,), (CLIENT, SERVER)]


def test_a_segment_cut_on_the_way_is_one_journey_with_its_pieces() -> None:
    scene = Scene()
    data = bytes(range(256)) * 10
    whole = ip(1, 2, SENT) / TCP(sport=4000, dport=80, seq=1, ack=1, flags="PA") / data
    scene.go((CLIENT, whole), (GATEWAY_IN, whole))
    for point, outgoing in ((GATEWAY_OUT, True), (SERVER, False)):
        for begin in (0, 1000, 2000):
            segment = TCP(sport=1025, dport=80, seq=1 + begin, ack=1, flags="A") / data[begin : begin + 1000]
            scene.see(point, ip(3, 2, ROUTED) / segment, outgoing=outgoing)
    (journey,) = trace(scene.frames)
    assert [(hop.point, len(hop.frames)) for hop in journey.hops] == list(zip(POINTS, (1, 1, 3, 3), strict=True))
    assert [change.field for change in journey.hops[2].changes] == ["ip.src", "ip.ttl", "tcp.sport"]


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "the last first"])
def test_a_datagram_cut_on_the_way_is_one_journey_with_its_pieces(order: int) -> None:
    scene = Scene()
    sent, routed = (ip(1, 2, hops) / UDP(sport=4000, dport=9) / bytes(range(250)) for hops in (SENT, ROUTED))
    scene.go((CLIENT, sent), (GATEWAY_IN, sent))
    for point, outgoing in ((GATEWAY_OUT, True), (SERVER, False)):
        for piece in fragment(routed, 100)[::order]:
            scene.see(point, piece, outgoing=outgoing)
    (journey,) = trace(scene.frames)
    assert [(hop.point, len(hop.frames)) for hop in journey.hops] == list(zip(POINTS, (1, 1, 3, 3), strict=True))
    assert [str(change) for hop in journey.hops for change in hop.changes] == ["ip.ttl 64→63"]


def test_pieces_of_a_datagram_that_was_sent_twice_are_of_one_each() -> None:
    scene = Scene()
    sent, routed = (ip(1, 2, hops) / UDP(sport=4000, dport=9) / bytes(range(250)) for hops in (SENT, ROUTED))
    for _ in range(2):
        scene.go((CLIENT, sent), (GATEWAY_IN, sent))
    for _ in range(2):
        for piece in fragment(routed, 100):
            scene.go((GATEWAY_OUT, piece), (SERVER, piece))
    assert [[len(hop.frames) for hop in journey.hops] for journey in trace(scene.frames)] == [[1, 1, 3, 3]] * 2


def test_pieces_are_not_of_a_datagram_that_was_lost_long_before() -> None:
    scene = Scene()
    sent = ip(1, 2, SENT) / UDP(sport=4000, dport=9) / bytes(range(250))
    scene.go((CLIENT, sent))
    scene.wait(milliseconds=1100)
    for piece in fragment(sent, 100):
        scene.see(SERVER, piece, outgoing=False)
    assert ways(scene.frames)[0] == (CLIENT,)


def test_a_segment_in_fragments_is_one_journey() -> None:
    scene = Scene()
    segment = TCP(sport=4000, dport=80, seq=1, ack=1, flags="PA", options=[("Timestamp", (1, 0))]) / bytes(range(250))
    scene.go((CLIENT, ip(1, 2, SENT) / segment))
    for piece in fragment(ip(1, 2, SENT) / segment, 100):
        scene.see(SERVER, piece, outgoing=False)
    (journey,) = trace(scene.frames)
    assert [len(hop.frames) for hop in journey.hops] == [1, 3]
    assert journey.hops[1].changes == ()


def test_what_of_a_datagram_was_lost_on_the_way_has_changed() -> None:
    scene = Scene()
    sent = ip(1, 2, SENT) / UDP(sport=4000, dport=9) / bytes(range(200))
    scene.go((CLIENT, sent))
    scene.see(SERVER, fragment(sent, 100)[1], outgoing=False)
    (journey,) = trace(scene.frames)
    assert journey.points == (CLIENT, SERVER)
    assert "payload" in [change.field for change in journey.hops[1].changes]


def test_pieces_of_another_datagram_with_the_same_identification_are_not_joined_to_it() -> None:
    scene = Scene()
    scene.go((CLIENT, ip(1, 2, SENT) / UDP(sport=4000, dport=9) / bytes(200)))
    for piece in fragment(ip(1, 2, SENT) / UDP(sport=4000, dport=9) / bytes(range(200)), 100):
        scene.see(SERVER, piece, outgoing=False)
    assert ways(scene.frames) == [(CLIENT,), (SERVER,), (SERVER,), (SERVER,)]


def test_an_icmp_error_is_followed_with_what_changed_inside_it() -> None:
    scene = Scene()

    def error(client: int, hops: int) -> Packet:
        about = IPerror(src=f"10.0.0.{client}", dst="10.0.0.2") / UDPerror(sport=4000, dport=9)
        return ip(2, client, hops) / ICMP(type=3, code=3) / about

    scene.go(
        (SERVER, error(3, SENT)),
        (GATEWAY_OUT, error(3, SENT)),
        (GATEWAY_IN, error(1, ROUTED)),
        (CLIENT, error(1, ROUTED)),
    )
    (journey,) = trace(scene.frames)
    assert "embedded ip.src 10.0.0.3→10.0.0.1" in [str(change) for change in journey.hops[2].changes]


def test_a_vlan_tag_that_goes_away_is_a_change() -> None:
    scene = Scene()
    frame = scene.see(CLIENT, ip(1, 2, SENT) / UDP(dport=9), outgoing=True)
    tagged = Frame(SERVER, frame.time_ns + 1, frame.data[:12] + b"\x81\x00\x00\x07" + frame.data[12:], outgoing=False)
    (journey,) = trace([frame, tagged])
    assert [str(change) for change in journey.hops[1].changes] == ["vlan none→7"]


# Connections.


def connections_in(scene: Scene) -> list[Connection]:
    return connections(trace(scene.frames))


def test_a_translated_connection_is_one_leg() -> None:
    scene = Scene()
    talk(scene, (CLIENT, 1, 2), (GATEWAY_IN, 1, 2), (GATEWAY_OUT, 3, 2), (SERVER, 3, 2))
    (connection,) = connections_in(scene)
    (leg,) = connection.legs
    assert (leg.protocol, leg.initiator, leg.responder) == ("tcp", "10.0.0.1:4000", "10.0.0.2:80")
    assert [leg.is_forward(journey) for journey in leg.journeys] == [True, False, True, False]


@pytest.mark.parametrize("port", [4000, 5000], ids=["same port", "another port"])
def test_a_relayed_connection_is_two_legs(port: int) -> None:
    scene = Scene()
    first = (CLIENT, 1, 2), (GATEWAY_IN, 1, 2)
    scene.open(*first)
    talk(scene, (GATEWAY_OUT, 1, 2), (SERVER, 1, 2), port=port, seq=7000)
    scene.reset(*first)
    (connection,) = connections_in(scene)
    assert [(leg.initiator, {journey.points for journey in leg.journeys}) for leg in connection.legs] == [
        ("10.0.0.1:4000", {(CLIENT, GATEWAY_IN), (GATEWAY_IN, CLIENT)}),
        (f"10.0.0.1:{port}", {(GATEWAY_OUT, SERVER), (SERVER, GATEWAY_OUT)}),
    ]


def test_a_relayed_connection_is_two_legs_although_its_first_packet_was_lost() -> None:
    scene = Scene()
    first = (CLIENT, 1, 2), (GATEWAY_IN, 1, 2)
    scene.see(CLIENT, ip(1, 2, SENT) / TCP(sport=4000, dport=80, flags="S"), outgoing=True)
    scene.wait(milliseconds=1100)
    scene.open(*first)
    talk(scene, (GATEWAY_OUT, 1, 2), (SERVER, 1, 2), port=5000, seq=7000)
    scene.reset(*first)
    (connection,) = connections_in(scene)
    assert [leg.opening.points for leg in connection.legs] == [(CLIENT, GATEWAY_IN), (GATEWAY_OUT, SERVER)]


def test_answers_that_take_another_way_belong_to_the_connection() -> None:
    scene = Scene()
    syn, answer = TCP(sport=4000, dport=80, flags="S"), TCP(sport=80, dport=4000, flags="SA", seq=500, ack=1)
    scene.go((CLIENT, ip(1, 2, SENT) / syn), (SERVER, ip(1, 2, SENT) / syn))
    scene.go(("server:eth1", ip(2, 1, SENT) / answer), ("client:eth1", ip(2, 1, SENT) / answer))
    (connection,) = connections_in(scene)
    ((_, there), (leg, back)) = connection.journeys
    assert (leg.is_forward(there), leg.is_forward(back)) == (True, False)


def test_packets_at_other_points_than_the_first_still_have_their_direction() -> None:
    scene = Scene()
    datagram = UDP(sport=4000, dport=9)
    scene.go(*((point, ip(1, 2, SENT) / datagram / b"said") for point in (CLIENT, GATEWAY_IN)))
    scene.go(*((point, ip(1, 2, ROUTED) / datagram / b"retold") for point in (GATEWAY_OUT, SERVER)))
    scene.go(*((point, ip(2, 1, SENT) / UDP(sport=9, dport=4000)) for point in POINTS[::-1]))
    (connection,) = connections_in(scene)
    assert [leg.is_forward(journey) for leg, journey in connection.journeys] == [True, True, False]


def test_a_connection_made_after_another_ended_is_not_its_second_leg() -> None:
    scene = Scene()
    talk(scene, (CLIENT, 1, 2), (GATEWAY_IN, 1, 2))
    talk(scene, (GATEWAY_OUT, 3, 2), (SERVER, 3, 2), port=5000, seq=7000)
    assert [len(connection.legs) for connection in connections_in(scene)] == [1, 1]


def test_ports_used_again_make_another_connection() -> None:
    scene = Scene()
    talk(scene, (CLIENT, 1, 2), (SERVER, 1, 2), seq=0)
    talk(scene, (CLIENT, 1, 2), (SERVER, 1, 2), seq=90000)
    assert [len(connection.journeys) for connection in connections_in(scene)] == [4, 4]


def test_an_icmp_error_belongs_to_the_connection_it_is_about_and_goes_to_its_sender() -> None:
    scene = Scene()
    datagram = ip(1, 2, SENT) / UDP(sport=4000, dport=9)
    scene.go((CLIENT, datagram), (SERVER, datagram))
    message = ip(2, 1, SENT) / ICMP(type=3, code=3) / IPerror(bytes(datagram))
    scene.go((SERVER, message), (CLIENT, message))
    (connection,) = connections_in(scene)
    assert [leg.is_forward(journey) for leg, journey in connection.journeys] == [True, False]


def test_fragments_belong_to_the_connection_of_the_first() -> None:
    scene = Scene()
    for part in fragment(ip(1, 2, SENT) / UDP(sport=4000, dport=9) / bytes(3000), 1000):
        scene.go((CLIENT, part), (SERVER, part))
    (connection,) = connections_in(scene)
    assert [journey.points for _, journey in connection.journeys] == [(CLIENT, SERVER)] * 4


def test_datagrams_that_lost_their_first_pieces_are_of_connections_of_their_own() -> None:
    scene = Scene()
    for number, port in enumerate((4000, 5000)):
        datagram = IP(src="10.0.0.1", dst="10.0.0.2", id=number) / UDP(sport=port, dport=9) / bytes([number] * 200)
        scene.go((CLIENT, datagram))
        scene.see(SERVER, fragment(datagram, 100)[1], outgoing=False)
    assert len(connections_in(scene)) == 2


def test_a_connection_knows_its_frames() -> None:
    scene = Scene()
    talk(scene, (CLIENT, 1, 2), (SERVER, 1, 2), port=4000)
    talk(scene, (CLIENT, 1, 2), (SERVER, 1, 2), port=4001)
    first, second = connections_in(scene)
    assert [first.has(frame) for frame in scene.frames] == [True] * 8 + [False] * 8
    assert second.has(scene.frames[-1])
