"""`--lab-shell`: a failed test stops in a shell, with its lab alive.

Owns: when that can be done, and the terminal meanwhile. As long as the shell is open the lab is on record, so
`testbed shell` and `testbed exec` reach its other nodes, from there or from another terminal.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from testbed.errors import TestbedError, in_words
from testbed.lab import Lab
from testbed.owner import environment
from testbed.registry import record_of


def refusal(config: pytest.Config) -> str | None:
    """Why no shell can be opened; None when one can."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") != "no":
        return "a test in a worker of pytest-xdist has no terminal; run it without -n"
    with _uncaptured(config):
        if not all(os.isatty(descriptor) for descriptor in (0, 1)):
            return "standard input and output must be a terminal"
    return None


def open_shell(config: pytest.Config, lab: Lab, story: str) -> None:
    """Open a shell in a node of the lab, the one with the engine if there is one; back when it has ended.

    What keeps it from being opened is told in its place: the other tests go on.
    """
    try:
        _talk(config, lab, story)
    except (TestbedError, OSError) as error:
        with _uncaptured(config):
            sys.stdout.write(f"\nno shell can be opened: {in_words(error)}\n")


def _talk(config: pytest.Config, lab: Lab, story: str) -> None:
    nodes = lab.topology.nodes
    inside = next((node for node in nodes if node.engine is not None), nodes[0]).name
    record = record_of(lab.topology.name, lab.directory, {node.name: lab[node.name].namespace for node in nodes})
    try:
        with _uncaptured(config):
            sys.stdout.write(
                f"\n{story}\n\nThe lab {record.name} is alive, and this is a shell in {inside}; `exit` ends both.\n"
                f"Other nodes: testbed shell --lab {record.name} {'|'.join(record.nodes)}\n"
                f"Logs and captures: {lab.directory}\n"
            )
            sys.stdout.flush()
            with lab[inside].namespace.entered():
                shell = subprocess.Popen([os.environ.get("SHELL") or "/bin/sh"], env=environment())
            shell.wait()
    finally:
        record.remove()


@contextlib.contextmanager
def _uncaptured(config: pytest.Config) -> Iterator[None]:
    """Have standard input and output as they are outside of pytest."""
    capturing = config.pluginmanager.getplugin("capturemanager")
    if capturing is None:
        yield
        return
    capturing.suspend(in_=True)
    try:
        yield
    finally:
        capturing.resume()
        capturing.suspend()  # between tests, where we are called, only standard input is taken
