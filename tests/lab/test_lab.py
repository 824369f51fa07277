"""Labs: everything in order, told when it fails, and gone at the end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from traffic_checks import gets_through

from testbed.build import BuildError
from testbed.failure import ExpectationError
from testbed.lab import Lab, LabError
from testbed.netns import Namespace
from testbed.owner import sweep
from testbed.process import ServiceError
from testbed.shapes import chain
from testbed.topology import Readiness, Topology
from testbed.topology_file import TopologyError, loads

pytestmark = pytest.mark.lab

PAIR = "name: pair\nnodes: {a: , b: %s}\nlinks: [{ends: [{node: a}, {node: b}]}]"
DAEMON = ("bash", "-c", "setsid --fork bash -c 'echo $$; exec sleep 60'; exec sleep 60")
SEND = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'first', ('10.0.0.1', 9))"


def lab_of(second: str = "", **options: bool) -> Lab:
    """A lab of two hosts; the second has something more."""
    return Lab(loads(PAIR % second), **options)  # type: ignore[arg-type]


def test_a_node_knows_its_addresses_and_what_is_run_in_it_is_inside() -> None:
    with lab_of() as lab:
        assert [str(address) for address in lab["a"].addresses] == ["10.0.0.1/24", "fd00::1/64"]
        assert lab["b"].address(6) == "fd00::2"
        done = lab["b"].run(["ip", "-brief", "address", "show", "eth0"])
        assert "10.0.0.2/24" in done.stdout
        assert lab["b"].call(lambda: Namespace.current().identity) == lab["b"].namespace.identity
        assert lab["b"].run(["printf", r"no text: \377"]).stdout == "no text: \ufffd"
        with pytest.raises(LookupError):
            lab["a"].address(4, "eth7")
        with pytest.raises(KeyError):
            lab["c"]
    assert lab.left_over == []


def test_nothing_can_be_expected_of_a_lab_without_captures() -> None:
    with lab_of(capture=False) as lab:
        for ask in (lab.mark, lambda: lab.expect("a:eth0"), lambda: lab.expect_none("a:eth0")):
            with pytest.raises(LabError, match="nothing can be expected of pair: it captures nothing"):
                ask()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        pytest.param(["bash", "-c", "echo so; exit 3"], r"a: bash .* failed \(3\): so", id="fails"),
        pytest.param(["/no/such"], "a: cannot run '/no/such': No such file", id="no file"),
        pytest.param(["sleep", "60"], "a: sleep 60 took longer than 0.1 s", id="too long"),
    ],
)
def test_a_command_that_fails_is_an_error_with_what_it_said(command: list[str], message: str) -> None:
    with lab_of() as lab, pytest.raises(LabError, match=message):
        lab["a"].run(command, timeout=0.1 if command[0] == "sleep" else 5)


def test_captures_see_the_first_packet_of_a_service() -> None:
    with lab_of(f"{{services: {{s: {{command: ['{{python}}', -c, \"{SEND}\"]}}}}}}") as lab:
        assert lab.programs["b", "s"].wait(30) == 0
        assert lab.capture is not None
        lab.capture.settle()
        for point in ("b:eth0", "a:eth0"):
            assert any(b"first" in frame.data for frame in lab.capture.frames(point)), point


@pytest.mark.parametrize(
    ("capture", "points"),
    [("all", ("a:eth0", "b:eth0")), ("none", ()), ("['b:lo', 'a:eth0']", ("b:lo", "a:eth0"))],
    ids=["all", "none", "some"],
)
def test_captures_are_where_the_topology_wants_them(capture: str, points: tuple[str, ...]) -> None:
    with Lab(loads(PAIR % "" + f"\ncapture: {capture}")) as lab:
        assert lab.capture is not None
        assert lab.capture.points == points


def test_a_service_that_died_is_told_at_the_end() -> None:
    lab = lab_of().__enter__()
    script = "trap 'echo last words; exit 7' USR1; echo up; while :; do sleep 0.01; done"
    program = lab["b"].start("s", ["bash", "-c", script], Readiness(log="up"))
    os.kill(program.pid, signal.SIGUSR1)
    assert program.wait(5) == 7
    with pytest.raises(LabError, match=r"(?s)b/s ended with exit status 7\n.*\| last words"):
        lab.__exit__(None, None, None)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_service_that_was_ended_on_purpose_is_no_failure(how: str) -> None:
    with lab_of() as lab:
        getattr(lab["b"].start("s", ["sleep", "60"]), how)()


def test_an_error_of_the_test_is_not_hidden_by_a_service_that_died() -> None:
    lab = lab_of().__enter__()
    program = lab["b"].start("s", ["sleep", "60"])
    os.kill(program.pid, signal.SIGKILL)
    program.wait(5)
    error = ZeroDivisionError()
    lab.__exit__(type(error), error, None)
    assert error.__notes__ == ["b/s was ended by SIGKILL"]


def test_a_service_can_be_started_again_and_not_twice() -> None:
    with lab_of() as lab:
        first = lab["b"].start("s", ["sleep", "60"])
        with pytest.raises(ServiceError, match="b/s runs already"):
            lab["b"].start("s", ["sleep", "60"])
        first.stop()
        assert lab["b"].start("s", ["sleep", "60"]).wait(0) is None


def wrong_topology() -> Lab:
    topology = chain(2)
    return Lab(Topology(topology.name, topology.nodes[:1], topology.links))


def wrong_rules() -> Lab:
    return lab_of("{nft: nonsense}")


def wrong_service() -> Lab:
    return lab_of("{services: {s: {command: [bash, -c, 'echo why; exit 2'], ready: {log: never}}}}")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(wrong_topology, TopologyError, "no node 'n1'", id="topology"),
        pytest.param(wrong_rules, BuildError, "nft refused the rules of b", id="rules"),
        pytest.param(wrong_service, ServiceError, "b/s ended with exit status 2\n    . why", id="service"),
    ],
)
def test_a_lab_that_cannot_start_says_why_and_leaves_nothing(
    make: Callable[[], Lab], error: type[Exception], message: str
) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    lab = make()
    with pytest.raises(error, match=message):
        lab.__enter__()
    assert lab.left_over == []
    assert not lab.directory.exists()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_a_service_left_behind_is_killed_and_told() -> None:
    with lab_of() as lab:
        program = lab["b"].start("s", DAEMON, Readiness(log=r"\d"))
        daemon = int(program.log.read_text())
    assert lab.left_over in ([f"sleep (pid {daemon})"], [f"bash (pid {daemon})"])


def test_a_connection_whose_program_is_gone_keeps_no_namespace() -> None:
    """The kernel would go on for 100 s to tell the other end that it is over (tcp_orphan_retries)."""
    with lab_of() as lab, lab["b"].namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.bind(("10.0.0.2", 80))
        listening.listen()
        with lab["a"].namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as near:
            near.connect(("10.0.0.2", 80))
            lab["b"].run(["ip", "link", "set", "eth0", "down"])
            near.send(b"nobody hears that")
    assert lab.left_over == []


def test_a_socket_that_keeps_a_namespace_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.lab._DELETE_PATIENCE", 3.0)
    with lab_of() as lab:
        kept = lab["a"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
    kept.close()
    assert lab.left_over == ["the namespace of a, held by a socket or descriptor"]


def test_every_failure_of_undoing_is_told() -> None:
    def fail() -> None:
        raise OSError("cannot be undone")

    lab = lab_of().__enter__()
    lab["b"].start("s", DAEMON, Readiness(log=r"\d"))
    lab.at_end("the one", fail)
    lab.at_end("the other", fail)
    with pytest.raises(LabError) as caught:
        lab.__exit__(None, None, None)
    assert str(caught.value).splitlines() == [
        "the other: OSError: cannot be undone",
        "the one: OSError: cannot be undone",
    ]
    assert len(lab.left_over) == 1
    assert not lab.directory.exists()


def test_a_given_directory_stays_with_its_logs(tmp_path: Path) -> None:
    with Lab(loads(PAIR % ""), tmp_path / "new") as lab:
        lab["b"].start("s", ["bash", "-c", "echo said; sleep 60"], Readiness(log="said"))
    assert (tmp_path / "new" / "b.s.log").read_text() == "said\n"
    with Lab(loads(PAIR % ""), tmp_path / "new") as lab:
        lab["b"].start("s", ["bash", "-c", "echo anew; sleep 60"], Readiness(log="anew"))
    assert (tmp_path / "new" / "b.s.log").read_text() == "anew\n"


def test_a_failed_expectation_leaves_the_capture_file_that_it_names() -> None:
    with pytest.raises(ExpectationError) as failed, lab_of() as lab:
        lab.expect("b:eth0", {"udp.dport": 9}, within=0.05)
    try:
        sweep()
        assert failed.value.path.stat().st_size > 0
        assert str(failed.value.path) in str(failed.value)
    finally:
        shutil.rmtree(failed.value.path.parent)
    with pytest.raises(ZeroDivisionError), lab_of() as lab:
        _ = 1 / 0
    assert not lab.directory.exists()


def test_labs_run_side_by_side() -> None:
    with Lab(chain(2)) as one, Lab(chain(2)) as other:
        for lab in (one, other):
            assert gets_through(lab["n0"].namespace, lab["n1"].namespace, "fd00::2")
        assert one.directory != other.directory


def test_a_lab_that_a_thread_made_outlives_it() -> None:
    lab = lab_of()
    thread = threading.Thread(target=lab.__enter__)
    thread.start()
    thread.join()
    with lab_of() as between:
        program = between["b"].start("s", ["sleep", "60"])
    assert program.returncode is not None
    assert gets_through(lab["a"].namespace, lab["b"].namespace, "10.0.0.2")
    lab.__exit__(None, None, None)
    assert lab.left_over == []


def test_a_fork_of_the_owner_does_not_keep_a_lab_alive(tmp_path: Path) -> None:
    script = f"""
