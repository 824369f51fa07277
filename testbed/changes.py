"""What differs between two sightings of one packet.

Owns: the names of fields, which are Scapy's, and their comparison. Checksums and link addresses are no field here: the
former follow from the rest (checksums.py judges them), the latter are new on every link.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from testbed.frames import Frame, flag_names
from testbed.headers import ICMP, ICMPV6, TCP, UDP, IpPacket
from testbed.layers import MatchError

# What every router changes: no news at a hop, and no breach of 'nothing else changed'.
HOP_LIMITS: Final = frozenset({"ip.ttl", "ipv6.hlim"})

_IP_FLAGS: Final = ("none", "DF", "reserved", "reserved DF")  # the two above that for more fragments

_IN_LAYERS: Final = {
    "ip": ("src", "dst", "tos", "ttl", "id", "frag", "flags", "options"),
    "ipv6": ("src", "dst", "tc", "hlim", "id", "frag", "fl", "extensions"),
    "tcp": ("sport", "dport", "seq", "ack", "flags", "window", "urgptr", "options"),
    "udp": ("sport", "dport"),
    "icmp": ("type", "code", "id", "seq", "rest"),
    "icmpv6": ("type", "code", "id", "seq", "rest"),
}
EMBEDDED: Final = "embedded "
"""Before a field of the packet that an ICMP error is about."""

FIELDS: Final = ("vlan", *(f"{layer}.{name}" for layer, names in _IN_LAYERS.items() for name in names), "payload")
"""Every field that a change may be of, as it is or embedded."""

_TRANSPORT_NAMES: Final = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "icmpv6"}


@dataclass(frozen=True, slots=True)
class Change:
    """A field that is not what it was; `field` as Scapy calls it: ip.src, tcp.dport."""

    field: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.field} {self.before}→{self.after}"


def changes_between(before: Frame, after: Frame) -> tuple[Change, ...]:
    """Every field in which the packets of two frames differ."""
    old, new = dict(_fields(before)), dict(_fields(after))
    return tuple(
        Change(name, _text(old.get(name)), _text(new.get(name)))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    )


def check_change(name: str) -> None:
    """MatchError for what is no field that can change, which tells the nearest."""
    plain = name.removeprefix(EMBEDDED)
    if plain not in FIELDS:
        near = get_close_matches(plain, FIELDS, n=1)
        hint = f"did you mean {name.removesuffix(plain)}{near[0]}?" if near else f"there are {', '.join(FIELDS)}"
        raise MatchError(f"{name!r} is no field that changes are told of; {hint}")


def _fields(frame: Frame) -> Iterator[tuple[str, object]]:
    yield "vlan", frame.vlans
    if frame.ip is not None:
        yield from _packet_fields(frame.ip, frame.data)


def _packet_fields(packet: IpPacket, data: bytes) -> Iterator[tuple[str, object]]:
    """Its fields; `data` is what its layout is about."""
    layout = packet.layout
    header = data[layout.start : layout.transport]
    is_v4 = layout.version == 4
    net = "ip" if is_v4 else "ipv6"
    yield f"{net}.src", packet.source
    yield f"{net}.dst", packet.destination
    yield f"{net}.{'tos' if is_v4 else 'tc'}", layout.traffic_class
    yield f"{net}.{'ttl' if is_v4 else 'hlim'}", layout.hop_limit
    yield f"{net}.id", layout.identification
    yield f"{net}.frag", (layout.fragment_offset, layout.has_more_fragments) if layout.is_fragment else None
    if is_v4:
        yield "ip.flags", _IP_FLAGS[header[6] >> 6]
        yield "ip.options", header[20:]
    else:
        yield "ipv6.fl", int.from_bytes(header[:4], "big") & 0xFFFFF
        yield "ipv6.extensions", b"" if layout.is_fragment else header[40:]
    transport = _TRANSPORT_NAMES.get(packet.protocol, "payload")
    if packet.icmp is not None:
        yield from _icmp_fields(packet, transport, data)
    elif packet.source_port is not None:
        yield f"{transport}.sport", packet.source_port
        yield f"{transport}.dport", packet.destination_port
    if packet.tcp is not None:
        yield "tcp.seq", packet.tcp.seq
        yield "tcp.ack", packet.tcp.ack
        yield "tcp.flags", flag_names(packet.tcp.flags)
        yield "tcp.window", packet.tcp.window
        yield "tcp.urgptr", packet.tcp.urgent
        yield "tcp.options", packet.tcp.options
    if not packet.is_icmp_error:
        yield "payload", packet.payload


def _icmp_fields(packet: IpPacket, transport: str, data: bytes) -> Iterator[tuple[str, object]]:
    assert packet.icmp is not None
    yield f"{transport}.type", packet.icmp.type
    yield f"{transport}.code", packet.icmp.code
    if packet.source_port is not None:
        yield f"{transport}.id", packet.source_port
        yield f"{transport}.seq", packet.icmp.rest[2:]
        return
    yield f"{transport}.rest", packet.icmp.rest
    if packet.icmp.embedded is not None:
        for name, value in _packet_fields(packet.icmp.embedded, data):
            yield f"{EMBEDDED}{name}", value


def _text(value: object) -> str:
    """A field's value, short enough for one line."""
    match value:
        case None | () | b"":
            return "none"
        case bytes():
            return value.hex() if len(value) <= 8 else f"{len(value)} bytes {value[:6].hex()}…"
        case tuple():
            return ",".join(str(part) for part in value)
        case _:
            return str(value)
