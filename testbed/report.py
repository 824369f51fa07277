"""Reports: what a lab did, in one HTML file that needs nothing else.

Owns: what goes into the file, and how much of it. What connections, ladders and changes are is told by the modules of
these names; templates/ has the looks. Whatever came over a wire or out of a program is text there and nothing else:
the template escapes it, and the page allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Final, assert_never

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from testbed.capture import CaptureError
from testbed.connections import Connection, connections
from testbed.conversations import Conversation, conversations
from testbed.diagram import diagram
from testbed.dissection import Dissection, dissect
from testbed.engine_handle import EngineHandle
from testbed.frames import Frame, endpoint
from testbed.lab import Lab
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
from testbed.trace import Hop, trace

# A report is read by people, and a browser has to hold it. What is left out is said where it is missing.
_MOST_FRAMES: Final = 20_000
_MOST_CONNECTIONS: Final = 40
_MOST_ROWS: Final = 150  # a connection
_MOST_DISSECTIONS: Final = 600  # frames
_MOST_OTHERS: Final = 100  # frames that belong to no connection
_MOST_TALKS: Final = 50  # conversations at a point
_MOST_ENTRIES: Final = 200  # of a list of the engine's
_LOG_BYTES: Final = 64 << 10  # the end of each log

# What the template is given of a lab without captures.
_NO_TRAFFIC: Final[dict[str, Any]] = {
    **dict.fromkeys(("points", "ladders", "others", "talks"), ()),
    **dict.fromkeys(("frames", "unread", "hidden", "other_count"), 0),
    "trouble": "",
}


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


@dataclass(frozen=True, slots=True)
class PacketLine:
    """A packet in a ladder; `number` is its first frame's in the capture file."""

    number: int
    milliseconds: float
    leg: str
    row: Row
    cells: tuple[Cell, ...]
    dissections: tuple[Dissection, ...]
    is_dissected: bool


@dataclass(frozen=True, slots=True)
class OmissionLine:
    """Packets that show nothing new; `parts`: leg, direction, packets, bytes."""

    packets: int
    parts: tuple[tuple[str, bool, int, int], ...]


@dataclass(frozen=True, slots=True)
class LadderView:
    """A connection: `begin` and `length` are its place in the time of all, in percent; `left_out`: rows."""

    title: str
    names: tuple[tuple[str, str, str], ...]
    points: tuple[str, ...]
    lines: tuple[PacketLine | OmissionLine, ...]
    left_out: int
    milliseconds: tuple[float, float]
    begin: float
    length: float


@dataclass(frozen=True, slots=True)
class Table:
    """What an engine told: `problem` when it could not be asked."""

    title: str
    heads: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    left_out: int = 0
    problem: str = ""


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


def write_report(lab: Lab, path: Path) -> Path:
    """Write down what a lab did so far; OSError when the file cannot be written."""
    path.write_text(report(lab), encoding="utf-8", errors="replace")
    return path


