"""Programs in nodes: started, ready when they say so, logged, and never left behind.

Owns: the processes of a lab. A program is a child of the lab, in a session of its own. `stop` ends it and what is left
of that session; what else it started, and everything when the lab is killed, is the warden's matter (warden.py). When
even that was killed, the next lab finds the processes by their marks (owner.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from operator import methodcaller
from pathlib import Path
from typing import Final

from testbed.errors import TestbedError
from testbed.netns import Namespace
from testbed.owner import environment
from testbed.topology import Readiness

__tracebackhide__ = methodcaller("errisinstance", TestbedError)  # pytest shows where the test called

_GRACE: Final = 3.0  # seconds between SIGTERM and SIGKILL
_LAST_BREATH: Final = 0.5  # seconds from the closing of a process's descriptors to its end
_LISTEN: Final = "0A"  # TCP_LISTEN in /proc/net/tcp
_LOG_LINES: Final = 15
_LOOK_AGAIN: Final = 0.01  # seconds; a port that is listened on, or a line in a log, makes no event


class ServiceError(TestbedError):
    """A program did not start, did not become ready, or ended by itself; the message ends with its last log lines."""


class Program:
    """A running program in a namespace."""

    def __init__(self, label: str, command: Sequence[str], namespace: Namespace, log: Path, ready: Readiness) -> None:
        """Start a program and wait until it is ready; ServiceError when it does not get so far."""
        self.label = label
        self.log = log
        self._ready = ready
        self._namespace = namespace
        self._returncode: int | None = None
        reading, writing = os.pipe()
        with contextlib.closing(os.fdopen(reading, "rb")) as news:
            with contextlib.closing(os.fdopen(writing, "wb")) as notify:
                self._process = self._start(command, notify.fileno())
            self._ended = os.pidfd_open(self._process.pid)
            try:
                self._wait_ready(news.fileno())
            except BaseException:
                self.stop()
                raise

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, as subprocess tells it; None while it runs."""
        if self._returncode is None:
            # Not reaped: as long as it is not, its pid and that of its session are nobody else's.
            status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status is not None:
                killed = status.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                self._returncode = -status.si_status if killed else status.si_status
        return self._returncode

    def check(self) -> None:
        """ServiceError when it has ended."""
        if self.returncode is not None:
            raise ServiceError(self.account())

    def account(self) -> str:
        """How it ended, with its last words."""
        return f"{self.label} {_ended(self.returncode)}{self.tail()}"

    @property
    def has_failed(self) -> bool:
        """Whether it ended by itself, and not with exit status 0."""
        return self._ended >= 0 and self.returncode not in (None, 0)

    def wait(self, within: float) -> int | None:
        """Wait for its end; how it ended, or None when it did not within that many seconds."""
        _await([self._ended], within)
        return self.returncode

    def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL after a while; then SIGKILL for what it started in its session."""
        if self._ended < 0:
            return
        if self.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            self.wait(_GRACE)
        self.kill()

    def kill(self) -> None:
        """SIGKILL it and its session, without warning."""
        if self._ended < 0:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        _await([self._ended], None)
        self._returncode = self.returncode
        os.close(self._ended)
        self._ended = -1
        self._process.wait()

    def tail(self) -> str:
        """The last lines of its log, indented, behind a line break; empty when it wrote nothing."""
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:] if self.log.exists() else []
        return "".join(f"\n    | {line}" for line in lines)

    def _start(self, command: Sequence[str], notify: int) -> subprocess.Popen[bytes]:
        """The process, in its namespace, with its log."""
        words = [word.replace("{notify_fd}", str(notify)).replace("{python}", sys.executable) for word in command]
        try:
            with self.log.open("ab") as output, self._namespace.entered():
                self._log_start = output.tell()
                return subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment(),
                    pass_fds=(notify,) if self._ready.notify else (),
                    start_new_session=True,
                )
        except OSError as error:
            raise ServiceError(f"{self.label}: cannot start {words[0]!r}: {error.strerror}") from None

    def _wait_ready(self, notify: int) -> None:
        """Wait until it says that it is ready."""
        deadline = time.monotonic() + self._ready.within
        while not self._is_ready(notify):
            self.check()
            left = deadline - time.monotonic()
            if left <= 0:
                raise ServiceError(f"{self.label} was not ready after {self._ready.within:g} s{self.tail()}")
            _await([self._ended, *([notify] if self._ready.notify else [])], min(left, self._patience()))
        if self.has_failed:
            raise ServiceError(self.account())

    def _patience(self) -> float:
        """How long to wait for an event before looking again."""
        return self._ready.within if self._ready.notify else _LOOK_AGAIN

    def _is_ready(self, notify: int) -> bool:
        ready = self._ready
        if ready.notify:
            return _await([notify], 0) and self._has_notified(notify)
        if ready.port is not None:
            port = ready.port
            return self._namespace.call(lambda: _is_listening(port))
        if ready.log is not None:
            with self.log.open("rb") as file:
                file.seek(self._log_start)  # what an earlier run wrote is before that
                return re.search(ready.log, file.read().decode(errors="replace"), re.MULTILINE) is not None
        return True

    def _has_notified(self, notify: int) -> bool:
        """Read what came through the pipe; ServiceError when it was closed and nothing will come any more."""
        word = os.read(notify, 64)
        if not word:
            self.wait(_LAST_BREATH)
            self.check()
            raise ServiceError(f"{self.label} closed the descriptor without a word of being ready{self.tail()}")
        return b"\n" in word


def _await(descriptors: list[int], within: float | None) -> bool:
    """Wait until one of the descriptors is readable, for `within` seconds or (None) for ever; whether one is."""
    poll = select.poll()  # select() takes no descriptor above 1023, and large labs have these
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if within is None else max(0, within * 1000)))


def _is_listening(port: int) -> bool:
    """Does something listen on a TCP port of this thread's namespace?"""
    for name in ("tcp", "tcp6"):
        table = Path(f"/proc/thread-self/net/{name}")
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            _, local, _, state, *_ = line.split()
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


def _ended(returncode: int | None) -> str:
    if returncode is None:
        return "runs"
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"ended with exit status {returncode}"
