"""The hot path: one packet of a known connection, as bytes in and bytes out.

Owns: the fixed layouts of packets without IP options, and the one look-up. Must not decide anything: what it does not
know it leaves to `pipeline.Engine.decide`, which gives the same answer from parsed values. Place in the path: first.

In a packet without IP options or extension headers, addresses and ports are one run of bytes, which is the key of the
look-up and is replaced as a whole; two prepared deltas go onto the checksums (RFC 1624 equation 3, as in rewrite.py).
There is one function a layout because each was measured at half the time of one function for all: a single unpack reads
what is to be checked, the key and the checksums, and a single pack writes them.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from nfq_engine.core.conntrack import PACKET, ConnectionTable, Entry, Stage
from nfq_engine.core.packet import IPV6_HEADER, Protocol

# version and tos, total length, identification, fragment, ttl, protocol, checksum, KEY, length, checksum
_UDP4: Final = Struct("!HHHHBBH12sHH")
# the same up to KEY; sequence and acknowledgement, offset and flags, window, checksum
_TCP4: Final = Struct("!HHHHBBH12sQHHH")
# version, class and flow label, payload length, next header, hop limit, KEY, length, checksum
_UDP6: Final = Struct("!IHBB36sHH")
_TCP6: Final = Struct("!IHBB36sQHHH")

_TCP: Final = int(Protocol.TCP)
_UDP: Final = int(Protocol.UDP)
_PLAIN_IPV4: Final = 0x45  # version 4, no options
_FRAGMENT: Final = 0xBFFF  # all of the field but 'do not fragment'
_FLAGS: Final = 0x17  # SYN, FIN, RST, ACK
_ACK: Final = 0x10
_MINIMUM_OFFSET: Final = 0x5000

_Entries = dict[bytes, Entry]


class HotPath:
    """Translates packets of known connections by one look-up each."""

    __slots__ = ("_tcp", "_udp")

    def __init__(self, connections: ConnectionTable) -> None:
        self._tcp = tuple(connections.entries[stage][Protocol.TCP] for stage in Stage)
        self._udp = tuple(connections.entries[stage][Protocol.UDP] for stage in Stage)

    def translate(self, stage: int, data: bytes, now: float) -> bytes | None:
        """The packet as it goes on: `data` itself when nothing changes; None when the slow path must look at it."""
        length = len(data)
        if length < 28:  # UDP over IPv4, the shortest of the four
            return None
        first = data[0]
        if first == _PLAIN_IPV4:
            protocol = data[9]
            if protocol == _UDP:
                return _udp4(self._udp[stage], data, length, now)
            if protocol == _TCP and length >= 40:
                return _tcp4(self._tcp[stage], data, length, now)
        elif first >> 4 == 6:
            protocol = data[6]
            if protocol == _UDP and length >= 48:
                return _udp6(self._udp[stage], data, length, now)
            if protocol == _TCP and length >= 60:
                return _tcp6(self._tcp[stage], data, length, now)
        return None


def _udp4(entries: _Entries, data: bytes, length: int, now: float) -> bytes | None:
    start, total, identification, fragment, ttl, protocol, header, key, size, checksum = _UDP4.unpack_from(data)
    entry = entries.get(key)
    if entry is None or not entry.is_settled or total != length or fragment & _FRAGMENT or size != length - 20:
        return None
    entry.last_seen = now
    entry.traffic += PACKET + length
    new_key = entry.key
    if new_key is None:
        return data
    header = (header ^ 0xFFFF) + entry.address_delta
    header = ((header & 0xFFFF) + (header >> 16)) ^ 0xFFFF
    if checksum:  # 0: none was sent; a computed 0 is sent as all ones (RFC 768)
        checksum = (checksum ^ 0xFFFF) + entry.delta
        checksum = ((checksum & 0xFFFF) + (checksum >> 16)) ^ 0xFFFF or 0xFFFF
    packed = _UDP4.pack(start, total, identification, fragment, ttl, protocol, header, new_key, size, checksum)
    return packed + data[28:]


def _tcp4(entries: _Entries, data: bytes, length: int, now: float) -> bytes | None:
    fields = _TCP4.unpack_from(data)
    start, total, identification, fragment, ttl, protocol, header, key, numbers, flags, window, checksum = fields
    entry = entries.get(key)
    if (
        entry is None
        or not entry.is_settled
        or total != length
        or fragment & _FRAGMENT
        or not _is_plain(flags, length - 20)
    ):
        return None
    entry.last_seen = now
    entry.traffic += PACKET + length
    new_key = entry.key
    if new_key is None:
        return data
    header = (header ^ 0xFFFF) + entry.address_delta
    header = ((header & 0xFFFF) + (header >> 16)) ^ 0xFFFF
    checksum = (checksum ^ 0xFFFF) + entry.delta
    checksum = ((checksum & 0xFFFF) + (checksum >> 16)) ^ 0xFFFF
    packed = _TCP4.pack(
        start, total, identification, fragment, ttl, protocol, header, new_key, numbers, flags, window, checksum
    )
    return packed + data[38:]


def _udp6(entries: _Entries, data: bytes, length: int, now: float) -> bytes | None:
    start, payload, protocol, hops, key, size, checksum = _UDP6.unpack_from(data)
    entry = entries.get(key)
    if entry is None or not entry.is_settled or payload != length - IPV6_HEADER or size != payload:
        return None
    entry.last_seen = now
    entry.traffic += PACKET + length
    new_key = entry.key
    if new_key is None:
        return data
    if checksum:  # 0 is not allowed (RFC 8200 section 8.1) except for tunnels (RFC 6935): it stays what it was
        checksum = (checksum ^ 0xFFFF) + entry.delta
        checksum = ((checksum & 0xFFFF) + (checksum >> 16)) ^ 0xFFFF or 0xFFFF
    return _UDP6.pack(start, payload, protocol, hops, new_key, size, checksum) + data[48:]


def _tcp6(entries: _Entries, data: bytes, length: int, now: float) -> bytes | None:
    start, payload, protocol, hops, key, numbers, flags, window, checksum = _TCP6.unpack_from(data)
    entry = entries.get(key)
    if entry is None or not entry.is_settled or payload != length - IPV6_HEADER or not _is_plain(flags, payload):
        return None
    entry.last_seen = now
    entry.traffic += PACKET + length
    new_key = entry.key
    if new_key is None:
        return data
    checksum = (checksum ^ 0xFFFF) + entry.delta
    checksum = ((checksum & 0xFFFF) + (checksum >> 16)) ^ 0xFFFF
    return _TCP6.pack(start, payload, protocol, hops, new_key, numbers, flags, window, checksum) + data[58:]


def _is_plain(flags: int, length: int) -> bool:
    """Is this offset-and-flags field that of a sound segment that cannot change an established connection's state?"""
    return flags & _FLAGS == _ACK and flags & 0xF000 >= _MINIMUM_OFFSET and (flags >> 12) * 4 <= length
