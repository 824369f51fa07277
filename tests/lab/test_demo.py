"""The main job itself: every check holds, a broken one is told, and a killed demo leaves nothing."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from testbed.process import MARK, start_time

pytestmark = pytest.mark.lab

DEMO = Path(__file__).parents[2] / "scripts" / "demo_main.py"
PATIENCE = 15.0


def run_demo(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO), "--directory", str(directory), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_every_check_holds_and_the_captures_are_there(tmp_path: Path) -> None:
    result = run_demo(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout
    assert len(re.findall(r"^ok ", result.stdout, re.MULTILINE)) == 8
    assert re.search(r"A → SYN +●─+▶●", result.stdout), "a ladder is printed"
    assert str(tmp_path) in result.stdout
    assert (tmp_path / "capture.pcapng").stat().st_size > 4 << 20, "the file went over two links, twice"


def test_a_proxy_that_shows_itself_fails_the_check(tmp_path: Path) -> None:
    """The checks can fail: with the relay's assignment left out, the server sees the gateway."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import nfq_engine.client\n"
        "nfq_engine.client.Tproxy.assign = lambda *_: None\n"
        "nfq_engine.client.Tproxy.set_flags = lambda *_: None\n"
    )
    command = [sys.executable, str(DEMO), "--directory", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(broken)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert result.returncode != 0
    assert "FAILED" in result.stdout


@pytest.mark.parametrize("seed", range(4))
def test_demo_that_is_killed_leaves_nothing(tmp_path: Path, seed: int) -> None:
    """SIGKILL at a random moment: its processes end, and so do the namespaces, which nothing else holds."""
    moment = random.Random(seed).uniform(0.3, 2.5)
    demo = subprocess.Popen(
        [sys.executable, str(DEMO), "--directory", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    mark = f"{MARK}={demo.pid}:{start_time(demo.pid)}".encode()
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
