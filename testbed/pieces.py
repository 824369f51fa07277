"""Pieces: segments and datagrams that were cut on the way.

Owns: which frame is a piece of which, and what changed apart from that. A device cuts a segment into smaller ones (TCP
segmentation offload), a router a datagram into fragments (RFC 791 section 3.2). Pure: frames in, values out.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from testbed.changes import Change, changes_between
from testbed.frames import Frame, ip_of
from testbed.headers import IpPacket

# What the pieces of a segment that a device cut, or of a datagram, differ in, and is no translation.
_CUTTING: Final = frozenset({"ip.id", "ip.frag", "tcp.seq", "tcp.flags", "payload"})

# Of sequence numbers: no segment is longer, but with BIG TCP.
_LONGEST_SEGMENT: Final = 1 << 16


def cutting_keys(frame: Frame) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """Where its pieces look for it; and where that is of which it may be a piece.

    Segments of TCP are in stretches of numbers: its own, or that before. Datagrams, and segments in fragments, are
    known by their identification; in IPv6 no router makes such (RFC 8200 section 5).
    """
    packet = ip_of(frame)
    layout = packet.layout
    datagram = ((packet.protocol, layout.identification),) if layout.version == 4 else ()
    if packet.tcp is not None and packet.payload:
        common = layout.version, packet.tcp.ack, packet.tcp.options
        stretch = packet.tcp.seq // _LONGEST_SEGMENT
        own = (*common, stretch)
        return (own, *datagram), ((*common, (stretch - 1) % ((1 << 32) // _LONGEST_SEGMENT)), own)
    return ((), datagram) if layout.is_fragment else (datagram, ())


def is_piece_of(frame: Frame, whole: Frame) -> bool:
    """Is it, of all that `cutting_keys` lets one look at, a part of just this one, seen elsewhere?"""
    piece, data = ip_of(frame), ip_of(whole)
    size = len(piece.payload)
    if size >= len(data.payload) or frame.point == whole.point:
        return False
    if piece.tcp is not None and data.tcp is not None:
        offset = (piece.tcp.seq - data.tcp.seq) % (1 << 32)
    else:
        # Of the payload, which is behind the transport's header: that is in the first piece.
        offset = max(0, piece.layout.fragment_offset - _header_size(data))
    return data.payload[offset : offset + size] == piece.payload


def _header_size(packet: IpPacket) -> int:
    """Bytes of the transport's header."""
    return packet.layout.end - packet.layout.transport - len(packet.payload)


def changes_of(before: tuple[Frame, ...], after: tuple[Frame, ...]) -> list[tuple[Change, ...]]:
    """What changed between two points where a packet was whole or in pieces, for each piece, but for the cutting."""
    old, new = _in_order(before), _in_order(after)
    if _sizes(old) == _sizes(new):
        return [changes_between(first, second) for first, second in zip(old, new, strict=True)]
    before_size, after_size = sum(_sizes(old)), sum(_sizes(new))
    lost = () if before_size == after_size else (Change("payload", f"{before_size} bytes", f"{after_size} bytes"),)
    return [
        (*(change for change in changes_between(first, second) if change.field not in _CUTTING), *lost)
        for first in _with_headers(old)
        for second in _with_headers(new)
    ]


def _with_headers(pieces: list[Frame]) -> list[Frame]:
    """Those that begin with a transport header: of a datagram, the first piece only, if it is there."""
    return [piece for piece in pieces if not ip_of(piece).layout.fragment_offset] or pieces


def _in_order(frames: tuple[Frame, ...]) -> list[Frame]:
    """Pieces as the segment had them, however they came."""
    return list(frames) if len(frames) == 1 else sorted(frames, key=partial(_offset, frames[0]))


def _offset(first: Frame, piece: Frame) -> int:
    """How far a piece is behind another, or before (RFC 9293 section 3.4)."""
    one, other = ip_of(first), ip_of(piece)
    if one.tcp is None or other.tcp is None:
        return other.layout.fragment_offset
    return (other.tcp.seq - one.tcp.seq + (1 << 31)) % (1 << 32)


def _sizes(frames: list[Frame]) -> list[int]:
    return [len(ip_of(frame).payload) for frame in frames]
