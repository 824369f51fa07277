"""Labs that are handed over: a keeper of their own takes them when the process that built them has to go.

Owns: both ends of that. The keeper inherits the descriptors of the namespaces, sets a warden of its own over them, and
says so; only then does the builder let go (`Lab.leave`), and with its word the keeper records the lab, so that
`testbed shell`, `exec` and `down` find it. Whichever of the two is killed at any moment, a warden is left that
cleans.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from testbed.impair import WIRE
from testbed.lab import Lab, LabError
from testbed.netns import Namespace
from testbed.owner import KEEPS, owner_mark, unmarked
from testbed.registry import LOG, Record, find, record_of, redirect
from testbed.warden_handle import WardenHandle


def hand_over(lab: Lab, held: Sequence[int] = ()) -> Record:
    """Give a lab to a keeper and be done with it; LabError when none can be had: then the lab is as it was.

    `held`: descriptors that the keeper is to have open as long as it lives, such as those of locks.
    """
    namespaces = lab.namespaces
    with (lab.directory / LOG).open("ab") as log:
        keeper = subprocess.Popen(
            [
                *(sys.executable, "-m", "testbed.keeper", lab.topology.name, str(lab.directory)),
                *(f"{node}={namespace.fileno()}" for node, namespace in namespaces.items()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,  # not ours: whoever reads that waits for its end
            text=True,
            env={**unmarked(), KEEPS: owner_mark()},
            pass_fds=[*(namespace.fileno() for namespace in namespaces.values()), *held],
            start_new_session=True,
        )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    with keeper.stdin, keeper.stdout:
        if keeper.stdout.readline() != "ready\n":
            raise LabError(f"the lab cannot be kept: its keeper ended with {keeper.wait()}")
        lab.leave()
        with contextlib.suppress(BrokenPipeError):
            keeper.stdin.write("keep\n")
            keeper.stdin.flush()
        name = keeper.stdout.readline().strip()
    if not name:
        raise LabError(f"the lab is gone: its keeper ended with {keeper.wait()}")
    keeper.returncode = 0  # it outlives us; what it ends with is nobody's matter
    return find(name)


class Down(BaseException):
    """SIGTERM came."""


def main() -> None:
    """`python -m testbed.keeper NAME DIRECTORY NODE=DESCRIPTOR...`: keep a lab until SIGTERM."""
    name, directory, *words = sys.argv[1:]
    signal.signal(signal.SIGTERM, leave)
    nodes = {node: Namespace(int(descriptor)) for node, _, descriptor in (word.rpartition("=") for word in words)}
    warden = WardenHandle()
    for namespace in nodes.values():
        warden.guard(namespace)
    os.environ.pop(KEEPS, None)  # what we start is no keeper; ours was read when we started
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if sys.stdin.readline() != "keep\n":
        warden.release()  # the builder was killed, and its own warden cleans up
        return
    record = None
    with contextlib.suppress(Down):
        record = record_of(name, Path(directory), {node: nodes[node] for node in nodes if node != WIRE})
        sys.stdout.write(record.name + "\n")
        sys.stdout.flush()
        redirect(Path(directory, LOG))
        while True:
            signal.pause()
    try:
        warden.finish()
    finally:
        if record is not None:
            record.remove()


def leave(number: int, frame: object) -> None:
    """Answer to SIGTERM: once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Down


if __name__ == "__main__":
    main()
