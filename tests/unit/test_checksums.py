"""Which checksums of a frame are wrong, whole ones and those left to the device."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, UDPerror, fragment
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet

from testbed.checksums import checksum_errors
from testbed.frames import Frame

LINK = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
V4 = {"src": "10.0.0.1", "dst": "10.0.0.2"}
V6 = {"src": "2001:db8::1", "dst": "2001:db8::2"}


def errors_of(data: bytes, *, half: bool = False) -> list[str]:
    return checksum_errors(Frame("left:eth0", 0, data, outgoing=True, half_checksum=half))


RIGHT = {
    "tcp": IP(**V4) / TCP() / b"odd",
    "tcp v6": IPv6(**V6) / TCP() / b"odd",
    "udp": IP(**V4) / UDP() / b"even",
    "udp v6": IPv6(**V6) / UDP() / b"even",
    "udp without checksum": IP(**V4) / UDP(chksum=0) / b"x",
    "icmp": IP(**V4) / ICMP() / b"ping",
    "icmpv6": IPv6(**V6) / ICMPv6EchoRequest() / b"ping",
    "ip options": IP(**V4, options=b"\x01\x01\x01\x01") / UDP() / b"x",
    "extension header": IPv6(**V6) / IPv6ExtHdrHopByHop() / TCP() / b"x",
    "icmp error": IP(**V4) / ICMP(type=3) / IPerror(**V4) / UDPerror(),
    "udp, bytes behind the datagram": IP(**V4, len=31) / IP(bytes(IP(**V4) / UDP() / b"x"))[UDP] / b"yz",
    "another protocol": IP(**V4, proto=47) / b"whatever",
}


@pytest.mark.parametrize("packet", RIGHT.values(), ids=RIGHT.keys())
@pytest.mark.parametrize("link", [LINK, LINK / Dot1Q(vlan=7)], ids=["untagged", "vlan"])
def test_right_checksums_pass(packet: Packet, link: Packet) -> None:
    assert errors_of(bytes(link / packet) + b"\0\0\0") == []


WRONG = {
    "ip header": (IP(**V4) / UDP(), IP, "IPv4 header is 0x1234, should be {}"),
    "tcp": (IP(**V4) / TCP(), TCP, "TCP checksum is 0x1234, should be {}"),
    "tcp v6": (IPv6(**V6) / TCP() / b"odd", TCP, "TCP checksum is 0x1234, should be {}"),
    "udp": (IP(**V4) / UDP(), UDP, "UDP checksum is 0x1234, should be {}"),
    "udp v6": (IPv6(**V6) / UDP(), UDP, "UDP checksum is 0x1234, should be {}"),
    "icmp": (IP(**V4) / ICMP(), ICMP, "ICMP checksum is 0x1234, should be {}"),
    "icmpv6": (IPv6(**V6) / ICMPv6EchoRequest(), ICMPv6EchoRequest, "ICMPv6 checksum is 0x1234, should be {}"),
}


@pytest.mark.parametrize(("packet", "layer", "error"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_checksum_is_named_beside_the_right_one(packet: Packet, layer: type[Packet], error: str) -> None:
    field = "cksum" if layer is ICMPv6EchoRequest else "chksum"
    right = getattr(type(packet)(bytes(packet))[layer], field)
    wrong = packet.copy()
    setattr(wrong[layer], field, 0x1234)
    assert errors_of(bytes(LINK / wrong)) == [error.format(f"{right:#06x}")]


def test_the_embedded_header_of_an_icmp_error_is_judged() -> None:
    message = IP(**V4) / ICMP(type=3) / IPerror(**V4, chksum=0x1234) / UDPerror()
    right = f"{IP(bytes(IP(**V4) / UDP())).chksum:#06x}"
    assert errors_of(bytes(LINK / message)) == [f"embedded IPv4 header is 0x1234, should be {right}"]


BROKEN = {
    "udp v6 without checksum": (IPv6(**V6) / UDP(chksum=0), "UDP checksum 0, which IPv6 does not allow"),
    "cut header": (IP(**V4, proto=6) / b"123", "the TCP header is cut short"),
    "udp length below its header": (IP(**V4) / UDP(len=7, chksum=1), "the UDP header is cut short"),
}


@pytest.mark.parametrize(("packet", "error"), BROKEN.values(), ids=BROKEN.keys())
def test_a_packet_without_a_checksum_to_judge_is_an_error(packet: Packet, error: str) -> None:
    assert errors_of(bytes(LINK / packet)) == [error]


def test_a_packet_that_was_cut_is_an_error() -> None:
    data = bytes(LINK / IP(**V4) / UDP() / b"12345")
    assert errors_of(data[:-2]) == ["the IP header claims 2 bytes more than there are"]


# The pseudo-headers' sums, made by hand: addresses, protocol, length.
HALVES = {
    "tcp": (IP(**V4) / TCP(chksum=0x0A00 + 1 + 0x0A00 + 2 + 6 + 24) / b"data", []),
    "udp": (IP(**V4) / UDP(chksum=0x0A00 + 1 + 0x0A00 + 2 + 17 + 12) / b"data", []),
    "tcp v6": (IPv6(**V6) / TCP(chksum=(2 * (0x2001 + 0x0DB8) + 1 + 2 + 6 + 24)) / b"data", []),
    "whole instead": (IP(**V4) / UDP() / b"data", ["UDP half checksum is 0x12a7, should be 0x1420"]),
    "of another address": (
        IP(**V4) / UDP(chksum=0x0A00 + 1 + 0x0A00 + 3 + 17 + 12) / b"data",
        ["UDP half checksum is 0x1421, should be 0x1420"],
    ),
}


@pytest.mark.parametrize(("packet", "errors"), HALVES.values(), ids=HALVES.keys())
def test_a_half_checksum_is_the_sum_of_the_pseudo_header(packet: Packet, errors: list[str]) -> None:
    assert errors_of(bytes(LINK / packet), half=True) == errors


def test_what_one_frame_cannot_tell_is_not_judged() -> None:
    parts = [bytes(LINK / part) for part in fragment(IP(**V4) / UDP(chksum=1) / bytes(1600), 1000)]
    assert [errors_of(part) for part in parts] == [[], []]
    rerouted = IPv6(**V6) / IPv6ExtHdrRouting(addresses=["::1"], segleft=1) / UDP(chksum=1)
    assert errors_of(bytes(LINK / rerouted)) == []
