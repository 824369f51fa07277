"""Which calls does a signal end, of those that the supervisor holds?

Owns: the signals of a thread, from /proc. Must not know the calls. Place in the path: supervisor_receive.py asks while
a recvmsg waits; every other call is answered at once.

The filter has calls wait killable (seccomp.py), so a signal that does not kill leaves the thread asleep: the supervisor
must look, and answer as the kernel's own call would. ERESTARTSYS is no errno of a program's but a word to the kernel,
which makes of it EINTR or the same call anew, as the signal's handler asks for (SA_RESTART); ERESTARTNOHAND is the same
but for any handler. The kernel hears these words only from a thread that has been told to look for signals
(TIF_SIGPENDING, which then stays until it runs); another would show 512 to its program. So they are said only to a
thread for which a signal is due beyond doubt, or that we told ourselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Final

ERESTARTSYS: Final = 512  # linux/errno.h, which no program sees
ERESTARTNOHAND: Final = 514

_SIZE: Final = 65536  # the list of groups comes before the signals
_STATUS: Final = re.compile(
    rb"\nState:\t(.).*\nThreads:\t(\d+)\n"
    rb".*\nSigPnd:\t([0-9a-f]+)\nShdPnd:\t([0-9a-f]+)\nSigBlk:\t([0-9a-f]+)\nSigIgn:\t([0-9a-f]+)\n",
    re.DOTALL,
)
_ENDED: Final = (b"Z", b"X")
_STOPPED: Final = b"T"
_DEAF: Final = (*_ENDED, _STOPPED, b"t")
_PTRACE_DETACH: Final = 17
_PTRACE_SEIZE: Final = 0x4206
_PTRACE_INTERRUPT: Final = 0x4207
_WALL: Final = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


class Due(Enum):
    """For whom a signal waits."""

    NOBODY = auto()
    THIS_THREAD = auto()
    """One of its own, or one of a process with no other thread; or all threads of the process are told to stop."""
    PROCESS = auto()
    """One for a process with several threads, of which this one may be the one to take it."""


@dataclass(frozen=True, slots=True)
class _Status:
    """A thread's state and signals; sets of signals are bit masks."""

    state: bytes
    threads: int
    own: int
    shared: int
    blocked: int
    ignored: int


def due_signal(thread: int, process: int, held: Container[int]) -> Due:
    """For whom a signal waits, as far as this thread is concerned; `held`: all threads whose calls are held."""
    status = _read_status(f"/proc/{thread}/status")
    if status is None:
        return Due.NOBODY
    heard = ~(status.blocked | status.ignored)
    if status.own & heard:
        return Due.THIS_THREAD
    if waiting := status.shared & heard:
        if status.threads == 1:
            return Due.THIS_THREAD
        return Due.NOBODY if thread != process and _does_hear(process, waiting) else Due.PROCESS
    return Due.THIS_THREAD if status.threads > 1 and _is_stopping(process, held) else Due.NOBODY


def _does_hear(first: int, signals: int) -> bool:
    """Will the first thread of a process take these signals, now or when it gets to run?

    If it can, it is the one that the kernel tells of them (kernel/signal.c, complete_signal), and the others wait on.
    """
    status = _read_status(f"/proc/{first}/status")
    return status is not None and status.state not in _DEAF and bool(signals & ~status.blocked)


@contextlib.contextmanager
def look_for_signals(thread: int) -> Iterator[bool]:
    """Have a thread look for signals when its call is answered, which is done within; False when that cannot be had.

    The kernel's own way to do so is a debugger's: to be interrupted. A thread that has a debugger gets no second one.
    """
    if not _ptrace(_PTRACE_SEIZE, thread):
        yield False
        return
    _ptrace(_PTRACE_INTERRUPT, thread)
    yield True
    with contextlib.suppress(ChildProcessError):
        os.waitpid(thread, _WALL)  # until it stops, on its way out of the call, or has been killed
    _ptrace(_PTRACE_DETACH, thread)


def _ptrace(request: int, thread: int) -> bool:
    """ptrace(2); False when it is refused."""
    return not _libc.ptrace(ctypes.c_long(request), ctypes.c_long(thread), None, None)


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
