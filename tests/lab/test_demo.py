"""The main job itself: every check holds, a broken one is told, and a killed demo leaves nothing."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from testbed.owner import MARK, owner_mark

pytestmark = pytest.mark.lab

DEMO = Path(__file__).parents[2] / "scripts" / "demo_main.py"
PATIENCE = 15.0
DEMO_PATIENCE = 300.0  # seconds; it takes 10, alone on the machine
DATAPATHS = ("inline", "kernel")
RULE = {"inline": "PREROUTING 1", "kernel": "TPROXY"}  # conntrack does not know which rule it was
LEGS = """\
  A 10.0.0.1:PORT → 10.0.1.2:80  at client:eth0, gateway:eth0
  B 10.0.0.1:PORT → 10.0.1.2:80  at gateway:eth1, server:eth0
  A in the gateway: 10.0.0.1:PORT → 10.0.1.2:80 becomes 10.0.0.1:PORT → 10.0.0.2:50080 (by RULE), and answers back
  B in the gateway: 10.0.1.1:PORT → 10.0.1.2:80 leaves as 10.0.0.1:PORT → 10.0.1.2:80 (by sockref), and answers back
"""
COLUMNS = ["client eth0", "gateway eth0", "gateway eth1", "server eth0"]
SEEN_AT = {"A": COLUMNS[:2], "B": COLUMNS[2:]}
datapaths = pytest.mark.parametrize("datapath", DATAPATHS)


@dataclass(frozen=True, slots=True)
class Shown:
    """A demo that has ended."""

    datapath: str
    directory: Path
    result: subprocess.CompletedProcess[str]


def run_demo(directory: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO), "--directory", str(directory), *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=DEMO_PATIENCE, check=False, env={**os.environ, **variables}
    )


@pytest.fixture(scope="module", params=DATAPATHS)
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    directory = tmp_path_factory.mktemp(request.param)
    return Shown(request.param, directory, run_demo(directory, "--datapath", request.param))


def test_every_check_holds_and_the_captures_are_there(shown: Shown) -> None:
    assert shown.result.returncode == 0, shown.result.stdout + shown.result.stderr
    assert "FAILED" not in shown.result.stdout
    assert len(re.findall(r"^ok ", shown.result.stdout, re.MULTILINE)) == 8
    assert str(shown.directory) in shown.result.stdout
    assert f"report: {shown.directory / 'report.html'}" in shown.result.stdout
    assert "198.51.100.7:7: 10 packets" in (shown.directory / "report.html").read_text()
    assert (shown.directory / "capture.pcapng").stat().st_size > 4 << 20, "the file went over two links, twice"


def test_the_ladder_is_the_same_on_both_datapaths(shown: Shown) -> None:
    text = re.sub(r"(10\.0\.[01]\.1):\d+", r"\1:PORT", shown.result.stdout)
    lines = text.splitlines()
    legs = [line for line in lines if re.match(r"  [AB] ", line)]
    assert legs == LEGS.replace("RULE", RULE[shown.datapath]).splitlines()
    [head] = [number for number, line in enumerate(lines) if line.split()[:2] == ["ms", "packet"]]
    columns = columns_of(lines[head], lines[head + 1])
    assert list(columns.values()) == COLUMNS
    ends = {
        row[1]: [name for start, name in columns.items() if line[start : start + 1] == "●"]
        for line in lines
        if (row := re.search(r"\d  ([AB] [→←] (?:SYN|FIN))", line))
    }
    assert ends == {f"{leg} {way} {flag}": SEEN_AT[leg] for leg in "AB" for way in "→←" for flag in ("SYN", "FIN")}


def columns_of(nodes: str, interfaces: str) -> dict[int, str]:
    """The ladder's columns: where each begins, and its two words."""
    node_at = {word.start(): word[0] for word in re.finditer(r"\S+", nodes)}
    return {word.start(): f"{node_at[word.start()]} {word[0]}" for word in re.finditer(r"\S+", interfaces)}


def test_a_proxy_that_shows_itself_fails_the_check(tmp_path: Path) -> None:
    """The checks can fail: with the relay's assignments left out, the server sees the gateway."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import socket\n"
        "from nfq_engine.client import Tproxy\n"
        "def for_datagrams(call):\n"
        "    return lambda self, sock, *rest: None if sock.type == socket.SOCK_STREAM else call(self, sock, *rest)\n"
        "Tproxy.assign, Tproxy.set_flags = for_datagrams(Tproxy.assign), for_datagrams(Tproxy.set_flags)\n"
    )
    result = run_demo(tmp_path / "out", PYTHONPATH=str(broken))
    assert result.returncode == 1
    assert "FAILED the server only ever saw the client's address" in result.stdout


@datapaths
@pytest.mark.parametrize("seed", range(3))
def test_demo_that_is_killed_leaves_nothing(tmp_path: Path, datapath: str, seed: int) -> None:
    """SIGKILL at a random moment: its processes end, and so do the namespaces, which nothing else holds."""
    moment = random.Random(seed).uniform(0.3, 2.5)
    command = [sys.executable, str(DEMO), "--directory", str(tmp_path), "--datapath", datapath]
    demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    mark = f"{MARK}={owner_mark(demo.pid)}".encode()
    with pytest.raises(subprocess.TimeoutExpired):
        demo.wait(moment)
    demo.send_signal(signal.SIGKILL)
    demo.wait()
    deadline = time.monotonic() + PATIENCE
    while left := marked(mark):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)


def marked(mark: bytes) -> list[str]:
    """The processes of a lab, by the mark in their environment."""
    found = []
    for directory in Path("/proc").iterdir():
        try:
            if directory.name.isdigit() and mark in (directory / "environ").read_bytes().split(b"\0"):
                found.append((directory / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
