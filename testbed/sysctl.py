"""Sysctls of the network namespace that this thread is in.

Owns: reading and writing them, without file objects, which take twice as long as the kernel does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import takewhile
from typing import Final

Setting = tuple[str, str]  # key, dots between its parts, and value

_LONGEST: Final = 4096  # bytes of a value that is compared


def already_there(settings: Iterable[Setting]) -> set[Setting]:
    """The first of some settings that this thread's namespace, in which nobody has set anything, has by itself."""
    return set(takewhile(lambda setting: _read(setting[0]) == setting[1], settings))


def _read(key: str) -> str | None:
    """A value; None when there is none that can be read."""
    try:
        descriptor = os.open(_path(key), os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.read(descriptor, _LONGEST).decode("ascii", "replace").strip()
    except OSError:
        return None
    finally:
        os.close(descriptor)


def write(key: str, value: str) -> None:
    """Set a value; OSError when the kernel refuses it, UnicodeError when it cannot be one."""
    descriptor = os.open(_path(key), os.O_WRONLY)
    try:
        os.write(descriptor, value.encode("ascii"))
    finally:
        os.close(descriptor)


def _path(key: str) -> str:
    return f"/proc/sys/{key.replace('.', '/')}"
