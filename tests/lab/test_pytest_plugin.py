"""The pytest plugin, as somebody has it who tests his own project with labs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from traffic_checks import tcpdump

from testbed import registry
from testbed.owner import start_time, sweep

pytestmark = pytest.mark.lab

PAIR = "name: {name}\nnodes: {{a: , b: {node}}}\nlinks: [{{ends: [{{node: a}}, {{node: b}}]}}]\n"
ENGINE = "{engine: {rules: ['-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080']}}"
FAILS = """
import pytest

@pytest.mark.topology("lab.yaml")
def test_fails(lab):
    with lab["a"].namespace.socket(2, 2) as sock:
        sock.sendto(b"hello", (lab["b"].address(), 9))
    assert "the answer" == 42
"""
PASSES = FAILS.replace("== 42", "")
FAILS_WITH_ENGINE = FAILS.replace("lab.yaml", "engine.yaml")
WITHOUT = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")  # half of the time to start
PATIENCE = 20.0


@pytest.fixture
def name() -> str:
    """A lab's name that no other test run uses."""
    return f"plugin-{os.getpid()}"


@pytest.fixture
def project(pytester: pytest.Pytester, name: str) -> pytest.Pytester:
    """Somebody's project, with a topology."""
    pytester.makefile(".yaml", lab=PAIR.format(name=name, node=""), engine=PAIR.format(name=name, node=ENGINE))
    return pytester


def run(project: pytest.Pytester, *words: str) -> pytest.RunResult:
    """pytest in the project, as a command."""
    result = project.runpytest_subprocess(*WITHOUT, *words, timeout=60)
    assert result.ret >= 0, f"pytest was ended by {signal.Signals(-result.ret).name}"
    return result


def folders(project: pytest.Pytester) -> list[Path]:
    return sorted((project.path / "artefacts").glob("*"))


# ---- fixtures and markers ----


def test_a_topology_comes_from_marker_parameter_or_fixture(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_it="""
        import pytest
        from testbed.shapes import chain
        from testbed.topology_file import loads

        TEXT = "name: t\\nnodes: {c: }\\nlinks: []"

        @pytest.mark.topology("lab.yaml")
        def test_a_file(lab):
            assert lab["a"].address(6) == "fd00::1"

        @pytest.mark.topology(TEXT)
        def test_text(lab):
            assert lab["c"].run(["true"]).returncode == 0

        @pytest.mark.topology(chain(2))
        def test_a_value(lab):
            assert lab.topology.name == "chain"

        @pytest.mark.parametrize("topology", ["lab.yaml", TEXT, chain(2)], ids=["file", "text", "value"], indirect=True)
        def test_a_parameter(lab, topology):
            assert lab.topology is topology

        @pytest.mark.parametrize("topology", ["lab.yaml", TEXT, chain(2)], ids=["file", "text", "value"])
        def test_a_direct_parameter(lab):
            assert lab.topology.name

        class TestOverride:
            @pytest.fixture
            def topology(self):
                return chain(3)

            def test_a_fixture(self, lab):
                assert len(lab.topology.nodes) == 3
        """
    )
    result = run(project)
    result.assert_outcomes(passed=10)
    assert folders(project) == []


