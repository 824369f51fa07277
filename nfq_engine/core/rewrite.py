"""Rewriting: from one flow to another, checksums kept right.

Owns: the prepared rewrite of the hot path, its bytes patch, and the patch of ICMP errors. Must not know connections or
why anything is rewritten. Place in the path: the last thing done to a packet before its verdict.

Checksums are updated, never computed anew, so a packet that arrived with a wrong checksum leaves with a wrong one: the
receiver is to notice, not we (RFC 1624, equation 3: HC' = ~(~HC + ~m + m')).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nfq_engine.core.packet import CHECKSUM_OFFSET, FlowTuple, IcmpError, Protocol, Segment, claimed_length


def ones_complement_sum(data: bytes) -> int:
    """The 16-bit ones' complement sum (RFC 1071), 0 for 0xffff; an odd last byte counts as if a zero followed."""
    if len(data) % 2:
        data += b"\0"
    return int.from_bytes(data, "big") % 0xFFFF


def updated_checksum(checksum: int, delta: int) -> int:
    """A checksum after the bytes under it changed by `delta` (RFC 1624 equation 3)."""
    total = (checksum ^ 0xFFFF) + delta
    return ((total & 0xFFFF) + (total >> 16)) ^ 0xFFFF


_deltas: Final[dict[int, int]] = {}


def _shared(delta: int) -> int:
    """The same number as one object for all rewrites, so that it stays in the processor's cache."""
    return _deltas.setdefault(delta, delta)


def _delta(before: bytes, after: bytes) -> int:
    """What the exchange of `before` for `after` adds to a ones' complement sum."""
    return (ones_complement_sum(after) - ones_complement_sum(before)) % 0xFFFF


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A prepared rewrite.

    `key` stands in the place of the old addresses and ports; `address_delta` is for the IPv4 header checksum,
    `delta` for the transport's, whose pseudo-header has the addresses too.
    """

    flow: FlowTuple
    key: bytes
    address_delta: int
    delta: int

    @classmethod
    def between(cls, before: FlowTuple, after: FlowTuple) -> Rewrite:
        """The rewrite that makes packets of `before` packets of `after`."""
        old, new = before.key, after.key
        return cls(after, new, _shared(_delta(old[:-4], new[:-4])), _shared(_delta(old, new)))


def patch_segment(data: bytes, segment: Segment, rewrite: Rewrite) -> bytes:
    """The packet with its addresses, ports and checksums rewritten, whatever options or extension headers it has."""
    patched = bytearray(data)
    _patch_addresses(patched, 0, rewrite)
    _patch_transport(patched, segment.transport, segment.flow.protocol, rewrite)
    return bytes(patched)


def patch_icmp_error(data: bytes, error: IcmpError, embedded: Rewrite, source: bytes, destination: bytes) -> bytes:
    """An ICMP error with its embedded packet rewritten and new outer addresses."""
    patched = bytearray(data)
    _patch_addresses(patched, error.embedded, embedded)
    _patch_transport(patched, error.embedded_transport, embedded.flow.protocol, embedded)
    outer, new = error.source + error.destination, source + destination
    message = slice(error.transport, claimed_length(data))
    delta = _delta(data[message], bytes(patched[message]))
    if len(source) == 4:
        patched[12:20] = new
        _update(patched, 10, _delta(outer, new))
    else:
        patched[8:40] = new
        delta += _delta(outer, new)  # ICMPv6 has a pseudo-header (RFC 4443 section 2.3)
    _update(patched, error.transport + 2, delta % 0xFFFF)
    return bytes(patched)


def _patch_addresses(packet: bytearray, at: int, rewrite: Rewrite) -> None:
    """Put the addresses of a rewrite into the IP header at an offset."""
    addresses = rewrite.key[:-4]
    if len(addresses) == 8:
        packet[at + 12 : at + 20] = addresses
        _update(packet, at + 10, rewrite.address_delta)
    else:
        packet[at + 8 : at + 40] = addresses


def _update(packet: bytearray, at: int, delta: int) -> None:
    """Update the checksum at an offset."""
    checksum = int.from_bytes(packet[at : at + 2], "big")
    packet[at : at + 2] = updated_checksum(checksum, delta).to_bytes(2, "big")


def _patch_transport(packet: bytearray, at: int, protocol: Protocol, rewrite: Rewrite) -> None:
    """Put the ports of a rewrite into the transport header at an offset; an ICMP error may have cut the checksum."""
    packet[at : at + 4] = rewrite.key[-4:]
    where = at + CHECKSUM_OFFSET[protocol]
    if where + 2 > len(packet):
        return
    checksum = int.from_bytes(packet[where : where + 2], "big")
    if protocol is Protocol.UDP and checksum == 0:
        return  # no checksum was sent (RFC 768)
    updated = updated_checksum(checksum, rewrite.delta)
    if protocol is Protocol.UDP and updated == 0:
        updated = 0xFFFF  # a computed 0 is sent as all ones (RFC 768)
    packet[where : where + 2] = updated.to_bytes(2, "big")
