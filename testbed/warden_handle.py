"""The lab's side of its warden (warden.py): start it, tell it what is the lab's, hear what was left.

The warden runs from before the first namespace is made until after the last is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

from testbed.errors import TestbedError
from testbed.netns import Namespace
from testbed.owner import unmarked

_SCRIPT: Final = Path(__file__).with_name("warden.py")
_PATIENCE: Final = 10.0  # seconds for the warden to end; it gives what it kills five


class WardenError(TestbedError):
    """The warden did not do its work."""


class WardenHandle:
    """A warden at work for this process."""

    def __init__(self) -> None:
        own = os.pidfd_open(os.getpid())
        self._telling, listening = socket.socketpair()
        try:
            # A session of its own: a Ctrl-C in the terminal is for the lab.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SCRIPT), str(os.getpid()), str(own)],
                stdin=listening.fileno(),
                stdout=subprocess.PIPE,
                env=unmarked(),
                pass_fds=(own,),
                start_new_session=True,
            )
        finally:
            listening.close()
            os.close(own)

    def guard(self, namespace: Namespace) -> None:
        """Make it responsible for every process in a namespace; it holds that as long as it lives."""
        self._tell("namespace", namespace.fileno())

    def remove(self, folder: Path) -> None:
        """Make it responsible for a temporary folder."""
        self._tell(f"folder {folder}")

    def release(self) -> None:
        """Make it responsible for nothing: another has taken over."""
        self._tell("release")

    def finish(self) -> list[str]:
        """Let it clean up now; what it had to kill, by name and pid. WardenError when it does not end."""
        with contextlib.suppress(OSError):  # it is gone, which is told below
            self._telling.shutdown(socket.SHUT_WR)  # closing is not enough: a fork of ours may have it open, too
        self._telling.close()
        try:
            output, _ = self._process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            self._process.communicate()
            raise WardenError("processes of the lab could not be ended") from error
        if self._process.returncode:
            raise WardenError(f"the lab's warden ended with {self._process.returncode}: processes may be left")
        return output.decode(errors="replace").splitlines()

    def _tell(self, line: str, *descriptors: int) -> None:
        try:
            socket.send_fds(self._telling, [line.encode() + b"\n"], descriptors)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise WardenError("the lab's warden is gone") from error
