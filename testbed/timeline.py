"""The timeline of a report: what happened when, on one axis.

Owns: which lanes there are, what is on them, and the same as a list. Pure: a journal, engines' events and ladders in,
values out; the template draws them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from testbed.frames import Frame, endpoint
from testbed.journal import LAB, Entry
from testbed.recorder import Event
from testbed.report_ladders import LadderView, PacketLine

_MOST_LANES: Final = 120
_MOST_MARKS: Final = 2_000  # on all lanes
_MOST_MOMENTS: Final = 300  # lines of the list
_MARGIN: Final = 0.02  # of the whole, left and right


@dataclass(frozen=True, slots=True)
class Bar:
    """Something that lasted, in milliseconds. `ready`: when it was; `is_open`: it went on when this was written."""

    begin: float
    end: float
    text: str
    kind: str
    ready: float | None = None
    is_open: bool = False
    target: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment; `target`: where in the report there is more about it."""

    at: float
    text: str
    kind: str
    target: str = ""


@dataclass(frozen=True, slots=True)
class Lane:
    """A line of the picture."""

    where: str
    label: str
    bars: tuple[Bar, ...] = ()
    marks: tuple[Mark, ...] = ()
    target: str = ""


@dataclass(frozen=True, slots=True)
class Moment:
    """A line of the list; `length` is None for what took no time."""

    at: float
    length: float | None
    where: str
    text: str
    is_bad: bool = False


@dataclass(frozen=True, slots=True)
class Timeline:
    """All of it; `begin` and `end` in milliseconds, `traffic` from the first connection's begin to the last one's end.

    `left_out`: lanes and marks; `unlisted`: moments.
    """

    begin: float
    end: float
    traffic: tuple[float, float] | None
    lanes: tuple[Lane, ...]
    moments: tuple[Moment, ...]
    left_out: int
    unlisted: int


def timeline(
    entries: Sequence[Entry],
    events: Sequence[tuple[str, Event]],
    views: Sequence[LadderView],
    others: Iterable[Frame],
    start: int,
    now: int,
) -> Timeline:
    """The timeline of a lab up to `now`, in milliseconds since `start`; both are nanoseconds since the epoch.

    `events`: what engines told of sockrefs and connections; `others`: frames of no connection.
    """
    clock = _Clock(start, now)
    of_nodes = [*_program_lanes(entries, clock), *_engine_lanes(events, clock)]
    places = list(dict.fromkeys((LAB, *(lane.where for lane in of_nodes))))
    of_nodes.sort(key=lambda lane: places.index(lane.where))
    lanes = [*of_nodes, *_connection_lanes(views), *_other_lane(others, clock)]
    kept, left_out = _within_bounds(lanes)
    moments = sorted([*_moments(entries, clock), *_event_moments(events, clock)], key=lambda moment: moment.at)
    times = [time for lane in lanes for time in _times(lane)] or [0.0, clock.now]
    margin = _MARGIN * max(max(times) - min(times), 1.0)
    return Timeline(
        begin=min(times) - margin,
        end=max(times) + margin,
        traffic=(min(v.begin for v in views), max(v.begin + v.length for v in views)) if views else None,
        lanes=tuple(kept),
        moments=tuple(moments[:_MOST_MOMENTS]),
        left_out=left_out,
        unlisted=max(0, len(moments) - _MOST_MOMENTS),
    )


class _Clock:
    """Nanoseconds since the epoch become milliseconds since the start."""

    def __init__(self, start: int, now: int) -> None:
        self._start = start
        self.now = self.at(now)

    def at(self, time_ns: int) -> float:
        return (time_ns - self._start) / 1e6

    def of(self, event: Event) -> float:
        return self.at(int(event["time"] * 1e9))


def _program_lanes(entries: Sequence[Entry], clock: _Clock) -> Iterator[Lane]:
    """The lab's own, and for each node one for its commands and one for each program."""
    rows: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        label = entry.what if entry.program is not None else "" if entry.where == LAB else "commands"
        rows.setdefault((entry.where, label), []).append(entry)
    for (where, label), found in rows.items():
        yield Lane(where, label, tuple(_bar(entry, clock) for entry in found))


