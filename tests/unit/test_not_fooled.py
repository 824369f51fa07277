"""Expectations on what is unusual, but legal: none may pass for the wrong reason, nor break."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import ModuleType

import pytest
from past import Past, routed, text_of
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import ICMPv6ND_NA, IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import LLC, STP, Dot3
from scapy.packet import Packet, Raw
from scenes import CLIENT, GATEWAY_IN, GATEWAY_OUT, ROUTED, SENT, SERVER, Scene, ip

import testbed.connections
import testbed.trace
from testbed.connections import connections
from testbed.expect import Watch
from testbed.frames import Frame
from testbed.layers import MatchError
from testbed.matching import Match, matcher_of
from testbed.trace import trace

# Layers.


def test_a_frame_that_was_dissected_before_a_layer_was_known_shows_it() -> None:
    """In a process of its own: here, somebody may have loaded the layer already."""
    script = """
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from testbed.frames import Frame
from testbed.matching import matcher_of
query = bytes.fromhex("0001010000010000000000000161000001" + "0001")
frame = Frame("a:eth0", 0, bytes(Ether() / IP() / UDP(dport=53) / query), True)
assert frame.packet.haslayer(UDP) and "DNS" not in frame.packet
assert matcher_of(lambda dns: dns.qr == 0).matches(frame)
assert frame.packet is frame.packet
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_frame_with_a_length_in_place_of_a_type_has_link_addresses() -> None:
    data = bytes(Dot3(src="02:00:00:00:00:01", dst="01:80:c2:00:00:00") / LLC() / STP())
    frame = Frame(CLIENT, 0, data, outgoing=True)
    assert matcher_of({"ether.dst": "01:80:c2:00:00:00"}).matches(frame)
    assert not matcher_of({"ether.dst": "01:80:c2:00:00:01"}).matches(frame)


# Values.

NEVER: dict[str, Match] = {
    "a range beyond": {"tcp.dport": range(70000, 70010)},
    "a range of addresses": {"net.src": range(1, 5)},
    "an address with a zone": {"ipv6.src": "fe80::1%eth0"},
    "twelve bits": {"vlan.vlan": 5000},
    "eight bits": {"ipv6.tc": 300},
    "thirteen bits": {"ip.frag": 9000},
    "one bit": {"dns.qr": 2},
    "four bits with names": {"dns.opcode": 16},
    "a flag that is none": {"tcp.flags": 4096},
    "a negative number": {"vlan.vlan": -1},
    "no address of a link": {"arp.hwsrc": "02:00"},
    "bytes for a text": {"ether.src": b"123456"},
    "a number for bytes": {"raw.load": 5},
    "a misspelt field of some message": {"icmpv6.tpye": 3},
}


@pytest.mark.parametrize("match", NEVER.values(), ids=NEVER.keys())
def test_what_can_never_be_is_refused(match: Match) -> None:
    with pytest.raises(MatchError):
        Watch(Past([])).expect_none(SERVER, match)


V6 = IPv6(src="::ffff:1.2.3.4", dst="fd00::2")
POSSIBLE: dict[str, tuple[Match, Packet]] = {
    "an IPv4 address within IPv6": ({"ipv6.src": "::ffff:1.2.3.4"}, V6 / UDP()),
    "a field of some messages": ({"icmpv6.tgt": "fd00::9"}, V6 / ICMPv6ND_NA(tgt="fd00::9")),
    "all bits": ({"ipv6.tc": 255}, IPv6(tc=255) / UDP()),
    "all flags": ({"tcp.flags": 0x1FF}, IP() / TCP(flags=0x1FF)),
}


@pytest.mark.parametrize(("match", "packet"), POSSIBLE.values(), ids=POSSIBLE.keys())
def test_what_can_be_is_not_refused(match: Match, packet: Packet) -> None:
    assert matcher_of(match).matches(Scene().see(CLIENT, packet, outgoing=True))


# The same packet.

SYN = TCP(dport=80, flags="S")
NOTICED: dict[str, tuple[Packet, Packet, str]] = {
    "congestion flags": (ip(1, 2, 64) / TCP(flags="SEC"), ip(1, 2, 64) / TCP(flags="S"), "tcp.flags SYN ECE CWR→SYN"),
    "don't fragment": (IP(flags="DF") / SYN, IP() / SYN, "ip.flags DF→none"),
    "an option": (IP(options=IPOption_Router_Alert()) / SYN, IP() / SYN, "ip.options 94040000→none"),
    "the flow label": (IPv6(fl=5) / SYN, IPv6(fl=9) / SYN, "ipv6.fl 5→9"),
    "the urgent pointer": (ip(1, 2, 64) / TCP(urgptr=5), ip(1, 2, 64) / TCP(urgptr=0), "tcp.urgptr 5→0"),
    "an extension header": (IPv6() / IPv6ExtHdrDestOpt() / SYN, IPv6() / SYN, "ipv6.extensions 0600010400000000→none"),
    "what an advertisement says": (
        IPv6() / ICMPv6ND_NA(R=1, S=0, O=0, tgt="fd00::9"),
        IPv6() / ICMPv6ND_NA(R=0, S=0, O=0, tgt="fd00::9"),
        "icmpv6.rest 80000000→00000000",
    ),
    "the id of an echo": (IP() / ICMP(id=5), IP() / ICMP(id=6), "icmp.id 5→6"),
}


