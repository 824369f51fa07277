"""What is read off the bytes of a frame, and how it is told in a line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, TCPerror, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet

from testbed.checksums import checksum_errors
from testbed.frames import Frame, describe
from testbed.headers import IpPacket

LINK = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
V4 = {"src": "10.0.0.1", "dst": "10.0.0.2"}
V6 = {"src": "2001:db8::1", "dst": "2001:db8::2"}


def frame(packet: Packet, link: Packet | None = None) -> Frame:
    ethernet = LINK if link is None else link
    return Frame("left:eth0", 0, bytes(ethernet / packet), outgoing=True)


def packet_in(packet: Packet) -> IpPacket:
    read = frame(packet).ip
    assert read is not None
    return read


TOLD = {
    "tcp syn": (IP(**V4) / TCP(sport=4000, dport=80, seq=7), "10.0.0.1:4000 > 10.0.0.2:80 tcp SYN seq 7"),
    "tcp data": (
        IPv6(**V6) / TCP(sport=80, dport=4000, flags="PA", seq=1, ack=8) / b"12345",
        "[2001:db8::1]:80 > [2001:db8::2]:4000 tcp PSH ACK seq 1 ack 8, 5 bytes",
    ),
    "tcp options": (
        IP(**V4) / TCP(sport=4000, dport=80, seq=7, options=[("MSS", 1460)]),
        "10.0.0.1:4000 > 10.0.0.2:80 tcp SYN seq 7",
    ),
    "udp": (IP(**V4) / UDP(sport=1, dport=2) / b"abc", "10.0.0.1:1 > 10.0.0.2:2 udp 3 bytes"),
    "udp, link padding": (IP(**V4) / UDP(sport=1, dport=2, len=8), "10.0.0.1:1 > 10.0.0.2:2 udp 0 bytes"),
    "echo": (IP(**V4) / ICMP(id=7) / b"x", "10.0.0.1 > 10.0.0.2 icmp echo request"),
    "echo v6": (IPv6(**V6) / ICMPv6EchoRequest(), "2001:db8::1 > 2001:db8::2 icmpv6 echo request"),
    "port unreachable": (
        IP(**V4) / ICMP(type=3, code=3) / IPerror(src="10.0.0.2", dst="10.0.0.9") / TCPerror(),
        "10.0.0.1 > 10.0.0.2 icmp port unreachable, about 10.0.0.2",
    ),
    "time exceeded v6": (
        IPv6(**V6) / ICMPv6TimeExceeded() / IPv6(src="2001:db8::7", dst="::1") / UDP(),
        "2001:db8::1 > 2001:db8::2 icmpv6 time exceeded, about 2001:db8::7",
    ),
    "unnamed icmp": (IP(**V4) / ICMP(type=40, code=2), "10.0.0.1 > 10.0.0.2 icmp type 40 code 2"),
    "extension header": (
        IPv6(**V6) / IPv6ExtHdrHopByHop() / UDP(sport=1, dport=2),
        "[2001:db8::1]:1 > [2001:db8::2]:2 udp 0 bytes",
    ),
    "other protocol": (IP(**V4, proto=47) / b"1234", "10.0.0.1 > 10.0.0.2 protocol 47 4 bytes"),
    "arp": (ARP(), "02:00:00:00:00:01 > 02:00:00:00:00:02 arp, 42 bytes"),
}


@pytest.mark.parametrize(("packet", "line"), TOLD.values(), ids=TOLD.keys())
def test_a_frame_is_told_in_a_line(packet: Packet, line: str) -> None:
    assert describe(frame(packet)) == line


def test_vlan_tags_are_read_and_told() -> None:
    tagged = frame(IP(**V4) / UDP(sport=1, dport=2), LINK / Dot1AD(vlan=5) / Dot1Q(vlan=7))
    assert tagged.vlans == (5, 7)
    assert describe(tagged) == "vlan 5 vlan 7 10.0.0.1:1 > 10.0.0.2:2 udp 0 bytes"


def test_the_number_in_the_file_and_the_place_are_told() -> None:
    numbered = Frame("right:eth0", 0, frame(IP(**V4) / UDP(sport=1, dport=2)).data, outgoing=False, number=17)
    assert str(numbered) == "#17 right:eth0 in: 10.0.0.1:1 > 10.0.0.2:2 udp 0 bytes"


def test_echo_request_and_reply_have_the_identifier_as_ports() -> None:
    request = packet_in(IP(**V4) / ICMP(type=8, id=77))
    assert (request.source_port, request.destination_port) == (77, 77)


def test_the_first_fragment_has_ports_and_the_others_do_not() -> None:
    first, second = (packet_in(part) for part in fragment(IP(**V4, id=9) / UDP(sport=1, dport=2) / bytes(1600), 1000))
    assert (first.source_port, second.source_port) == (1, None)
    assert (first.layout.identification, second.layout.identification) == (9, 9)
    assert (first.layout.has_more_fragments, second.layout.has_more_fragments) == (True, False)


def test_an_ipv6_fragment_has_identification_and_offset() -> None:
    part = packet_in(IPv6(**V6) / IPv6ExtHdrFragment(id=5, offset=3, m=1, nh=17) / bytes(16))
    assert (part.layout.identification, part.layout.fragment_offset, part.source_port) == (5, 24, None)


def test_the_embedded_packet_is_read_though_cut_behind_eight_bytes_of_tcp() -> None:
    whole = bytes(IP(**V4) / ICMP(type=11) / IP(src="10.1.1.1", dst="10.2.2.2") / TCP(sport=7, dport=8))
    message = IP(whole[:-12])
    del message.len, message.chksum, message[ICMP].chksum
    icmp = packet_in(message).icmp
    assert icmp is not None
    assert icmp.embedded is not None
    assert (icmp.embedded.source, icmp.embedded.source_port, icmp.embedded.tcp) == ("10.1.1.1", 7, None)


def test_scapy_dissects_on_demand() -> None:
    assert frame(IP(**V4) / TCP(dport=81)).packet[TCP].dport == 81


@given(st.binary(max_size=120), st.sampled_from([b"\x08\x00", b"\x86\xdd", b"\x81\x00"]), st.booleans())
def test_no_bytes_raise(data: bytes, ethertype: bytes, half: bool) -> None:
    odd = Frame("left:eth0", 0, bytes(12) + ethertype + data, outgoing=False, half_checksum=half)
    assert describe(odd)
    assert checksum_errors(odd) is not None


VALID = [
    bytes(LINK / IP(**V4) / TCP() / b"data"),
    bytes(LINK / IP(**V4) / ICMP(type=3) / IPerror(**V4) / TCPerror()),
    bytes(LINK / IPv6(**V6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrFragment() / UDP() / b"data"),
    bytes(LINK / IPv6(**V6) / ICMPv6DestUnreach() / IPv6(**V6) / UDP()),
]


@given(st.sampled_from(VALID), st.integers(0, 200), st.integers(0, 200), st.integers(0, 255), st.booleans())
def test_no_damage_to_a_packet_raises(data: bytes, cut: int, place: int, value: int, half: bool) -> None:
    damaged = bytearray(data)
    damaged[place % len(data)] = value
    odd = Frame("left:eth0", 0, bytes(damaged[: len(data) - cut % len(data)]), outgoing=False, half_checksum=half)
    assert describe(odd)
    assert checksum_errors(odd) is not None


def test_errors_about_errors_about_errors_are_read_no_deeper_than_the_first() -> None:
    level = bytes(IP(src="10.0.0.1", dst="10.0.0.2", proto=1, len=0) / ICMP(type=3, code=1))
    packet = Frame("left:eth0", 1, bytes(12) + b"\x08\x00" + level * 2000, outgoing=False).ip
    assert packet is not None
    assert packet.icmp is not None
    assert packet.icmp.embedded is not None
    assert packet.icmp.embedded.icmp is not None
    assert packet.icmp.embedded.icmp.embedded is None
