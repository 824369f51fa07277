"""Rewriting: Scapy's checksums are the oracle, and going back gives the bytes that were there."""

from __future__ import annotations

import pytest
from builders import dissect, endpoint, flow, icmp_error, layers, packet, with_right_checksums
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6ExtHdrDestOpt

from nfq_engine.core.conntrack import Connection, ConnectionTable, Direction, Event, Stage
from nfq_engine.core.hotpath import HotPath
from nfq_engine.core.packet import Endpoint, FlowTuple, IcmpError, Protocol, Segment, parse
from nfq_engine.core.rewrite import Rewrite, ones_complement_sum, patch_icmp_error, patch_segment, updated_checksum

ports = st.integers(0, 0xFFFF)


def endpoints(size: int) -> st.SearchStrategy[Endpoint]:
    return st.builds(Endpoint, st.binary(min_size=size, max_size=size), ports)


@st.composite
def rewrites(draw: st.DrawFn) -> tuple[FlowTuple, FlowTuple]:
    size = draw(st.sampled_from([4, 16]))
    protocol = draw(st.sampled_from(list(Protocol)))
    before, after = (FlowTuple(protocol, draw(endpoints(size)), draw(endpoints(size))) for _ in range(2))
    return before, after


def patched(data: bytes, before: FlowTuple, after: FlowTuple) -> bytes:
    segment = parse(data)
    assert isinstance(segment, Segment)
    return patch_segment(data, segment, Rewrite.between(before, after))


@given(rewrites(), st.binary(max_size=40))
def test_any_rewrite_has_right_checksums_and_a_way_back(flows: tuple[FlowTuple, FlowTuple], payload: bytes) -> None:
    before, after = flows
    data = packet(before, flags="A", payload=payload)
    result = patched(data, before, after)
    assert with_right_checksums(result) == result
    parsed = parse(result)
    assert isinstance(parsed, Segment)
    assert parsed.flow == after
    assert patched(result, after, before) == data


@given(rewrites(), st.binary(max_size=40))
def test_hot_path_gives_the_same_bytes(flows: tuple[FlowTuple, FlowTuple], payload: bytes) -> None:
    before, after = flows
    data = packet(before, flags="PA", payload=payload)
    if before not in (after, after.inverse()):
        assert by_hot_path(data, before, after) == patched(data, before, after)


def by_hot_path(data: bytes, before: FlowTuple, after: FlowTuple) -> bytes | None:
    """What the hot path makes of a packet whose connection is rewritten so."""
    table = ConnectionTable()
    connection = Connection(before, after, 0.0)
    table.insert(connection)
    connection.advance(Event.ACK if before.protocol is Protocol.TCP else Event.DATAGRAM, Direction.ORIGINAL)
    return HotPath(table).translate(Stage.DESTINATION, data, 1.0)


@pytest.mark.parametrize("version", [4, 6])
def test_options_and_extension_headers_are_left_alone(version: int) -> None:
    before = flow(endpoint("client", 4000, version), endpoint("server", 80, version), Protocol.UDP)
    after = flow(endpoint("client", 4000, version), endpoint("gateway", 50080, version), Protocol.UDP)
    plain = layers(before, payload=b"abc")
    plain = dissect(bytes(plain))
    if version == 4:
        plain[IP].options = [IPOption_NOP()] * 4
        del plain[IP].ihl, plain[IP].len, plain[IP].chksum
    else:
        rest = plain[UDP].copy()
        plain.remove_payload()
        del plain.plen, plain.nh
        plain = plain / IPv6ExtHdrDestOpt() / rest
    data = bytes(plain)
    result = patched(data, before, after)
    assert with_right_checksums(result) == result
    assert len(result) == len(data)