@pytest.mark.parametrize(("before", "after", "change"), NOTICED.values(), ids=NOTICED.keys())
def test_every_field_that_changed_is_noticed(before: Packet, after: Packet, change: str) -> None:
    scene = Scene()
    scene.go((CLIENT, before), (SERVER, after))
    assert f"changed: {change}" in text_of(lambda: Watch(Past(scene.frames)).expect_same(at=(CLIENT, SERVER), within=0))


def pieces(scene: Scene, point: str, *, outgoing: bool, sources: Iterable[int | None]) -> None:
    """A segment of 3000 bytes in pieces of 1000, each from an address; None is lost."""
    for number, source in enumerate(sources):
        data = bytes([number]) * 1000
        segment = TCP(sport=4000, dport=80, seq=1 + 1000 * number, ack=1, flags="A") / data
        if source is not None:
            scene.see(point, ip(source, 2, ROUTED) / segment, outgoing=outgoing)


def cut(at_gateway: Iterable[int | None], at_server: Iterable[int | None]) -> Watch:
    scene = Scene()
    data = b"".join(bytes([number]) * 1000 for number in range(3))
    whole = ip(1, 2, SENT) / TCP(sport=4000, dport=80, seq=1, ack=1, flags="PA") / data
    scene.go((CLIENT, whole), (GATEWAY_IN, whole))
    pieces(scene, GATEWAY_OUT, outgoing=True, sources=at_gateway)
    pieces(scene, SERVER, outgoing=False, sources=at_server)
    return Watch(Past(scene.frames))


def test_a_segment_in_pieces_is_the_same() -> None:
    watch = cut((3, 3, 3), (3, 3, 3))
    assert len(watch.expect_same(at=(CLIENT, SERVER), changed={"ip.src"}, within=0)) == 1
    assert len(watch.expect_same(at=(GATEWAY_OUT, SERVER), within=0)) == 1


def test_a_piece_that_was_not_translated_is_noticed() -> None:
    watch = cut((3, 1, 3), (3, 1, 3))
    text = text_of(lambda: watch.expect_same(at=(CLIENT, SERVER), changed={"ip.src"}, within=0))
    assert "      not changed: ip.src\n" in text


def test_a_piece_that_is_missing_is_noticed() -> None:
    watch = cut((3, 3, 3), (3, None, 3))
    text = text_of(lambda: watch.expect_same(at=(GATEWAY_OUT, SERVER), within=0))
    assert "      changed: payload 3000 bytes→2000 bytes\n" in text


def test_any_piece_may_be_the_one_that_matches() -> None:
    watch = cut((3, 3, 3), (3, 3, 3))
    assert len(watch.expect_same({"tcp.seq": 2001}, at=(GATEWAY_OUT, SERVER), within=0)) == 1


def test_a_packet_that_comes_by_twice_is_taken_as_it_was_when_it_first_matched() -> None:
    scene = Scene()
    sent, translated = ip(1, 2, SENT) / TCP(dport=80), ip(3, 2, ROUTED) / TCP(dport=80)
    scene.go((CLIENT, sent), (GATEWAY_IN, sent), (GATEWAY_IN, translated), (SERVER, translated))
    watch = Watch(Past(scene.frames))
    for match, changed, before in (({"tcp.dport": 80}, {"ip.src"}, 2), ({"ip.src": "10.0.0.3"}, set(), 3)):
        pairs = watch.expect_same(match, at=(GATEWAY_IN, SERVER), changed=changed, within=0)
        assert [(first.number, second.number) for first, second in pairs] == [(before, 4)]


def test_a_point_is_not_compared_with_itself() -> None:
    with pytest.raises(ValueError, match="two points"):
        Watch(Past(routed().frames)).expect_same(at=(CLIENT, CLIENT))


# Order, and who talked to whom.


