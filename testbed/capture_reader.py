"""The threads that empty the rings of a capture.

Owns: the way of a frame from a ring to memory and file. Its place: below capture.py, above packet_ring.py.

    collect   one thread does nothing but take frames from the rings: a full ring loses frames, a slow disk must not
    order     the other sorts them. The rings show theirs at different times, so frames are held back until every ring
              has shown what is older: file and memory are in the order of time
    release   into the file, then into memory, then to those who wait
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from queue import SimpleQueue
from typing import Final

from testbed.capture_store import FrameStore
from testbed.packet_ring import Captured, PacketRing, RingCounts
from testbed.pcapng import PcapngWriter

# More than twice the time after which a ring shows what it has, since timers are late on a busy machine.
_HOLD_NS: Final = 10_000_000
# Of our threads: on a busy machine a ring is full after half a second.
_NICENESS: Final = -10
# How often to look while frames are held back.
_PATIENCE_MS: Final = 2


@dataclass(slots=True)
class Tap:
    """A point's ring, and how many frames were taken from it; its number is its place in the file's interfaces."""

    number: int
    label: str
    ring: PacketRing
    taken: int = 0


@dataclass(frozen=True, slots=True)
class _Round:
    """What the rings showed when they were looked at, from `began` on: frames, by the index of their tap."""

    began: int
    frames: tuple[tuple[int, list[Captured]], ...]


@dataclass(slots=True, eq=False)
class _Request:
    """Somebody wants all frames up to a moment; they are there when that many were taken from each tap."""

    moment: int
    amounts: tuple[int, ...]
    is_done: bool = False


class _End:
    """No more rounds will come."""


class CaptureReader:
    """Reads the rings of all taps until it is finished. `frames` has what was released, oldest first."""

    def __init__(self, taps: Sequence[Tap], writer: PcapngWriter) -> None:
        """Begin at once; the taps' order is that of the file's interfaces."""
        self.frames: Final = FrameStore([tap.label for tap in taps])
        self.failure: Exception | None = None
        self._taps = taps
        self._writer = writer
        self._queue: SimpleQueue[_Round | _Request | _End] = SimpleQueue()
        self._changed = threading.Condition()
        self._counting = threading.Lock()
        self._ending = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        works = (self._collect, self._keep)
        self._threads = [threading.Thread(target=self._guard, args=(work,), daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def counts(self, tap: Tap) -> RingCounts:
        """What came to a tap so far."""
        with self._counting:
            return tap.ring.counts()

    def wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait for a condition on the frames, or a failure; False when `timeout` seconds were not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: condition() or self.failure is not None, timeout)

    def settle(self, within: float) -> list[str]:
        """Wait until all that reached a ring before this call is in `frames`; the labels of taps that are behind."""
        # The moment first: what is counted after it may be younger, never the other way round.
        moment = time.time_ns()
        counts = [self.counts(tap) for tap in self._taps]
        request = _Request(moment, tuple(count.arrived - count.dropped for count in counts))
        self._queue.put(request)
        if self.wait(lambda: request.is_done, within):
            return []
        late = [tap.label for tap, amount in zip(self._taps, request.amounts, strict=True) if tap.taken < amount]
        return late or [tap.label for tap in self._taps]  # all were taken, and some are not released yet

    def finish(self) -> None:
        """Release what was taken, write the statistics, end."""
        os.eventfd_write(self._ending, 1)
        for thread in self._threads:
            thread.join()
        os.close(self._ending)

    def _guard(self, work: Callable[[], None]) -> None:
        """Run a thread's work; when it fails, whatever it was, the other ends, and those who wait hear of it."""
        with contextlib.suppress(PermissionError):  # rootless, without
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            work()
        except Exception as error:
            self.failure = error
            os.eventfd_write(self._ending, 1)
            self._queue.put(_End())
            with self._changed:
                self._changed.notify_all()

    def _collect(self) -> None:
        """One thread: take frames until it is told to end."""
        indices = {tap.ring.fileno(): index for index, tap in enumerate(self._taps)}
        poller = select.poll()
        for descriptor in (self._ending, *indices):
            poller.register(descriptor, select.POLLIN)
        last_frame = 0
        while True:
            # While frames are held back, rounds without any tell how far time has come.
            is_quiet = time.time_ns() - last_frame > 2 * _HOLD_NS
            poller.poll(None if is_quiet else _PATIENCE_MS)
            began = time.time_ns()
            events = dict(poller.poll(0))
            if self._ending in events:
                self._queue.put(_End())
                return
            frames: list[tuple[int, list[Captured]]] = []
            for descriptor, event in events.items():
                index = indices[descriptor]
                ring = self._taps[index].ring
                if event & select.POLLERR:
                    ring.clear_error()
                if taken := ring.take(index):
                    frames.append((index, taken))
            last_frame = began if frames else last_frame
            self._queue.put(_Round(began, tuple(frames)))

    def _keep(self) -> None:
        """The other thread: into file and memory."""
        self._order()
        for index, tap in enumerate(self._taps):
            counts = self.counts(tap)
            self._writer.add_statistics(index, time.time_ns(), counts.arrived, counts.dropped)

    def _order(self) -> None:
        held: list[Captured] = []
        requests: list[_Request] = []
        complete = 0  # up to that moment all frames were taken
        while True:
            match self._queue.get():
                case _Round(began, frames):
                    complete = began - _HOLD_NS
                    for index, taken in frames:
                        self._hold(index, taken, held)
                case _Request() as request:
                    requests.append(request)
                case _End():
                    self._release(held, time.time_ns(), [])
                    return
            if self._queue.empty():
                answered = [request for request in requests if self._is_complete(request)]
                requests = [request for request in requests if request not in answered]
                self._release(held, max(complete, *(request.moment for request in answered), 0), answered)

    def _hold(self, index: int, taken: list[Captured], held: list[Captured]) -> None:
        tap = self._taps[index]
        tap.taken += len(taken)
        if tap.ring.is_loopback:
            taken = [frame for frame in taken if not frame[3]]  # seen as received, so not as sent
        held += taken

    def _is_complete(self, request: _Request) -> bool:
        return all(tap.taken >= amount for tap, amount in zip(self._taps, request.amounts, strict=True))

    def _release(self, held: list[Captured], until: int, answered: Sequence[_Request]) -> None:
        """Let go of what is not younger than `until`, and of those who waited for it."""
        held.sort(key=itemgetter(0))
        end = bisect_right(held, until, key=itemgetter(0))
        released = held[:end]
        del held[:end]
        self._writer.add(released)
        self.frames.add(released)
        with self._changed:
            for request in answered:
                request.is_done = True
            self._changed.notify_all()
