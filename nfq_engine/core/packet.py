"""Packets: from bytes to values.

Owns: the names of hooks and protocols, endpoints, flow tuples, and the parser. Must not know connections,
rules or sockets. Place in the path: the first thing that looks at bytes the hot path did not recognise.

Rules that hold here:

* an address is bytes, 4 or 16 of them; nothing assumes either;
* `parse` never raises: bytes it cannot read become `Malformed`, which says why;
* nobody but `FlowTuple.key` and `hotpath.py` knows the order of the bytes of a key.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final


class Hook(IntEnum):
    """Where in the kernel's path a packet is; numbers of `enum nf_inet_hooks`."""

    PREROUTING = 0
    INPUT = 1
    FORWARD = 2
    OUTPUT = 3
    POSTROUTING = 4


class Protocol(IntEnum):
    """IP protocol numbers of the transports that are translated."""

    TCP = 6
    UDP = 17


ICMP: Final = 1
ICMPV6: Final = 58

TCP_FIN: Final = 0x01
TCP_SYN: Final = 0x02
TCP_RST: Final = 0x04
TCP_ACK: Final = 0x10

IPV4_HEADER: Final = 20
IPV6_HEADER: Final = 40
TCP_HEADER: Final = 20
UDP_HEADER: Final = 8
ICMP_HEADER: Final = 8

# Offset of the checksum inside the transport header.
CHECKSUM_OFFSET: Final = {Protocol.TCP: 16, Protocol.UDP: 6}

_MAPPED: Final = bytes(10) + b"\xff\xff"  # what stands before an IPv4 address in IPv6

_IPV4_MORE: Final = 0x2000
_IPV4_OFFSET: Final = 0x1FFF

# IPv6 extension headers that may stand before the transport (RFC 8200 section 4.1).
_IPV6_FRAGMENT: Final = 44
_IPV6_EXTENSIONS: Final = frozenset({0, 43, _IPV6_FRAGMENT, 60, 135})
_IPV6_OFFSET: Final = 0xFFF8

# ICMP types that carry the packet they complain about (RFC 792; RFC 4443 section 3).
_ICMP_REDIRECT: Final = 5
_ICMP_ERRORS: Final = frozenset({3, 4, _ICMP_REDIRECT, 11, 12})
_ICMPV6_ERRORS: Final = frozenset({1, 2, 3, 4})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address (4 or 16 bytes, network order) and a port (0 to 65535; 0 where it says 'any' or 'later')."""

    address: bytes
    port: int

    @classmethod
    def of(cls, address: str, port: int) -> Endpoint:
        """The endpoint of an address in text; ValueError when it is none."""
        return cls(ipaddress.ip_address(address).packed, port)

    @property
    def unmapped(self) -> Endpoint:
        """The IPv4 endpoint, if this is one mapped into IPv6 (RFC 4291 section 2.5.5.2)."""
        return Endpoint(self.address[12:], self.port) if self.address.startswith(_MAPPED) else self

    @property
    def is_unspecified(self) -> bool:
        """Is the address all zero, 0.0.0.0 or ::?"""
        return not any(self.address)

    def __str__(self) -> str:
        text = format_address(self.address)
        return f"{text}:{self.port}" if len(self.address) == 4 else f"[{text}]:{self.port}"


def format_address(address: bytes) -> str:
    """The usual text of 4 or 16 address bytes."""
    return str(ipaddress.ip_address(address))


@dataclass(frozen=True, slots=True)
class FlowTuple:
    """Who sends to whom: one direction of a connection, as conntrack writes it."""

    protocol: Protocol
    source: Endpoint
    destination: Endpoint

    def inverse(self) -> FlowTuple:
        """The tuple of an answer to this one."""
        return FlowTuple(self.protocol, self.destination, self.source)

    @property
    def key(self) -> bytes:
        """Source, destination, source port, destination port: one run of bytes, as in a packet without options."""
        source, destination = self.source, self.destination
        ports = source.port << 16 | destination.port
        return source.address + destination.address + ports.to_bytes(4, "big")

    def __str__(self) -> str:
        return f"{self.protocol.name.lower()} {self.source} -> {self.destination}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A TCP segment or UDP datagram that can be translated."""

    flow: FlowTuple
    transport: int  # offset of the transport header, in bytes from the start of the packet
    tcp_flags: int = 0

    @property
    def is_syn(self) -> bool:
        """Does this segment ask for a new TCP connection (SYN without ACK)?"""
        return self.tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN) == TCP_SYN


