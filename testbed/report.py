"""Reports: what a lab did, in one HTML file that needs nothing else.

Owns: what goes into the file, and how much of it. What connections, ladders and changes are is told by the modules of
these names; templates/ has the looks. Whatever came over a wire or out of a program is text there and nothing else:
the template escapes it, and the page allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from markupsafe import Markup

from testbed.capture import CaptureError
from testbed.connections import connections
from testbed.conversations import Conversation, conversations
from testbed.decisions import Decision, decided, decision_of
from testbed.diagram import diagram
from testbed.engine_handle import EngineHandle
from testbed.frames import Frame, endpoint
from testbed.lab import Lab
from testbed.recorder import Recording
from testbed.report_ladders import LadderView, PacketLine, ladders
from testbed.timeline import Timeline, timeline
from testbed.trace import trace

if TYPE_CHECKING:
    from jinja2 import Environment

_Item = TypeVar("_Item")

# A report is read by people, and a browser has to hold it. What is left out is said where it is missing.
_MOST_FRAMES: Final = 20_000
_MOST_CONNECTIONS: Final = 40
_MOST_OTHERS: Final = 100  # frames that belong to no connection
_MOST_TALKS: Final = 50  # conversations at a point
_MOST_ENTRIES: Final = 200  # of a list of the engine's
_LOG_BYTES: Final = 64 << 10  # the end of each log


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was captured, as far as a report shows it; the defaults are a lab's without captures.

    `points`: label, frames, lost ones; `trouble`: why the captures cannot be relied on; `unread`, `hidden`: frames and
    connections left out; `talks`: at each point the conversations, and how many are left out; `start`: when the first
    connection began.
    """

    frames: int = 0
    points: tuple[tuple[str, int, int], ...] = ()
    trouble: str = ""
    unread: int = 0
    ladders: tuple[LadderView, ...] = ()
    hidden: int = 0
    others: tuple[Frame, ...] = ()
    other_count: int = 0
    talks: tuple[tuple[str, list[Conversation], int], ...] = ()
    start: int | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """What an engine told: `problem` when it could not be asked."""

    title: str
    heads: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    left_out: int = 0
    problem: str = ""


def write_report(lab: Lab, path: Path) -> Path:
    """Write down what a lab did so far; OSError when the file cannot be written."""
    path.write_text(report(lab), encoding="utf-8", errors="replace")
    return path


def report(lab: Lab, failure: str = "") -> str:
    """The report's HTML; `failure` is the text of what went wrong, if something did.

    The engines are asked as long as the lab runs; captures and logs are there after its end as well.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # needed by few commands, and slow to import

    now = time.time_ns()
    environment = Environment(
        loader=PackageLoader("testbed"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_source(environment, name) for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    recording = lab.recording()
    decisions = [decision_of(node, event) for node, event in recording.events if event["event"] == "packet"]
    traffic = _traffic(lab, decisions)
    return environment.get_template("report.html.j2").render(
        style=Markup(style),
        script=Markup(script),
        script_hash=digest,
        topology=lab.topology,
        picture=Markup(diagram(lab.topology)),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        failure=failure,
        traffic=traffic,
        timeline=_timeline(lab, recording, traffic, now),
        engines=[_engine(lab, node.name, decisions, traffic) for node in lab.topology.nodes if node.engine],
        cut=sorted(recording.cut),
        impairments=_impairments(lab),
        notes=lab.notes,
        logs=[(f"{node}: {name}", *_end_of(log)) for (node, name), log in lab.logs.items()],
    )


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _timeline(lab: Lab, recording: Recording, traffic: Traffic, now: int) -> Timeline:
    """What happened when; 0 is the first connection's begin, or the lab's where there was none."""
    for entry in lab.journal.entries:
        entry.look()
    events = [(node, event) for node, event in recording.events if event["event"] != "packet"]
    start = traffic.start if traffic.start is not None else lab.journal.entries[0].began
    return timeline(lab.journal.entries, events, traffic.ladders, traffic.others, start, now)


def _traffic(lab: Lab, decisions: Sequence[Decision]) -> Traffic:
    """What was captured, and what engines said of it."""
    capture = lab.capture
    if capture is None:
        return Traffic()
    trouble = ""
    try:
        capture.settle()
        capture.verify()
    except CaptureError as error:
        trouble = str(error)
    try:
        frames = capture.frames()
    except CaptureError:  # the lab never came so far
        return Traffic(trouble=trouble)
    read = _both_ends(frames, _MOST_FRAMES)
    found = connections(trace(read, capture.longest_hop))
    told = {id(frame) for each in found for _, journey in each.journeys for hop in journey.hops for frame in hop.frames}
    others = [frame for frame in read if id(frame) not in told]
    start = min((connection.legs[0].began for connection in found), default=None)
    shown = _both_ends(found, _MOST_CONNECTIONS)
    return Traffic(
        frames=len(frames),
        points=tuple((label, each.seen, each.dropped) for label, each in capture.statistics().items()),
        trouble=trouble,
        unread=len(frames) - len(read),
        ladders=tuple(ladders(shown, capture.points, start or 0, decided(read, decisions))),
        hidden=len(found) - len(shown),
        others=tuple(others[:_MOST_OTHERS]),
        other_count=len(others),
        talks=tuple((at, *_talks(frame for frame in read if frame.point == at)) for at in capture.points),
        start=start,
    )


def _both_ends(items: list[_Item], most: int) -> list[_Item]:
    """The first and the last half of the most that are wanted: what failed is rather at the end."""
    return items if len(items) <= most else items[: most // 2] + items[-most // 2 :]


def _talks(frames: Iterator[Frame]) -> tuple[list[Conversation], int]:
    """The first conversations of a point, and how many are left out."""
    found = conversations(frames)
    return found[:_MOST_TALKS], max(0, len(found) - _MOST_TALKS)


# ---- engines and programs ----


@dataclass(frozen=True, slots=True)
class EngineView:
    """An engine: what it said of packets, each with the milliseconds and the packet's place in a ladder, and tables."""

    node: str
    words: tuple[tuple[float, int | None, Decision], ...]
    left_out: int
    tables: tuple[Table, ...]


def _engine(lab: Lab, node: str, decisions: Sequence[Decision], traffic: Traffic) -> EngineView:
    """All about a node's engine."""
    lines = [line for view in traffic.ladders for line in view.lines if isinstance(line, PacketLine)]
    packets = {word: line.number for line in lines for word in line.words}
    its = [word for word in decisions if word.node == node]
    start = traffic.start if traffic.start is not None else lab.journal.entries[0].began
    words = [((word.time_ns - start) / 1e6, packets.get(word), word) for word in its[:_MOST_ENTRIES]]
    return EngineView(node, tuple(words), max(0, len(its) - _MOST_ENTRIES), tuple(_engine_tables(lab, node)))


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
        with log.open("rb") as file:
            left_out = max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES)
            file.seek(left_out)
            data = file.read(_LOG_BYTES)
    except OSError as error:
        return f"cannot be had: {error.strerror}", 0
    return data.decode(errors="replace"), left_out
