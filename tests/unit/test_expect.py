"""Expectations on frames of the past: what passes, what fails, and what a failure says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

import pytest
from past import Past, routed, text_of
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1AD, Dot1Q
from scapy.packet import Packet
from scenes import CLIENT, GATEWAY_IN, GATEWAY_OUT, ROUTED, SENT, SERVER, Scene, ip

from testbed.expect import ExpectationError, Watch
from testbed.frames import Frame
from testbed.layers import MatchError
from testbed.matching import Match, matcher_of

# Matches.

V4, V6 = IP(src="10.0.0.1", dst="10.0.0.2"), IPv6(src="fd00::1", dst="fd00::2")


def annotated(packet: IP, header: TCP) -> bool:
    return bool(packet.src == "10.0.0.1" and header.dport == 80)


MATCHES: dict[str, tuple[Match, Packet, bool]] = {
    "nothing asked": (None, V4 / UDP(), True),
    "a field": ({"ip.src": "10.0.0.1"}, V4 / UDP(), True),
    "a field of another value": ({"ip.src": "10.0.0.9"}, V4 / UDP(), False),
    "one of several": ({"tcp.dport": {80, 443}}, V4 / TCP(dport=443), True),
    "a range": ({"udp.dport": range(33434, 33534)}, V4 / UDP(dport=33500), True),
    "behind a range": ({"udp.dport": range(33434, 33534)}, V4 / UDP(dport=33534), False),
    "a condition": ({"ip.ttl": lambda hops: hops < 64}, V4 / UDP(), False),
    "flags": ({"tcp.flags": "SA"}, V4 / TCP(flags="SA"), True),
    "one of several flags": ({"tcp.flags": ["S", "SA"]}, V4 / TCP(flags="SA"), True),
    "a layer that is not there": ({"tcp.dport": 80}, V4 / UDP(dport=80), False),
    "either version, 4": ({"net.dst": "10.0.0.2"}, V4 / UDP(), True),
    "either version, 6": ({"net.dst": "fd00::2"}, V6 / UDP(), True),
    "an address written long": ({"ipv6.dst": "fd00:0:0::2"}, V6 / UDP(), True),
    "one of several addresses written long": ({"net.dst": {"fd00:0:0::2"}}, V6 / UDP(), True),
    "an address that is no text": ({"ip.dst": IPv4Address("10.0.0.2")}, V4 / UDP(), True),
    "a link address in capitals": ({"ether.src": "02:00:00:00:00:01".upper()}, V4 / UDP(), True),
    "payload": ({"raw.load": b"hello"}, V4 / UDP(dport=9) / b"hello", True),
    "a port in a tunnel": ({"tcp.dport": 80}, V4 / IP() / TCP(dport=80), True),
    "an address in a tunnel of the other version": ({"ipv6.src": "fd00::1"}, V4 / V6 / UDP(), True),
    "the outer of two tags": ({"vlan.vlan": 10}, Dot1AD(vlan=10) / Dot1Q(vlan=20) / V4, True),
    "an address as an object": ({"net.dst": IPv6Address("fd00::2")}, V6 / UDP(), True),
    "payload as text": ({"raw.load": "hello"}, V4 / UDP(dport=9) / b"hello", True),
    "one of several payloads": ({"raw.load": ["bye", "hello"]}, V4 / UDP(dport=9) / b"hello", True),
    "a number by its name": ({"ip.proto": "udp"}, V4 / UDP(), True),
    "flags in another order": ({"tcp.flags": "AS"}, V4 / TCP(flags="SA"), True),
    "the frame": ({"frame.outgoing": False}, V4 / UDP(), False),
    "a lambda": (lambda ip, tcp: ip.dst == "10.0.0.2" and tcp.flags.S, V4 / TCP(), True),
    "a lambda with a layer that is not there": (lambda ip, tcp: True, V4 / UDP(), False),
    "a lambda on either version": (lambda net, udp: net.src == "fd00::1", V6 / UDP(), True),
    "annotations": (annotated, V4 / TCP(dport=80), True),
    "annotations, other port": (annotated, V4 / TCP(dport=81), False),
}


@pytest.mark.parametrize(("match", "packet", "expected"), MATCHES.values(), ids=MATCHES.keys())
def test_a_match(match: Match, packet: Packet, expected: bool) -> None:
    frame = Scene().see(CLIENT, packet, outgoing=True)
    matcher = matcher_of(match)
    assert matcher.matches(frame) is expected
    assert all(verdict.is_met for verdict in matcher.judge(frame)) is expected


def no_return(ip: IP) -> None:
    assert ip.src


def of_number(packet: int) -> bool:
    return packet > 0


def of_packet(packet: Packet) -> bool:
    return bool(packet)


def by_position(ip: IP, /) -> bool:
    return bool(ip)


NONSENSE: dict[str, tuple[Match, str]] = {
    "misspelt layer": ({"tpc.dport": 80}, "there is no layer 'tpc', .*did you mean tcp?"),
    "misspelt field": ({"tcp.dprot": 80}, "tcp has no field 'dprot', .*did you mean dport?"),
    "no field": ({"tcp": 80}, "'tcp' names no field"),
    "unknown parameter": (lambda foo: True, "there is no layer 'foo'"),
    "no parameter": (lambda: True, "it has no parameters"),
    "an annotation that is no layer": (of_number, "parameter 'packet': <class 'int'> is no Scapy layer"),
    "none": ({"tcp.dport": None}, "tcp.dport is never None"),
    "one of nothing": ({"tcp.dport": set()}, "tcp.dport: there is nothing in set()"),
    "a network": ({"ip.src": "10.0.0.0/24"}, r"ip.src is never '10.0.0.0/24': .*does not appear to be"),
    "a name": ({"net.dst": ["10.0.0.1", "server"]}, "net.dst is never 'server'"),
    "no flags": ({"tcp.flags": "SYN"}, "tcp.flags is never 'SYN'"),
    "ids that are no list of them": ({"frame.vlans": (5, 7)}, "frame.vlans is never 5, but a value of type tuple"),
    "any layer": (of_packet, "parameter 'packet': name the layer"),
    "by position": (by_position, "parameter 'ip': layers are given by name"),
    "many": (lambda *ip: True, "parameter 'ip': layers are given by name"),
    "a number as text": ({"tcp.dport": "80"}, r"tcp.dport is never '80'"),
    "one of several as text": ({"tcp.dport": {443, "80"}}, r"tcp.dport is never '80'"),
    "a number that is too large": ({"udp.dport": 70000}, r"udp.dport is never 70000"),
    "a number as address": ({"ip.src": 80}, r"ip.src is never 80"),
    "an address of the other family": ({"ip.src": "fd00::1"}, r"ip.src is never 'fd00::1': that is an address of IPv6"),
    "no link address": ({"ether.dst": "02:00"}, r"ether.dst is never '02:00'"),
    "neither": (5, "a match is a mapping of fields or a function, not 5"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize(("match", "message"), NONSENSE.values(), ids=NONSENSE.keys())
def test_a_match_that_makes_no_sense_is_refused_even_when_nothing_is_seen(match: Match, message: str) -> None:
    with pytest.raises(MatchError, match=message):
        Watch(Past([])).expect_none(SERVER, match)


def test_a_long_value_is_cut_in_what_a_failure_says() -> None:
    text = text_of(lambda: Watch(Past(routed().frames)).expect(SERVER, {"raw.load": bytes(60_000)}, within=0.01))
    assert len(text) < 10_000
    assert "… (240003 characters)" in text


def test_no_frame_is_looked_at_twice() -> None:
    frames = routed().frames
    looked: list[int] = []

    def seen(frame: Frame) -> bool:
        looked.append(frame.number)
        return False

    with pytest.raises(ExpectationError):
        Watch(Past(frames, shown=1)).expect(SERVER, seen, within=0.05)
    at_server = [frame.number for frame in frames if frame.point == SERVER]
    assert looked[: len(at_server)] == at_server


def test_a_match_that_forgets_to_return_is_an_error() -> None:
    with pytest.raises(MatchError, match="is there a `return` missing"):
        Watch(Past(routed().frames)).expect_none(SERVER, no_return, during=0)


async def later(tcp: TCP) -> bool:
    return bool(tcp)


ALWAYS_TRUE: dict[str, Match] = {
    "a tuple": lambda ip, tcp: (ip.src == "10.0.0.9", tcp.dport == 81),
    "a method that was not called": lambda tcp: tcp.haslayer,
    "a generator": lambda tcp: (tcp.dport == port for port in (81,)),
    "a coroutine": later,
    "a condition that was not called": {"tcp.dport": lambda port: str(port).isdigit},
}


@pytest.mark.parametrize("match", ALWAYS_TRUE.values(), ids=ALWAYS_TRUE.keys())
def test_a_match_that_is_always_true_is_an_error(match: Match) -> None:
    with pytest.raises(MatchError, match="which is always true"):
        Watch(Past(routed().frames)).expect(SERVER, match, within=0)


def test_a_condition_that_forgets_to_return_is_an_error() -> None:
    with pytest.raises(MatchError, match="is there a `return` missing"):
        Watch(Past(routed().frames)).expect_none(SERVER, {"tcp.dport": lambda port: None}, during=0)


def test_an_error_in_a_match_names_the_frame() -> None:
    with pytest.raises(AttributeError) as caught:
        Watch(Past(routed().frames)).expect(SERVER, lambda tcp: tcp.nonsense == 1)
    assert caught.value.__notes__ == [
        "raised by the match for #4 server:eth0 in: 10.0.0.3:4000 > 10.0.0.2:80 tcp SYN seq 0"
    ]


# Seen.


def test_frames_that_match_are_returned_and_noted_in_the_file() -> None:
    past = Past(routed().frames)
    found = Watch(past).expect(SERVER, {"tcp.dport": 80})
    assert [frame.number for frame in found] == [4, 12]
    assert past.comments == [
        (number, "satisfied: expected at server:eth0 within 2 s: 1 frame or more with tcp.dport 80")
        for number in (4, 12)
    ]
    assert past.verified == [SERVER]


def test_frames_that_come_later_are_waited_for() -> None:
    past = Past(routed().frames, shown=0)
    assert len(Watch(past).expect(SERVER, {"tcp.flags": "R"})) == 1


def test_what_was_before_the_mark_does_not_count() -> None:
    past = Past(routed().frames, shown=4)
    watch = Watch(past)
    watch.mark()
    assert [frame.number for frame in watch.expect(SERVER, {"tcp.dport": 80})] == [12]
    assert [frame.number for frame in watch.expect(SERVER, {"tcp.dport": 80}, since=0)] == [4, 12]


@pytest.mark.parametrize("count", [2, range(1, 3), range(2, 9)], ids=["exactly", "range to", "range from"])
def test_a_count_that_holds(count: int | range) -> None:
    assert len(Watch(Past(routed().frames)).expect(SERVER, {"tcp.dport": 80}, count=count)) == 2


@pytest.mark.parametrize(
    ("count", "wanted", "seen"),
    [
        (1, "exactly 1 frame with", "seen there: 2 frames of that kind"),
        (3, "exactly 3 frames with", "seen there: 4 frames, 2 of them as expected"),
        (range(3, 5), "3 to 4 frames with", "seen there: 4 frames, 2 of them as expected"),
    ],
    ids=["too many", "too few", "below a range"],
)
def test_a_count_that_does_not_hold(count: int | range, wanted: str, seen: str) -> None:
    watch = Watch(Past(routed().frames))
    text = text_of(lambda: watch.expect(SERVER, {"tcp.dport": 80}, count=count, within=0.05))
    assert wanted in text
    assert seen in text


@pytest.mark.parametrize("count", [0, -1, range(3), range(3, 3)])
def test_a_count_that_says_nothing_is_refused(count: int | range) -> None:
    with pytest.raises(ValueError, match="use expect_none"):
        Watch(Past([])).expect(SERVER, count=count)


@pytest.mark.parametrize("count", [range(1, 9, 2), 2.5, "3"])
def test_a_count_that_is_none_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="give a"):
        Watch(Past(routed().frames)).expect(CLIENT, count=count)


def test_the_future_and_a_sequence_of_nothing_are_refused() -> None:
    watch = Watch(Past(routed().frames))
    with pytest.raises(ValueError, match="is in the future"):
        watch.expect_none(CLIENT, since=watch.mark() + 1)
    with pytest.raises(ValueError, match="at least one step"):
        watch.expect_sequence()


def test_a_failure_shows_expected_beside_seen_and_the_nearest_misses_field_by_field() -> None:
    watch = Watch(Past(routed().frames))
    text = text_of(lambda: watch.expect(SERVER, {"ip.src": "10.0.0.1", "tcp.dport": 80, "tcp.flags": "S"}, within=0.05))
    assert text.splitlines()[:14] == [
        "expected at server:eth0 within 0.05 s: 1 frame or more with ip.src 10.0.0.1, tcp.dport 80, tcp.flags S",
        "seen there: 4 frames, 0 of them as expected",
        "the nearest misses:",
        "  +0.030 ms #4 server:eth0 in: 10.0.0.3:4000 > 10.0.0.2:80 tcp SYN seq 0",
        "      ✗ ip.src     10.0.0.3   expected: 10.0.0.1",
        "      ✓ tcp.dport  80",
        "      ✓ tcp.flags  S",
        "  +0.110 ms #12 server:eth0 in: 10.0.0.3:4000 > 10.0.0.2:80 tcp PSH ACK seq 1 ack 501, 5 bytes",
        "      ✗ ip.src     10.0.0.3   expected: 10.0.0.1",
        "      ✓ tcp.dport  80",
        "      ✗ tcp.flags  PA   expected: S",
        "such frames were seen at client:eth0: 1, the first +0.000 ms "
        "#1 client:eth0 out: 10.0.0.1:4000 > 10.0.0.2:80 tcp SYN seq 0",
        "such frames were seen at gateway:eth0: 1, the first +0.010 ms "
        "#2 gateway:eth0 in: 10.0.0.1:4000 > 10.0.0.2:80 tcp SYN seq 0",
        "",
    ]


def test_a_failure_shows_the_ladder_of_the_connection_and_where_the_file_is() -> None:
    watch = Watch(Past(routed().frames))
    text = text_of(lambda: watch.expect(SERVER, {"tcp.dport": 81, "ip.src": "10.0.0.3"}, within=0.05))
    assert "tcp 10.0.0.1:4000 → 10.0.0.2:80: 4 packets\n" in text
    assert "→ SYN                         ●───" in text
    assert "① src 10.0.0.1" in text
    assert text.endswith("\ncapture file: /run/lab/capture.pcapng")


def test_a_failure_takes_a_lambda_apart() -> None:
    port = 81
    watch = Watch(Past(routed().frames))
    text = text_of(
        lambda: watch.expect(SERVER, lambda ip, tcp: ip.src == "10.0.0.3" and tcp.dport == port, within=0.05)
    )
    assert "1 frame or more with ip.src is '10.0.0.3', tcp.dport is 81\n" in text
    assert "      ✓ ip.src     10.0.0.3\n      ✗ tcp.dport  80   expected: is 81\n" in text


def test_a_failure_with_nothing_as_expected_shows_what_there_was_instead() -> None:
    scene = routed()
    watch = Watch(Past(scene.frames))
    text = text_of(lambda: watch.expect(SERVER, {"tcp.dport": 81}, within=0.05))
    assert "tcp 10.0.0.1:4000 → 10.0.0.2:80: 4 packets\n" in text  # the only one: it must have been meant
    scene.see(SERVER, ip(1, 2, SENT) / TCP(dport=8080), outgoing=False)
    lines = text_of(lambda: watch.expect(SERVER, {"tcp.dport": 81}, within=0.05)).splitlines()
    assert lines[1:5] == [
        "seen there: 5 frames, 0 of them as expected",
        "the nearest misses:",
        "  +0.030 ms #4 server:eth0 in: 10.0.0.3:4000 > 10.0.0.2:80 tcp SYN seq 0",
        "      ✗ tcp.dport  80   expected: 81",
    ]
    assert "  server:eth0: tcp 10.0.0.1 > 10.0.0.2:8080, tcp 10.0.0.3 > 10.0.0.2:80" in lines


def test_frames_of_the_kind_are_nearer_than_others() -> None:
    scene = Scene()
    scene.see(SERVER, ip(1, 2, SENT) / UDP(dport=9), outgoing=False)
    scene.see(SERVER, ip(1, 2, SENT) / TCP(dport=80), outgoing=False)
    watch = Watch(Past(scene.frames))
    text = text_of(lambda: watch.expect(SERVER, lambda ip, tcp: ip.src == "9.9.9.9" and tcp.dport == 81, within=0.05))
    misses = [line for line in text.splitlines() if "server:eth0 " in line and " ms #" in line]
    assert [" tcp " in line for line in misses] == [True, False]
    assert "      ✗ tcp.dport  80   expected: is 81\n" in text
    assert "      ✗ tcp  not there   expected: present\n" in text


def test_a_failure_with_nothing_near_shows_who_talked_to_whom() -> None:
    watch = Watch(Past(routed().frames))
    lines = text_of(lambda: watch.expect(SERVER, {"udp.dport": 53}, within=0.05)).splitlines()
    assert lines[1:] == [
        "seen there: 4 frames, 0 of them as expected",
        "none of them came near",
        "",
        "conversations, by point:",
        "  client:eth0: tcp 10.0.0.1 > 10.0.0.2:80",
        "  gateway:eth0: tcp 10.0.0.1 > 10.0.0.2:80",
        "  gateway:eth1: tcp 10.0.0.3 > 10.0.0.2:80",
        "  server:eth0: tcp 10.0.0.3 > 10.0.0.2:80",
        "",
        "capture file: /run/lab/capture.pcapng",
    ]


def test_a_failure_can_be_read_by_programs() -> None:
    past = Past(routed().frames)
    with pytest.raises(ExpectationError) as caught:
        Watch(past).expect(SERVER, {"tcp.dport": 81, "ip.src": "10.0.0.3"}, within=0.05)
    error = caught.value
    assert error.path == past.path
    assert error.connection is not None
    assert [frame.number for frame in error.nearest] == [4, 12]
    assert {comment.split(":")[0] for _, comment in past.comments} == {"did not satisfy"}


# Not seen.


def test_absence_holds_on_a_capture_that_was_verified() -> None:
    past = Past(routed().frames)
    Watch(past).expect_none(SERVER, {"ip.src": "10.0.0.1"}, during=0.05)
    assert set(past.verified) == {SERVER}


def test_absence_fails_at_once_with_what_was_seen() -> None:
    watch = Watch(Past(routed().frames))
    text = text_of(lambda: watch.expect_none(SERVER, {"tcp.flags": "S"}, during=60))
    assert text.splitlines()[:3] == [
        "expected at server:eth0 for 60 s: no frame with tcp.flags S",
        "seen there: 1 frame of that kind",
        "  +0.030 ms #4 server:eth0 in: 10.0.0.3:4000 > 10.0.0.2:80 tcp SYN seq 0",
    ]


# Order.

SYN, DATA, RESET = {"tcp.flags": "S"}, {"tcp.flags": "PA"}, {"tcp.flags": "R"}


def test_a_sequence_over_several_points() -> None:
    found = Watch(Past(routed().frames)).expect_sequence((CLIENT, SYN), (SERVER, SYN), (SERVER, DATA), (CLIENT, RESET))
    assert [frame.number for frame in found] == [1, 4, 12, 16]


def test_a_sequence_in_the_wrong_order_names_the_step() -> None:
    watch = Watch(Past(routed().frames))
    text = text_of(lambda: watch.expect_sequence((CLIENT, DATA), (SERVER, SYN), within=0.05))
    assert text.splitlines()[:6] == [
        "expected within 0.05 s: at client:eth0 tcp.flags PA; then at server:eth0 tcp.flags S",
        "step 2 was not seen: at server:eth0 tcp.flags S",
        "seen there: 2 frames, 0 of them as expected",
        "the nearest misses:",
        "  +0.110 ms #12 server:eth0 in: 10.0.0.3:4000 > 10.0.0.2:80 tcp PSH ACK seq 1 ack 501, 5 bytes",
        "      ✗ tcp.flags  PA   expected: S",
    ]
    assert "such frames were seen there too early:\n  +0.030 ms #4 server:eth0 in: 10.0.0.3:4000 >" in text
    assert "tcp 10.0.0.1:4000 → 10.0.0.2:80: 4 packets\n" in text


# The same packet.


def test_the_same_packet_with_only_these_fields_changed() -> None:
    pairs = Watch(Past(routed().frames)).expect_same({"tcp.dport": 80}, at=(CLIENT, SERVER), changed={"ip.src"})
    assert [(before.number, after.number) for before, after in pairs] == [(1, 4), (9, 12)]


def test_the_same_packet_is_waited_for() -> None:
    pairs = Watch(Past(routed().frames, shown=0)).expect_same(
        {"tcp.dport": 80}, at=(CLIENT, SERVER), changed={"ip.src"}
    )
    assert [(before.number, after.number) for before, after in pairs] == [(1, 4)]


class Flowing(Past):
    """A source in which there is a frame more each time somebody looks."""

    def settle(self) -> None:
        self._shown = min(self._shown + 1, len(self._frames))

    def verify(self, points: Iterable[str] | None = None) -> None:
        self.settle()


def test_a_further_packet_on_its_way_does_not_matter() -> None:
    flowing = Flowing(routed().frames, shown=7)  # with the next: all of two packets, then one at its first point
    pairs = Watch(flowing).expect_same({"tcp.dport": 80}, at=(CLIENT, SERVER), changed={"ip.src"}, within=0.05)
    assert [(before.number, after.number) for before, after in pairs] == [(1, 4)]


def test_a_last_step_that_comes_when_time_is_up_is_no_error_of_another_kind() -> None:
    frames = routed().frames[:4]
    flowing = Flowing(frames, shown=1)
    with pytest.raises(ExpectationError, match="step 2 was not seen"):
        Watch(flowing).expect_sequence((CLIENT, SYN), (SERVER, SYN), within=-1)


def test_a_hop_limit_may_change_of_itself() -> None:
    scene = Scene()
    before, after = ip(1, 2, SENT) / UDP(dport=9), ip(1, 2, ROUTED) / UDP(dport=9)
    scene.go((CLIENT, before), (GATEWAY_IN, before), (GATEWAY_OUT, after), (SERVER, after))
    assert len(Watch(Past(scene.frames)).expect_same(at=(CLIENT, SERVER))) == 1


SAME_BROKEN: dict[str, tuple[set[str], str]] = {
    "an unwanted change": (set(), "changed: ip.src 10.0.0.1→10.0.0.3"),
    "a change that is missing": ({"ip.src", "tcp.sport"}, "not changed: tcp.sport"),
    "both": ({"tcp.sport"}, "changed: ip.src 10.0.0.1→10.0.0.3; not changed: tcp.sport"),
}


@pytest.mark.parametrize(("changed", "line"), SAME_BROKEN.values(), ids=SAME_BROKEN.keys())
def test_another_change_than_wanted_fails(changed: set[str], line: str) -> None:
    watch = Watch(Past(routed().frames))
    text = text_of(lambda: watch.expect_same(SYN, at=(CLIENT, SERVER), changed=changed, within=0.05))
    assert text.splitlines()[1:3] == [
        "  #1 client:eth0 out: 10.0.0.1:4000 > 10.0.0.2:80 tcp SYN seq 0",
        f"      {line}",
    ]


CHANGED_WRONG = {
    "a slip": ({"tcp.dprt"}, "'tcp.dprt' is no field that changes are told of; did you mean tcp.dport?"),
    "of what an error is about": ({"embedded udp.sprt"}, "did you mean embedded udp.sport?"),
    "a field that follows from others": ({"tcp.chksum"}, "'tcp.chksum' is no field"),
    "nothing near": ({"x"}, "there are vlan, ip.src, "),
}


@pytest.mark.parametrize(("changed", "complaint"), CHANGED_WRONG.values(), ids=CHANGED_WRONG)
def test_a_field_that_cannot_change_is_an_error_before_anything_is_waited_for(
    changed: set[str], complaint: str
) -> None:
    with pytest.raises(MatchError, match=re.escape(complaint)):
        Watch(Past(routed().frames)).expect_same(SYN, at=(CLIENT, SERVER), changed=changed)


def test_one_name_where_several_are_wanted_is_not_taken_for_its_letters() -> None:
    with pytest.raises(TypeError, match="give a set of names"):
        Watch(Past(routed().frames)).expect_same(SYN, at=(CLIENT, SERVER), changed="ip.src")


def test_a_packet_that_does_not_arrive_fails() -> None:
    scene = Scene()
    scene.go((CLIENT, ip(1, 2, SENT) / UDP(dport=9)), (GATEWAY_IN, ip(1, 2, SENT) / UDP(dport=9)))
    text = text_of(lambda: Watch(Past(scene.frames)).expect_same(at=(CLIENT, SERVER), within=0.05))
    assert "      was not seen at server:eth0, last at gateway:eth0" in text.splitlines()


def test_nothing_that_could_be_the_same_fails() -> None:
    text = text_of(lambda: Watch(Past(routed().frames)).expect_same({"udp.dport": 9}, at=(CLIENT, SERVER), within=0.05))
    assert "seen there: 4 frames, 0 of them as expected" in text


# Conversations.


def test_who_talked_to_whom() -> None:
    (one,) = Watch(Past(routed().frames)).conversations(CLIENT)
    assert str(one) == "tcp 10.0.0.1 > 10.0.0.2:80"
    assert (one.initiator_port, one.packets, one.payload) == (4000, (2, 2), (5, 0))


def test_exactly_these_conversations() -> None:
    watch = Watch(Past(routed().frames))
    watch.expect_conversations(CLIENT, ["tcp 10.0.0.1 > 10.0.0.2:80"])
    text = text_of(lambda: watch.expect_conversations(SERVER, ["tcp 10.0.0.1 > 10.0.0.2:80"], within=0.05))
    assert text.splitlines()[:3] == [
        "expected at server:eth0 within 0.05 s: the conversations tcp 10.0.0.1 > 10.0.0.2:80",
        "  missing: tcp 10.0.0.1 > 10.0.0.2:80",
        "  not expected: tcp 10.0.0.3 > 10.0.0.2:80",
    ]


def test_the_initiator_is_known_though_its_syn_was_not_seen() -> None:
    scene = Scene()
    scene.see(CLIENT, ip(2, 1, SENT) / TCP(sport=80, dport=4000, flags="SA"), outgoing=False)
    assert [str(one) for one in Watch(Past(scene.frames)).conversations(CLIENT)] == ["tcp 10.0.0.1 > 10.0.0.2:80"]
