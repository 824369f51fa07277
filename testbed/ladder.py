"""Ladders: a connection as text, one column a capture point, one row a packet.

Owns: the layout. Values in, text with styles out: a terminal shows the colours, a file gets the plain text.

    ms      packet                      client          gateway         gateway         server
                                        eth0            eth0            eth1            eth0
    0.000   → SYN                       ●──────────────▶●┄┄┄┄┄┄┄┄┄┄┄┄┄┄▶①──────────────▶●
                                                                        ① src 10.0.1.2→10.0.2.1
    0.113   ← SYN ACK                   ●◀──────────────②◀┄┄┄┄┄┄┄┄┄┄┄┄┄┄●◀──────────────●
                                                        ② dst 10.0.2.1→10.0.1.2
    0.131   → ACK ack 1                 ●──────────────▶●┄┄┄┄┄┄┄┄┄┄┄┄┄┄▶①──────────────▶●

On a wire the line is drawn through, inside a node it is dotted. A number is where a packet was not what it was at the
point before; what changed is written out below its first use. ✗ is where a packet was seen last although others of its
kind went further.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise, repeat
from typing import Final, assert_never

from rich.text import Text

from testbed.connections import Connection
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

WIDTH: Final = 140

_TIME: Final = 10
_PACKET: Final = 28
_NARROWEST: Final = 13
_MOST_ROWS: Final = 120  # of many packets that all show something new, the first and the last are drawn

_FORWARD: Final = "cyan"
_BACK: Final = "green"
_CHANGED: Final = "yellow"
_BAD: Final = "bold red"
_FAINT: Final = "dim"

# For what changed; when they run out, it is written out each time.
_NUMBERS: Final = "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳"
_UNNUMBERED: Final = "◆"


@dataclass(frozen=True, slots=True)
class _Grid:
    """Where the columns are, in characters, and the numbers of the changes that were written out."""

    points: tuple[str, ...]
    left: int
    step: int
    numbers: dict[tuple[str, ...], str] = field(default_factory=dict)

    def number(self, notes: tuple[str, ...]) -> str:
        """The number that stands for these changes from now on."""
        if len(self.numbers) < len(_NUMBERS):
            self.numbers.setdefault(notes, _NUMBERS[len(self.numbers)])
        return self.numbers.get(notes, _UNNUMBERED)

    def place(self, point: str) -> int | None:
        """Where a point's column begins; None when it has none."""
        return self.left + self.points.index(point) * self.step if point in self.points else None