def test_a_sequence_goes_by_the_time_not_by_the_place_in_the_file() -> None:
    scene = Scene()
    first = scene.see(CLIENT, ip(1, 2, SENT) / UDP(dport=9), outgoing=True)
    second = scene.see(SERVER, ip(1, 2, SENT) / UDP(dport=9), outgoing=False)
    watch = Watch(Past([replace(second, number=1), replace(first, number=2)]))
    watch.expect_sequence((CLIENT, None), (SERVER, None), within=0)
    assert "step 2 was not seen" in text_of(lambda: watch.expect_sequence((SERVER, None), (CLIENT, None), within=0))


def test_a_frame_that_was_one_step_did_not_come_too_early_for_the_next() -> None:
    watch = Watch(Past(routed().frames))
    text = text_of(lambda: watch.expect_sequence(*[(SERVER, {"tcp.flags": "S"})] * 2, within=0))
    assert "step 2 was not seen" in text
    assert "too early" not in text


def test_that_nobody_talks_is_not_believed_before_the_time_is_up() -> None:
    text = text_of(lambda: Watch(Past(routed().frames, shown=0)).expect_conversations(CLIENT, [], within=1))
    assert "  not expected: tcp 10.0.0.1 > 10.0.0.2:80" in text
    assert Watch(Past([])).expect_conversations(CLIENT, [], within=0.01) == []


# Matches that break on other frames.


def payloads(*found: tuple[str, bytes]) -> Watch:
    scene = Scene()
    for point, payload in found:
        scene.see(point, ip(1, 2, SENT) / UDP(dport=443) / payload, outgoing=point == CLIENT)
    return Watch(Past(scene.frames))


def test_a_condition_that_cannot_be_asked_of_a_near_miss_is_not_met() -> None:
    match: Match = {"udp.dport": 80, "raw.load": lambda data: data.decode().startswith("GET")}
    text = text_of(lambda: payloads((SERVER, b"\xff\xfe")).expect(SERVER, match, within=0))
    assert "raises UnicodeDecodeError" in text


def test_a_match_that_breaks_on_frames_of_other_points_does_not_match_there() -> None:
    def fifth(raw: Raw) -> bool:
        value = raw.load[4]
        return bool(value == 1)

    assert "seen there: 0 frames" in text_of(lambda: payloads((CLIENT, b"ab")).expect(SERVER, fifth, within=0))


port = 70  # a name that matches below have, too


def test_a_name_given_within_a_match_is_not_another_s() -> None:
    watch = Watch(Past(routed().frames))
    text = text_of(lambda: watch.expect(SERVER, lambda tcp: (port := tcp.dport) > 79 and port < 80, within=0))
    assert "✓ port" not in text


def test_preparing_a_match_calls_nothing_of_the_user_s() -> None:
    values = iter([80, 81])
    matcher = matcher_of(lambda tcp: tcp.dport == next(values))
    assert matcher.matches(routed().frames[0])


# Many frames.

MANY = 2000


def echoes(scene: Scene) -> None:
    for _ in range(MANY // 4):
        scene.go(*[(point, ip(1, 2, SENT) / UDP(sport=7, dport=9) / b"x") for point in (CLIENT, SERVER)])
        scene.go(*[(point, ip(2, 1, SENT) / UDP(sport=9, dport=7) / b"x") for point in (SERVER, CLIENT)])


def first_lost(scene: Scene) -> None:
    datagram = IPv6() / UDP(dport=9) / b"x"
    scene.see(CLIENT, datagram, outgoing=True)
    for _ in range(MANY // 2):
        scene.go((CLIENT, datagram), (SERVER, datagram))


def bulk(scene: Scene) -> None:
    for number in range(MANY):
        segment = TCP(sport=4000, dport=80, seq=1 + number * 1400, ack=1, flags="A") / bytes(1400)
        scene.see(CLIENT, ip(1, 2, SENT) / segment, outgoing=True)


def one_way_flows(scene: Scene) -> None:
    for number in range(MANY):
        scene.see(CLIENT, ip(1, 2, SENT) / UDP(sport=1000 + number, dport=9), outgoing=True)


@pytest.mark.parametrize("make", [echoes, first_lost, bulk, one_way_flows])
def test_few_are_compared_for_the_ladder_of_many_frames(
    make: Callable[[Scene], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def counted(module: ModuleType, name: str) -> None:
        function = getattr(module, name)

        def counting(*words: object) -> object:
            calls[name] += 1
            return function(*words)

        monkeypatch.setattr(module, name, counting)

    for name in ("_is_lost", "_may_continue", "_strangeness", "is_piece_of"):
        counted(testbed.trace, name)
    counted(testbed.connections, "_kinship")
    scene = Scene()
    make(scene)
    connections(trace(scene.frames))
    assert calls.total() < 200 * MANY, calls
