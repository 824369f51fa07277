"""Captures of the past, to expect something of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from scenes import CLIENT, GATEWAY_IN, GATEWAY_OUT, POINTS, SERVER, Scene, talk

from testbed.expect import ExpectationError
from testbed.frames import Frame
from testbed.trace import LONGEST_HOP


class Past:
    """A source that has all its frames from the beginning, or shows one more each time somebody waits."""

    def __init__(self, frames: list[Frame], shown: int | None = None) -> None:
        self.path = Path("/run/lab/capture.pcapng")
        self.points = POINTS
        self.longest_hop = LONGEST_HOP
        self.comments: list[tuple[int, str]] = []
        self.verified: list[str] = []
        self._frames = frames
        self._shown = len(frames) if shown is None else shown

    @property
    def total(self) -> int:
        return self._shown

    def frames(self, at: str | None = None, since: int = 0, behind: int = 0) -> list[Frame]:
        shown = [frame for frame in self._frames[: self._shown] if frame.number > behind]
        return [frame for frame in shown if frame.time_ns >= since and at in (None, frame.point)]

    def wait(self, amount: int, timeout: float) -> None:
        assert timeout > 0
        self._shown = min(amount + 1, len(self._frames))

    def settle(self) -> None:
        pass

    def verify(self, points: Iterable[str] | None = None) -> None:
        self.verified += points or self.points

    def mark(self) -> int:
        return self._frames[self._shown - 1].time_ns + 1 if self._shown else 0

    def annotate(self, frame: Frame, comment: str) -> None:
        self.comments.append((frame.number, comment))


def routed() -> Scene:
    """One connection through the gateway, which makes 10.0.0.1 to 10.0.0.3."""
    scene = Scene()
    talk(scene, (CLIENT, 1, 2), (GATEWAY_IN, 1, 2), (GATEWAY_OUT, 3, 2), (SERVER, 3, 2))
    return scene


def text_of(expectation: Callable[[], object]) -> str:
    """What the expectation says when it fails."""
    with pytest.raises(ExpectationError) as caught:
        expectation()
    return str(caught.value)
