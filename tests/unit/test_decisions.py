"""Engines' words, and the frames that they are about."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, UDPerror
from scapy.packet import Packet
from scenes import CLIENT, GATEWAY_IN, GATEWAY_OUT, SERVER, Scene

from testbed.decisions import Decision, decided, decision_of
from testbed.frames import Frame, ip_of

CLIENT_END, SERVER_END = ("10.0.0.1", 4000), ("10.0.1.2", 80)
FOREIGN_END, LOCAL_END = ("10.0.0.9", 4000), ("10.0.1.1", 80)


def end(value: tuple[str, int]) -> dict[str, str | int]:
    return {"address": value[0], "port": value[1]}


def word(
    frame: Frame,
    hook: str,
    before: tuple[tuple[str, int], tuple[str, int]],
    after: tuple[tuple[str, int], tuple[str, int]] | None = None,
    reason: str = "translated",
    delay: float = 0.0001,
) -> Decision:
    """What the gateway's engine would tell of a frame, `delay` seconds after the tap."""
    packet = ip_of(frame)
    flows = {
        name: None if ends is None else {"source": end(ends[0]), "destination": end(ends[1])}
        for name, ends in (("before", before), ("after", after))
    }
    event = {
        "event": "packet",
        "time": frame.time_ns / 1e9 + delay,
        "hook": hook,
        "in_interface": "eth0" if hook == "PREROUTING" else "",
        "out_interface": "" if hook == "PREROUTING" else "eth1",
        "length": packet.layout.end - packet.layout.start,
        "protocol": "tcp",
        "tcp_flags": packet.tcp.flags if packet.tcp else None if packet.icmp else 0,
        "is_error": packet.icmp is not None,
        "verdict": "drop" if after is None else "accept",
        "reason": reason,
        "detail": "",
        "by": "",
        **flows,
    }
    return decision_of("gateway", event)


def segment(source: tuple[str, int], destination: tuple[str, int], flags: str = "S", **fields: int) -> Packet:
    return IP(src=source[0], dst=destination[0]) / TCP(sport=source[1], dport=destination[1], flags=flags, **fields)


def test_a_packet_that_passes_a_node_has_the_words_of_both_hooks_at_both_its_frames() -> None:
    scene = Scene()
    sent, entered, left, _ = scene.go(
        (CLIENT, segment(CLIENT_END, SERVER_END)),
        (GATEWAY_IN, segment(CLIENT_END, SERVER_END)),
        (GATEWAY_OUT, segment(FOREIGN_END, SERVER_END)),
        (SERVER, segment(FOREIGN_END, SERVER_END)),
    )
    words = (
        word(entered, "PREROUTING", (CLIENT_END, SERVER_END), (CLIENT_END, SERVER_END), "no-mapping", 0.000002),
        word(entered, "POSTROUTING", (CLIENT_END, SERVER_END), (FOREIGN_END, SERVER_END), "sockref", 0.000004),
    )
    assert decided(scene.frames, words) == {entered.number: words, left.number: words}
    assert sent.number not in decided(scene.frames, words)


def test_a_redirected_packet_has_its_word_where_it_came_in() -> None:
    scene = Scene()
    entered = scene.see(GATEWAY_IN, segment(CLIENT_END, SERVER_END), outgoing=False)
    redirect = word(entered, "PREROUTING", (CLIENT_END, SERVER_END), (CLIENT_END, LOCAL_END), "redirect")
    assert decided(scene.frames, [redirect]) == {entered.number: (redirect,)}


def test_a_dropped_packet_has_its_word_and_no_frame_behind() -> None:
    scene = Scene()
    entered = scene.see(GATEWAY_IN, segment(CLIENT_END, SERVER_END), outgoing=False)
    dropped = word(entered, "PREROUTING", (CLIENT_END, SERVER_END), None, "rule-drop")
    assert decided(scene.frames, [dropped]) == {entered.number: (dropped,)}
    assert dropped.is_news


def test_equal_packets_have_their_words_in_the_order_of_time() -> None:
    scene = Scene()
    first, second = (scene.see(GATEWAY_IN, segment(CLIENT_END, SERVER_END, "A"), outgoing=False) for _ in range(2))
    words = [
        word(frame, "PREROUTING", (CLIENT_END, SERVER_END), (CLIENT_END, LOCAL_END), delay=0.00001)
        for frame in (first, second)
    ]
    assert decided(scene.frames, words) == {first.number: (words[0],), second.number: (words[1],)}


def test_what_was_told_long_before_a_packet_came_is_not_about_it() -> None:
    scene = Scene()
    entered = scene.see(GATEWAY_IN, segment(CLIENT_END, SERVER_END), outgoing=False)
    early = word(entered, "PREROUTING", (CLIENT_END, SERVER_END), (CLIENT_END, LOCAL_END), delay=-0.1)
    assert decided(scene.frames, [early]) == {}


OTHERS = {
    "flags": segment(CLIENT_END, SERVER_END, "A"),
    "length": segment(CLIENT_END, SERVER_END) / b"data",
    "port": segment(("10.0.0.1", 4001), SERVER_END),
    "protocol": IP(src="10.0.0.1", dst="10.0.1.2") / UDP(sport=4000, dport=80) / bytes(12),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_packet_that_differs_has_not_the_word_of_another(other: Packet) -> None:
    scene = Scene()
    entered = scene.see(GATEWAY_IN, segment(CLIENT_END, SERVER_END), outgoing=False)
    about = word(entered, "PREROUTING", (CLIENT_END, SERVER_END), (CLIENT_END, LOCAL_END), "redirect")
    assert decided([scene.see(GATEWAY_IN, other, outgoing=False)], [about]) == {}


def test_an_icmp_error_is_known_by_the_packet_that_it_is_about() -> None:
    scene = Scene()
    about = IPerror(src="10.0.0.1", dst="10.0.1.2") / UDPerror(sport=4000, dport=80)
    entered = scene.see(GATEWAY_IN, IP(src="10.0.9.9", dst="10.0.0.1") / ICMP(type=3, code=3) / about, outgoing=False)
    passed = word(entered, "PREROUTING", (CLIENT_END, SERVER_END), (CLIENT_END, SERVER_END), "icmp-passed")
    assert decided(scene.frames, [passed]) == {entered.number: (passed,)}
