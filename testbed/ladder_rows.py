"""What a ladder shows of a connection, before it is drawn.

Owns: what is said of each packet, which packet was lost or repeated, and which may be left out. Pure; ladder.py draws
it as text, the report as HTML.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from testbed.changes import EMBEDDED, HOP_LIMITS, Change
from testbed.checksums import checksum_errors
from testbed.connections import Connection, Leg
from testbed.frames import describe_content, destination_of, flag_names, icmp_name, ip_of, source_of
from testbed.headers import IpPacket, TcpHeader
from testbed.trace import Hop, Journey

# Fewer packets than this are not worth a line that says they were left out.
_WORTH_LEAVING_OUT: Final = 3


@dataclass(frozen=True, slots=True)
class Row:
    """A packet. `leg` is an index; `is_lost`: others of its kind went further; `is_repeated`: it was sent before."""

    leg: int
    is_forward: bool
    journey: Journey
    text: str
    is_lost: bool
    is_repeated: bool


@dataclass(frozen=True, slots=True)
class Omission:
    """Packets that show nothing new; each part is a leg, is it forward, how many packets, with how many bytes."""

    parts: tuple[tuple[int, bool, int, int], ...]

    @property
    def packets(self) -> int:
        """How many there are."""
        return sum(packets for _, _, packets, _ in self.parts)


def title_of(connection: Connection) -> str:
    """What a connection is called: `tcp 10.0.0.1:4000 → 10.0.0.2:80: 4 packets in 2 legs`."""
    first = connection.legs[0]
    amount = len(connection.journeys)
    legs = f" in {len(connection.legs)} legs" if len(connection.legs) > 1 else ""
    return f"{first.protocol} {first.initiator} → {first.responder}: {amount} packet{'s' * (amount > 1)}{legs}"


def letter_of(leg: int) -> str:
    """What the leg of an index is called where there are several."""
    return chr(ord("A") + leg % 26)


def points_of(connection: Connection, points: Sequence[str]) -> tuple[str, ...]:
    """Those of the points by which a connection came, in their order."""
    seen = {point for _, journey in connection.journeys for point in journey.points}
    return tuple(point for point in points if point in seen)


def names_of(leg: Leg, points: Sequence[str]) -> dict[str, list[str]]:
    """What the ends of a leg are called, and where."""
    names: dict[str, list[str]] = {}
    shown = [hop for hop in leg.opening.hops if hop.point in points]
    for hop in sorted(shown, key=lambda hop: points.index(hop.point)):
        packet = ip_of(hop.frame)
        names.setdefault(f"{source_of(packet)} → {destination_of(packet)}", []).append(hop.point)
    return names


def rows_of(connection: Connection) -> list[Row]:
    """Every packet of a connection, in the order of time."""
    furthest = _furthest_points(connection)
    numbers = [_Numbers(leg) for leg in connection.legs]
    sent: set[object] = set()
    rows = []
    for leg, journey in connection.journeys:
        index = connection.legs.index(leg)
        forward = leg.is_forward(journey)
        identity = _data_identity(journey.packet)
        rows.append(
            Row(
                index,
                forward,
                journey,
                numbers[index].describe(journey.packet, is_forward=forward),
                is_lost=furthest[index, forward] not in journey.points,
                is_repeated=identity is not None and (index, forward, identity) in sent,
            )
        )
        sent.add((index, forward, identity))
    return rows


def shortened(rows: list[Row]) -> Iterator[Row | Omission]:
    """The same without packets that only carry on: data and acknowledgements that went the way of earlier ones."""
    known: set[object] = set()
    waiting: list[Row] = []
    for row in rows:
        kind = _kind(row)
        if kind is not None and kind in known:
            waiting.append(row)
            continue
        yield from _left_out(waiting)
        waiting = []
        known.add(kind)
        yield row
    yield from _left_out(waiting)


def notes_on(hop: Hop) -> list[str]:
    """What happened to a packet just before a point, one line each."""
    notes = [_short(change) for change in hop.changes if not _is_routing(change)]
    if len(hop.frames) > 1:
        notes.append(f"in {len(hop.frames)} pieces")
    return notes


def errors_at(hop: Hop) -> list[str]:
    """Which checksums are wrong there."""
    return sorted({error for frame in hop.frames for error in checksum_errors(frame)})


def _furthest_points(connection: Connection) -> dict[tuple[int, bool], str]:
    """Where the packets of a leg and direction end as a rule; of two places, the one with the longer way.

    A place that some left by a wire, and got somewhere, is no end: whatever was seen last there was lost.
    """
    ends: defaultdict[tuple[int, bool], Counter[str]] = defaultdict(Counter)
    left: defaultdict[tuple[int, bool], set[str]] = defaultdict(set)
    longest: defaultdict[str, int] = defaultdict(int)
    for leg, journey in connection.journeys:
        kind, end = (connection.legs.index(leg), leg.is_forward(journey)), journey.points[-1]
        ends[kind][end] += 1
        left[kind] |= {hop.point for hop in journey.hops[:-1] if hop.frame.outgoing}
        longest[end] = max(longest[end], len(journey.hops))
    return {
        kind: max(count, key=lambda end: (end not in left[kind], count[end], longest[end]))
        for kind, count in ends.items()
    }


class _Numbers:
    """TCP's sequence numbers of a leg, counted from its beginning."""

    def __init__(self, leg: Leg) -> None:
        self._starts: dict[bool, int] = {}
        for journey in leg.journeys:
            if journey.packet.tcp is not None:
                self._starts.setdefault(leg.is_forward(journey), journey.packet.tcp.seq)

    def describe(self, packet: IpPacket, *, is_forward: bool) -> str:
        """`SYN`, `PSH ACK 1:513`, `ACK ack 513`; what is no TCP is told as everywhere."""
        if packet.icmp is not None:
            return icmp_name(packet)
        if packet.tcp is None or packet.layout.is_fragment:
            return describe_content(packet)
        flags = flag_names(packet.tcp.flags)
        if packet.payload:
            start = self._relative(packet.tcp.seq, is_forward)
            return f"{flags} {start}:{start + len(packet.payload)}"
        if packet.tcp.flags & (TcpHeader.SYN | TcpHeader.ACK) == TcpHeader.ACK:
            return f"{flags} ack {self._relative(packet.tcp.ack, not is_forward)}"
        return flags

    def _relative(self, number: int, is_forward: bool) -> int:
        return (number - self._starts.get(is_forward, number)) % (1 << 32)