@dataclass(frozen=True, slots=True)
class IcmpError:
    """An ICMP or ICMPv6 error and the flow of the packet that it complains about."""

    source: bytes
    destination: bytes
    transport: int  # offset of the ICMP header
    flow: FlowTuple  # of the embedded packet, as it is written there
    embedded: int  # offset of the embedded IP header
    embedded_transport: int  # offset of the embedded transport header
    is_redirect: bool = False  # an ICMP redirect: use another gateway


@dataclass(frozen=True, slots=True)
class Unrelated:
    """A sound packet that the engine has no business with: another protocol, an ICMP message that is no error."""

    protocol: int


class Malformation(Enum):
    """Why bytes could not be read as a packet."""

    EMPTY = "empty"
    BAD_VERSION = "bad-version"
    SHORT_IP_HEADER = "short-ip-header"
    BAD_IP_HEADER_LENGTH = "bad-ip-header-length"
    BAD_TOTAL_LENGTH = "bad-total-length"
    FRAGMENT = "fragment"
    SHORT_TRANSPORT_HEADER = "short-transport-header"
    BAD_TCP_OFFSET = "bad-tcp-offset"
    BAD_TCP_FLAGS = "bad-tcp-flags"
    BAD_UDP_LENGTH = "bad-udp-length"
    SHORT_EXTENSION_HEADER = "short-extension-header"
    SHORT_ICMP_ERROR = "short-icmp-error"


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are no packet, and why."""

    why: Malformation


Parsed = Segment | IcmpError | Unrelated | Malformed


@dataclass(frozen=True, slots=True)
class _Network:
    """An IP header that was read: what follows it, where, and how far the packet goes."""

    source: bytes
    destination: bytes
    protocol: int
    transport: int
    end: int


def claimed_length(data: bytes) -> int:
    """How many bytes an IPv4 or IPv6 packet says it has, by its fixed header, which must be there."""
    if data[0] >> 4 == 4:
        return data[2] << 8 | data[3]
    return IPV6_HEADER + (data[4] << 8 | data[5])


def parse(data: bytes) -> Parsed:
    """Read one IPv4 or IPv6 packet, which starts at its IP header and must be whole."""
    network = _parse_network(data, 0, len(data))
    if isinstance(network, Malformation):
        return Malformed(network)
    if network.end > len(data):
        return Malformed(Malformation.BAD_TOTAL_LENGTH)
    if network.protocol in (Protocol.TCP, Protocol.UDP):
        return _parse_segment(data, network)
    is_ipv4 = len(network.source) == 4
    if network.protocol == (ICMP if is_ipv4 else ICMPV6):
        return _parse_icmp(data, network, _ICMP_ERRORS if is_ipv4 else _ICMPV6_ERRORS)
    return Unrelated(network.protocol)


def _parse_network(data: bytes, start: int, limit: int, *, is_embedded: bool = False) -> _Network | Malformation:
    """Read the IP header at `start`.

    Of a packet that is embedded in an ICMP error, `end` may lie beyond `limit`, as it was cut, and it may be a first
    fragment, as it was embedded by a host that did not put fragments together.
    """
    if start >= limit:
        return Malformation.EMPTY
    version = data[start] >> 4
    if version == 4:
        return _parse_ipv4(data, start, limit, is_embedded)
    if version == 6:
        return _parse_ipv6(data, start, limit, is_embedded)
    return Malformation.BAD_VERSION


def _parse_ipv4(data: bytes, start: int, limit: int, is_embedded: bool) -> _Network | Malformation:
    """Read an IPv4 header (RFC 791 section 3.1)."""
    if limit - start < IPV4_HEADER:
        return Malformation.SHORT_IP_HEADER
    header = (data[start] & 0x0F) * 4
    if header < IPV4_HEADER or start + header > limit:
        return Malformation.BAD_IP_HEADER_LENGTH
    total = data[start + 2] << 8 | data[start + 3]
    if total < header:
        return Malformation.BAD_TOTAL_LENGTH
    # More fragments, or an offset: fragments are put together before this hook, so none should be seen.
    if (data[start + 6] << 8 | data[start + 7]) & (_IPV4_OFFSET if is_embedded else _IPV4_MORE | _IPV4_OFFSET):
        return Malformation.FRAGMENT
    return _Network(
        source=data[start + 12 : start + 16],
        destination=data[start + 16 : start + 20],
        protocol=data[start + 9],
        transport=start + header,
        end=start + total,
    )


def _parse_ipv6(data: bytes, start: int, limit: int, is_embedded: bool) -> _Network | Malformation:
    """Read an IPv6 header and the extension headers behind it (RFC 8200 sections 3 and 4)."""
    if limit - start < IPV6_HEADER:
        return Malformation.SHORT_IP_HEADER
    end = start + IPV6_HEADER + (data[start + 4] << 8 | data[start + 5])
    following = data[start + 6]
    offset = start + IPV6_HEADER
    while following in _IPV6_EXTENSIONS:
        if offset + 8 > min(end, limit):
            return Malformation.SHORT_EXTENSION_HEADER
        if following != _IPV6_FRAGMENT:
            following, offset = data[offset], offset + 8 + data[offset + 1] * 8
        elif is_embedded and not (data[offset + 2] << 8 | data[offset + 3]) & _IPV6_OFFSET:
            following, offset = data[offset], offset + 8
        else:
            return Malformation.FRAGMENT
    if offset > end:
        return Malformation.SHORT_EXTENSION_HEADER
    return _Network(
        source=data[start + 8 : start + 24],
        destination=data[start + 24 : start + 40],
        protocol=following,
        transport=offset,
        end=end,
    )


def _flow(data: bytes, network: _Network) -> FlowTuple:
    """The flow of a packet whose first four transport bytes are there."""
    at = network.transport
    return FlowTuple(
        Protocol(network.protocol),
        Endpoint(network.source, data[at] << 8 | data[at + 1]),
        Endpoint(network.destination, data[at + 2] << 8 | data[at + 3]),
    )


def _parse_segment(data: bytes, network: _Network) -> Segment | Malformed:
    """Read a TCP (RFC 9293 section 3.1) or UDP (RFC 768) header."""
    at, length = network.transport, network.end - network.transport
    if network.protocol == Protocol.UDP:
        if length < UDP_HEADER:
            return Malformed(Malformation.SHORT_TRANSPORT_HEADER)
        claimed = data[at + 4] << 8 | data[at + 5]
        if not UDP_HEADER <= claimed <= length:
            return Malformed(Malformation.BAD_UDP_LENGTH)
        return Segment(_flow(data, network), at)
    if length < TCP_HEADER:
        return Malformed(Malformation.SHORT_TRANSPORT_HEADER)
    if not TCP_HEADER <= (data[at + 12] >> 4) * 4 <= length:
        return Malformed(Malformation.BAD_TCP_OFFSET)
    flags = data[at + 13]
    if not _are_possible_flags(flags):
        return Malformed(Malformation.BAD_TCP_FLAGS)
    return Segment(_flow(data, network), at, flags)


def _are_possible_flags(flags: int) -> bool:
    """May these TCP flags stand together?

    The rule of the kernel's conntrack: SYN, FIN and RST exclude each other; without SYN and RST there is an ACK.
    """
    only_one = flags & (TCP_SYN | TCP_FIN | TCP_RST) in (0, TCP_SYN, TCP_FIN, TCP_RST)
    return only_one and bool(flags & (TCP_SYN | TCP_RST | TCP_ACK))


def _parse_icmp(data: bytes, network: _Network, errors: frozenset[int]) -> IcmpError | Unrelated | Malformed:
    """Read an ICMP message; of an error, the embedded packet's flow (RFC 792, RFC 4443)."""
    at = network.transport
    if network.end - at < ICMP_HEADER:
        return Malformed(Malformation.SHORT_ICMP_ERROR)
    if data[at] not in errors:
        return Unrelated(network.protocol)
    embedded = _parse_network(data, at + ICMP_HEADER, network.end, is_embedded=True)
    if embedded is Malformation.FRAGMENT:
        return Unrelated(network.protocol)  # a complaint about a later fragment names no ports
    if isinstance(embedded, Malformation) or len(embedded.source) != len(network.source):
        return Malformed(Malformation.SHORT_ICMP_ERROR)
    if embedded.protocol not in (Protocol.TCP, Protocol.UDP):
        return Unrelated(network.protocol)
    # RFC 792 promises eight bytes of the embedded transport; the ports are the first four.
    if embedded.transport + 8 > network.end:
        return Malformed(Malformation.SHORT_ICMP_ERROR)
    return IcmpError(
        source=network.source,
        destination=network.destination,
        transport=at,
        flow=_flow(data, embedded),
        embedded=at + ICMP_HEADER,
        embedded_transport=embedded.transport,
        is_redirect=network.protocol == ICMP and data[at] == _ICMP_REDIRECT,
    )
