"""Network namespaces: make them, enter them, open things inside.

Owns: the descriptor that keeps a namespace alive. A namespace made here has no name and no mount: it goes with the last
descriptor and the last process in it, so a lab that is killed leaves none.

setns(2) moves one thread. Whatever is done inside must not yield to other coroutines: enter, open, leave. Threads and
processes started inside stay there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

_CLONE_NEWNET: Final = 0x40000000
_OWN: Final = Path("/proc/thread-self/ns/net")  # /proc/self shows the main thread's

_libc: Final = ctypes.CDLL(None, use_errno=True)

_Result = TypeVar("_Result")


class Namespace:
    """An open handle to a network namespace. Close it, or use it in a `with`."""

    def __init__(self, descriptor: int) -> None:
        """Take over a descriptor of a namespace file."""
        self._descriptor = descriptor

    @classmethod
    def new(cls) -> Self:
        """Make a namespace; OSError(EPERM) without CAP_SYS_ADMIN."""
        with ThreadPoolExecutor(1) as one_thread:
            return one_thread.submit(cls.move_into_new).result()

    @classmethod
    def move_into_new(cls) -> Self:
        """Make a namespace and stay in it, with a thread that ends there and so needs no way back."""
        _check(_libc.unshare(_CLONE_NEWNET), "unshare(CLONE_NEWNET)")
        return cls.current()

    @classmethod
    def current(cls) -> Self:
        """The namespace of this thread."""
        return cls.at(_OWN)

    @classmethod
    def of_process(cls, pid: int) -> Self:
        """The namespace of a process."""
        return cls.at(Path(f"/proc/{pid}/ns/net"))

    @classmethod
    def at(cls, path: Path) -> Self:
        """The namespace behind a file."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: equal for two handles of one namespace."""
        return _identity(os.fstat(self._descriptor))

    def enter(self) -> None:
        """Move this thread in: one that ends there, or inside `returning`."""
        _check(_libc.setns(self._descriptor, _CLONE_NEWNET), "setns")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Be in the namespace with this thread, and back where it was afterwards. Nothing may await inside."""
        with returning():
            self.enter()
            yield

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket that belongs to the namespace, wherever it is used."""
        with self.entered():
            return socket.socket(family, kind, protocol)

    def call(self, function: Callable[[], _Result]) -> _Result:
        """Call a function inside."""
        with self.entered():
            return function()

    def close(self) -> None:
        """Give the handle up."""
        descriptor, self._descriptor = self._descriptor, -1  # first: twice, it might be somebody else's
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def returning() -> Iterator[None]:
    """Have this thread back afterwards in the namespace where it was, whichever it goes to inside."""
    with Namespace.current() as back:
        try:
            yield
        finally:
            try:
                back.enter()
            except OSError as error:
                if _identity(_OWN.stat()) != back.identity:  # else it is where it was: who may not move never left
                    raise OSError(error.errno, f"no way back: {error.strerror}") from error


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _check(result: int, what: str) -> None:
    """OSError when a libc call failed."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
