"""Labs that outlive the command that started them: how others find them, their namespaces and their keepers.

Owns: the records, and the questions to a keeper (up.py, keeper.py). A lab's namespaces are the keeper's descriptors, so
they end with it, however it ends; a record whose keeper is gone is removed by whoever meets it. `testbed exec` and the
completion of a shell import this: it imports no lab.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Final

from testbed.errors import TestbedError
from testbed.netns import Namespace
from testbed.owner import is_gone, pid_namespace, start_time

if TYPE_CHECKING:
    from testbed.topology import Impairment

_PATIENCE: Final = 60.0  # seconds for a lab to end: more than all that it waits for then
ANSWER_PATIENCE: Final = 60.0  # seconds for a keeper to write a report
DONE: Final = b"+"  # what a keeper's answer begins with
FAILED: Final = b"-"
LOG: Final = "keeper.log"  # in the lab's directory: what went wrong in the end


class RegistryError(TestbedError):
    """There is no such lab, or there is one already; the message says which."""


@dataclass(frozen=True, slots=True)
class Record:
    """A running lab: the process that keeps it, and the descriptor that this has for each node's namespace."""

    name: str
    pid: int
    started: str
    directory: str
    nodes: dict[str, int]

    @property
    def is_gone(self) -> bool:
        """Has its keeper ended? Pids come back, start times do not."""
        return is_gone(pid_namespace(), self.pid, self.started)

    def write(self) -> None:
        """Let others find the lab."""
        _make_directory()
        path = _path(self.name)
        begun = path.with_suffix(".new")  # nobody reads half a record: it would be removed as one of no lab
        begun.write_text(json.dumps(asdict(self)))
        begun.replace(path)

    def remove(self) -> None:
        """Let nobody find it any more."""
        forget(self.name)

    def namespace(self, node: str) -> Namespace:
        """The namespace of a node."""
        if node not in self.nodes:
            raise RegistryError(f"the lab {self.name} has no node {node!r}, only {', '.join(self.nodes)}")
        return Namespace.at(Path(f"/proc/{self.pid}/fd/{self.nodes[node]}"))


def directory() -> Path:
    """Where the records are: of this user, and of keepers whose pids mean here what they mean to themselves, only."""
    parent = Path("/run") if os.geteuid() == 0 and os.access("/run", os.W_OK) else Path("/tmp")
    path = parent / f"testbed-{os.geteuid()}-{pid_namespace()}"
    if path.exists() and path.stat().st_uid != os.geteuid():
        raise RegistryError(f"{path} belongs to somebody else")
    return path


def _make_directory() -> None:
    """For who is to write there: whoever only looks leaves nothing behind."""
    directory().mkdir(mode=0o700, exist_ok=True)


def records() -> list[Record]:
    """The labs that run; records of others are removed, unless one is just being made: it may be of such a name."""
    found, stale = _look()
    if stale:
        with contextlib.suppress(BlockingIOError), lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
            for name in _look()[1]:
                forget(name)
    return found


def _look() -> tuple[list[Record], list[str]]:
    """The records of labs that run, and the names of the others."""
    found, stale = [], []
    for path in sorted(directory().glob("*.json")):
        try:
            record = Record(**json.loads(path.read_text()))
        except OSError:  # it has just been removed, or cannot be read now
            continue
        except (ValueError, TypeError):
            stale.append(path.stem)
            continue
        if record.is_gone:
            stale.append(path.stem)
        else:
            found.append(record)
    return found, stale


def find(name: str | None) -> Record:
    """A lab by name, or the only one."""
    running = records()
    if name is None:
        if len(running) == 1:
            return running[0]
        names = ", ".join(record.name for record in running)
        raise RegistryError(f"which lab? running: {names}" if running else "no lab is running")
    for record in running:
        if record.name == name:
            return record
    raise RegistryError(f"no lab {name!r} is running")


def record_of(name: str, logs: Path, namespaces: Mapping[str, Namespace]) -> Record:
    """Record a lab of this process under its name, or NAME-2 and so on where that is taken."""
    with lock():
        taken = {record.name for record in records()}
        free = next(each for number in count(1) if (each := f"{name}-{number}" if number > 1 else name) not in taken)
        nodes = {node: namespace.fileno() for node, namespace in namespaces.items()}
        record = own_record(free, logs, nodes)
        record.write()
        return record


def own_record(name: str, logs: Path, nodes: dict[str, int]) -> Record:
    """What this process, which keeps a lab, has to record of it."""
    return Record(name, os.getpid(), start_time(os.getpid()) or "", str(logs.absolute()), nodes)


def down(record: Record) -> None:
    """End a lab and wait until its keeper is gone; RegistryError with what the keeper had to complain of."""
    log = Path(record.directory, LOG)
    said = log.stat().st_size if log.exists() else 0
    os.kill(record.pid, signal.SIGTERM)
    _wait_gone(record)  # it removes its record itself: the name may be another lab's by now
    if log.exists() and (complaints := log.read_text(errors="replace")[said:].strip()):
        raise RegistryError(f"{record.name} is down, but\n{complaints}")


def ask_report(record: Record) -> str:
    """What a running lab did so far, as HTML (report.py); RegistryError when its keeper cannot tell."""
    return _ask(record, {"want": "report"})


def impair(record: Record, label: str, impairment: Impairment) -> None:
    """Have a running lab change what an impaired link does (Lab.impair); RegistryError when it cannot."""
    _ask(record, {"want": "impair", "end": label, "impairment": asdict(impairment)})


def _ask(record: Record, question: Mapping[str, object]) -> str:
    """A keeper's answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(ANSWER_PATIENCE)
        try:
            asking.connect(str(socket_of(record.name)))
            asking.sendall(json.dumps(question).encode())
            asking.shutdown(socket.SHUT_WR)
            answer = everything(asking)
        except TimeoutError as error:
            raise RegistryError(f"the keeper of {record.name} (pid {record.pid}) does not answer") from error
        except OSError as error:
            # A lab that a test left running has no captures any more, and the test wrote what there was.
            raise RegistryError(f"{record.name} cannot be asked; see {record.directory}") from error
    verdict, text = answer[:1], answer[1:].decode()
    if verdict != DONE:
        raise RegistryError(f"{record.name}: {text or 'its keeper ended'}")
    return text


def everything(sock: socket.socket) -> bytes:
    """What comes until the other end has no more to say."""
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def _wait_gone(record: Record) -> None:
    """Wait for the end of a keeper (which is no child of ours)."""
    try:
        descriptor = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    with contextlib.closing(os.fdopen(descriptor)) as ended:
        if not select.select([ended], [], [], _PATIENCE)[0]:
            raise RegistryError(f"the keeper of {record.name} (pid {record.pid}) does not end")


def redirect(log: Path) -> None:
    """Standard input from nowhere, output to the keeper's log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)


def _path(name: str) -> Path:
    return directory() / f"{name}.json"


def socket_of(name: str) -> Path:
    """Where the keeper of a lab is asked."""
    return directory() / f"{name}.sock"


def forget(name: str) -> None:
    """Remove what is there of a lab."""
    _path(name).unlink(missing_ok=True)
    socket_of(name).unlink(missing_ok=True)


@contextlib.contextmanager
def lock(how: int = fcntl.LOCK_EX) -> Iterator[int]:
    """One that makes records, or removes what another left, at a time; yields the descriptor that holds the lock."""
    _make_directory()
    descriptor = os.open(directory() / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        os.close(descriptor)
