"""What the supervisor's tests stand on: compiled programs, and runs of them under the harness."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any, TypeVar

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests" / "programs"
HARNESS = Path(__file__).with_name("supervisor_harness.py")
TIMEOUT = 60.0

IP_TPROXY, IP_RECVORIGADDRS, SO_ORIGINAL_DST = 11274, 11273, 80
VERSION, ASSIGN, UNASSIGN, QUERY, FLAGS, ALLOC, CONNECT = range(7)
ITP_CONNECT, ITP_LISTEN, ITP_ESTABLISHED, ITP_ONCE, ITP_UNIDIR = 0x1, 0x2, 0x4, 0x10000, 0x80000

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str) -> T:
    """The first true value of a condition; the test fails when there is none in time."""
    deadline = time.monotonic() + TIMEOUT
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {TIMEOUT} s in vain: {what}")
        time.sleep(0.002)
    return value


def compile_c(source: str, target: Path, *flags: str) -> None:
    """Compile one of tests/programs; its warnings are errors."""
    command = [
        "gcc",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pthread",
        *flags,
        "-o",
        str(target),
        str(SOURCES / source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}:\n{done.stderr}")


class Run:
    """One program under the harness; `process` is the program's own."""

    def __init__(self, settings: dict[str, Any], folder: Path, command: list[str], wrapper: list[str]) -> None:
        self.record = folder / "record"
        self.record.touch()
        self.record.chmod(0o666)
        self._settings = folder / "settings.json"
        self._settings.write_text(json.dumps({"rules": [], **settings, "record": str(self.record)}))
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, str(HARNESS), str(self._settings), *command],
            bufsize=0,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._seen = b""

    def line(self) -> str:
        """The next line that the program prints."""
        while b"\n" not in self._seen:
            self._read()
        line, self._seen = self._seen.split(b"\n", 1)
        return line.decode()

    def output(self) -> str:
        """All that the program prints from here on, once it has ended."""
        while self._read():
            pass
        self.process.wait(TIMEOUT)
        return self._seen.decode()

    def _read(self) -> bool:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT)
        if not ready:
            pytest.fail(f"the program hangs; so far it printed {self._seen!r}")
        data = os.read(self.process.stdout.fileno(), 65536)
        self._seen += data
        return bool(data)

    def calls(self) -> list[dict[str, Any]]:
        """The calls that reached the handler, in order."""
        return [line for line in map(json.loads, self.record.read_text().splitlines()) if "direction" in line]

    def supervisor(self) -> int:
        """The supervisor's pid, once it is up."""
        first_line = wait_until(self.record.read_text, "the supervisor's first line")
        return int(json.loads(first_line.splitlines()[0])["supervisor"])

    def close(self) -> None:
        """End the program; the supervisor must then end by itself."""
        self.process.kill()
        self.process.wait(TIMEOUT)
        if self.process.stdout is not None:
            self.process.stdout.close()
        try:
            wait_until(lambda: not self._holders(), "the supervisor ends with its last program")
        finally:
            for pid in self._holders():
                os.kill(pid, signal.SIGKILL)

    def _holders(self) -> list[int]:
        """The processes that were started with this run's settings."""
        name = str(self._settings).encode()
        return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if name in _command_line(folder)]


def _command_line(folder: Path) -> bytes:
    try:
        return (folder / "cmdline").read_bytes()
    except OSError:  # it ended meanwhile
        return b""


Start = Callable[..., Run]


# Arguments as the programs give them


def address_argument(operation: int, ip: str, port: int) -> str:
    return (pack("=I", operation) + socket.inet_aton(ip) + pack("!H", port)).hex()


def flags_argument(flags: int) -> str:
    return pack("=II", FLAGS, flags).hex()
