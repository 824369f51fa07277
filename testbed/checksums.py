"""Checksums of captured frames.

Owns: whether the IPv4, TCP, UDP, ICMP and ICMPv6 checksums of a frame are what they should be. A frame that its sender
left half summed, for the device to finish, must hold the sum of the pseudo-header alone: nothing else comes out right.

What one frame does not tell is not judged: fragments, and packets whose final destination is in a routing header.
"""

from __future__ import annotations

from struct import pack
from typing import Final

from testbed.frames import Frame
from testbed.headers import ICMP, ICMPV6, TCP, UDP, Layout, locate, locate_embedded, read_ethernet

# Protocol to: name, offset of the checksum, shortest header.
_TRANSPORTS: Final = {TCP: ("TCP", 16, 20), UDP: ("UDP", 6, 8), ICMP: ("ICMP", 2, 8), ICMPV6: ("ICMPv6", 2, 8)}


def checksum_errors(frame: Frame) -> list[str]:
    """What is wrong with a frame's checksums, one sentence each; empty when nothing is, or when it is no IP packet."""
    data = frame.data
    ethernet = read_ethernet(data)
    layout = None if ethernet is None else locate(data, ethernet)
    if layout is None:
        return []
    if layout.is_truncated:
        return [f"the IP header claims {layout.end - len(data)} bytes more than there are"]
    errors = _header_errors(data, layout, "IPv4 header")
    if (embedded := locate_embedded(data, layout)) is not None:
        errors += _header_errors(data, embedded, "embedded IPv4 header")
    if not layout.is_fragment and not layout.is_rerouted:
        errors += _transport_errors(data, layout, frame.half_checksum)
    return errors


def _header_errors(data: bytes, layout: Layout, what: str) -> list[str]:
    """Judge the header checksum; IPv6 has none."""
    if layout.version != 4:
        return []
    end = layout.start + 4 * (data[layout.start] & 0x0F)
    return _judge(data[layout.start : end], 10, 0, what)


def _transport_errors(data: bytes, layout: Layout, is_half: bool) -> list[str]:
    if layout.protocol not in _TRANSPORTS:
        return []
    name, offset, shortest = _TRANSPORTS[layout.protocol]
    segment = data[layout.transport : layout.end]
    if layout.protocol == UDP and len(segment) >= shortest:
        segment = segment[: int.from_bytes(segment[4:6], "big")]
    if len(segment) < shortest:
        return [f"the {name} header is cut short"]
    found = int.from_bytes(segment[offset : offset + 2], "big")
    if layout.protocol == UDP and found == 0 and not is_half:
        return [] if layout.version == 4 else ["UDP checksum 0, which IPv6 does not allow"]
    pseudo = 0
    if layout.protocol != ICMP:
        pseudo = _sum(layout.source + layout.destination + pack("!II", len(segment), layout.protocol))
    if is_half:
        return _compare(found, pseudo, f"{name} half checksum")
    return _judge(segment, offset, pseudo, f"{name} checksum")


def _judge(data: bytes, offset: int, pseudo: int, what: str) -> list[str]:
    """Compare the checksum at `offset` with what the rest of the data needs."""
    found = int.from_bytes(data[offset : offset + 2], "big")
    rest = _sum(data[:offset] + b"\0\0" + data[offset + 2 :])
    return _compare(found, 0xFFFF - (rest + pseudo) % 0xFFFF, what)


def _compare(found: int, right: int, what: str) -> list[str]:
    """In ones' complement 0 and 0xffff are the same number."""
    return [] if (found - right) % 0xFFFF == 0 else [f"{what} is {found:#06x}, should be {right:#06x}"]


def _sum(data: bytes) -> int:
    """The ones' complement sum of 16-bit words, between 0 and 0xfffe."""
    return int.from_bytes(data + b"\0" if len(data) % 2 else data, "big") % 0xFFFF
