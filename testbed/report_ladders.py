"""Ladders of a report: what is shown of each connection, packet by packet.

Owns: the values that the template draws, and how many of them there may be. What is told of a packet is the matter of
ladder_rows.py, what engines decided about it of decisions.py. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, assert_never

from testbed.connections import Connection
from testbed.decisions import Decision
from testbed.dissection import Dissection, dissect
from testbed.ladder_rows import (
    Omission,
    Row,
    errors_at,
    letter_of,
    names_of,
    notes_on,
    points_of,
    rows_of,
    shortened,
    title_of,
)
from testbed.trace import Hop

_MOST_ROWS: Final = 150  # a connection
_MOST_DISSECTIONS: Final = 600  # frames


@dataclass(frozen=True, slots=True)
class Cell:
    """A packet at one point of a ladder. `left`, `right`: the line there, `wire`, `inside` a node, or none."""

    left: str
    right: str
    arrow: str
    is_seen: bool
    is_lost: bool
    notes: tuple[str, ...]
    errors: tuple[str, ...]
    words: tuple[Decision, ...]  # of the node's engine, where they are more than "as before"


@dataclass(frozen=True, slots=True)
class PacketLine:
    """A packet in a ladder; `number` is its first frame's in the capture file."""

    number: int
    milliseconds: float
    leg: str
    row: Row
    cells: tuple[Cell, ...]
    words: tuple[Decision, ...]  # all that the engines on its way said of it
    dissections: tuple[Dissection, ...]
    is_dissected: bool


@dataclass(frozen=True, slots=True)
class OmissionLine:
    """Packets that show nothing new; `parts`: leg, direction, packets, bytes."""

    packets: int
    parts: tuple[tuple[str, bool, int, int], ...]


@dataclass(frozen=True, slots=True)
class LadderView:
    """A connection: when it began, in milliseconds, and how long it lasted; `left_out`: rows."""

    title: str
    names: tuple[tuple[str, str, str], ...]
    points: tuple[str, ...]
    lines: tuple[PacketLine | OmissionLine, ...]
    left_out: int
    begin: float
    length: float


class _Budget:
    """How many frames may still be dissected."""

    def __init__(self, amount: int) -> None:
        self.left = amount

    def take(self, amount: int) -> bool:
        """Whether there is room for that many; if so, they are taken off."""
        if amount > self.left:
            return False
        self.left -= amount
        return True


def ladders(
    found: Sequence[Connection], points: Sequence[str], start: int, words: Mapping[int, tuple[Decision, ...]]
) -> list[LadderView]:
    """The ladders of connections over capture points, in milliseconds since `start`.

    `words`: what engines said of frames, by their numbers (decisions.py).
    """
    drawing = _Drawing(start, words)
    return [drawing.ladder(connection, points_of(connection, points)) for connection in found]


class _Drawing:
    """What all ladders of a report have in common."""

    def __init__(self, start: int, words: Mapping[int, tuple[Decision, ...]]) -> None:
        self._start = start
        self._words = words
        self._budget = _Budget(_MOST_DISSECTIONS)

    def ladder(self, connection: Connection, points: tuple[str, ...]) -> LadderView:
        """One connection."""
        has_legs = len(connection.legs) > 1
        began, ended = connection.legs[0].began, max(leg.ended for leg in connection.legs)
        rows = list(shortened(rows_of(connection)))
        names = [
            (letter_of(index) if has_legs else "", ends, ", ".join(places))
            for index, leg in enumerate(connection.legs)
            for ends, places in names_of(leg, points).items()
        ]
        return LadderView(
            title=title_of(connection),
            names=tuple(names),
            points=points,
            lines=tuple(self._line(row, points, has_legs=has_legs) for row in rows[:_MOST_ROWS]),
            left_out=max(0, len(rows) - _MOST_ROWS),
            begin=(began - self._start) / 1e6,
            length=(ended - began) / 1e6,
        )

    def _line(self, row: Row | Omission, points: Sequence[str], *, has_legs: bool) -> PacketLine | OmissionLine:
        match row:
            case Row():
                return self._packet(row, points, letter_of(row.leg) if has_legs else "")
            case Omission():
                parts = [(letter_of(part[0]) if has_legs else "", *part[1:]) for part in row.parts]
                return OmissionLine(row.packets, tuple(parts))
            case _:
                assert_never(row)

    def _packet(self, row: Row, points: Sequence[str], leg: str) -> PacketLine:
        first = row.journey.first
        pairs = [(frame, hop) for hop in row.journey.hops for frame in hop.frames]
        # A packet that passes a node has the same words at both of its frames.
        words = tuple(dict.fromkeys(word for frame, _ in pairs for word in self._words.get(frame.number, ())))
        has_room = self._budget.take(len(pairs))
        return PacketLine(
            number=first.number,
            milliseconds=(first.time_ns - self._start) / 1e6,
            leg=leg,
            row=row,
            cells=tuple(_cells(row, points, words)),
            words=words,
            dissections=tuple(dissect(frame, hop.changes) for frame, hop in pairs) if has_room else (),
            is_dissected=has_room,
        )


def _cells(row: Row, points: Sequence[str], words: Sequence[Decision]) -> Iterator[Cell]:
    """A packet's way over the columns of a ladder."""
    hops = row.journey.hops
    strokes = [""] * (len(points) + 1)  # left of the first column, between the columns, right of the last one
    arrows = dict.fromkeys(points, "")
    for before, after in pairwise(hops):
        begin, end = points.index(before.point), points.index(after.point)
        stroke = "inside" if before.frame.node == after.frame.node else "wire"
        for column in range(min(begin, end), max(begin, end)):
            strokes[column + 1] = stroke
        arrows[after.point] = "▶" if begin < end else "◀" if end < begin else ""
    for column, point in enumerate(points):
        here = [hop for hop in hops if hop.point == point]
        yield Cell(
            left=strokes[column],
            right=strokes[column + 1],
            arrow=arrows[point],
            is_seen=bool(here),
            is_lost=row.is_lost and hops[-1].point == point,
            notes=tuple(note for hop in here for note in notes_on(hop)),
            errors=tuple(error for hop in here for error in errors_at(hop)),
            words=tuple(word for word in words if word.is_news and _column_of(word, hops) == point),
        )


def _column_of(word: Decision, hops: Sequence[Hop]) -> str:
    """Where an engine's word is written: where it was said, or where the packet was seen last before that."""
    seen = [hop.point for hop in hops]
    return word.place if word.place in seen else next(at for at in reversed(seen) if at.startswith(f"{word.node}:"))
