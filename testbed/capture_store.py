"""The frames of a capture in memory.

Owns: what was captured, in the order of the file, and the frames as values, each made when it is first asked for: tens
of thousands may come a second, and few of them are ever looked at. Its place: filled by capture_reader.py, read by
capture.py.

One thread adds, any may read: what is added is complete before its count is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

from testbed.frames import Frame
from testbed.packet_ring import Captured

# What a busy machine showed so late that it is not in the order of time.
_DISORDER_NS: Final = 1_000_000_000


class FrameStore:
    """All frames that were read so far, numbered from 1 as in the file; it only grows."""

    def __init__(self, labels: Sequence[str]) -> None:
        """`labels`: of the points, in the order of their numbers."""
        self._labels = labels
        self._captured: list[Captured] = []
        self._complete = 0  # how many of them the points know, too
        self._places: list[list[int]] = [[] for _ in labels]  # by point: where in `_captured` its frames are
        self._made: dict[int, Frame] = {}

    def __len__(self) -> int:
        return self._complete

    def count(self, point: int) -> int:
        """How many frames were read at a point."""
        return len(self._places[point])

    def add(self, frames: Sequence[Captured]) -> None:
        """Append frames."""
        place = len(self._captured)
        self._captured += frames
        for _, point, _, _, _ in frames:
            self._places[point].append(place)
            place += 1
        self._complete = place

    def since(self, moment: int, point: int | None, behind: int = 0) -> list[Frame]:
        """The frames of a point, or (None) of all, that came at `moment` or later: nanoseconds since the epoch.

        Only those with higher numbers than `behind`.
        """
        captured = self._captured
        places: Sequence[int] = range(self._complete) if point is None else self._places[point]
        begin = bisect_left(places, moment - _DISORDER_NS, key=lambda place: captured[place][0])
        begin = max(begin, bisect_left(places, behind))  # a frame's number is one more than its place
        return [self._frame(place) for place in places[begin:] if captured[place][0] >= moment]

    def _frame(self, place: int) -> Frame:
        """The frame at a place, the same one each time: what is read off its bytes is kept in it."""
        if (made := self._made.get(place)) is not None:
            return made
        time_ns, point, data, outgoing, half_checksum = self._captured[place]
        frame = Frame(self._labels[point], time_ns, data, outgoing, half_checksum, place + 1)
        return self._made.setdefault(place, frame)
