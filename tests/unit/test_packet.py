"""The parser: every way to be malformed, and no way to raise."""

from __future__ import annotations

from typing import assert_never

import pytest
from builders import endpoint, flow, icmp_error, packet
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.packet import Raw

from nfq_engine.core.packet import (
    IcmpError,
    Malformation,
    Malformed,
    Protocol,
    Segment,
    Unrelated,
    claimed_length,
    parse,
)
from nfq_engine.core.rewrite import Rewrite, patch_icmp_error, patch_segment

TCP4 = packet(flow(endpoint("client", 4000), endpoint("server", 80)))
UDP4 = packet(flow(endpoint("client", 4000), endpoint("server", 80), Protocol.UDP), payload=b"hello")
TCP6 = packet(flow(endpoint("client", 4000, 6), endpoint("server", 80, 6)))
UDP6 = packet(flow(endpoint("client", 4000, 6), endpoint("server", 80, 6), Protocol.UDP), payload=b"hello")


def changed(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes((value,)) + data[at + 1 :]


def unreachable(about: bytes) -> bytes:
    return bytes(IP(proto=1) / Raw(b"\3\3" + b"\0" * 6 + about))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", list(Protocol), ids=lambda protocol: protocol.name)
def test_flow_and_key_are_read_from_where_they_stand(version: int, protocol: Protocol) -> None:
    expected = flow(endpoint("client", 4000, version), endpoint("server", 80, version), protocol)
    data = packet(expected)
    parsed = parse(data)
    assert isinstance(parsed, Segment)
    assert parsed.flow == expected
    assert data[12:24] == expected.key if version == 4 else data[8:44] == expected.key
    assert expected.inverse().inverse() == expected


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(IP(src="10.0.0.1", dst="10.0.1.2", options=[IPOption_NOP()] * 4), id="ipv4-options"),
        pytest.param(IPv6(src="::1", dst="::2") / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt(), id="ipv6-extensions"),
    ],
)
def test_transport_is_found_behind_options(layers: IP | IPv6) -> None:
    parsed = parse(bytes(layers / UDP(sport=4000, dport=80) / b"x"))
    assert isinstance(parsed, Segment)
    assert (parsed.flow.source.port, parsed.flow.destination.port) == (4000, 80)


MALFORMED = [
    pytest.param(b"", Malformation.EMPTY, id="nothing"),
    pytest.param(changed(TCP4, 0, 0x55), Malformation.BAD_VERSION, id="version-5"),
    pytest.param(TCP4[:19], Malformation.SHORT_IP_HEADER, id="ipv4-cut"),
    pytest.param(TCP6[:39], Malformation.SHORT_IP_HEADER, id="ipv6-cut"),
    pytest.param(changed(TCP4, 0, 0x44), Malformation.BAD_IP_HEADER_LENGTH, id="ihl-4"),
    pytest.param(changed(TCP4, 0, 0x4F), Malformation.BAD_IP_HEADER_LENGTH, id="ihl-beyond-the-end"),
    pytest.param(changed(changed(TCP4, 2, 0), 3, 19), Malformation.BAD_TOTAL_LENGTH, id="total-below-header"),
    pytest.param(TCP4[:-1], Malformation.BAD_TOTAL_LENGTH, id="total-beyond-the-end"),
    pytest.param(TCP6[:-1], Malformation.BAD_TOTAL_LENGTH, id="payload-beyond-the-end"),
    pytest.param(changed(TCP4, 6, 0x20), Malformation.FRAGMENT, id="more-fragments"),
    pytest.param(changed(TCP4, 7, 1), Malformation.FRAGMENT, id="later-fragment"),
    pytest.param(bytes(IPv6() / IPv6ExtHdrFragment(m=1) / UDP() / b"x"), Malformation.FRAGMENT, id="ipv6-fragment"),
    pytest.param(bytes(IP(proto=17) / Raw(b"1234567")), Malformation.SHORT_TRANSPORT_HEADER, id="udp-7-bytes"),
    pytest.param(bytes(IP(proto=6) / Raw(b"x" * 19)), Malformation.SHORT_TRANSPORT_HEADER, id="tcp-19-bytes"),
    pytest.param(changed(TCP4, 32, 0x40), Malformation.BAD_TCP_OFFSET, id="tcp-offset-4"),
    pytest.param(changed(TCP4, 32, 0x60), Malformation.BAD_TCP_OFFSET, id="tcp-offset-beyond-the-end"),
    pytest.param(bytes(IP() / UDP(len=7)), Malformation.BAD_UDP_LENGTH, id="udp-length-7"),
    pytest.param(bytes(IP() / UDP(len=9)), Malformation.BAD_UDP_LENGTH, id="udp-length-beyond-the-end"),
    pytest.param(bytes(IPv6(nh=0) / Raw(b"\x06")), Malformation.SHORT_EXTENSION_HEADER, id="extension-cut"),
    pytest.param(
        bytes(IPv6(nh=60) / Raw(b"\x06\xff" + b"\0" * 6)), Malformation.SHORT_EXTENSION_HEADER, id="extension-too-long"
    ),
    pytest.param(
        bytes(IPv6(nh=60) / Raw(b"\x3b\x01" + b"\0" * 6)),
        Malformation.SHORT_EXTENSION_HEADER,
        id="extension-beyond-the-end",
    ),
    pytest.param(
        bytes(IP(proto=1) / Raw(b"\3\3" + b"\0" * 6 + TCP6)), Malformation.SHORT_ICMP_ERROR, id="icmp-about-ipv6"
    ),
    pytest.param(bytes(IP(proto=1) / Raw(b"\3\3")), Malformation.SHORT_ICMP_ERROR, id="icmp-cut"),
    pytest.param(unreachable(b"\0" * 4), Malformation.SHORT_ICMP_ERROR, id="icmp-about-nothing"),
    pytest.param(
        unreachable(TCP4[:24]),
        Malformation.SHORT_ICMP_ERROR,
        id="icmp-without-ports",
    ),
]


