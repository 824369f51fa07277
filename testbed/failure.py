"""What a failed expectation says.

Owns: the text: expected beside seen, the nearest misses field by field, the ladder of the connection that came closest,
and where the capture file lies. Must not know how expectations wait.
"""

from __future__ import annotations

import shutil
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from testbed.connections import Connection, connections
from testbed.conversations import conversations
from testbed.frames import Frame
from testbed.ladder import ladder
from testbed.matching import Matcher, Verdict
from testbed.trace import trace

_MOST_LISTED: Final = 5
_MOST_MISSES: Final = 3
_FILE_WIDTH: Final = 120
_NEAR: Final = 10_000  # frames before and after one, among which its connection is looked for: a second's work


class FrameSource(Protocol):
    """Where expectations look: a CaptureSession, or frames of the past."""

    @property
    def path(self) -> Path:
        """The capture file."""

    @property
    def points(self) -> tuple[str, ...]:
        """The points in the order of their columns."""

    @property
    def longest_hop(self) -> float:
        """Seconds after which a packet that was not seen again is lost (trace.py)."""

    @property
    def total(self) -> int:
        """How many frames were read so far at all points."""

    def frames(self, at: str | None = None, since: int = 0, behind: int = 0) -> list[Frame]:
        """What was read so far, oldest first; only frames with higher numbers than `behind`."""

    def wait(self, amount: int, timeout: float) -> None:
        """Wait until more than `amount` frames were read, or for `timeout` seconds."""

    def settle(self) -> None:
        """Wait until all that was captured has been read."""

    def verify(self, points: Iterable[str] | None = None) -> None:
        """Raise when what was read cannot be relied on."""

    def mark(self) -> int:
        """This moment."""

    def annotate(self, frame: Frame, comment: str) -> None:
        """Put a comment on a frame in the file."""


