"""Programs in nodes: started, ready when they say so, logged, and never left behind.

Owns: the processes of a lab. A program is a child of the lab, and the kernel kills it when the thread that started it
ends (PR_SET_PDEATHSIG); its own children are known by a mark in their environment, and the next lab that starts kills
those whose owner is gone (`sweep`). Must not know topologies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from testbed.netns import Namespace
from testbed.topology import Readiness

MARK: Final = "TESTBED_OWNER"  # in the environment of every process of a lab: the owner's pid and start time
_PR_SET_PDEATHSIG: Final = 1
_GRACE: Final = 3.0  # seconds between SIGTERM and SIGKILL
_LISTEN: Final = "0A"  # TCP_LISTEN in /proc/net/tcp
_LOG_LINES: Final = 15

_libc: Final = ctypes.CDLL(None, use_errno=True)


class ServiceError(Exception):
    """A program did not start, did not become ready, or ended by itself; the message ends with its last log lines."""


def owner_mark() -> str:
    """This process as an owner: pid and start time, since pids come back."""
    return f"{os.getpid()}:{start_time(os.getpid())}"


def environment() -> dict[str, str]:
    """What a lab's processes find in their environment: ours, the owner's mark, this Python's commands in the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, "PATH": path, MARK: owner_mark()}


def start_time(pid: int) -> str | None:
    """When a process started, in ticks since boot (proc(5), field 22); None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _die_with_parent() -> None:
    """Run in the child: ask the kernel for SIGKILL when the parent ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Program:
    """A running program in a namespace."""

    def __init__(self, label: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.label = label
        self.log = log
        self._process = process

    @classmethod
    def start(
        cls,
        label: str,
        command: Sequence[str],
        namespace: Namespace,
        log: Path,
        ready: Readiness,
        further: Mapping[str, str] | None = None,
    ) -> Program:
        """Start a program and wait until it is ready; ServiceError when it does not get so far.

        `further`: environment variables beside those of `environment`.
        """
        reading, writing = os.pipe()
        words = [word.replace("{notify_fd}", str(writing)).replace("{python}", sys.executable) for word in command]
        variables = {**environment(), **(further or {})}
        try:
            with log.open("ab") as output, namespace.entered():
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=variables,
                    pass_fds=(writing,) if ready.notify else (),
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            os.close(writing)
            writing = -1
            program = cls(label, process, log)
            try:
                program._wait_ready(ready, reading, namespace)
            except BaseException:
                program.stop()
                raise
        except OSError as error:
            raise ServiceError(f"{label}: cannot start {words[0]!r}: {error.strerror}") from error
        finally:
            os.close(reading)
            if writing >= 0:
                os.close(writing)
        return program

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, as subprocess tells it; None while it runs."""
        return self._process.poll()

    def check(self) -> None:
        """ServiceError when it ended by itself."""
        if self.returncode is not None:
            raise ServiceError(f"{self.label} {_ended(self._process.returncode)}{self.tail()}")

    def stop(self) -> None:
        """End it: SIGTERM, then SIGKILL for it and what it started."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
        # Its children are in its session; the group's number is not reused while one of them lives.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def kill(self) -> None:
        """SIGKILL it, without warning."""
        self._process.kill()
        self._process.wait()

    def tail(self) -> str:
        """The last lines of its log, indented, behind a line break; empty when it wrote nothing."""
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:] if self.log.exists() else []
        return "".join(f"\n    | {line}" for line in lines)

    def _wait_ready(self, ready: Readiness, notify: int, namespace: Namespace) -> None:
        """Wait until it says that it is ready."""
        deadline = time.monotonic() + ready.within
        with contextlib.closing(_ExitWatch(self.pid)) as watch:
            while not self._is_ready(ready, notify, namespace):
                self.check()
                if time.monotonic() > deadline:
                    raise ServiceError(f"{self.label} was not ready after {ready.within:g} s{self.tail()}")
                # Woken by its end or its word; a port or a log line makes no event, so these are looked at again.
                waited_for = [watch.fileno(), *([notify] if ready.notify else [])]
                select.select(waited_for, [], [], 0.1 if ready.notify else 0.01)
        self.check()

    def _is_ready(self, ready: Readiness, notify: int, namespace: Namespace) -> bool:
        if ready.notify:
            return bool(select.select([notify], [], [], 0)[0]) and os.read(notify, 1) == b"\n"
        if ready.port is not None:
            return namespace.call(lambda: _is_listening(ready.port or 0))
        if ready.log is not None:
            return re.search(ready.log, self.log.read_text(errors="replace"), re.MULTILINE) is not None
        return True


class _ExitWatch:
    """A descriptor that becomes readable when a process ends (pidfd_open(2))."""

    def __init__(self, pid: int) -> None:
        self._descriptor = os.pidfd_open(pid)

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        os.close(self._descriptor)


def _is_listening(port: int) -> bool:
    """Does something listen on a TCP port of this thread's namespace?"""
    for name in ("tcp", "tcp6"):
        table = Path(f"/proc/thread-self/net/{name}")
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            _, local, _, state, *_ = line.split()
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


def _ended(returncode: int) -> str:
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"ended with exit status {returncode}"


def sweep() -> list[int]:
    """Kill the processes of labs whose owner is gone; their pids."""
    killed = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            environment = (directory / "environ").read_bytes()
        except OSError:
            continue
        match = re.search(rb"(?:^|\0)" + MARK.encode() + rb"=(\d+):(\d+)(?:\0|$)", environment)
        if match is None or start_time(int(match[1])) == match[2].decode():
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(int(directory.name), signal.SIGKILL)
            killed.append(int(directory.name))
    return killed