def _bar(entry: Entry, clock: _Clock) -> Bar:
    text = f"{entry.what}: {entry.outcome}" if entry.outcome else entry.what
    kind = "bad" if entry.is_bad else "program" if entry.program is not None else "command"
    end = clock.now if entry.ended is None else clock.at(entry.ended)
    ready = None if entry.ready is None else clock.at(entry.ready)
    return Bar(clock.at(entry.began), end, text, kind, ready, is_open=entry.ended is None)


def _engine_lanes(events: Sequence[tuple[str, Event]], clock: _Clock) -> Iterator[Lane]:
    for node in dict.fromkeys(node for node, _ in events):
        marks = [Mark(clock.of(event), event_text(event), event["event"]) for at, event in events if at == node]
        yield Lane(node, "engine's events", marks=tuple(marks), target=f"engine-{node}")


def _connection_lanes(views: Sequence[LadderView]) -> Iterator[Lane]:
    for number, view in enumerate(views, 1):
        bar = Bar(view.begin, view.begin + view.length, view.title, "connection", target=f"connection-{number}")
        packets = [line for line in view.lines if isinstance(line, PacketLine)]
        marks = [
            Mark(
                line.milliseconds,
                f"{line.leg} {line.row.text}".strip(),
                "forward" if line.row.is_forward else "back",
                f"packet-{line.number}",
            )
            for line in packets
        ]
        yield Lane("", view.title.rpartition(": ")[0], (bar,), tuple(marks), f"connection-{number}")


def _other_lane(others: Iterable[Frame], clock: _Clock) -> Iterator[Lane]:
    marks = tuple(Mark(clock.at(frame.time_ns), str(frame), "other") for frame in others)
    if marks:
        yield Lane("", "frames of no connection", marks=marks, target="captures")


def _within_bounds(lanes: Sequence[Lane]) -> tuple[list[Lane], int]:
    """What a browser can hold, and how many lanes and marks are left out for it."""
    kept, room = [], _MOST_MARKS
    for lane in lanes[:_MOST_LANES]:
        kept.append(Lane(lane.where, lane.label, lane.bars, lane.marks[:room], lane.target))
        room -= len(kept[-1].marks)
    all_marks = sum(len(lane.marks) for lane in lanes)
    return kept, len(lanes) - len(kept) + all_marks - sum(len(lane.marks) for lane in kept)


def _times(lane: Lane) -> Iterator[float]:
    for bar in lane.bars:
        yield from (bar.begin, bar.end)
    for mark in lane.marks:
        yield mark.at


def _moments(entries: Sequence[Entry], clock: _Clock) -> Iterator[Moment]:
    for entry in entries:
        bar = _bar(entry, clock)
        words = [bar.text]
        if bar.ready is not None:
            words.append(f"ready after {bar.ready - bar.begin:.1f} ms")
        if bar.is_open:
            words.append("still running")
        yield Moment(
            bar.begin, None if bar.is_open else bar.end - bar.begin, entry.where, ", ".join(words), entry.is_bad
        )


def _event_moments(events: Sequence[tuple[str, Event]], clock: _Clock) -> Iterator[Moment]:
    for node, event in events:
        yield Moment(clock.of(event), None, node, f"engine: {event_text(event)}", event["event"] == "dropped")


def event_text(event: Event) -> str:
    """What `tproxyctl monitor` tells of an event, without the time."""
    if "sockref" in event:
        entry = event["sockref"]
        return f"{event['event']} {entry['protocol']} {_end(entry['foreign'])} for {_end(entry['local'])}"
    if "connection" in event:
        entry = event["connection"]
        steps = dict.fromkeys(_flow(entry[name]) for name in ("original", "inside", "final"))
        return f"{event['event']} #{entry['id']} {entry['protocol']} {', then '.join(steps)}"
    about = f" {event['protocol']} {_flow(event['before'])}" if event["before"] else ""
    return f"{event['event']} at {event['hook']}{about}: {event['reason']} {event['detail']}".rstrip()


def _end(value: dict[str, Any]) -> str:
    return endpoint(value["address"], value["port"])


def _flow(value: dict[str, Any]) -> str:
    return f"{_end(value['source'])} → {_end(value['destination'])}"