def report(lab: Lab, failure: str = "") -> str:
    """The report's HTML; `failure` is the text of what went wrong, if something did.

    The engines are asked as long as the lab runs; captures and logs are there after its end as well.
    """
    environment = Environment(
        loader=PackageLoader("testbed"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_source(environment, name) for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        style=Markup(style),
        script=Markup(script),
        script_hash=digest,
        topology=lab.topology,
        picture=Markup(diagram(lab.topology)),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        failure=failure,
        engines=[(node.name, list(_engine_tables(lab, node.name))) for node in lab.topology.nodes if node.engine],
        impairments=_impairments(lab),
        notes=lab.notes,
        logs=[(f"{node}: {name}", *_end_of(program.log)) for (node, name), program in lab.programs.items()],
        **_traffic(lab),
    )


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _traffic(lab: Lab) -> dict[str, Any]:
    """What was captured, for the template."""
    capture = lab.capture
    if capture is None:
        return _NO_TRAFFIC
    trouble = ""
    try:
        capture.settle()
        capture.verify()
    except CaptureError as error:
        trouble = str(error)
    frames = capture.frames()
    read = frames[:_MOST_FRAMES]
    found = connections(trace(read))
    told = {id(frame) for each in found for _, journey in each.journeys for hop in journey.hops for frame in hop.frames}
    others = [frame for frame in read if id(frame) not in told]
    return {
        "points": [(label, each.seen, each.dropped) for label, each in capture.statistics().items()],
        "trouble": trouble,
        "frames": len(frames),
        "unread": len(frames) - len(read),
        "ladders": _ladders(found[:_MOST_CONNECTIONS], capture.points),
        "hidden": max(0, len(found) - _MOST_CONNECTIONS),
        "others": others[:_MOST_OTHERS],
        "other_count": len(others),
        "talks": [(at, *_talks(frame for frame in read if frame.point == at)) for at in capture.points],
    }


def _talks(frames: Iterator[Frame]) -> tuple[list[Conversation], int]:
    """The first conversations of a point, and how many are left out."""
    found = conversations(frames)
    return found[:_MOST_TALKS], max(0, len(found) - _MOST_TALKS)


# ---- ladders ----


def _ladders(found: Sequence[Connection], points: Sequence[str]) -> list[LadderView]:
    if not found:
        return []
    start = min(connection.legs[0].began for connection in found)
    end = max(leg.ended for connection in found for leg in connection.legs)
    budget = _Budget(_MOST_DISSECTIONS)
    return [_ladder(connection, points_of(connection, points), (start, end), budget) for connection in found]


def _ladder(connection: Connection, points: tuple[str, ...], time: tuple[int, int], budget: _Budget) -> LadderView:
    has_legs = len(connection.legs) > 1
    began, ended = connection.legs[0].began, max(leg.ended for leg in connection.legs)
    whole = max(time[1] - time[0], 1)
    rows = list(shortened(rows_of(connection)))
    lines = tuple(_line(row, points, time[0], budget, has_legs=has_legs) for row in rows[:_MOST_ROWS])
    names = [
        (letter_of(index) if has_legs else "", ends, ", ".join(places))
        for index, leg in enumerate(connection.legs)
        for ends, places in names_of(leg, points).items()
    ]
    return LadderView(
        title=title_of(connection),
        names=tuple(names),
        points=points,
        lines=lines,
        left_out=max(0, len(rows) - _MOST_ROWS),
        milliseconds=((began - time[0]) / 1e6, (ended - began) / 1e6),
        begin=100 * (began - time[0]) / whole,
        length=100 * (ended - began) / whole,
    )


def _line(
    row: Row | Omission, points: Sequence[str], start: int, budget: _Budget, *, has_legs: bool
) -> PacketLine | OmissionLine:
    match row:
        case Row():
            return _packet_line(row, points, start, budget, letter_of(row.leg) if has_legs else "")
        case Omission():
            parts = [(letter_of(part[0]) if has_legs else "", *part[1:]) for part in row.parts]
            return OmissionLine(row.packets, tuple(parts))
        case _:
            assert_never(row)


def _packet_line(row: Row, points: Sequence[str], start: int, budget: _Budget, leg: str) -> PacketLine:
    first = row.journey.first
    pairs = [(frame, hop) for hop in row.journey.hops for frame in hop.frames]
    has_room = budget.take(len(pairs))
    return PacketLine(
        number=first.number,
        milliseconds=(first.time_ns - start) / 1e6,
        leg=leg,
        row=row,
        cells=tuple(_cells(row, points)),
        dissections=tuple(dissect(frame, hop.changes) for frame, hop in pairs) if has_room else (),
        is_dissected=has_room,
    )


def _cells(row: Row, points: Sequence[str]) -> Iterator[Cell]:
    """A packet's way over the columns of a ladder."""
    hops = row.journey.hops
    strokes = [""] * (len(points) + 1)  # left of the first column, between the columns, right of the last one
    arrows = dict.fromkeys(points, "")
    for before, after in pairwise(hops):
        begin, end = points.index(before.point), points.index(after.point)
        stroke = "inside" if _node(before) == _node(after) else "wire"
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
        )


def _node(hop: Hop) -> str:
    return hop.point.partition(":")[0]


# ---- engines and programs ----


def _engine_tables(lab: Lab, node: str) -> Iterator[Table]:
    """What the engine of a node says of itself."""
    views: list[tuple[str, Callable[[EngineHandle], object]]] = [
        ("decisions by hook and reason", _decisions),
        ("counters", lambda engine: [{k: v for k, v in engine.counters.items() if k != "hooks"}]),
        ("connections", lambda engine: engine.connections),
        ("sockrefs", lambda engine: engine.sockrefs),
        ("ruleset", lambda engine: [{"rule": line} for line in engine.ruleset.splitlines()]),
    ]
    for title, view in views:
        yield _table(title, partial(_ask, lab, node, view))


def _ask(lab: Lab, node: str, view: Callable[[EngineHandle], object]) -> Any:
    return view(EngineHandle(lab[node]))


def _decisions(engine: EngineHandle) -> list[dict[str, Any]]:
    return [
        {"hook": hook, "reason": reason, "packets": packets}
        for hook, reasons in engine.counters["hooks"].items()
        for reason, packets in reasons.items()
    ]


def _impairments(lab: Lab) -> Table:
    """What became of the frames of impaired links."""
    return _table(
        "impaired links",
        lambda: [{"end": label, **asdict(counts)} for label, counts in lab.impairments.items()],
    )


def _table(title: str, read: Callable[[], Any]) -> Table:
    """A list of values as a table; what cannot be had says why."""
    try:
        values: list[dict[str, Any]] = read()
    except Exception as error:
        return Table(title, problem=f"cannot be had: {error}")
    heads = tuple(dict.fromkeys(key for value in values for key in value))
    rows = [tuple(_text(value.get(head)) for head in heads) for value in islice(values, _MOST_ENTRIES)]
    return Table(title, heads, tuple(rows), max(0, len(values) - _MOST_ENTRIES))


def _text(value: object) -> str:
    match value:
        case None:
            return ""
        case str():
            return value
        case {"address": str(address), "port": int() | None as port}:
            return endpoint(address, port)
        case {"source": source, "destination": destination}:
            return f"{_text(source)} > {_text(destination)}"
        case dict():
            return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
        case _:
            return json.dumps(value, ensure_ascii=False)


def _end_of(log: Path) -> tuple[str, int]:
    """The end of a log, and how many bytes before it are left out."""
    try:
        data = log.read_bytes()
    except OSError as error:
        return f"cannot be had: {error.strerror}", 0
    return data[-_LOG_BYTES:].decode(errors="replace"), max(0, len(data) - _LOG_BYTES)