def test_udp_checksum_of_zero_stays_zero() -> None:
    before = flow(endpoint("client", 4000), endpoint("server", 80), Protocol.UDP)
    data = layers(before, payload=b"abc")
    data[UDP].chksum = 0
    result = patched(bytes(data), before, flow(endpoint("client", 4000), endpoint("gateway", 1), Protocol.UDP))
    assert dissect(result)[UDP].chksum == 0


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("protocol", "expected"), [(Protocol.UDP, 0xFFFF), (Protocol.TCP, 0)], ids=["udp", "tcp"])
def test_checksum_that_becomes_zero(version: int, protocol: Protocol, expected: int) -> None:
    """Of UDP it is sent as all ones, as 0 would mean that there is none; on both paths."""
    before = flow(endpoint("client", 4000, version), endpoint("server", 80, version), protocol)
    data = packet(before, flags="A")
    layer = UDP if protocol is Protocol.UDP else TCP
    port = (80 + dissect(data)[layer].chksum) % 0xFFFF
    after = FlowTuple(protocol, before.source, Endpoint(before.destination.address, port))
    result = patched(data, before, after)
    assert dissect(result)[layer].chksum == expected
    assert by_hot_path(data, before, after) == result


def test_wrong_checksum_stays_wrong() -> None:
    before = flow(endpoint("client", 4000), endpoint("server", 80))
    data = bytearray(packet(before))
    data[36] ^= 0x55
    result = patched(bytes(data), before, flow(endpoint("client", 4000), endpoint("gateway", 1)))
    assert with_right_checksums(result) != result


@given(st.binary(max_size=64))
def test_sum_is_that_of_rfc_1071(data: bytes) -> None:
    total = sum(int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big") for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert ones_complement_sum(data) == total % 0xFFFF


def test_example_of_rfc_1624() -> None:
    """Section 4: the checksum 0xdd2f, of data in which 0x5555 becomes 0x3285, becomes 0x0000."""
    assert updated_checksum(0xDD2F, (0x3285 - 0x5555) % 0xFFFF) == 0x0000


@st.composite
def icmp_rewrites(draw: st.DrawFn) -> tuple[FlowTuple, FlowTuple, bytes, bytes]:
    """What the embedded packet was and becomes, and the outer addresses before and after."""
    before, after = draw(rewrites())
    size = len(before.source.address)
    outer, new = (draw(st.binary(min_size=2 * size, max_size=2 * size)) for _ in range(2))
    return before, after, outer, new


def halves(addresses: bytes) -> tuple[bytes, bytes]:
    middle = len(addresses) // 2
    return addresses[:middle], addresses[middle:]


@given(icmp_rewrites(), st.binary(max_size=41))
def test_any_icmp_error_is_rewritten_inside_and_out(
    case: tuple[FlowTuple, FlowTuple, bytes, bytes], payload: bytes
) -> None:
    """Over IPv4 the embedded packet is cut after eight bytes of its transport, where TCP has no checksum yet."""
    before, after, outer, new = case
    data = icmp_error(packet(before, flags="PA", payload=payload), *halves(outer))
    error = parse(data)
    assert isinstance(error, IcmpError)
    result = patch_icmp_error(data, error, Rewrite.between(before, after), *halves(new))
    assert result == icmp_error(packet(after, flags="PA", payload=payload), *halves(new))
    again = parse(result)
    assert isinstance(again, IcmpError)
    assert (again.flow, again.source + again.destination) == (after, new)
    assert patch_icmp_error(result, again, Rewrite.between(after, before), *halves(outer)) == data


@pytest.mark.parametrize("version", [4, 6])
def test_wrong_checksum_of_an_icmp_error_stays_wrong(version: int) -> None:
    before, after = (flow(endpoint(who, 1, version), endpoint("server", 2, version)) for who in ("client", "foreign"))
    router, to = endpoint("gateway", 0, version).address, before.source.address
    data = bytearray(icmp_error(packet(before), router, to))
    data[-1] ^= 0x55
    error = parse(bytes(data))
    assert isinstance(error, IcmpError)
    result = patch_icmp_error(bytes(data), error, Rewrite.between(before, after), router, after.source.address)
    right = bytearray(icmp_error(packet(after), router, after.source.address))
    right[-1] ^= 0x55
    assert result == right
