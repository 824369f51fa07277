"""What a scenario looked like from outside: the packets at the far ends and the conntrack view, in comparable words.

Owns: the rule by which two observations are equal. Pure: frames and entries in, lines of text out.

The rule. Packets are compared per capture point, conversation and direction; how directions interleave is not compared.

* Addresses and ports are compared as they are. Only at the addresses where a scenario lets NAT choose ports, a port
  outside the scenario's own block becomes `*1`, `*2`, ... in the order of appearance, the same one for the same port.
* UDP and ICMP: packet by packet, fragments put together first (how a router cuts again is its own matter). Compared:
  length and digest of the payload, hop limit, traffic class, the don't-fragment bit, and whether the checksum is right,
  wrong or none. Of ICMP errors also type, code, MTU, and the packet that they are about: its ends, hop limit and, for
  UDP, what it carried. IP identifications are not compared. Equal errors about a TCP connection count as one in a row:
  each segment that was too large has its own.
* TCP: the stream that the segments make, its length and digest, with the control flags SYN, FIN and RST at their place
  and the options of the SYN by kind, with the segment size; hop limits, traffic classes and checksums as the set of all
  segments' values. So these are not compared: segmentation, retransmission, windows, acknowledgements alone (but that
  there was nothing else), initial sequence numbers and timestamps. A SYN with another sequence number begins another
  connection between the same ends.
* Left out: ARP, neighbour discovery, multicast reports, and what has no port of the scenario's block: it belongs to an
  earlier scenario that still closes its connections.
* conntrack: both tuples of each entry that began with a port of the block, the protocol, whether it is mapped, and the
  class of its state: opening, established, closing, time-wait, reset; unreplied, replied. A port of the reply alone
  does not make an entry the scenario's: NAT may have chosen it for an earlier scenario.

Known differences. With `inline` the kernel's own conntrack has the inside addresses, and so has the user's masquerade,
which comes before the engine's source; the view compared there is the engine's. Packets with broken headers are dropped
and counted by `inline`; on `kernel` conntrack calls them invalid, and they pass: scenarios keep clear of them. A TCP
connection that is reset before any other answer is forgotten by conntrack at once, by the engine after ten seconds of
CLOSE, in which a new SYN takes its place: the view of `inline` leaves it out (stage.py). An ICMP error of the gateway's
own about the first packet of a mapped connection is lost with `inline`: it shares that packet's unconfirmed conntrack
entry, and the kernel does not queue such.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from testbed.checksums import checksum_errors
from testbed.frames import Frame, describe_content, endpoint, flag_names, protocol_name
from testbed.headers import ICMPV6, UDP, IpPacket, TcpHeader, locate, read_ethernet

_CONTROL = TcpHeader.SYN | TcpHeader.FIN | TcpHeader.RST
_DISCOVERY = range(130, 144)  # ICMPv6: multicast listeners, neighbours, routers
_STATES = {
    "SYN_SENT": "opening",
    "SYN_SENT2": "opening",
    "SYN_RECV": "opening",
    "ESTABLISHED": "established",
    "FIN_WAIT": "closing",
    "CLOSE_WAIT": "closing",
    "LAST_ACK": "closing",
    "TIME_WAIT": "time-wait",
    "CLOSE": "reset",
    "UNREPLIED": "unreplied",
    "ASSURED": "replied",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A conntrack entry; a flow is source address and port, destination address and port. `state`: conntrack's name."""

    protocol: str
    original: tuple[str, int, str, int]
    reply: tuple[str, int, str, int]
    state: str

    @property
    def is_mapped(self) -> bool:
        """Is anything translated?"""
        return self.original != (*self.reply[2:], *self.reply[:2])


@dataclass
class Names:
    """How ports are called: the scenario's own as they are, those that NAT chose by the order of their appearance."""

    block: range
    chosen_at: frozenset[str] = frozenset()
    _chosen: dict[tuple[str, int], str] = field(default_factory=dict)

    def end(self, address: str, port: int | None) -> str:
        """An endpoint."""
        if port is None or port in self.block or address not in self.chosen_at:
            return endpoint(address, port)
        name = self._chosen.setdefault((address, port), f"*{len(self._chosen) + 1}")
        return endpoint(address, 0)[:-1] + name

    def concerns(self, packet: IpPacket) -> bool:
        """Does it belong to the scenario?"""
        if packet.icmp is not None and packet.icmp.embedded is not None:
            return self.concerns(packet.icmp.embedded)
        return packet.source_port in self.block or packet.destination_port in self.block


