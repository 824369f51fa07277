"""Captures: every frame at chosen interfaces, from before the first.

Owns: which points are captured, whether that can be relied on, and access to the frames. Must not know what anybody
expects of them.

A capture that lies by leaving out is worse than none, so:

* `start` returns when the kernel lists every socket as running (/proc/net/packet), or it raises;
* `settle` returns when all that the kernel counted for a socket has been read;
* `verify` raises when a frame was lost, a capture is not running, or the clock was set back, so that what came since a
  mark cannot be told: no expectation passes without it.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from testbed.capture_reader import CaptureReader, Tap
from testbed.errors import TestbedError
from testbed.frames import Frame
from testbed.netns import Namespace
from testbed.packet_ring import PacketRing
from testbed.pcapng import PcapngWriter, add_comments
from testbed.trace import LONGEST_HOP

FILE_NAME: Final = "capture.pcapng"

RING_BYTES: Final = 16 << 20
# Ring memory is taken at once, and many points may share a small machine.
_ALL_RINGS_BYTES: Final = 128 << 20
_SMALLEST_RING: Final = 1 << 20

_THREADS: Final = 32

_STEP_NS: Final = 10_000_000  # that much is no inaccuracy of looking at two clocks
_AT_ONCE_NS: Final = 1_000_000


class CaptureError(TestbedError):
    """A capture cannot be made, or what it saw cannot be relied on."""


@dataclass(frozen=True, slots=True)
class CapturePoint:
    """An interface in a node."""

    node: str
    interface: str
    namespace: Namespace = field(compare=False)

    @property
    def label(self) -> str:
        """How expectations, ladders and the pcapng file call it."""
        return f"{self.node}:{self.interface}"


@dataclass(frozen=True, slots=True)
class PointStatistics:
    """How a capture is doing: is the kernel handing frames to it, how many were kept, how many were lost."""

    armed: bool
    seen: int
    dropped: int


class CaptureSession:
    """Captures at several points at once, into one pcapng file and memory. Use it in a `with`, or start and stop it."""

    def __init__(self, points: Sequence[CapturePoint], directory: Path, *, ring_bytes: int = RING_BYTES) -> None:
        """`directory` gets the file; `ring_bytes` is how much one point may hold that was not read yet."""
        self.path: Final = directory / FILE_NAME
        self.longest_hop = LONGEST_HOP  # seconds; a lab knows of slower links
        self._points = {point.label: point for point in points}
        if len(self._points) < len(points):
            raise CaptureError("a capture point is given twice")
        share = max(_ALL_RINGS_BYTES // max(len(points), 1), _SMALLEST_RING)
        self._ring_bytes = min(ring_bytes, share)
        self._taps: dict[str, Tap] = {}
        self._reader: CaptureReader | None = None
        self._resources = ExitStack()
        self._last: dict[str, PointStatistics] | None = None
        self._comments: dict[int, list[str]] = {}
        self._ahead = 0  # of the clock of frames and marks, before the steady one, when the captures were armed

    @property
    def points(self) -> tuple[str, ...]:
        """The labels, in the order given."""
        return tuple(self._points)

    @property
    def total(self) -> int:
        """How many frames were read so far, at all points together."""
        return len(self._armed().frames)

    def start(self) -> None:
        """Arm every point. CaptureError when one cannot be: then none is."""
        self._ahead = _ahead()
        with ExitStack() as resources:
            rings = _open_rings(list(self._points.values()), self._ring_bytes)
            resources.callback(_close_rings, rings)
            labelled = zip(self._points, rings, strict=True)
            self._taps = {label: Tap(number, label, ring) for number, (label, ring) in enumerate(labelled)}
            if idle := self._taps.keys() - self._running(self.points):
                raise CaptureError(f"no capture at {', '.join(sorted(idle))}: the kernel hands it nothing")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            writer = resources.enter_context(PcapngWriter(self.path, self.points))
            self._reader = CaptureReader(list(self._taps.values()), writer)
            resources.callback(self._reader.finish)
            self._resources = resources.pop_all()

    def stop(self) -> None:
        """Read what is there, write the comments, close everything. The frames and the statistics stay."""
        if self._reader is None or self._last is not None:
            return
        with self._resources:
            try:
                self.settle()
            finally:
                self._last = self.statistics()
        if self._comments:
            add_comments(self.path, self._comments)

    def mark(self) -> int:
        """This moment, in the captures' time: nanoseconds since the epoch."""
        return time.time_ns()

    def frames(self, at: str | None = None, since: int = 0, behind: int = 0) -> list[Frame]:
        """What was read so far, at one point or at all, oldest first.

        `since` is a mark; `behind` a frame's number: only those that come later in the file.
        """
        return self._armed().frames.since(since, None if at is None else self._tap(at).number, behind)

    def wait(self, amount: int, timeout: float) -> None:
        """Wait until more than `amount` frames were read at all points together, or for `timeout` seconds."""
        reader = self._armed()
        reader.wait(lambda: len(reader.frames) > amount, timeout)

    def settle(self, within: float = 10.0) -> None:
        """Wait until every frame that reached a capture before this call has been read.

        CaptureError when that takes longer than `within` seconds, or when the reader failed.
        """
        reader = self._armed()
        behind = [] if self._last is not None else reader.settle(within)
        self._check_reader()
        if behind:
            raise CaptureError(f"not all frames were read within {within} s at {', '.join(behind)}")

    def statistics(self) -> dict[str, PointStatistics]:
        """How each point is doing; after `stop`, how it was doing then."""
        return self._last or self._statistics(self.points)

    def verify(self, points: Iterable[str] | None = None) -> None:
        """CaptureError unless these points, or all, are armed and lost nothing."""
        self._check_reader()
        chosen = self.points if points is None else tuple(points)
        statistics = self._last or self._statistics(chosen)
        problems = []
        if (back := self._ahead - _ahead()) > _STEP_NS:
            problems.append(f"the clock was set back by {back / 1e9:.3f} s, so what came since a mark cannot be told")
        for at in chosen:
            self._tap(at)
            if not statistics[at].armed:
                problems.append(f"{at} is not capturing: the interface is down or gone, or has another name now")
            if dropped := statistics[at].dropped:
                problems.append(f"{at} lost {dropped} frames, beside {statistics[at].seen} that it saw")
        if problems:
            raise CaptureError("; ".join(problems))

    def annotate(self, frame: Frame, comment: str) -> None:
        """Put a comment on a frame; it is in the file after `stop`."""
        comments = self._comments.setdefault(frame.number, [])
        if comment not in comments:
            comments.append(comment)

    def _armed(self) -> CaptureReader:
        if self._reader is None:
            raise CaptureError("the captures were never armed")
        return self._reader

    def _tap(self, label: str) -> Tap:
        if label not in self._points:
            raise CaptureError(f"there is no capture at {label!r}, only at {', '.join(self._points)}")
        self._armed()
        return self._taps[label]

    def _check_reader(self) -> None:
        if (failure := self._armed().failure) is not None:
            raise CaptureError(f"the capture failed: {failure}") from failure

    def _statistics(self, points: Sequence[str]) -> dict[str, PointStatistics]:
        reader = self._armed()
        taps = {label: self._tap(label) for label in points}
        running = self._running(points)
        return {
            label: PointStatistics(label in running, reader.frames.count(tap.number), reader.counts(tap).dropped)
            for label, tap in taps.items()
        }

    def _running(self, points: Sequence[str]) -> set[str]:
        """The points whose sockets the kernel hands frames to, of interfaces of that name, as it says itself."""
        namespaces = {self._points[label].namespace for label in points}
        running = {inode: name for namespace in namespaces for inode, name in _running_inodes(namespace)}
        return {label for label in points if running.get(self._taps[label].ring.inode) == self._points[label].interface}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _ahead() -> int:
    """How far the clock of frames and marks is before the steady one: it can be set, in nanoseconds.

    NTP's slow corrections are those of both clocks (clock_gettime(2)).
    """
    while True:
        before, now, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        if after - before < _AT_ONCE_NS:
            return now - after