def test_engines_tell_what_they_know_as_values(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.topology("engine.yaml")
        def test_engine(lab, engine, engines):
            assert engines.keys() == {"b"} and engines["b"] is engine
            assert engine.rules[-1].endswith("--dport 80 -j TPROXY --on-port 50080")
            assert "*tproxy" in engine.ruleset
            assert (engine.sockrefs, engine.connections) == ([], [])
            engine.tproxyctl("-F")
            assert not any("TPROXY" in rule for rule in engine.rules)
            with lab["a"].namespace.socket(2, 2) as sock:
                sock.sendto(b"hello", ("10.0.0.2", 9))
            lab.capture.settle()
            assert engine.connections[0]["original"]["destination"] == {"address": "10.0.0.2", "port": 9}
            assert sum(engine.counters["hooks"]["PREROUTING"].values()) > 0
            with engine.client() as tproxy, lab["b"].namespace.socket(2, 2) as sock:
                sock.bind(("10.0.0.2", 0))
                tproxy.assign(sock, "198.51.100.7", 53)
                assert [each["foreign"]["port"] for each in engine.sockrefs] == [53]

        @pytest.mark.topology("name: n\\nnodes: {a: }\\nlinks: []")
        def test_none(engine):
            pass
        """
    )
    result = run(project)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*the fixture `engine` is for labs with one engine; here is none*"])


WRONG_MARKERS = {
    "topology('no.yaml')": "*no.yaml: cannot be read: *",
    "topology('bad.yaml')": "*bad.yaml:1:1: nodez: unknown key; did you mean 'nodes'[?]",
    "topology()": "@pytest.mark.topology takes one argument: *",
    "topology('lab.yaml', capture=1)": "@pytest.mark.topology takes one argument: *",
    "topology(7)": "topology: a Topology, a file, or YAML text is wanted, not int",
    "lab": "no topology for the lab: mark the test *",
    "needs('netm')": "needs('netm'): there is no such capability; did you mean 'netem'[?]",
}


def test_a_wrong_marker_is_told_without_a_traceback(project: pytest.Pytester) -> None:
    project.makefile(".yaml", bad="nodez: {}\n")
    tests = (f"@pytest.mark.{marker}\ndef test_{number}(lab): pass\n" for number, marker in enumerate(WRONG_MARKERS))
    project.makepyfile(test_it="\n".join(["import pytest\n", *tests]))
    result = run(project)
    result.assert_outcomes(errors=len(WRONG_MARKERS))
    result.stdout.fnmatch_lines(list(WRONG_MARKERS.values()))
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")
    result.stdout.no_fnmatch_line("*During handling of the above exception*")  # and once


def test_what_the_machine_lacks_is_the_reason_of_a_skip(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        import dataclasses
        from testbed import capabilities

        LACKS = {"nft", "netem"}
        found = capabilities.probe()
        without = (dataclasses.replace(c, present=False, detail="gone") if c.name in LACKS else c for c in found)
        known = capabilities.Capabilities(tuple(without))
        capabilities.probe = lambda: known
        """
    )
    project.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.needs("netem")
        def test_needs(): pass

        @pytest.mark.lab
        def test_marked(): pass

        @pytest.fixture
        def topology():
            return "lab.yaml"

        def test_fixture(lab): pass

        def test_that_needs_nothing(): pass
        """
    )
    result = run(project, "-rs")
    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines(["SKIPPED*missing netem (gone): *", "*no lab here, missing nft (gone): *"])


def test_an_expectation_that_fails_points_at_the_test(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.topology("lab.yaml")
        def test_it(lab):
            lab.expect(at="b:eth0", match=lambda udp: udp.dport == 9, within=0.1)
        """
    )
    result = run(project)
    result.stdout.fnmatch_lines([">*lab.expect(at=*", "E*expected at b:eth0 within 0.1 s: *", "test_it.py:5: *"])
    result.stdout.no_fnmatch_line("*def expect(*")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param('run(["no-such-program"])', "a: cannot run 'no-such-program': No such file", id="no program"),
        pytest.param('run(["sh", "-c", "exit 3"])', "a: sh -c exit 3 failed (3)", id="failed"),
        pytest.param('run(["sleep", "9"], timeout=0.1)', "a: sleep 9 took longer than 0.1 s", id="too long"),
        pytest.param('start("s", ["sleep", "9"], Readiness(port=9, within=0.1))', "a/s was not ready", id="not ready"),
        pytest.param('start("s", ["no-such-program"])', "a/s: cannot start 'no-such-program'", id="no service"),
        pytest.param('send(IP(dst="203.0.113.1"))', "a: 203.0.113.1: Network is unreachable", id="not sent"),
    ],
)
def test_what_a_lab_cannot_do_points_at_the_test(project: pytest.Pytester, call: str, message: str) -> None:
    project.makepyfile(
        test_it=f"""
        import pytest
        from scapy.layers.inet import IP
        from testbed.topology import Readiness

        @pytest.mark.topology("lab.yaml")
        def test_it(lab):
            lab["a"].{call}
        """
    )
    lines = run(project).stdout.lines
    failure = lines[next(at for at, line in enumerate(lines) if "FAILURES" in line) :]
    assert f'>       lab["a"].{call}' in failure
    assert any(line.startswith("E") and message in line for line in failure)
    assert not [line for line in failure if " def " in line and "test_it" not in line]


# ---- artefacts ----