Observation = Mapping[str, tuple[str, ...]]  # by what is compared: the lines to be equal


def observe(frames: Iterable[Frame], entries: Iterable[Entry], names: Names) -> Observation:
    """The observation of a scenario."""
    directions: dict[str, list[Frame]] = {}
    for frame in _whole(frames):
        packet = frame.ip
        if packet is not None and names.concerns(packet):
            directions.setdefault(_direction(frame.point, packet, names), []).append(frame)
    seen = {
        key: tuple(_stream(group) if key.endswith(" tcp") else _datagrams(group, names))
        for key, group in directions.items()
    }
    return {**seen, "conntrack": tuple(sorted(_entry(entry, names) for entry in entries if _has_port(entry, names)))}


def differences(left: Observation, right: Observation, titles: tuple[str, str]) -> str:
    """Both observations beside each other, where they are not equal; empty when they are."""
    text = []
    for key in sorted({*left, *right}):
        pair = left.get(key, ()), right.get(key, ())
        if pair[0] == pair[1]:
            continue
        rows = [titles, *itertools.zip_longest(*pair, fillvalue="(nothing)")]
        width = max(len(row[0]) for row in rows)
        text.append(key)
        text += [f"  {'  ' if row[0] == row[1] else '!='} {row[0]:{width}} | {row[1]}" for row in rows[:1]]
        text += [f"  {'  ' if one == other else '!='} {one:{width}} | {other}" for one, other in rows[1:]]
    return "\n".join(text)


def _direction(point: str, packet: IpPacket, names: Names) -> str:
    if packet.icmp is not None:
        return f"{point} {packet.source} > {packet.destination} icmp"
    source = names.end(packet.source, packet.source_port)
    destination = names.end(packet.destination, packet.destination_port)
    return f"{point} {source} > {destination} {protocol_name(packet.protocol)}"


def _whole(frames: Iterable[Frame]) -> list[Frame]:
    """All packets, fragments put together, each at the place of its last fragment; what stays incomplete is left."""
    done: list[Frame] = []
    waiting: dict[tuple[object, ...], list[Frame]] = {}
    for frame in frames:
        packet = frame.ip
        if packet is None or (packet.icmp and packet.protocol == ICMPV6 and packet.icmp.type in _DISCOVERY):
            continue
        if not packet.layout.is_fragment:
            done.append(frame)
            continue
        layout = packet.layout
        key = (frame.point, layout.source, layout.destination, layout.protocol, layout.identification)
        parts = waiting.setdefault(key, [])
        parts.append(frame)
        if (whole := _join(parts)) is not None:
            done.append(whole)
            del waiting[key]
    return done + [frame for parts in waiting.values() for frame in parts]


def _join(parts: Sequence[Frame]) -> Frame | None:
    """The packet that fragments make; None while one is missing."""
    data = b""
    pieces = sorted(((frame.ip.layout, frame.data) for frame in parts if frame.ip), key=lambda p: p[0].fragment_offset)
    for layout, raw in pieces:
        if layout.fragment_offset != len(data):
            return None
        data += raw[layout.transport : layout.end]
    if pieces[-1][0].has_more_fragments:
        return None
    first, raw = pieces[0]
    header = bytearray(raw[: first.start + (20 if first.version == 4 else 40)])
    if first.version == 4:
        header[14] = 0x45
        header[16:18] = (20 + len(data)).to_bytes(2, "big")
        header[20:22] = (0x4000 if raw[20] & 0x40 else 0).to_bytes(2, "big")
        header[24:26] = bytes(2)
        header[24:26] = (0xFFFF - int.from_bytes(header[14:], "big") % 0xFFFF).to_bytes(2, "big")
    else:
        header[18:20] = len(data).to_bytes(2, "big")
        header[20] = first.protocol
    return replace(parts[-1], data=bytes(header) + data)


def _digest(data: bytes) -> str:
    return f"{len(data)} bytes {hashlib.sha256(data).hexdigest()[:8]}" if data else "0 bytes"


def _checksum(frame: Frame) -> str:
    layout = _layout(frame)
    if layout.protocol == UDP and not layout.is_fragment and not any(frame.data[layout.transport + 6 :][:2]):
        return "checksum none"
    return "; ".join(checksum_errors(frame)) or "checksum right"


def _layout(frame: Frame):  # type: ignore[no-untyped-def]
    ethernet = read_ethernet(frame.data)
    return locate(frame.data, ethernet) if ethernet else None