def _open_rings(points: Sequence[CapturePoint], size: int) -> list[PacketRing]:
    """Arm all points at once, since each waits for all CPUs; the first CaptureError when one cannot be."""
    with ThreadPoolExecutor(_THREADS) as pool:
        attempts = [pool.submit(_open_ring, point, size) for point in points]
    errors = [error for attempt in attempts if (error := attempt.exception()) is not None]
    if errors:
        _close_rings([attempt.result() for attempt in attempts if attempt.exception() is None])
        raise errors[0]
    return [attempt.result() for attempt in attempts]


def _close_rings(rings: Sequence[PacketRing]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(PacketRing.close, rings))


def _open_ring(point: CapturePoint, size: int) -> PacketRing:
    """Arm a point; CaptureError says what is in the way."""
    try:
        sock = point.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            return PacketRing(sock, point.interface, size)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise CaptureError(f"no capture at {point.label}: {_explain(error, size)}") from error


def _explain(error: OSError, size: int) -> str:
    match error.errno:
        case errno.EPERM:
            return "opening a packet socket needs CAP_NET_RAW"
        case errno.ENODEV:
            return "there is no such interface"
        case errno.ENETDOWN:
            return "the interface is down"
        case errno.ENOMEM:
            return f"no memory for a ring of {size >> 20} MiB"
        case _:
            return error.strerror or str(error)


def _running_inodes(namespace: Namespace) -> Iterator[tuple[int, str]]:
    """The packet sockets of a namespace that are hooked into an interface, and what that is called now."""
    with namespace.entered():
        table = Path("/proc/thread-self/net/packet").read_text()
        names = dict(socket.if_nameindex())
    for line in table.splitlines()[1:]:
        # sk, references, type, protocol, interface, running, memory, user, inode
        columns = line.split()
        if columns[5] == "1":
            yield int(columns[8]), names.get(int(columns[4]), "")
