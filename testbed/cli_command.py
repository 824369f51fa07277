"""Commands that the command line runs in a lab: `testbed exec`, `shell` and `run`.

Owns: starting them, and how they ended. What they print is theirs, unless it is wanted as JSON.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from testbed.errors import TestbedError
from testbed.journal import LAB, command_line, exit_code
from testbed.owner import environment, unmarked
from testbed.registry import Record

if TYPE_CHECKING:
    from testbed.lab import Lab


def become(record: Record, node: str, command: Sequence[str]) -> NoReturn:
    """Become a command inside a node of a running lab; TestbedError when it cannot be run."""
    with record.namespace(node) as namespace, namespace.entered():
        try:
            os.execvpe(command[0], list(command), environment(record.pid))
        except (OSError, ValueError) as error:
            raise _cannot_run(node, command, error) from error


def run_captured(record: Record, node: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command inside a node of a running lab; TestbedError when it cannot be run."""
    with record.namespace(node) as namespace:
        try:
            with namespace.entered():
                running = _start(command, environment(record.pid), is_captured=True)
        except (OSError, ValueError) as error:
            raise _cannot_run(node, command, error) from error
    return _finished(running, command)


def run_in(
    lab: Lab, node: str | None, command: Sequence[str], *, is_captured: bool
) -> subprocess.CompletedProcess[str]:
    """Run a command in a node, or (None) here; TestbedError when that fails. Its output is captured, or goes on."""
    with lab.journal.during(node or LAB, command_line(command)) as entry:
        try:
            with lab[node].namespace.entered() if node is not None else contextlib.nullcontext():
                env = environment() if node is not None else unmarked()
                running = _start(command, env, is_captured=is_captured)
        except (OSError, ValueError) as error:
            raise _cannot_run(node, command, error) from error
        done = _finished(running, command)
        entry.end(f"exit status {done.returncode}", is_bad=done.returncode != 0)
    return done


def command_values(
    node: str | None, command: Sequence[str], done: subprocess.CompletedProcess[str]
) -> dict[str, object]:
    """A command and how it ended, for JSON."""
    return {
        "node": node,
        "command": list(command),
        "exit": exit_code(done.returncode),
        "stdout": done.stdout,
        "stderr": done.stderr,
    }


def _start(command: Sequence[str], env: Mapping[str, str], *, is_captured: bool) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE if is_captured else None
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, errors="replace", env=env)


def _finished(running: subprocess.Popen[str], command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    with running:
        try:
            output, errors = running.communicate()
        except BaseException:  # a signal ends us
            running.kill()
            raise
    return subprocess.CompletedProcess(command, running.returncode, output, errors)


def _cannot_run(node: str | None, command: Sequence[str], error: OSError | ValueError) -> TestbedError:
    why = error.strerror if isinstance(error, OSError) else error
    return TestbedError(f"{f'{node}: ' if node is not None else ''}cannot run {command[0]!r}: {why}")