def _data_identity(packet: IpPacket) -> object:
    """What makes TCP data, or an opening or closing, the same as sent before; None for what may well come twice."""
    if packet.tcp is None:
        return None
    opens_or_closes = packet.tcp.flags & (TcpHeader.SYN | TcpHeader.FIN)
    return (packet.tcp.seq, opens_or_closes, packet.payload) if packet.payload or opens_or_closes else None


def _kind(row: Row) -> object:
    """What rows have in common that show the same; None for one that is always shown."""
    packet = row.journey.packet
    if row.is_lost or row.is_repeated or packet.icmp is not None or any(map(errors_at, row.journey.hops)):
        return None
    if packet.tcp is not None and packet.tcp.flags & ~(TcpHeader.ACK | TcpHeader.PSH):
        return None
    notes = tuple((hop.point, tuple(map(str, hop.changes))) for hop in row.journey.hops)
    return row.leg, row.is_forward, bool(packet.payload), notes


def _left_out(waiting: list[Row]) -> Iterator[Row | Omission]:
    if len(waiting) < _WORTH_LEAVING_OUT:
        yield from waiting
        return
    packets: Counter[tuple[int, bool]] = Counter()
    sizes: Counter[tuple[int, bool]] = Counter()
    for row in waiting:
        packets[row.leg, row.is_forward] += 1
        sizes[row.leg, row.is_forward] += len(row.journey.packet.payload)
    yield Omission(
        tuple((*kind, packets[kind], sizes[kind]) for kind in sorted(packets, key=lambda k: (k[0], not k[1])))
    )


def _short(change: Change) -> str:
    """`src 10.0.0.1→10.0.0.2`: a ladder has little room, and the packet's protocol is known."""
    embedded = EMBEDDED if change.field.startswith(EMBEDDED) else ""
    return f"{embedded}{change.field.rpartition('.')[2]} {change.before}→{change.after}"


def _is_routing(change: Change) -> bool:
    """Did a router take one off the hop limit, as it must?"""
    return change.field in HOP_LIMITS and int(change.before) - int(change.after) == 1