def ladder(connection: Connection, points: Sequence[str], width: int = WIDTH) -> Text:
    """Draw a connection. `points`: all capture points in the order of their columns; untouched ones are left out.

    With more points than fit into `width` characters, some are left out too, and it says so: first those at which
    nothing changed. Two always are drawn, however narrow that is.
    """
    has_legs = len(connection.legs) > 1
    left = _TIME + 2 * has_legs + 2 + _PACKET
    width = max(width, left + 2 * _NARROWEST)
    touched = points_of(connection, points)
    shown = _that_fit(connection, touched, (width - left) // _NARROWEST)
    grid = _Grid(shown, left, (width - left) // max(len(shown), 1))
    lines = [*_title(connection, touched), *_heads(grid)]
    if len(shown) < len(touched):
        lines.append(Text(f"{len(touched) - len(shown)} points are not shown, for want of room", _FAINT))
    start = connection.legs[0].began
    rows = list(shortened(rows_of(connection)))
    hidden = range(_MOST_ROWS // 2, len(rows) - _MOST_ROWS // 2)
    for number, row in enumerate(rows):
        if number in hidden:
            if number == hidden.start:
                lines.append(Text(f"{' ' * _TIME}⋮ {len(hidden)} lines are not shown", _FAINT))
            continue
        match row:
            case Row():
                lines += _packet_lines(row, grid, start, has_legs)
            case Omission():
                lines.append(_omission_line(row, left, has_legs))
            case _:
                assert_never(row)
    return Text("\n").join(lines)


def _that_fit(connection: Connection, points: tuple[str, ...], most: int) -> tuple[str, ...]:
    """Points for which there is room: the ends first, then those where something changed."""
    if len(points) <= most:
        return points
    changed = {hop.point for _, journey in connection.journeys for hop in journey.hops if notes_on(hop)}
    ranked = sorted(points, key=lambda point: (point not in (points[0], points[-1]), point not in changed))
    kept = ranked[: max(most, 2)]
    return tuple(point for point in points if point in kept)


def _title(connection: Connection, points: Sequence[str]) -> Iterator[Text]:
    yield Text(title_of(connection), "bold")
    for index, leg in enumerate(connection.legs):
        for names, places in names_of(leg, points).items():
            mark = f"{letter_of(index)} " if len(connection.legs) > 1 else ""
            yield Text(f"  {mark}{names}  at {', '.join(places)}", _FAINT)


def _heads(grid: _Grid) -> Iterator[Text]:
    nodes, interfaces = (
        "".join(point.split(":", 1)[part][: grid.step - 1].ljust(grid.step) for point in grid.points) for part in (0, 1)
    )
    yield Text(f"{'ms'.rjust(_TIME - 2)}  {'packet'.ljust(grid.left - _TIME)}{nodes}".rstrip(), "bold")
    yield Text(" " * grid.left + interfaces.rstrip(), "bold")


def _packet_lines(row: Row, grid: _Grid, start: int, has_legs: bool) -> Iterator[Text]:
    style = _FORWARD if row.is_forward else _BACK
    milliseconds = (row.journey.first.time_ns - start) / 1e6
    leg = f"{letter_of(row.leg)} " if has_legs else ""
    text = f"{row.text}{' again' if row.is_repeated else ''}"
    text = text if len(text) < _PACKET else f"{text[: _PACKET - 2]}…"
    below = _note_lines(row, grid)  # first, since it gives the numbers that the line shows
    line = Text(f"{milliseconds:{_TIME - 2}.3f}  ", _FAINT)
    line.append(f"{leg}{'→' if row.is_forward else '←'} ".ljust(grid.left - _TIME - _PACKET), style)
    line.append(text.ljust(_PACKET), _BAD if row.is_lost or row.is_repeated else "")
    line.append(_path(row, grid))
    line.rstrip()
    yield line
    yield from below


def _path(row: Row, grid: _Grid) -> Text:
    """The line from point to point."""
    hops = [(place - grid.left, hop) for hop in row.journey.hops if (place := grid.place(hop.point)) is not None]
    cells = [" "] * (grid.step * len(grid.points))
    styles = [_FORWARD if row.is_forward else _BACK] * len(cells)
    for (begin, before), (end, after) in pairwise(hops):
        stroke = "┄" if before.frame.node == after.frame.node else "─"
        inner = range(min(begin, end) + 1, max(begin, end))
        for place in inner:
            cells[place] = stroke
        if inner:
            cells[end - 1 if begin < end else end + 1] = "▶" if begin < end else "◀"
    for place, hop in hops:
        notes = tuple(notes_on(hop))
        cells[place], styles[place] = (
            (grid.numbers.get(notes, _UNNUMBERED), _CHANGED) if notes else ("●", styles[place])
        )
        if errors_at(hop):
            styles[place] = _BAD
    if row.is_lost and hops:
        cells[hops[-1][0]], styles[hops[-1][0]] = "✗", _BAD
    path = Text()
    for cell, style in zip(cells, styles, strict=True):
        path.append(cell, style)
    return path


def _note_lines(row: Row, grid: _Grid) -> list[Text]:
    """What is written below a row, each note as wide as there is room on its right. Numbers changes that are new."""
    columns = sorted(_notes_below(row, grid), key=lambda column: column[0])
    lines: list[Text] = []
    for index, (place, notes, errors) in enumerate(columns):
        # A packet may come by a point twice, in and out by the same door.
        right = (other for other, _, _ in columns[index + 1 :] if other > place)
        end = next(right, grid.left + grid.step * len(grid.points))
        room = end - place - 1
        marks = chain([f"{grid.number(notes)} "] if notes else [], repeat("  "))
        changed = [f"{mark}{line}" for mark, line in zip(marks, _wrapped(notes, room - 2), strict=False)]
        styled = [(line, _CHANGED) for line in changed] + [(line, _BAD) for line in _wrapped(errors, room)]
        begin = next((number for number, line in enumerate(lines) if len(line.plain) <= place), len(lines))
        lines += (Text() for _ in range(begin + len(styled) - len(lines)))
        for line, (words, style) in zip(lines[begin:], styled, strict=False):
            line.append(" " * (place - len(line.plain)))
            line.append(words, style)
    return lines


def _notes_below(row: Row, grid: _Grid) -> Iterator[tuple[int, tuple[str, ...], list[str]]]:
    """Column, changes that were not written out before, and errors."""
    for hop in row.journey.hops:
        place, notes, errors = grid.place(hop.point), tuple(notes_on(hop)), errors_at(hop)
        fresh = () if notes in grid.numbers else notes
        if place is not None and (fresh or errors):
            yield place, fresh, errors


def _wrapped(notes: Iterable[str], width: int) -> list[str]:
    return [line for note in notes for line in _broken(note, width)]


def _broken(note: str, width: int) -> Iterator[str]:
    """Break a note at its arrow, else at blanks, else anywhere."""
    lead = ""
    for part in note.replace("→", " →", 1).split(" ") if len(note) > width else [note]:
        joined = part if not lead else f"{lead}{'' if part.startswith('→') else ' '}{part}"
        if len(joined) <= width:
            lead = joined
            continue
        if lead:
            yield lead
        lead = f"  {part}" if part.startswith("→") else part
        while len(lead) > width:
            yield lead[:width]
            lead = f"   {lead[width:]}"
    yield lead


def _omission_line(omission: Omission, left: int, has_legs: bool) -> Text:
    parts = []
    for leg, is_forward, packets, size in omission.parts:
        mark = f"{letter_of(leg)} " if has_legs else ""
        data = f" with {size:,} bytes" if size else ""
        parts.append(f"{mark}{'→' if is_forward else '←'} {packets}{data}")
    words = f"⋮ {omission.packets} more like these"
    return Text(f"{' ' * _TIME}{words.ljust(left - _TIME)}{'   '.join(parts)}", _FAINT)
