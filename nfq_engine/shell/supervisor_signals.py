"""Which calls does a signal end, of those that the supervisor holds?

Owns: the signals of a thread, from /proc. Must not know the calls. Place in the path: supervisor_receive.py asks while
a recvmsg waits; every other call is answered at once.

The filter has calls wait killable (seccomp.py), so a signal that does not kill leaves the thread asleep: the supervisor
must look, and answer as the kernel's own call would. ERESTARTSYS is no errno of a program's but a word to the kernel,
which makes of it EINTR or the same call anew, as the signal's handler asks for (SA_RESTART). The kernel hears it only
where a signal is due on that very thread (TIF_SIGPENDING, which then stays until the thread runs); any other thread
would show 512 to its program. So it is said only to a thread that certainly is the one.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Final, assert_never

ERESTARTSYS: Final = 512  # linux/errno.h, which no program sees

_PATIENT_LOOKS: Final = 5
_SIZE: Final = 65536  # the list of groups comes before the signals
_STATUS: Final = re.compile(
    rb"\nState:\t(.).*\nThreads:\t(\d+)\n"
    rb".*\nSigPnd:\t([0-9a-f]+)\nShdPnd:\t([0-9a-f]+)\nSigBlk:\t([0-9a-f]+)\nSigIgn:\t([0-9a-f]+)\n",
    re.DOTALL,
)
_ENDED: Final = (b"Z", b"X")
_STOPPED: Final = b"T"


class _Due(Enum):
    """For whom a signal waits."""

    NOBODY = auto()
    THIS_THREAD = auto()
    """One of its own, or one of a process with no other thread; or all threads of the process are told to stop."""
    SOME_THREAD = auto()
    """One for a process with several threads."""


@dataclass(frozen=True, slots=True)
class _Status:
    """A thread's state and signals; sets of signals are bit masks."""

    state: bytes
    threads: int
    own: int
    shared: int
    blocked: int
    ignored: int


class SignalWatch:
    """Looks at the threads whose calls are held, again and again.

    Which of several threads is to take a signal for the process cannot be told. Whoever it is takes it at once, unless
    it is one that is held; so after a few looks it is, and gets EINTR, which is never wrong.
    """

    def __init__(self) -> None:
        self._looks: dict[int, int] = {}  # process -> in how many looks on end a signal waited for some thread of it

    def look(self, held: Mapping[int, int]) -> dict[int, int]:
        """Whose calls a signal ends now: thread -> ERESTARTSYS or EINTR. `held`: thread -> its process."""
        ended = {}
        candidates: dict[int, int] = {}
        for thread, process in held.items():
            match _due_signal(thread, process, held):
                case _Due.NOBODY:
                    pass
                case _Due.THIS_THREAD:
                    ended[thread] = ERESTARTSYS
                case _Due.SOME_THREAD:
                    if thread == process or process not in candidates:  # the kernel prefers the first thread too
                        candidates[process] = thread
                case due:
                    assert_never(due)
        self._looks = {process: self._looks.get(process, 0) + 1 for process in candidates}
        for process, thread in candidates.items():
            if self._looks[process] == _PATIENT_LOOKS:
                ended[thread] = errno.EINTR
                del self._looks[process]
        return ended


def _due_signal(thread: int, process: int, held: Container[int]) -> _Due:
    """For whom a signal waits, as far as this thread is concerned."""
    status = _read_status(f"/proc/{thread}/status")
    if status is None:
        return _Due.NOBODY
    heard = ~(status.blocked | status.ignored)
    if status.own & heard:
        return _Due.THIS_THREAD
    if status.shared & heard:
        return _Due.THIS_THREAD if status.threads == 1 else _Due.SOME_THREAD
    return _Due.THIS_THREAD if status.threads > 1 and _is_stopping(process, held) else _Due.NOBODY


def _is_stopping(process: int, held: Container[int]) -> bool:
    """Have those threads stopped that can? One tells, as they stop together; it was then said to the held ones too."""
    return next((status.state == _STOPPED for thread, status in _threads(process) if thread not in held), False)


def _threads(process: int) -> Iterator[tuple[int, _Status]]:
    """The living threads of a process, one after another."""
    try:
        folders = list(Path(f"/proc/{process}/task").iterdir())
    except OSError:
        return
    for folder in folders:
        status = _read_status(f"{folder}/status")
        if status is not None and status.state not in _ENDED:
            yield int(folder.name), status


def _read_status(path: str) -> _Status | None:
    """What a thread's status tells; None when the thread has gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = _STATUS.search(os.read(descriptor, _SIZE))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if found is None:
        return None
    state, threads, *masks = found.groups()
    return _Status(state, int(threads), *(int(mask, 16) for mask in masks))