import os, signal, time
from pathlib import Path
from testbed.lab import Lab
from testbed.shapes import chain
with Lab(chain(2), Path({str(tmp_path)!r})) as lab:
    program = lab["n0"].start("s", ["sleep", "60"])
    child = os.fork()
    if child == 0:
        signal.pause()
    print(child, program.pid, flush=True)
    signal.pause()
"""
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child, program = map(int, owner.stdout.readline().split())
    owner.kill()
    owner.wait()
    try:
        deadline = time.monotonic() + 10
        while is_running(program) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_running(program)
        assert is_running(child)  # it is not in the lab
    finally:
        os.kill(child, signal.SIGKILL)
        owner.stdout.close()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_links_can_be_changed_while_a_lab_runs() -> None:
    with lab_of() as lab, lab["a"].route() as route:
        assert gets_through(lab["a"].namespace, lab["b"].namespace, "10.0.0.2")
        (index,) = route.link_lookup(ifname="eth0")
        assert index != route.link_lookup(ifname="lo")[0]
        route.addr("add", index=index, address="10.9.9.9", prefixlen=32)
        assert "10.9.9.9" in lab["a"].run(["ip", "-4", "addr", "show", "eth0"]).stdout
        assert "10.9.9.9" not in lab["b"].run(["ip", "-4", "addr"]).stdout
