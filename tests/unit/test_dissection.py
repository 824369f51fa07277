"""Frames, field by field."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, IPOption_Router_Alert, UDPerror
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoRequest, IPerror6, IPv6
from scapy.layers.l2 import Dot1Q
from scapy.packet import Packet, Raw
from scenes import CLIENT, Scene

from testbed.changes import changes_between
from testbed.dissection import dissect
from testbed.frames import Frame

DATAGRAM = IP(src="10.0.0.1", dst="10.0.0.2", id=7) / UDP(sport=4000, dport=53) / b"question"
SEGMENT = IPv6(src="fd00::1", dst="fd00::2") / TCP(sport=4000, dport=80) / b"GET /"
ABOUT = IPerror(src="10.0.0.1", dst="10.0.0.2", id=7) / UDPerror(sport=4000, dport=53)
ERROR = IP(src="10.0.0.9", dst="10.0.0.1", id=7) / ICMP(type=3, code=3) / ABOUT
ECHO = IPv6(src="fd00::1", dst="fd00::2") / ICMPv6EchoRequest(id=1, data=b"ping")
TAGGED = Dot1Q(vlan=7) / DATAGRAM
TUNNEL = IP(src="10.0.0.1", dst="10.0.0.2", id=7, ttl=64) / IP(src="10.9.0.1", dst="10.9.0.2", ttl=64) / UDP(dport=9)
ABOUT6 = IPerror6(src="fd00::1", dst="fd00::2") / UDPerror(sport=4000, dport=53) / b"question"
ERROR6 = IPv6(src="fd00::9", dst="fd00::1") / ICMPv6DestUnreach(code=4) / ABOUT6


def frame(packet: Packet) -> Frame:
    return Scene().see(CLIENT, packet, outgoing=True)


def changed(packet: Packet, **fields: object) -> Packet:
    """A copy with some fields of `Layer_field` set."""
    copy = packet.copy()
    for name, value in fields.items():
        layer, _, field = name.partition("_")
        setattr(copy[layer], field, value)
    return copy


CASES = {
    "nothing": (DATAGRAM, DATAGRAM, set()),
    "source": (DATAGRAM, changed(DATAGRAM, IP_src="10.0.0.3"), {"src"}),
    "ports": (DATAGRAM, changed(DATAGRAM, UDP_sport=1, UDP_dport=2), {"sport", "dport"}),
    "payload": (DATAGRAM, changed(DATAGRAM, Raw_load=b"Question"), {"load"}),
    "IPv6 and TCP": (SEGMENT, changed(SEGMENT, IPv6_dst="fd00::3", TCP_seq=9), {"dst", "seq"}),
    "options": (DATAGRAM, changed(DATAGRAM, IP_options=[IPOption_Router_Alert()]), {"\\options   \\"}),
    "echo": (ECHO, changed(ECHO, ICMPv6EchoRequest_id=2, ICMPv6EchoRequest_data=b"pong"), {"id", "data"}),
    "VLAN": (TAGGED, changed(TAGGED, Dot1Q_vlan=8), {"vlan"}),
    "outer of two headers": (TUNNEL, changed(TUNNEL, IP_src="10.0.0.3", IP_ttl=63), {"src", "ttl"}),
    "what an ICMPv6 error is about": (
        ERROR6,
        changed(ERROR6, IPerror6_src="fd00::9", UDPerror_sport=1, Raw_load=b"Question"),
        {"src", "sport", "load"},
    ),
    "what an error is about": (ERROR, ERROR.__class__(bytes(ERROR).replace(b"\x0f\xa0", b"\x0f\xa1")), {"sport"}),
}


@pytest.mark.parametrize(("before", "after", "marked"), CASES.values(), ids=CASES)
def test_the_fields_that_changed_are_marked_and_no_others(before: Packet, after: Packet, marked: set[str]) -> None:
    old, new = frame(before), frame(after)
    lines = dissect(new, changes_between(old, new)).lines
    assert sorted(line.text.split("=")[0].strip(" |") for line in lines if line.is_changed) == sorted(marked)


def test_long_lines_and_many_bytes_are_cut_and_it_says_so() -> None:
    found = dissect(frame(IP() / UDP() / Raw(b"a" * 1000)))
    (load,) = [line.text for line in found.lines if "load" in line.text]
    assert len(load) < 400
    assert load.endswith(" characters more")
    assert found.rest == len(found.frame.data) - 256
    assert len(found.dump.splitlines()) == 256 / 16


@pytest.mark.parametrize("data", [b"", b"\x00" * 13, bytes(range(60))], ids=["empty", "cut short", "nonsense"])
def test_what_is_no_packet_is_still_told(data: bytes) -> None:
    assert dissect(Frame(CLIENT, 1, data, True)).lines
