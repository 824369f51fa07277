"""`testbed up`: a lab that a process of its own builds and keeps.

Owns: the keeper, from its fork to SIGTERM, and its answers. Its record is registry.py's; a lab that somebody else built
is kept by keeper.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from testbed.errors import TestbedError, in_words
from testbed.keeper import Down, leave
from testbed.lab import Lab
from testbed.registry import (
    ANSWER_PATIENCE,
    DONE,
    FAILED,
    LOG,
    Record,
    RegistryError,
    everything,
    find,
    forget,
    lock,
    own_record,
    records,
    redirect,
    socket_of,
)
from testbed.report import report
from testbed.topology import Impairment, Topology

_READY: Final = "+"  # what a keeper says of a lab that is up
_QUESTION_PATIENCE: Final = 5.0  # seconds for somebody to ask


def up(topology: Topology, logs: Path) -> Record:
    """Start a lab that runs until `down`; whatever keeps it from starting is told here."""
    with lock() as held:
        if any(record.name == topology.name for record in records()):
            raise RegistryError(f"the lab {topology.name} runs already")
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(reading)
            _keep(topology, logs, writing, held)
        os.close(writing)
        with os.fdopen(reading) as told:
            verdict = told.read()
        os.wait()
        if verdict != _READY:
            raise RegistryError(verdict or f"the keeper of {topology.name} was killed")
        return find(topology.name)


def _keep(topology: Topology, logs: Path, telling: int, held: int) -> None:
    """The keeper: leave the command's session, build the lab, say so, answer questions until SIGTERM. Never returns.

    `held` is the lock, which it has until the lab is recorded: the command may be killed before. Then nobody hears that
    the lab is ready, and it is taken down.
    """
    os.setsid()
    if os.fork():
        os._exit(0)
    status = 1
    try:
        # Not blocked and waited for: what the keeper starts would have it blocked, too.
        signal.signal(signal.SIGTERM, leave)
        redirect(logs / LOG)
        with contextlib.suppress(Down), Lab(topology, logs, record=True) as lab, _listening(topology.name) as listener:
            nodes = {node.name: lab[node.name].namespace.fileno() for node in topology.nodes}
            own_record(topology.name, logs, nodes).write()
            os.write(telling, _READY.encode())
            os.close(telling)
            telling = -1
            fcntl.flock(held, fcntl.LOCK_UN)  # closing is not enough: the command has it open, too, and may be stopped
            with contextlib.suppress(Down):
                while True:
                    _answer(listener, lab)
        status = 0
    except Exception as error:
        message = in_words(error)
        if telling >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(telling, message.encode())
        else:
            sys.stderr.write(message + "\n")
            sys.stderr.flush()
    finally:
        forget(topology.name)
        os._exit(status)


@contextlib.contextmanager
def _listening(name: str) -> Iterator[socket.socket]:
    """Where a keeper is asked; only this user can reach it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        socket_of(name).unlink(missing_ok=True)  # of a keeper that was killed
        listener.bind(str(socket_of(name)))
        listener.listen()
        yield listener


def _answer(listener: socket.socket, lab: Lab) -> None:
    """Wait for a question, and answer it."""
    asked, _ = listener.accept()
    with asked:
        asked.settimeout(_QUESTION_PATIENCE)
        with contextlib.suppress(OSError):  # who asked is gone, or does not listen
            question = everything(asked)
            try:
                answer = DONE + _answer_to(json.loads(question), lab).encode(errors="replace")
            except TestbedError as error:
                answer = FAILED + str(error).encode(errors="replace")
            except Exception as error:
                answer = FAILED + repr(error).encode(errors="replace")
            asked.settimeout(ANSWER_PATIENCE)
            asked.sendall(answer)


def _answer_to(question: Mapping[str, Any], lab: Lab) -> str:
    if question["want"] == "report":
        return report(lab)
    lab.impair(question["end"], Impairment(**question["impairment"]))
    return ""
