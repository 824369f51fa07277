"""Headers: from the bytes of a frame to values.

Owns: where the headers of an Ethernet frame lie, and what they say. Must not know captures, files or Scapy, which takes
76 µs a packet and here would have to dissect thousands of them for one ladder.

Rules that hold here:

* nothing raises: bytes that cannot be read are None, or end where they can still be read;
* IPv4 and IPv6 give the same values, so that nobody after this asks which it was.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from struct import Struct
from typing import Final

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58

PROTOCOL_NAMES: Final = {ICMP: "icmp", TCP: "tcp", UDP: "udp", ICMPV6: "icmpv6"}

_VLAN_TAGS: Final = frozenset({0x8100, 0x88A8})
_IPV4: Final = 0x0800
_IPV6: Final = 0x86DD

# IPv6 extension headers whose length field counts 8 bytes (RFC 8200 section 4, RFC 6275).
_EXTENSIONS: Final = frozenset({0, 43, 60, 135})
_FRAGMENT: Final = 44

# Messages that carry the packet they complain about (RFC 792; RFC 4443 section 3).
_ICMP_ERRORS: Final = frozenset({3, 4, 5, 11, 12})
_ICMPV6_ERRORS: Final = frozenset({1, 2, 3, 4})
_ECHO: Final = {ICMP: (8, 0), ICMPV6: (128, 129)}

Ends = tuple[tuple[str, int | None], tuple[str, int | None]]

_WORD: Final = Struct("!H")
_IPV4_HEADER: Final = Struct("!BBHHHBBH4s4s")
_IPV6_HEADER: Final = Struct("!IHBB16s16s")
_TCP_HEADER: Final = Struct("!HHIIHHHH")
_PORTS: Final = Struct("!HH")


@dataclass(frozen=True, slots=True)
class Ethernet:
    """The link header: what it carries, where that begins, and the VLAN ids before it, outermost first."""

    ethertype: int
    payload: int
    vlans: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of an IP packet lie; offsets into the bytes it was found in.

    `end` is behind the last byte that the IP header claims, which link padding is not part of; with `is_truncated`
    fewer bytes are there. `is_rerouted`: a routing header hides the final destination.
    `is_embedded`: it was found within an ICMP error.
    """

    version: int
    start: int
    transport: int
    end: int
    protocol: int
    source: bytes
    destination: bytes
    traffic_class: int
    hop_limit: int
    identification: int | None
    fragment_offset: int
    has_more_fragments: bool
    is_truncated: bool
    is_rerouted: bool
    is_embedded: bool = False

    @property
    def is_fragment(self) -> bool:
        """Is it only a part of a packet?"""
        return self.fragment_offset > 0 or self.has_more_fragments


@dataclass(frozen=True, slots=True)
class TcpHeader:
    """TCP's own fields; `flags` as the header has them, the reserved ones (RFC 9293 section 3.1) among them."""

    seq: int
    ack: int
    flags: int
    window: int
    urgent: int
    options: bytes

    FIN = 0x001
    SYN = 0x002
    RST = 0x004
    PSH = 0x008
    ACK = 0x010
    URG = 0x020
    ECE = 0x040
    CWR = 0x080
    AE = 0x100  # RFC 9768; NS before
    RESERVED = 0xE00


@dataclass(frozen=True, slots=True)
class IcmpHeader:
    """A message of ICMP or ICMPv6; `rest` is the four bytes behind the checksum, `embedded` the packet it is about."""

    type: int
    code: int
    rest: bytes
    embedded: IpPacket | None


@dataclass(frozen=True, slots=True)
class IpPacket:
    """An IPv4 or IPv6 packet as read. Ports are None where there are none; the payload is behind the last header read.

    For an ICMP echo both ports are the identifier, so that request and reply belong together as they do in conntrack.
    """

    layout: Layout
    source: str
    destination: str
    source_port: int | None
    destination_port: int | None
    tcp: TcpHeader | None
    icmp: IcmpHeader | None
    payload: bytes

    @property
    def protocol(self) -> int:
        """The protocol number of the transport."""
        return self.layout.protocol

    @property
    def ends(self) -> Ends:
        """Source and destination, each with its port."""
        return (self.source, self.source_port), (self.destination, self.destination_port)

    @property
    def is_icmp_error(self) -> bool:
        """Does it complain about another packet?"""
        return self.icmp is not None and self.icmp.embedded is not None


def read_ethernet(data: bytes) -> Ethernet | None:
    """The link header of a frame; None when it is cut short."""
    if len(data) < 14:
        return None
    ethertype, offset = _WORD.unpack_from(data, 12)[0], 14
    vlans: list[int] = []
    while ethertype in _VLAN_TAGS and len(data) >= offset + 4:
        tag, ethertype = _PORTS.unpack_from(data, offset)
        vlans.append(tag & 0x0FFF)
        offset += 4
    return Ethernet(ethertype, offset, tuple(vlans))


