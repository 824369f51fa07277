"""What is left of a lab for whoever looks into a failed test: one folder.

Owns: that folder, its name and its lock, and the files about the state of a running lab. Captures and logs are there
already when the folder is also the lab's directory. Must not know pytest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final, Self

from testbed.engine_handle import EngineHandle
from testbed.lab import Lab, NodeHandle
from testbed.report import report

FAILURE: Final = "failure.txt"
REPORT: Final = "report.html"
_LONGEST: Final = 120  # bytes of a name; a file system allows 255


class ArtefactFolder:
    """A folder that is this process's alone while it is open; closing it leaves it on the disk."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path: Final = path
        self._descriptor = descriptor

    @classmethod
    def claim(cls, parent: Path, name: str) -> Self:
        """An empty folder for `name` (any text) in `parent`; another run that uses it right now has it to itself."""
        readable = re.sub(r"[^\w.=-]+", "_", name).encode()[:_LONGEST].decode(errors="ignore")
        stem = f"{readable}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:6]}"
        for number in count(1):
            path = parent / (f"{stem}-{number}" if number > 1 else stem)
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:  # another run has just been done with it
                continue
            if _is_locked_now(descriptor, path):
                break
            os.close(descriptor)
        for entry in path.iterdir():  # of an earlier run
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        return cls(path, descriptor)

    def fileno(self) -> int:
        """The descriptor that has the lock: the folder is in use as long as any process has it open."""
        return self._descriptor

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let others have it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _is_locked_now(descriptor: int, path: Path) -> bool:
    """Lock a folder, unless somebody else has, or has removed it since it was opened."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def write_state(lab: Lab, folder: Path, failure: str) -> None:
    """Write down how a running lab is: rulesets, sockrefs, connections, counters; and a report with `failure`.

    What cannot be had says why.
    """
    for name, read in _state(lab, failure):
        try:
            text = read()
        except Exception as error:
            text = f"cannot be had: {error}\n"
        if text:
            _write(folder / name, text)


def write_end(lab: Lab, folder: Path, failure: str) -> None:
    """Write down what went wrong; and a report, if there is none yet because the lab never came up or went in peace."""
    _write(folder / FAILURE, failure)
    if not (folder / REPORT).exists():
        try:
            text = report(lab, failure)
        except Exception as error:
            text = f"cannot be had: {error}\n"
        _write(folder / REPORT, text)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _state(lab: Lab, failure: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Files and what goes into them, node by node."""
    for node in lab.topology.nodes:
        handle = lab[node.name]
        yield f"{node.name}.nft.txt", partial(_nft_rules, handle)
        if node.engine is not None:
            engine = EngineHandle(handle)
            yield f"{node.name}.ruleset.txt", partial(getattr, engine, "ruleset")
            for view in ("sockrefs", "connections", "counters"):
                yield f"{node.name}.{view}.json", partial(_view, engine, view)
    yield REPORT, partial(report, lab, failure)


def _nft_rules(node: NodeHandle) -> str:
    return node.run(["nft", "list", "ruleset"]).stdout


def _view(engine: EngineHandle, name: str) -> str:
    return json.dumps(getattr(engine, name), indent=2) + "\n"