def test_a_failed_test_leaves_a_folder_with_everything(project: pytest.Pytester, name: str) -> None:
    project.makepyfile(test_it=FAILS_WITH_ENGINE)
    result = run(project)
    result.assert_outcomes(failed=1)
    (folder,) = folders(project)
    assert re.fullmatch(r"test_it\.py_test_fails-[0-9a-f]{6}", folder.name)
    result.stdout.fnmatch_lines(["*lab artefacts*", f"test_it.py::test_fails: {folder}"])
    assert "'the answer' == 42" in (folder / "failure.txt").read_text()
    assert "10.0.0.2.9: UDP, length 5" in tcpdump(folder / "capture.pcapng", "udp")
    assert "--dport 80 -j TPROXY --on-port 50080" in (folder / "b.ruleset.txt").read_text()
    assert "nfq" in (folder / "b.nft.txt").read_text()
    assert json.loads((folder / "b.sockrefs.json").read_text()) == []
    assert isinstance(json.loads((folder / "b.connections.json").read_text()), list)
    assert json.loads((folder / "b.counters.json").read_text())["datapath"].startswith("inline")
    assert (folder / "b.tproxyd.log").exists()
    report = (folder / "report.html").read_text()
    assert "&#39;the answer&#39; == 42" in report
    assert "10.0.0.2:9: " in report
    assert name not in [record.name for record in registry.records()]


def test_what_fails_before_or_after_the_test_leaves_a_folder_too(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_it="""
        import os, pytest, signal

        def topology(ready):
            service = "{command: [bash, -c, 'echo last words; exec sleep 60'], ready: {%s}}" % ready
            return "name: n\\nnodes: {a: {services: {s: %s}}}\\nlinks: []" % service

        @pytest.mark.topology(topology("port: 7, within: 3"))
        def test_never_ready(lab): pass

        @pytest.mark.topology(topology("log: words"))
        def test_died(lab):
            os.kill(lab.programs["a", "s"].pid, signal.SIGKILL)
            lab.programs["a", "s"].wait(5)

        @pytest.fixture
        def late(lab):
            yield
            assert not "too late"

        @pytest.mark.topology(topology("log: words"))
        def test_late(late): pass
        """
    )
    result = run(project)
    result.assert_outcomes(passed=2, errors=3)
    result.stdout.fnmatch_lines(["a/s was not ready after 3 s", "    | last words", "a/s was ended by SIGKILL"])
    for line in ("*/testbed/*.py:*", "*another exception*"):  # what is wrong with a lab is told in its own words
        result.stdout.no_fnmatch_line(line)
    found = folders(project)
    assert [folder.name.rpartition("-")[0] for folder in found] == [
        "test_it.py_test_died",
        "test_it.py_test_late",
        "test_it.py_test_never_ready",
    ]
    for folder in found:
        assert (folder / "a.s.log").read_text() == "last words\n"
        story = (folder / "failure.txt").read_text()
        assert story.startswith(f"test_it.py::{folder.name[11:-7]}, ")
        report = (folder / "report.html").read_text()
        assert "last words" in report
        assert {"test_died": "a/s was ended by SIGKILL", "test_late": "too late"}.get(folder.name[11:-7], "7") in report


def test_an_interrupted_test_leaves_a_report(project: pytest.Pytester) -> None:
    project.makepyfile(test_it=FAILS.replace('assert "the answer" == 42', "raise KeyboardInterrupt"))
    assert run(project).ret == pytest.ExitCode.INTERRUPTED
    (folder,) = folders(project)
    report = (folder / "report.html").read_text()
    assert "The test was interrupted." in report
    assert "10.0.0.2:9: " in report


def test_where_no_folder_can_be_is_said_in_one_line(project: pytest.Pytester) -> None:
    project.makepyfile(test_it=PASSES)
    project.path.joinpath("artefacts").touch()
    result = run(project)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["no folder for the lab: *artefacts*--lab-artefacts names another place"])
    result.stdout.no_fnmatch_line("*Error*")


def test_no_name_and_no_text_is_too_odd_for_a_folder(project: pytest.Pytester) -> None:
    name = "test_" + "\N{CJK UNIFIED IDEOGRAPH-6F22}" * 100
    project.makepyfile(
        test_it=f"""
        import pytest

        @pytest.mark.topology("lab.yaml")
        def {name}(lab):
            pytest.fail("bytes as text: " + bytes([255]).decode(errors="surrogateescape"))
        """
    )
    run(project, "--tb=no", "-rN").assert_outcomes(failed=1)  # pytest itself would print the byte
    (folder,) = folders(project)
    assert "bytes as text: \\udcff" in (folder / "failure.txt").read_text()