class ExpectationError(AssertionError):
    """What was expected was not seen, or the other way round.

    `expected`: in words. `nearest`: the frames that came closest. `connection`: the one that is drawn. `path`: the
    capture file.
    """

    def __init__(
        self, text: str, expected: str, nearest: Sequence[Frame], connection: Connection | None, path: Path
    ) -> None:
        super().__init__(text)
        self.expected = expected
        self.nearest = tuple(nearest)
        self.connection = connection
        self.path = path


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A frame that did not match, and what came of each condition."""

    frame: Frame
    verdicts: tuple[Verdict, ...]

    @property
    def is_of_the_kind(self) -> bool:
        """Has it all that the conditions are about?"""
        return all(verdict.is_there for verdict in self.verdicts)

    @property
    def met(self) -> int:
        """How many conditions were met."""
        return sum(verdict.is_met for verdict in self.verdicts)


def nearest_misses(frames: Iterable[Frame], matcher: Matcher) -> list[NearMiss]:
    """The frames that came closest: of the kind, and among them those that meet the most conditions.

    Such as meet none are told only when none meets any. None when no frame has what the conditions are about.
    """
    misses = [NearMiss(frame, tuple(matcher.judge(frame))) for frame in frames if not matcher.matches(frame)]
    near = [miss for miss in misses if miss.is_of_the_kind or miss.met]
    near.sort(key=lambda miss: (not miss.is_of_the_kind, -miss.met))
    return [miss for miss in near if miss.met or not near[0].met][:_MOST_MISSES]


@dataclass(frozen=True, slots=True)
class Failure:
    """Puts a failure together. `since`: the mark that the expectation looked back to."""

    source: FrameSource
    since: int
    expected: str

    def of_absence(
        self, at: str, matcher: Matcher, matched: Sequence[Frame], before: Sequence[Frame] = ()
    ) -> ExpectationError:
        """Too little was seen at a point, after what should be, and was, seen before."""
        after = before[-1].time_ns + 1 if before else 0
        frames = self.source.frames(at, max(self.since, after))
        misses = nearest_misses(frames, matcher)
        lines = [f"seen there: {_frames(len(frames))}, {len(matched)} of them as expected", *self._listed(matched)]
        lines += ["the nearest misses:" if misses else "none of them came near"] if frames else []
        lines += [line for miss in misses for line in self._miss_lines(miss)]
        too_early = [frame for frame in self._matching(at, matcher) if frame.time_ns < after and frame not in before]
        if too_early:
            lines += ["such frames were seen there too early:", *self._listed(too_early)]
        lines += self._elsewhere(at, matcher)
        # The connection of one that meets no condition is any connection, unless there is but one.
        is_only = len(_names(frames)) == 1
        return self._error(lines, [*(miss.frame for miss in misses if miss.met or is_only), *matched, *too_early])

    def of_presence(self, at: str, matched: Sequence[Frame]) -> ExpectationError:
        """Too much was seen at a point."""
        return self._error([f"seen there: {_frames(len(matched))} of that kind", *self._listed(matched)], matched)

    def of_other(self, lines: Sequence[str], concerned: Sequence[Frame]) -> ExpectationError:
        """Anything else, about these frames."""
        return self._error(lines, concerned)

    def _error(self, lines: Sequence[str], concerned: Sequence[Frame]) -> ExpectationError:
        connection = self._connection_of(concerned[0]) if concerned else None
        text = [self.expected, *lines]
        if connection is not None:
            text += ["", ladder(connection, self.source.points, _width()).plain]
        else:
            text += ["", *self._conversations()]
        text += ["", f"capture file: {self.source.path}"]
        for frame in concerned[:_MOST_LISTED]:
            self.source.annotate(frame, f"did not satisfy: {self.expected}")
        return ExpectationError("\n".join(text), self.expected, concerned, connection, self.source.path)

    def _listed(self, frames: Sequence[Frame]) -> Iterator[str]:
        for frame in frames[:_MOST_LISTED]:
            yield f"  {self._when(frame)} {frame}"
        if len(frames) > _MOST_LISTED:
            yield f"  … and {len(frames) - _MOST_LISTED} more"

    def _miss_lines(self, miss: NearMiss) -> Iterator[str]:
        yield f"  {self._when(miss.frame)} {miss.frame}"
        width = max(len(verdict.subject) for verdict in miss.verdicts)
        for verdict in miss.verdicts:
            mark, contrast = ("✓", "") if verdict.is_met else ("✗", f"   expected: {verdict.expected}")
            yield f"      {mark} {verdict.subject.ljust(width)}  {verdict.seen}{contrast}"

    def _when(self, frame: Frame) -> str:
        begin = self.since or self.source.frames()[0].time_ns
        return f"{(frame.time_ns - begin) / 1e6:+.3f} ms"

    def _elsewhere(self, at: str, matcher: Matcher) -> Iterator[str]:
        for point in self.source.points:
            if point != at and (found := self._matching(point, matcher)):
                yield f"such frames were seen at {point}: {len(found)}, the first {self._when(found[0])} {found[0]}"

    def _matching(self, at: str, matcher: Matcher) -> list[Frame]:
        return [frame for frame in self.source.frames(at, self.since) if _is_match(frame, matcher)]

    def _connection_of(self, frame: Frame) -> Connection | None:
        frames = self.source.frames(since=self.since)
        place = bisect_left(frames, frame.number, key=lambda other: other.number)
        found = connections(trace(frames[max(0, place - _NEAR) : place + _NEAR], self.source.longest_hop))
        return next((connection for connection in found if connection.has(frame)), None)

    def _conversations(self) -> Iterator[str]:
        yield "conversations, by point:"
        for point in self.source.points:
            yield f"  {point}: {', '.join(_names(self.source.frames(point, self.since))) or 'none'}"


def _is_match(frame: Frame, matcher: Matcher) -> bool:
    """Whether it matches; nobody asked for a frame that the match breaks on."""
    try:
        return matcher.matches(frame)
    except Exception:
        return False


def _names(frames: Iterable[Frame]) -> list[str]:
    """Who talked to whom, each once."""
    return sorted({str(one) for one in conversations(frames)})


def amount_text(least: int, most: int | None, matcher: Matcher) -> str:
    """`1 frame or more`, `exactly 2 frames with udp.dport 9`, `2 to 4 frames`."""
    which = f" with {matcher}" if matcher.conditions else ""
    if most is None:
        return f"{_frames(least)} or more{which}"
    if least == most:
        return f"exactly {_frames(least)}{which}"
    return f"{least} to {_frames(most)}{which}"


def _frames(amount: int) -> str:
    return "1 frame" if amount == 1 else f"{amount} frames"


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _FILE_WIDTH
