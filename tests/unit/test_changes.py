"""The names of fields that changes are told of."""

from __future__ import annotations

from itertools import permutations

from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, UDPerror
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6TimeExceeded, IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Dot1Q
from scenes import CLIENT, Scene

from testbed.changes import EMBEDDED, FIELDS, changes_between, check_change

V4, V6 = IP(src="10.0.0.1", dst="10.0.0.2", id=7), IPv6(src="fd00::1", dst="fd00::2")
PACKETS = (
    Dot1Q() / V4 / TCP(),
    V4 / UDP() / b"question",
    V4 / ICMP(type=8, id=1, seq=2),
    V4 / ICMP(type=11) / IPerror(src="10.0.0.3") / UDPerror(sport=4000),
    IP(src="10.0.0.1", dst="10.0.0.2", flags="MF", id=8) / UDP() / bytes(8),
    V6 / TCP(),
    V6 / UDP(),
    V6 / ICMPv6EchoRequest(id=1),
    V6 / ICMPv6TimeExceeded() / V6 / UDP(),
    V6 / IPv6ExtHdrFragment(m=1, id=9) / UDP() / bytes(8),
)


def test_all_that_may_change_has_a_name_and_no_name_is_of_what_does_not() -> None:
    scene = Scene()
    frames = [scene.see(CLIENT, packet, outgoing=True) for packet in PACKETS]
    names = {change.field for pair in permutations(frames, 2) for change in changes_between(*pair)}
    for name in names:
        check_change(name)
    assert {name.removeprefix(EMBEDDED) for name in names} == set(FIELDS)
    assert any(name.startswith(EMBEDDED) for name in names)