@pytest.mark.parametrize(
    ("mode", "of_failed", "of_passed"),
    [("always", True, True), ("failure", True, None), ("never", False, None)],
)
def test_captures_are_kept_as_asked(
    project: pytest.Pytester, mode: str, of_failed: bool, of_passed: bool | None
) -> None:
    project.makepyfile(test_fails=FAILS, test_passes=PASSES)
    run(project, f"--lab-pcap={mode}", "--lab-artefacts=left/here").assert_outcomes(failed=1, passed=1)
    found = {path.name.split(".")[0]: path for path in (project.path / "left/here").iterdir()}
    kept = {test: (path / "capture.pcapng").exists() for test, path in found.items()}
    expected = {"test_fails": of_failed} | ({} if of_passed is None else {"test_passes": of_passed})
    assert kept == expected


def test_a_folder_holds_the_last_run_only_and_goes_when_the_test_passes(project: pytest.Pytester) -> None:
    project.makepyfile(test_it=FAILS)
    run(project)
    (folder,) = folders(project)
    (folder / "of an earlier run").touch()
    with held(folder):
        run(project)
    assert folders(project) == [folder, folder.with_name(folder.name + "-2")]
    assert (folder / "of an earlier run").exists()
    run(project)
    assert not (folder / "of an earlier run").exists()
    project.makepyfile(test_it=PASSES)
    run(project)
    assert folder not in folders(project)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """As by a run of the same test at the same time."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


# ---- a lab that stays ----


@pytest.fixture
def ends(name: str) -> Iterator[None]:
    """Whatever was kept is ended."""
    yield
    for record in registry.records():
        if record.name == name or record.name.startswith(f"{name}-"):
            registry.down(record)


def run_testbed(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "testbed.cli", *words], capture_output=True, text=True, timeout=20, check=False
    )


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
@pytest.mark.usefixtures("ends")
def test_a_kept_lab_lives_on_as_it_was_until_it_is_ended(
    project: pytest.Pytester, name: str, workers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A mark of its own: other versions of the testbed may sweep this machine meanwhile.
    monkeypatch.setattr("testbed.owner.MARK", "TESTBED_KEPT_OWNER")
    project.makeconftest("from testbed import owner\nowner.MARK = 'TESTBED_KEPT_OWNER'")
    service = "{services: {s: {command: ['{python}', -m, http.server, '8000'], ready: {port: 8000}}}}"
    project.makefile(".yaml", lab=PAIR.format(name=name, node=service))
    project.makepyfile(test_it=FAILS, test_other=PASSES)
    result = run(project, "--lab-keep", *workers)
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        [f"test_it.py::test_fails: testbed shell --lab {name} a|b    to end it: testbed down {name}"]
    )
    (record,) = [record for record in registry.records() if record.name == name]

    sweep()  # as any lab does that starts: the processes' first owner is gone
    fetch = ("python", "-m", "testbed.traffic", "fetch", "http://10.0.0.2:8000/")
    fetched = run_testbed("exec", "--lab", name, "a", "--", *fetch)
    assert '"status": 200' in fetched.stdout, fetched.stderr

    service_pids = inside(record, "b")
    assert len(service_pids) == 1
    done = run_testbed("down", name)
    assert (done.returncode, done.stdout) == (0, f"{name} is down\n"), done.stderr
    assert start_time(record.pid) is None
    assert start_time(service_pids[0]) is None


@pytest.mark.usefixtures("ends")
def test_the_folder_of_a_kept_lab_is_its_own_until_it_is_ended(project: pytest.Pytester, name: str) -> None:
    project.makepyfile(test_it=FAILS)
    run(project, "--lab-keep")
    (folder,) = folders(project)
    project.makepyfile(test_it=PASSES)
    run(project).assert_outcomes(passed=1)
    assert (folder / "failure.txt").exists()
    assert run_testbed("down", name).returncode == 0
    run(project)
    assert folders(project) == []


@pytest.mark.usefixtures("ends")
def test_kept_labs_of_one_name_get_numbers(project: pytest.Pytester, name: str) -> None:
    project.makepyfile(test_it=FAILS, test_other=FAILS)
    run(project, "--lab-keep").assert_outcomes(failed=2)
    assert {f"{name}", f"{name}-2"} <= {record.name for record in registry.records()}


@pytest.mark.usefixtures("ends")
def test_a_kept_lab_whose_keeper_is_killed_leaves_nothing(project: pytest.Pytester, name: str) -> None:
    project.makepyfile(test_it=FAILS_WITH_ENGINE)
    run(project, "--lab-keep")
    (record,) = [record for record in registry.records() if record.name == name]
    (engine,) = inside(record, "b")
    os.kill(record.pid, signal.SIGKILL)
    until(lambda: start_time(engine) is None, "the engine's end")
    until(
        lambda: start_time(record.pid) is None, "the keeper's end"
    )  # its descriptors go first, and the warden sees it
    assert name not in [record.name for record in registry.records()]


def inside(record: registry.Record, node: str) -> list[int]:
    """The processes in a node's namespace."""
    found = []
    with record.namespace(node) as namespace:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                status = (process / "ns/net").stat()
                if (status.st_dev, status.st_ino) == namespace.identity:
                    found.append(int(process.name))
    return found


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.01)