@pytest.mark.parametrize(("data", "why"), MALFORMED)
def test_malformed_bytes_say_why(data: bytes, why: Malformation) -> None:
    assert parse(data) == Malformed(why)


FLAGS = [("S", True), ("SA", True), ("A", True), ("PA", True), ("FA", True), ("R", True), ("RA", True), ("SEC", True)]
FLAGS += [("", False), ("F", False), ("SF", False), ("SR", False), ("RF", False), ("PU", False), ("FPU", False)]


@pytest.mark.parametrize(("flags", "is_possible"), FLAGS, ids=[flags or "none" for flags, _ in FLAGS])
def test_impossible_flags_are_malformed(flags: str, is_possible: bool) -> None:
    parsed = parse(packet(flow(endpoint("client", 1), endpoint("server", 2)), flags=flags))
    assert isinstance(parsed, Segment) is is_possible


@pytest.mark.parametrize("version", [4, 6])
def test_icmp_error_tells_the_embedded_flow(version: int) -> None:
    about = flow(endpoint("client", 4000, version), endpoint("server", 80, version))
    source, destination = about.destination.address, about.source.address
    parsed = parse(icmp_error(packet(about), source, destination))
    assert isinstance(parsed, IcmpError)
    assert (parsed.flow, parsed.source, parsed.destination) == (about, source, destination)


MORE_TO_COME = {
    4: IP(src="10.0.0.1", dst="10.0.1.2", flags="MF") / UDP(sport=4000, dport=80, len=3000) / Raw(b"x" * 16),
    6: IPv6(src="fd00::1", dst="fd01::2")
    / IPv6ExtHdrDestOpt()
    / IPv6ExtHdrFragment(m=1)
    / UDP(sport=4000, dport=80, len=3000)
    / Raw(b"x" * 16),
}


@pytest.mark.parametrize("version", [4, 6])
def test_error_about_a_first_fragment_names_the_flow(version: int) -> None:
    """Path-MTU discovery for large datagrams over IPv6 works by such errors."""
    about = flow(endpoint("client", 4000, version), endpoint("server", 80, version), Protocol.UDP)
    data = icmp_error(bytes(MORE_TO_COME[version]), about.destination.address, about.source.address, kind="too-big")
    parsed = parse(data)
    assert isinstance(parsed, IcmpError)
    assert parsed.flow == about


UNRELATED = [
    pytest.param(bytes(IP(proto=47) / b"gre"), id="gre"),
    pytest.param(bytes(IP(proto=1) / Raw(b"\x08\0" + b"\0" * 6)), id="echo"),
    pytest.param(unreachable(bytes(IP(proto=47) / Raw(b"x" * 8))), id="error-about-gre"),
    pytest.param(unreachable(bytes(IP(frag=1) / Raw(b"x" * 8))), id="error-about-a-fragment"),
]


@pytest.mark.parametrize("data", UNRELATED)
def test_what_is_no_business_of_ours_is_unrelated(data: bytes) -> None:
    assert isinstance(parse(data), Unrelated)


@given(st.binary(max_size=120))
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    parse(data)


def error_about(data: bytes) -> bytes:
    version = data[0] >> 4
    return icmp_error(data, endpoint("gateway", 0, version).address, endpoint("client", 0, version).address)


BEHIND_OPTIONS = [
    bytes(IP(src="10.0.0.1", dst="10.0.1.2", options=[IPOption_NOP()] * 4) / UDP(sport=4000, dport=80) / b"x"),
    bytes(IPv6(src="fd00::1", dst="fd01::2") / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP() / b"x"),
]
SOUND = [TCP4, UDP4, TCP6, UDP6, *BEHIND_OPTIONS]
SOUND += [error_about(data) for data in SOUND] + [error_about(bytes(first)) for first in MORE_TO_COME.values()]


@settings(max_examples=400)
@given(
    st.sampled_from(SOUND),
    st.lists(st.tuples(st.integers(0, 159), st.integers(0, 255)), max_size=4),
    st.integers(0, 200),
)
def test_broken_packets_never_raise(data: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    """And what is still taken for a packet can be rewritten without a change of its length."""
    for at, value in changes:
        data = changed(data, at % len(data), value)
    data = data[:cut]
    match parsed := parse(data):
        case Segment(before):
            assert len(patch_segment(data, parsed, Rewrite.between(before, before.inverse()))) == len(data)
        case IcmpError(source, destination, _, before):
            rewrite = Rewrite.between(before, before.inverse())
            assert len(patch_icmp_error(data, parsed, rewrite, destination, source)) == len(data)
        case Unrelated() | Malformed():
            pass
        case _:
            assert_never(parsed)


@pytest.mark.parametrize("data", [TCP4, TCP6], ids=["ipv4", "ipv6"])
def test_claimed_length_is_the_whole_packets(data: bytes) -> None:
    assert claimed_length(data[:40]) == len(data)
