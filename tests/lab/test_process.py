"""Programs: ready when they say so, ended for good."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_lab import until

from testbed.netns import Namespace
from testbed.owner import owner_mark, sweep
from testbed.process import Program, ServiceError
from testbed.topology import Readiness

pytestmark = pytest.mark.lab

PATIENCE = 10.0
NOTIFY = Readiness(notify=True, within=PATIENCE)
LISTEN = "import socket, time; s = socket.create_server(('{}', 80), family=socket.{}); time.sleep(60)"
IGNORE_TERM = "trap '' TERM; sleep 60 & echo >&{notify_fd}; wait"


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A namespace with lo up."""
    with Namespace.new() as made:
        made.call(lambda: subprocess.run(["ip", "link", "set", "lo", "up"], check=True))
        yield made


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.005)
    return not is_alive(pid)


def shell(script: str) -> tuple[str, ...]:
    return ("bash", "-c", script)  # dash knows no descriptor above 9


@pytest.mark.parametrize(
    ("command", "ready"),
    [
        pytest.param(shell("sleep 60"), Readiness(), id="nothing to wait for"),
        pytest.param(shell("echo >&{notify_fd}; sleep 60"), NOTIFY, id="notify"),
        pytest.param(shell("echo starting; echo now ready; sleep 60"), Readiness(log="^now ready$"), id="log"),
        pytest.param(("{python}", "-c", LISTEN.format("127.0.0.1", "AF_INET")), Readiness(port=80), id="port"),
        pytest.param(("{python}", "-c", LISTEN.format("::1", "AF_INET6")), Readiness(port=80), id="port, IPv6"),
    ],
)
def test_a_program_that_gets_ready_runs_until_it_is_stopped(
    namespace: Namespace, tmp_path: Path, command: tuple[str, ...], ready: Readiness
) -> None:
    program = Program("a/x", command, namespace, tmp_path / "log", ready)
    assert program.wait(0) is None
    with Namespace.of_process(program.pid) as inside:
        assert inside.identity == namespace.identity
    program.stop()
    assert program.returncode == -signal.SIGTERM
    assert not is_alive(program.pid)


QUICK = Readiness(log="never", within=3)  # a loaded machine says its word in that time, too


@pytest.mark.parametrize(
    ("command", "ready", "message"),
    [
        pytest.param(
            ("/no/such",), Readiness(), "a/x: cannot start '/no/such': No such file or directory", id="no file"
        ),
        pytest.param(shell("echo why; exit 3"), NOTIFY, "ended with exit status 3\n    | why", id="ends"),
        pytest.param(shell("kill -9 $$"), NOTIFY, "was ended by SIGKILL", id="is killed"),
        pytest.param(shell("echo busy; sleep 60"), QUICK, "not ready after 3 s\n    | busy", id="too slow"),
        pytest.param(shell("exec {notify_fd}>&-; sleep 60"), NOTIFY, "without a word of being ready", id="silent"),
    ],
)
def test_a_program_that_does_not_get_ready_is_told_with_its_last_words_and_ended(
    namespace: Namespace, tmp_path: Path, command: tuple[str, ...], ready: Readiness, message: str
) -> None:
    descriptors = open_descriptors()
    with pytest.raises(ServiceError) as caught:
        Program("a/x", command, namespace, tmp_path / "log", ready)
    assert message in str(caught.value)
    assert open_descriptors() == descriptors


@pytest.mark.parametrize("ready", [Readiness(), NOTIFY], ids=["at once", "notify"])
def test_a_program_may_be_done_before_anybody_looks(
    namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: Readiness
) -> None:
    start = Program._start

    def start_and_end(*given: Any) -> subprocess.Popen[bytes]:
        process = start(*given)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return process

    monkeypatch.setattr(Program, "_start", start_and_end)
    words = shell("echo >&{notify_fd}") if ready.notify else ("true",)
    program = Program("a/x", words, namespace, tmp_path / "log", ready)
    assert not program.has_failed
    program.stop()


def test_a_line_of_an_earlier_run_makes_nobody_ready(namespace: Namespace, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("ready\n")
    with pytest.raises(ServiceError, match="not ready"):
        Program("a/x", shell("sleep 60"), namespace, log, Readiness(log="^ready$", within=0.1))


def test_what_ignores_sigterm_is_killed_with_its_children(
    namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("testbed.process._GRACE", 0.1)
    program = Program("a/x", shell(IGNORE_TERM), namespace, tmp_path / "log", NOTIFY)
    (child,) = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    program.stop()
    assert program.returncode == -signal.SIGKILL
    assert wait_until_gone(int(child))


def test_stopping_twice_does_nothing_more(namespace: Namespace, tmp_path: Path) -> None:
    program = Program("a/x", shell("sleep 60"), namespace, tmp_path / "log", Readiness())
    program.stop()
    program.stop()
    program.kill()
    assert program.returncode == -signal.SIGTERM


def test_a_program_that_ended_by_itself_is_noticed(namespace: Namespace, tmp_path: Path) -> None:
    script = "trap 'echo gone; exit 4' USR1; echo up; while :; do sleep 0.01; done"
    program = Program("a/x", shell(script), namespace, tmp_path / "log", Readiness(log="up"))
    os.kill(program.pid, signal.SIGUSR1)
    assert program.wait(PATIENCE) == 4
    with pytest.raises(ServiceError, match=r"(?s)a/x ended with exit status 4.*\| gone"):
        program.check()
    program.stop()
    assert program.returncode == 4


def test_a_program_outlives_the_thread_that_started_it(namespace: Namespace, tmp_path: Path) -> None:
    started: list[Program] = []
    command = shell("echo >&{notify_fd}; sleep 60")
    thread = threading.Thread(
        target=lambda: started.append(Program("a/x", command, namespace, tmp_path / "log", NOTIFY))
    )
    thread.start()
    thread.join()
    assert started[0].wait(0.2) is None
    started[0].stop()


def test_sweeping_ends_what_belongs_to_nobody_any_more_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    mark_of_this_test = f"TESTBED_OWNER_{os.getpid()}"  # or labs that start meanwhile would sweep, too
    monkeypatch.setattr("testbed.owner.MARK", mark_of_this_test)
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pid_namespace, _, _ = owner_mark().split(":")
    started = Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[19]
    marks = {
        "its owner lives": f"{pid_namespace}:{owner.pid}:{started}",
        "its owner is gone": f"{pid_namespace}:{owner.pid}:{int(started) - 1}",
        "its owner is in another container": f"1:{owner.pid}:{int(started) - 1}",
    }
    sleepers = {
        what: subprocess.Popen(["sleep", "60"], env={**os.environ, mark_of_this_test: mark})
        for what, mark in marks.items()
    }
    try:
        shown = [Path(f"/proc/{sleeper.pid}/environ") for sleeper in sleepers.values()]
        until(lambda: all(file.read_bytes() for file in shown), "an exec that has just begun shows no environment yet")
        assert sweep() == [sleepers["its owner is gone"].pid]
        assert sleepers["its owner is gone"].wait(PATIENCE) == -signal.SIGKILL
        assert sleepers["its owner lives"].poll() is None
        assert sleepers["its owner is in another container"].poll() is None
    finally:
        owner.communicate(b"\n")
        for sleeper in sleepers.values():
            sleeper.kill()
            sleeper.wait()