def locate(data: bytes, ethernet: Ethernet) -> Layout | None:
    """Find the IP packet in a frame; None when there is none that can be read."""
    if ethernet.ethertype == _IPV4:
        return _locate_ipv4(data, ethernet.payload)
    if ethernet.ethertype == _IPV6:
        return _locate_ipv6(data, ethernet.payload)
    return None


def locate_embedded(data: bytes, layout: Layout) -> Layout | None:
    """Find the packet that an ICMP error carries; for an error that is itself within one, there is none."""
    start = layout.transport + 8
    if layout.is_fragment or layout.is_embedded or len(data) < start:
        return None
    kind = data[layout.transport]
    if layout.protocol == ICMP and kind in _ICMP_ERRORS:
        embedded = _locate_ipv4(data, start)
    elif layout.protocol == ICMPV6 and kind in _ICMPV6_ERRORS:
        embedded = _locate_ipv6(data, start)
    else:
        return None
    return None if embedded is None else replace(embedded, is_embedded=True)


def read_packet(data: bytes, layout: Layout) -> IpPacket:
    """Everything that the headers at `layout` say."""
    protocol, start, end = layout.protocol, layout.transport, min(layout.end, len(data))
    ports: tuple[int | None, int | None] = (None, None)
    tcp = icmp = None
    if layout.fragment_offset == 0 and end - start >= 8:
        if protocol in (TCP, UDP):
            # An ICMP error may carry no more than the first eight bytes of a TCP header.
            ports = _PORTS.unpack_from(data, start)
            tcp = _read_tcp(data, start, end) if protocol == TCP else None
            start += 8 if tcp is None else 20 + len(tcp.options)
        elif protocol in (ICMP, ICMPV6):
            icmp = _read_icmp(data, layout)
            ports = (_WORD.unpack(icmp.rest[:2])[0],) * 2 if icmp.type in _ECHO[protocol] else ports
            start += 8
    return IpPacket(layout, _text(layout.source), _text(layout.destination), *ports, tcp, icmp, data[start:end])


def _locate_ipv4(data: bytes, start: int) -> Layout | None:
    if len(data) < start + 20:
        return None
    first, service, length, identification, fragment, hops, protocol, _, source, destination = _IPV4_HEADER.unpack_from(
        data, start
    )
    transport = start + 4 * (first & 0x0F)
    # A length of 0: a segment beyond 64 KB that the device has yet to cut (BIG TCP).
    end = start + length if length else len(data)
    if first >> 4 != 4 or transport < start + 20 or end < transport:
        return None
    return Layout(
        4,
        start,
        transport,
        end,
        protocol,
        source,
        destination,
        service,
        hops,
        identification,
        8 * (fragment & 0x1FFF),
        bool(fragment & 0x2000),
        is_truncated=end > len(data),
        is_rerouted=False,
    )


def _locate_ipv6(data: bytes, start: int) -> Layout | None:
    if len(data) < start + 40:
        return None
    first, length, protocol, hops, source, destination = _IPV6_HEADER.unpack_from(data, start)
    if first >> 28 != 6:
        return None
    transport = start + 40
    end = transport + length if length else len(data)
    identification, offset, has_more, is_rerouted = None, 0, False, False
    while protocol in _EXTENSIONS or protocol == _FRAGMENT:
        if len(data) < transport + 8 or offset:
            break
        if protocol == _FRAGMENT:
            field = _WORD.unpack_from(data, transport + 2)[0]
            identification = int.from_bytes(data[transport + 4 : transport + 8], "big")
            offset, has_more = field & 0xFFF8, bool(field & 1)
            size = 8
        else:
            is_rerouted |= protocol == 43 and data[transport + 3] > 0
            size = 8 * (data[transport + 1] + 1)
        protocol = data[transport]
        transport += size
    return Layout(
        6,
        start,
        transport,
        end,
        protocol,
        source,
        destination,
        first >> 20 & 0xFF,
        hops,
        identification,
        offset,
        has_more,
        is_truncated=end > len(data),
        is_rerouted=is_rerouted,
    )


def _read_tcp(data: bytes, start: int, end: int) -> TcpHeader | None:
    if end - start < 20:
        return None
    _, _, seq, ack, length_and_flags, window, _, urgent = _TCP_HEADER.unpack_from(data, start)
    options = data[start + 20 : min(start + 4 * (length_and_flags >> 12), end)]
    return TcpHeader(seq, ack, length_and_flags & 0x0FFF, window, urgent, options)


def _read_icmp(data: bytes, layout: Layout) -> IcmpHeader:
    start = layout.transport
    embedded = locate_embedded(data, layout)
    return IcmpHeader(
        data[start],
        data[start + 1],
        data[start + 4 : start + 8],
        None if embedded is None else read_packet(data, embedded),
    )


def _text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)