def test_a_folder_that_the_test_has_removed_keeps_no_other_test_from_running(project: pytest.Pytester) -> None:
    removed = FAILS.replace('    assert "the', '    __import__("shutil").rmtree(lab.directory)\n    assert "the')
    project.makepyfile(test_it=removed + "def test_other():\n    pass\n")
    result = run(project)
    assert result.parseoutcomes()["passed"] == 1
    result.stdout.fnmatch_lines(["*test_it.py::test_fails*No such file or directory*"])


# ---- a shell in the lab ----


class Terminal:
    """A program on a terminal, and what it wrote there."""

    def __init__(self, command: list[str], folder: Path, shell: str = "/bin/sh") -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        self.text = ""
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "SHELL": shell, "PS1": "lab> "},
        )
        os.close(slave)

    def await_text(self, pattern: str) -> re.Match[str]:
        """Read until the pattern is there; what was before it is forgotten."""
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self.text, re.DOTALL)) is None:
            left = deadline - time.monotonic()
            assert left > 0, f"not within {PATIENCE:g} s: {pattern!r} in {self.text!r}"
            if select.select([self._master], [], [], left)[0]:
                try:
                    self.text += os.read(self._master, 4096).decode(errors="replace")
                except OSError as error:  # EIO: nobody has it open any more
                    raise AssertionError(f"it ended before {pattern!r}: {self.text!r}") from error
        self.text = self.text[found.end() :]
        return found

    def type(self, line: str) -> None:
        os.write(self._master, line.encode() + b"\n")

    def close(self) -> None:
        os.close(self._master)
        self.process.kill()
        self.process.wait()


def test_a_failed_test_stops_in_a_shell_inside_the_lab(project: pytest.Pytester, name: str) -> None:
    project.makepyfile(test_it=FAILS_WITH_ENGINE)
    command = [sys.executable, "-m", "pytest", *WITHOUT, "--lab-shell"]
    with contextlib.closing(Terminal(command, project.path)) as terminal:
        terminal.await_text("test session starts")
        terminal.await_text(r"test_it.py::test_fails failed.*'the answer' == 42")
        terminal.await_text(rf"The lab {name} is alive, and this is a shell in b.*--lab {name} a\|b")
        terminal.type("ip -brief address show eth0; tproxyctl -S | tail -1")
        terminal.await_text(r"10\.0\.0\.2/24.*TPROXY --on-port 50080")
        other = run_testbed("exec", "--lab", name, "a", "--", "ip", "-brief", "address", "show", "eth0")
        assert "10.0.0.1/24" in other.stdout, other.stderr
        terminal.type("exit")
        summary = terminal.await_text("FAILURES.*1 failed")[0]
        assert "Captured" not in summary
        assert terminal.process.wait(PATIENCE) == 1
    assert name not in [record.name for record in registry.records()]


def test_a_shell_that_is_not_there_keeps_no_other_test_from_running(project: pytest.Pytester) -> None:
    project.makepyfile(test_it=FAILS + "def test_other():\n    pass\n")
    command = [sys.executable, "-m", "pytest", *WITHOUT, "--lab-shell"]
    with contextlib.closing(Terminal(command, project.path, "/no/such/shell")) as terminal:
        terminal.await_text(r"no shell can be opened: .*/no/such/shell")
        terminal.await_text("1 failed, 1 passed")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param((), "--lab-shell: standard input and output must be a terminal", id="no terminal"),
        pytest.param(("-n", "2"), "--lab-shell: a test in a worker of pytest-xdist has no terminal", id="xdist"),
    ],
)
def test_a_shell_is_refused_where_there_can_be_none(
    project: pytest.Pytester, words: tuple[str, ...], message: str
) -> None:
    project.makepyfile(test_it=FAILS)
    result = run(project, "--lab-shell", *words)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{message}*"])
    assert folders(project) == []
