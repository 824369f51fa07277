"""The thread that made a call: its memory, its sockets, its rights.

Owns: opening them, so that nothing of another process can be touched by mistake. Must not know what the call was.
Place in the path: supervisor.py opens a caller for each call.

Rule that holds here: a thread is known by a number, and numbers are used again. So all handles are opened first, then
the kernel is asked once whether the thread still waits for its answer: if so, they are its own, and stay its own.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
from dataclasses import dataclass
from typing import Final, Self

_SYS_PIDFD_GETFD: Final = 438  # the same number on every machine
_PIDFD_THREAD: Final = os.O_EXCL  # Linux 6.9
_CAP_NET_ADMIN: Final = 1 << 12
_NS_GET_USERNS: Final = 0xB701
_NS_GET_PARENT: Final = 0xB702
_STATUS_SIZE: Final = 65536  # the list of groups comes before the capabilities

_STATUS: Final = re.compile(rb"\nTgid:\t(\d+)\n.*\nUid:\t\d+\t(\d+)\t.*\nCapEff:\t([0-9a-f]+)\n", re.DOTALL)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who makes a call: thread, process, effective user; has it CAP_NET_ADMIN over the supervisor's network?

    Users and capabilities are each thread's own.
    """

    thread: int
    pid: int
    uid: int
    is_privileged: bool


def take_descriptor(pidfd: int, number: int) -> int:
    """A copy (close-on-exec) of another process's descriptor; OSError as from pidfd_getfd(2)."""
    copy: int = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
    if copy < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return copy


def open_thread(thread: int, process: int) -> int:
    """A pidfd of a thread; before Linux 6.9, of its process, which has the same descriptors in all but odd programs."""
    try:
        return os.pidfd_open(thread, _PIDFD_THREAD)
    except OSError as problem:
        if problem.errno != errno.EINVAL:
            raise
    return os.pidfd_open(process)


def user_namespaces_over_network() -> frozenset[int]:
    """The user namespaces whose administrators may administer this network: its owner, and all above that are visible.

    Empty when the network belongs to a user namespace that cannot be seen: then nobody here is its administrator.
    """
    found: set[int] = set()
    descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    request = _NS_GET_USERNS
    while True:
        try:
            above = fcntl.ioctl(descriptor, request)
        except PermissionError:
            return frozenset(found)
        finally:
            os.close(descriptor)
        descriptor, request = above, _NS_GET_PARENT
        found.add(os.fstat(descriptor).st_ino)


class Caller:
    """The handles of one thread, to be used in a `with`; OSError when they cannot be had."""

    def __init__(self, thread: int, administrators: frozenset[int]) -> None:
        folder = f"/proc/{thread}"
        self._memory = os.open(f"{folder}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            self.identity = _identify(thread, administrators)
            self._pidfd = open_thread(thread, self.identity.pid)
        except BaseException:
            os.close(self._memory)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._memory)
        os.close(self._pidfd)

    def take_descriptor(self, number: int) -> int:
        """A copy of one of the thread's descriptors; OSError (EBADF) when it has none of this number."""
        return take_descriptor(self._pidfd, number)

    def read(self, address: int, size: int, at_least: int | None = None) -> bytes:
        """`size` bytes of the program's memory; OSError (EFAULT) when not even `at_least` (all, if None) are there."""
        if not size:
            return b""
        try:
            data = os.pread(self._memory, size, address)
        except (OSError, OverflowError):
            data = b""
        if len(data) < (size if at_least is None else min(size, at_least)):
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return data

    def write(self, address: int, data: bytes | memoryview) -> None:
        """Put bytes into the program's memory; OSError (EFAULT) when there is none.

        Memory that the program itself may only read is written all the same (a kernel would answer EFAULT):
        /proc/PID/mem is a debugger's door, and the only one that cannot lead to another process with the same number.
        """
        if not data:
            return
        try:
            written = os.pwrite(self._memory, data, address)
        except (OSError, OverflowError):
            written = -1
        if written < len(data):
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def _identify(thread: int, administrators: frozenset[int]) -> Identity:
    """Read a thread's process, user and rights from its /proc folder."""
    folder = f"/proc/{thread}"
    status = os.open(f"{folder}/status", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(status, _STATUS_SIZE)
    finally:
        os.close(status)
    found = _STATUS.search(text)
    if found is None:
        raise ProcessLookupError(errno.ESRCH, f"{folder}/status is empty")
    has_capability = bool(int(found[3], 16) & _CAP_NET_ADMIN)
    is_privileged = has_capability and (
        os.stat(f"{folder}/ns/user").st_ino in administrators  # noqa: PTH116 - a Path costs as much as the call
    )
    return Identity(thread, int(found[1]), int(found[2]), is_privileged)
