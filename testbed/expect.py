"""Expectations: what must be seen, where, and by when.

Owns: waiting for it. An expectation looks back to the moment the stimulus began, so it may be written after the
stimulus; it looks forward for a time, and returns as soon as it holds.

    lab.mark()
    lab["client"].run(...)
    lab.expect(at="server:eth0", match={"tcp.dport": 80, "tcp.flags": "S"})
    lab.expect_none(at="server:eth0", match=lambda ip: ip.src == "10.0.1.2", during=0.5)

None passes on a capture that lost a frame or does not run: that raises CaptureError. One that fails raises
ExpectationError, see failure.py.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import methodcaller
from typing import Final, TypeVar

from testbed.changes import HOP_LIMITS, check_change
from testbed.conversations import Conversation, conversations
from testbed.failure import ExpectationError, Failure, FrameSource, amount_text
from testbed.frames import Frame
from testbed.matching import Match, Matcher, matcher_of
from testbed.pieces import changes_of
from testbed.trace import Hop, Journey, trace

__all__ = ["ExpectationError", "Expectations", "Watch"]

__tracebackhide__ = methodcaller("errisinstance", ExpectationError)  # pytest shows where the test expected it

WITHIN: Final = 2.0  # seconds
DURING: Final = 0.5  # seconds

_Found = TypeVar("_Found")


class Expectations(ABC):
    """Expectations on a capture. Each looks back to the last mark, or to the one it is given.

    Until there is a mark, that is the beginning of the capture.
    """

    _since = 0

    @property
    @abstractmethod
    def _source(self) -> FrameSource:
        """The capture."""

    def mark(self) -> int:
        """A stimulus begins: what was seen before is not what is expected from now on."""
        self._since = self._source.mark()
        return self._since

    def expect(
        self,
        at: str,
        match: Match = None,
        *,
        within: float = WITHIN,
        count: int | range | None = None,
        since: int | None = None,
    ) -> list[Frame]:
        """Frames that match must be seen at a point; returns them.

        `count`: how many; None is one or more. The expectation holds as soon as enough were seen and none too many was
        among what the kernel had captured until then. For 'and no more for a time', let `expect_none` follow.
        """
        least, most = _bounds(count)
        scan = _Scan(self._source, at, matcher_of(match), self._from(since))
        self._wait(lambda: len(scan.look()) >= least or None, within)
        self._source.settle()
        matched = scan.look()
        self._source.verify([at])
        expected = f"expected at {at} within {within:g} s: {amount_text(least, most, scan.matcher)}"
        failure = Failure(self._source, scan.since, expected)
        if len(matched) < least:
            raise failure.of_absence(at, scan.matcher, matched)
        if most is not None and len(matched) > most:
            raise failure.of_presence(at, matched)
        self._note(matched, expected)
        return matched

    def expect_none(self, at: str, match: Match = None, *, during: float = DURING, since: int | None = None) -> None:
        """No frame that matches may have been seen at a point since the mark, nor come in the next `during` seconds.

        Before it passes, the capture must be armed, and everything that reached it must have been read.
        """
        scan = _Scan(self._source, at, matcher_of(match), self._from(since))
        self._source.verify([at])
        self._wait(lambda: scan.look() or None, during)
        matched = scan.look()
        self._source.verify([at])
        if matched:
            expected = f"expected at {at} for {during:g} s: no frame with {scan.matcher}"
            raise Failure(self._source, scan.since, expected).of_presence(at, matched)

    def expect_sequence(
        self, *steps: tuple[str, Match], within: float = WITHIN, since: int | None = None
    ) -> list[Frame]:
        """Frames must be seen in this order, each at its point, whatever comes between; returns one for each step."""
        if not steps:
            raise ValueError("a sequence has at least one step")
        matchers = [(at, matcher_of(match)) for at, match in steps]
        begin = self._from(since)
        found = self._wait(lambda: self._whole_sequence(matchers, begin), within) or self._sequence(matchers, begin)
        self._source.verify({at for at, _ in steps})
        order = "; then ".join(f"at {at} {matcher}" for at, matcher in matchers)
        expected = f"expected within {within:g} s: {order}"
        if len(found) < len(steps):
            raise self._broken_sequence(found, matchers, begin, expected)
        self._note(found, expected)
        return found

    def expect_same(
        self,
        match: Match = None,
        *,
        at: tuple[str, str],
        changed: Collection[str] = (),
        within: float = WITHIN,
        since: int | None = None,
    ) -> list[tuple[Frame, Frame]]:
        """Every frame that matches at the first point must be seen at the second, with just these fields changed.

        `changed`: names as Scapy's, `ip.src` or `tcp.sport`; every one of them must have changed, and nothing else but
        what a router changes (hop limit, header checksums, link addresses). Returns the frames in pairs. MatchError for
        a name that no change has (changes.FIELDS).
        """
        first, second = at
        if first == second:
            raise ValueError(f"at={at}: give two points")
        if isinstance(changed, str):
            raise TypeError(f"changed={changed!r}: give a set of names")
        for name in changed:
            check_change(name)
        matcher, begin = matcher_of(match), self._from(since)
        wanted = frozenset(changed)

        def whole() -> list[_Pair] | None:
            pairs = self._pairs(matcher, at, begin)
            return pairs if pairs and all(pair.problem(wanted) is None for pair in pairs) else None

        # What is seen once they are whole may still be on its way, and is left out.
        pairs = self._wait(whole, within) or self._pairs(matcher, at, begin)
        self._source.verify(at)
        fields = f"only {', '.join(sorted(wanted))} changed" if wanted else "nothing changed"
        expected = f"expected within {within:g} s: frames at {first} with {matcher} again at {second}, {fields}"
        failure = Failure(self._source, begin, expected)
        if not pairs:
            raise failure.of_absence(first, matcher, [])
        wrong = [pair for pair in pairs if pair.problem(wanted) is not None]
        if wrong:
            lines = [line for pair in wrong for line in (f"  {pair.before}", f"      {pair.problem(wanted)}")]
            raise failure.of_other(lines, [pair.before for pair in wrong])
        both = [(pair.before, pair.after) for pair in pairs if pair.after is not None]
        self._note([frame for pair in both for frame in pair], expected)
        return both

    def conversations(self, at: str, since: int | None = None) -> list[Conversation]:
        """Who talked to whom at a point so far, in the order in which they began."""
        self._source.settle()
        self._source.verify([at])
        return conversations(self._source.frames(at, self._from(since)))

    def expect_conversations(
        self, at: str, exactly: Iterable[str], *, within: float = WITHIN, since: int | None = None
    ) -> list[Conversation]:
        """These conversations, and no others, must be seen at a point.

        Each is named as `tcp 10.0.0.1 > 10.0.0.2:80`, without the port of the initiator, an echo as
        `icmp 10.0.0.1 > 10.0.0.2`. What is neither TCP, UDP nor echo does not count.
        """
        wanted, begin = set(exactly), self._from(since)

        def names() -> set[str]:
            return {str(one) for one in conversations(self._source.frames(at, begin))}

        # That there are none is true only when the time is up.
        self._wait(lambda: (names() == wanted if wanted else names()) or None, within)
        seen = self.conversations(at, begin)
        if (found := {str(one) for one in seen}) != wanted:
            expected = f"expected at {at} within {within:g} s: the conversations {', '.join(sorted(wanted)) or 'none'}"
            lines = [f"  missing: {name}" for name in sorted(wanted - found)]
            lines += [f"  not expected: {name}" for name in sorted(found - wanted)]
            raise Failure(self._source, begin, expected).of_other(lines, [])
        return seen

    def _from(self, since: int | None) -> int:
        if since is None:
            return self._since
        if since > self._source.mark():
            raise ValueError(f"since={since} is in the future; give what mark() returned")
        return since

    def _wait(self, look: Callable[[], _Found | None], within: float) -> _Found | None:
        """Look until something is found; when time is up, once more at all that was captured until then."""
        deadline = time.monotonic() + within
        # What is there already is seen sooner than by waiting for it.
        self._source.settle()
        while True:
            amount, began = self._source.total, time.monotonic()
            if (found := look()) is not None:
                return found
            if (left := deadline - time.monotonic()) <= 0:
                break
            # Looking holds Python's lock, which those who read the capture need: not more than half of the time.
            time.sleep(min(left, time.monotonic() - began))
            if (left := deadline - time.monotonic()) > 0:
                self._source.wait(amount, left)
        self._source.settle()
        return look()

    def _whole_sequence(self, steps: Sequence[tuple[str, Matcher]], begin: int) -> list[Frame] | None:
        found = self._sequence(steps, begin)
        return found if len(found) == len(steps) else None

    def _sequence(self, steps: Sequence[tuple[str, Matcher]], begin: int) -> list[Frame]:
        """As many steps as were seen, each as early as it can be."""
        found: list[Frame] = []
        # The places in the file are nearly, but not always, in the order of time (capture_store.py).
        for frame in sorted(self._source.frames(since=begin), key=lambda frame: frame.time_ns):
            if len(found) == len(steps):
                break
            at, matcher = steps[len(found)]
            if frame.point == at and matcher.matches(frame):
                found.append(frame)
        return found

    def _broken_sequence(
        self, found: Sequence[Frame], steps: Sequence[tuple[str, Matcher]], begin: int, expected: str
    ) -> ExpectationError:
        at, matcher = steps[len(found)]
        failure = Failure(self._source, begin, f"{expected}\nstep {len(found) + 1} was not seen: at {at} {matcher}")
        return failure.of_absence(at, matcher, [], before=found)

    def _pairs(self, matcher: Matcher, at: tuple[str, str], begin: int) -> list[_Pair]:
        """The packets that match at the first point, as they were when they first did, each again at the second."""
        first, second = at
        pairs = []
        for journey in trace(self._source.frames(since=begin), self._source.longest_hop):
            seen = ((hop, frame) for hop in journey.hops if hop.point == first for frame in hop.frames)
            if (matching := next((each for each in seen if matcher.matches(each[1])), None)) is not None:
                pairs.append(_Pair(*matching, journey, second))
        return pairs

    def _note(self, frames: Iterable[Frame], expected: str) -> None:
        for frame in frames:
            self._source.annotate(frame, f"satisfied: {expected}")


class Watch(Expectations):
    """Expectations on a capture that has no lab around it. A lab (lab.py) has them itself."""

    def __init__(self, source: FrameSource) -> None:
        self._capture = source

    @property
    def _source(self) -> FrameSource:
        return self._capture


@dataclass(slots=True)
class _Scan:
    """The frames at a point that match, looked at once each."""

    source: FrameSource
    at: str
    matcher: Matcher
    since: int
    _last: int = 0  # the number of the last one that was looked at
    _matched: list[Frame] = field(default_factory=list)

    def look(self) -> list[Frame]:
        """All that match so far."""
        for frame in self.source.frames(self.at, self.since, self._last):
            self._last = frame.number
            if self.matcher.matches(frame):
                self._matched.append(frame)
        return self._matched


@dataclass(frozen=True, slots=True)
class _Pair:
    """A hop of a packet's journey, the frame there that matched, and the point at which the packet is wanted again."""

    hop: Hop
    before: Frame
    journey: Journey
    second: str

    @property
    def after(self) -> Frame | None:
        hop = self.journey.at(self.second)
        return None if hop is None else hop.frame

    def problem(self, wanted: frozenset[str]) -> str | None:
        """Why it is not the packet with just the wanted fields changed."""
        again = self.journey.at(self.second)
        if again is None:
            return f"was not seen at {self.second}, last at {self.journey.points[-1]}"
        pieces = changes_of(self.hop.frames, again.frames)
        changed = dict.fromkeys(chain.from_iterable(pieces))
        unwanted = [str(change) for change in changed if change.field not in wanted | HOP_LIMITS]
        kept = sorted({name for changes in pieces for name in wanted - {change.field for change in changes}})
        problems = [f"changed: {', '.join(unwanted)}"] * bool(unwanted) + [f"not changed: {', '.join(kept)}"] * bool(
            kept
        )
        return "; ".join(problems) or None


def _bounds(count: int | range | None) -> tuple[int, int | None]:
    """The least and the most that is meant; ValueError when it would always, or never, hold."""
    match count:
        case None:
            return 1, None
        case range():
            least, most = count.start, count.stop - 1
        case int():
            least = most = count
        case _:
            raise ValueError(f"count={count!r}: give a number or a range")
    if isinstance(count, range) and count.step != 1:
        raise ValueError(f"count={count}: give a range without steps")
    if least < 1 or most < least:
        raise ValueError(f"count={count}: give 1 or more, or use expect_none")
    return least, most