def _ip_fields(frame: Frame, packet: IpPacket) -> str:
    layout = packet.layout
    whole = " DF" if layout.version == 4 and frame.data[layout.start + 6] & 0x40 else ""
    return f"hops {layout.hop_limit} class {layout.traffic_class}{whole}"


def _datagrams(frames: Sequence[Frame], names: Names) -> Iterable[str]:
    """Packets one by one."""
    before = ""
    for frame in frames:
        line = _datagram(frame, names)
        if line != before or " about tcp " not in line:
            yield line
        before = line


def _datagram(frame: Frame, names: Names) -> str:
    packet = frame.ip
    assert packet is not None
    fields = f"{_ip_fields(frame, packet)} {_checksum(frame)}"
    if packet.layout.is_fragment:
        return f"{describe_content(packet)} of an incomplete packet {fields}"
    if packet.icmp is None:
        return f"{_digest(packet.payload)} {fields}"
    about = packet.icmp.embedded
    if about is None:
        return f"{describe_content(packet)} {_digest(packet.payload)} {fields}"
    ends = f"{names.end(about.source, about.source_port)} > {names.end(about.destination, about.destination_port)}"
    carried = f" {_digest(about.payload)}" if about.protocol == UDP else ""
    inner = f"{protocol_name(about.protocol)} {ends} hops {about.layout.hop_limit}{carried}"
    return f"{packet.icmp.type}/{packet.icmp.code} {packet.icmp.rest.hex()} {fields} about {inner}"


def _stream(frames: Sequence[Frame]) -> Iterable[str]:
    """The connections in one direction of TCP, one after the other."""
    connection: list[tuple[Frame, IpPacket, TcpHeader]] = []
    syn: int | None = None
    for frame in frames:
        packet = frame.ip
        if packet is None or packet.tcp is None:
            yield "cut short"
            continue
        if packet.tcp.flags & TcpHeader.SYN:
            if syn not in (None, packet.tcp.seq):
                yield from _connection(connection)
                connection = []
            syn = packet.tcp.seq
        connection.append((frame, packet, packet.tcp))
    yield from _connection(connection)


def _connection(segments: Sequence[tuple[Frame, IpPacket, TcpHeader]]) -> Iterable[str]:
    """One direction of one connection: flags, data, flags, then what all segments have in common."""
    if not segments:
        return
    opening = next((tcp for _, _, tcp in segments if tcp.flags & TcpHeader.SYN), None)
    base = segments[0][2].seq if opening is None else opening.seq + 1
    data, events = bytearray(), dict[str, None]()
    for _, packet, tcp in sorted(segments, key=lambda segment: (segment[2].seq - base + 1) % (1 << 32)):
        at = (tcp.seq - base) % (1 << 32)
        if tcp.flags & TcpHeader.SYN and opening is not None:
            events[f"{flag_names(tcp.flags)} options {_options(tcp.options)}"] = None
        elif packet.payload and at > len(data):
            events[f"hole after {len(data)} bytes"] = None
        elif packet.payload:
            data[at : at + len(packet.payload)] = packet.payload
    if data:
        events[_digest(bytes(data))] = None
    for _, packet, tcp in segments:
        if tcp.flags & TcpHeader.FIN:
            events[f"FIN after {(tcp.seq + len(packet.payload) - base) % (1 << 32)} bytes"] = None
    if any(tcp.flags & TcpHeader.RST for _, _, tcp in segments):
        events["RST"] = None
    yield from events or ("ACK alone",)
    yield "; ".join(sorted({f"{_ip_fields(f, p)} {_checksum(f)}" for f, p, tcp in segments if not tcp.flags & 4}))


def _options(options: bytes) -> str:
    """The kinds of TCP options, and the segment size."""
    kinds = []
    while options and options[0]:
        size = 1 if options[0] == 1 else max(options[1] if len(options) > 1 else 2, 2)
        if options[0] == 2:
            kinds.append(f"mss {int.from_bytes(options[2:4], 'big')}")
        elif options[0] > 1:
            kinds.append(str(options[0]))
        options = options[size:]
    return " ".join(kinds)


def _has_port(entry: Entry, names: Names) -> bool:
    return any(port in names.block for port in entry.original[1::2])


def _entry(entry: Entry, names: Names) -> str:
    flows = [
        f"{names.end(source, port)} > {names.end(destination, to)}"
        for source, port, destination, to in (entry.original, entry.reply)
    ]
    mapped = "mapped" if entry.is_mapped else "as it is"
    return f"{entry.protocol} {flows[0]}, reply {flows[1]}, {mapped}, {_STATES[entry.state]}"
