"""Fixtures of the supervisor's tests; a test module has them by `pytest_plugins`."""

import contextlib
import itertools
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from supervisor_runs import SOURCES, TIMEOUT, Run, Start, compile_c

IP_RECVORIGDSTADDR = 20  # what the kernel itself has that is most like IP_RECVORIGADDRS


@pytest.fixture(scope="session")
def programs() -> Iterator[Path]:
    """A folder, open to all users, with the C programs; some also linked statically, or for a kernel's option."""
    folder = Path(tempfile.mkdtemp(prefix="tproxy-programs-"))
    folder.chmod(0o755)
    for source in SOURCES.glob("*.c"):
        if not source.stem.endswith("_i386"):
            compile_c(source.name, folder / source.stem)
    compile_c("sockopt_edges.c", folder / "sockopt_edges_static", "-static")
    for name in ("receive", "interrupted"):
        compile_c(f"{name}.c", folder / f"{name}_by_kernel", f"-DIP_RECVORIGADDRS={IP_RECVORIGDSTADDR}")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start(programs: Path) -> Iterator[Start]:
    """Start a program under the harness: `start("flood", 1, rules=[…])`. In the end all are gone, supervisors too."""
    folder = Path(tempfile.mkdtemp(prefix="tproxy-runs-"))
    folder.chmod(0o755)
    ends = contextlib.ExitStack()
    ends.callback(shutil.rmtree, folder)
    numbers = itertools.count()

    def start_one(program: str, *arguments: object, wrapper: tuple[str, ...] = (), **settings: Any) -> Run:
        own = folder / str(next(numbers))
        own.mkdir()
        path = programs / program
        command = [str(path) if path.exists() else program, *map(str, arguments)]
        run = Run(settings, own, command, list(wrapper))
        ends.callback(run.close)
        return run

    with ends:
        yield start_one


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A FIFO on which a rule waits; writing to it lets the call go on."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT)
        yield listener
