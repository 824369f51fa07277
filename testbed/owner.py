"""Whose a process, a namespace or a folder is, and the end of those whose owner is gone.

Owns: the marks of a lab's owner, which is the process that builds it, and `sweep`. A process is marked in its
environment, and by its namespace: it may have thrown its environment away.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from testbed import rtnetlink
from testbed.netns import Namespace

# In the environment of every process of a lab, and with each of its namespaces: the owner, as `owner_mark` tells it.
MARK: Final = "TESTBED_OWNER"
KEEPS: Final = "TESTBED_KEEPS"  # in the environment of a keeper (keeper.py): the owner from which it took a lab over
KEPT: Final = "kept"  # a file in a temporary folder that is to stay (warden.py looks for it, too)

_Owner = tuple[int, int, str]  # pid namespace, pid, start time


def owner_mark(pid: int | None = None) -> str:
    """A process, or this one, as an owner: its pid, which pids those are, and its start time, since pids come back."""
    pid = os.getpid() if pid is None else pid
    return f"{pid_namespace()}:{pid}:{start_time(pid)}"


def pid_namespace() -> int:
    """Which pids are meant here: processes of containers are seen from outside, with others."""
    return Path("/proc/self/ns/pid").stat().st_ino


def namespace_mark() -> str:
    """The alias of the lo of a lab's namespaces (build.py): a process may have thrown its environment away."""
    return f"{MARK}={owner_mark()}"


def environment(owner: int | None = None) -> dict[str, str]:
    """What a lab's processes find in their environment: ours, the owner's mark, this Python's commands in the path.

    `owner`: the process that keeps the lab, where that is not this one.
    """
    return {**unmarked(), MARK: owner_mark(owner)}


def unmarked() -> dict[str, str]:
    """The same for what is not the lab's, and is to outlive it: no mark, not even that of a lab that we are part of."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**{name: value for name, value in os.environ.items() if name != MARK}, "PATH": path}


def start_time(pid: int) -> str | None:
    """When a process started, in ticks since boot (proc(5), field 22); None when it is gone, be it not yet reaped.

    OSError when that cannot be seen: it may be hidden (hidepid), or there is no descriptor left to look with.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            raise
        return None
    return None if fields[0] in "ZX" else fields[19]


def temporary_folder(name: str) -> Path:
    """A folder for a lab that has none, not made yet; it says in its name whose it is."""
    owner = owner_mark().replace(":", "-")
    return Path(tempfile.gettempdir(), f"testbed-{name}-{owner}-{secrets.token_hex(4)}")


def sweep() -> list[int]:
    """Kill the processes of labs whose owner is gone, and remove their temporary folders; the pids."""
    killed = []
    owners = _owners(MARK)
    found = owners | _owners_by_namespace(owners)
    # Not ourselves, whatever started us long ago.
    orphans = {pid: owner for pid, owner in found.items() if pid != os.getpid() and is_gone(*owner)}
    kept = set(_owners(KEEPS).values()) if orphans else set()
    for pid, owner in orphans.items():
        if owner not in kept:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
    for folder in Path(tempfile.gettempdir()).glob("testbed-*"):
        named = re.fullmatch(r"testbed-.+-(\d+)-(\d+)-(\d+)-[0-9a-f]{8}", folder.name)
        if named is not None and is_gone(*_owner(named)) and not (folder / KEPT).exists():
            shutil.rmtree(folder, ignore_errors=True)
    return killed


def _owners(variable: str) -> dict[int, _Owner]:
    """The processes with an owner's mark in their environment, and the owner."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environ = (process / "environ").read_bytes().decode(errors="replace")
            if (owner := _read_mark(variable, environ)) is not None:
                found[int(process.name)] = owner
    return found


def _owners_by_namespace(known: Collection[int]) -> dict[int, _Owner]:
    """The other processes that are in a marked namespace, and the owner."""
    ours = Path("/proc/self/ns/net").stat().st_ino
    inside: defaultdict[int, list[int]] = defaultdict(list)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(process.name) not in known and (number := (process / "ns/net").stat().st_ino) != ours:
                inside[number].append(int(process.name))
    found: dict[int, _Owner] = {}
    # /proc shows where a process's first thread is, and whoever is seen inside a lab is killed with it.
    with ThreadPoolExecutor(1) as unseen:
        for number, pids in inside.items():
            if (owner := unseen.submit(_owner_of_namespace, pids[0], number).result()) is not None:
                found |= dict.fromkeys(pids, owner)
    return found


def _owner_of_namespace(pid: int, number: int) -> _Owner | None:
    """The owner in the mark of a process's namespace; None when that is no longer the one with this number."""
    # Asked before it is entered: the process may be back where it came from, which is perhaps where we are.
    with contextlib.suppress(OSError), Namespace.of_process(pid) as namespace:
        if namespace.identity[1] == number:
            with namespace.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
                return _read_mark(MARK, rtnetlink.marked(netlink))
    return None


def _read_mark(variable: str, text: str) -> _Owner | None:
    """The owner that a mark tells, among others that NUL bytes part."""
    match = re.search(rf"(?:^|\0){variable}=(\d+):(\d+):(\d+)(?:\0|$)", text)
    return None if match is None else _owner(match)


def _owner(match: re.Match[str]) -> _Owner:
    return int(match[1]), int(match[2]), match[3]


def is_gone(namespace: int, pid: int, started: str) -> bool:
    """Whether a process is no more; of one in another container, or that is hidden, that cannot be known."""
    try:
        return namespace == pid_namespace() and start_time(pid) != started
    except OSError:
        return False
