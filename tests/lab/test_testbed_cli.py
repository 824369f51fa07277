"""The testbed command, as a user has it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path

import pytest
from click.testing import CliRunner
from engine_lab import until

from testbed import registry
from testbed.cli import main
from testbed.owner import start_time, sweep

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("own_temporary_folder")]

PATIENCE = 20.0
LONG = f"60.{os.getpid()}"  # seconds; no other run has programs that sleep just as long
LAB = """\
name: {name}
nodes:
  a:
  b:
    services:
      web: {{command: ["{{python}}", -m, http.server, "8000", --bind, "::"], ready: {{port: 8000}}}}
      restless: {{command: [bash, -c, "setsid --fork sleep {long}; echo up; exec sleep 62"], ready: {{log: up}}}}
links:
  - ends: [{{node: a}}, {{node: b}}]
"""


def run_testbed(
    *words: str | Path, within: float = PATIENCE, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "testbed.cli", *map(str, words)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=within,
        check=False,
    )


@pytest.fixture
def name() -> str:
    """A lab's name that no other test run uses."""
    return f"cli-{os.getpid()}"


@pytest.fixture
def file(tmp_path: Path, name: str) -> Path:
    path = tmp_path / "lab.yaml"
    path.write_text(LAB.format(name=name, long=LONG))
    return path


@pytest.fixture
def lab(file: Path, name: str, tmp_path: Path) -> Iterator[str]:
    """A lab that is up."""
    done = run_testbed("up", file, "--directory", tmp_path / "logs")
    assert done.returncode == 0, done.stderr
    assert f"{name} is up: a, b; logs and captures in {tmp_path / 'logs'}" in done.stdout
    yield name
    run_testbed("down", name)


def in_lab(word: str) -> list[int]:
    """The processes whose command line has a word."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if word.encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_a_lab_outlives_the_command_that_started_it_and_ends_with_down(lab: str, tmp_path: Path) -> None:
    listed = run_testbed("ls", "--json")
    (record,) = [each for each in json.loads(listed.stdout) if each["name"] == lab]
    assert record["nodes"] == ["a", "b"]
    assert lab in run_testbed("ls").stdout

    fetch = ("python", "-m", "testbed.traffic", "fetch", "http://[fd00::2]:8000/")
    fetched = run_testbed("exec", "--lab", lab, "a", "--", *fetch)
    assert (fetched.returncode, json.loads(fetched.stdout)["status"]) == (0, 200), fetched.stderr

    again = run_testbed("up", tmp_path / "lab.yaml")
    assert again.returncode == 1
    assert f"the lab {lab} runs already" in again.stderr

    keeper = record["pid"]
    done = run_testbed("down", lab)
    assert (done.returncode, done.stdout) == (0, f"{lab} is down\n"), done.stderr
    assert start_time(keeper) is None
    assert lab not in run_testbed("ls").stdout
    assert (tmp_path / "logs" / "capture.pcapng").stat().st_size > 0


def test_a_report_tells_what_a_running_lab_did_so_far(lab: str, tmp_path: Path) -> None:
    for number in (1, 2):
        asked = ["bash", "-c", f"echo x > /dev/udp/10.0.0.2/{number}"]
        assert run_testbed("exec", "--lab", lab, "a", "--", *asked).returncode == 0
        done = run_testbed("report", lab)
        assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'logs' / 'report.html'}\n"), done.stderr
        assert f"→ 10.0.0.2:{number}: " in (tmp_path / "logs" / "report.html").read_text()
    elsewhere = tmp_path / "elsewhere.html"
    assert run_testbed("report", lab, "-o", elsewhere).stdout == f"{elsewhere}\n"
    assert "→ 10.0.0.2:1: " in elsewhere.read_text()


def test_a_lab_is_found_from_another_folder_than_that_where_it_was_started(
    file: Path, name: str, tmp_path: Path
) -> None:
    done = run_testbed("up", file, "--directory", "logs", folder=tmp_path)
    try:
        assert done.stdout == f"{name} is up: a, b; logs and captures in logs\n"
        assert str(tmp_path / "logs") in run_testbed("ls").stdout
        told = run_testbed("report", name)
        assert (told.returncode, told.stdout) == (0, f"{tmp_path / 'logs' / 'report.html'}\n"), told.stderr
    finally:
        run_testbed("down", name)


def test_who_asks_a_keeper_and_says_nothing_does_no_harm(lab: str) -> None:
    for nonsense in (b"", b"{", b"[]", b'{"want": "impair"}'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.connect(str(registry.socket_of(lab)))
            asking.sendall(nonsense)
            asking.shutdown(socket.SHUT_WR)
            assert asking.recv(100)[:1] == b"-"
    assert run_testbed("report", lab).returncode == 0


def test_a_report_is_opened_in_the_browser_or_says_that_there_is_none(
    lab: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {asked}\n')
    browser.chmod(0o755)
    report = tmp_path / "lab report.html"
    monkeypatch.setenv("PATH", "/nowhere")  # so that no other browser is found
    for found, status, message in ((browser, 0, ""), (tmp_path / "none", 1, "Error: no browser is there")):
        monkeypatch.setenv("BROWSER", str(found))
        done = run_testbed("report", lab, "-o", report, "--open")
        assert (done.returncode, done.stdout) == (status, f"{report}\n"), done.stderr
        assert done.stderr.startswith(message)
    assert asked.read_text() == report.as_uri()


def test_exec_ends_as_the_command_does_and_names_what_is_not_there(lab: str) -> None:
    assert run_testbed("exec", "--lab", lab, "b", "--", "sh", "-c", "exit 37").returncode == 37
    unknown = run_testbed("exec", "--lab", lab, "c", "--", "true")
    assert unknown.returncode == 1
    assert f"the lab {lab} has no node 'c', only a, b" in unknown.stderr
    missing = run_testbed("exec", "--lab", lab, "b", "--", "no-such-command")
    assert missing.returncode == 1
    assert missing.stderr == "Error: b: cannot run 'no-such-command': No such file or directory\n"
    plain = run_testbed("exec", "--lab", lab, "b", "echo", "--json", "--", "--lab")  # all of it is the command's
    assert (plain.returncode, plain.stdout) == (0, "--json -- --lab\n"), plain.stderr
    nothing = run_testbed("exec", "--lab", lab, "b", "--", "")
    assert (nothing.returncode, nothing.stderr.startswith("Error: b: cannot run '': ")) == (1, True), nothing.stderr


@pytest.mark.parametrize("shell", ["/bin/sh", ""])
def test_a_shell_is_inside(lab: str, shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "testbed.cli", "shell", "--lab", lab, "b"],
        input="ip -brief address show eth0\n",
        env={**os.environ, "SHELL": shell},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert "10.0.0.2/24" in done.stdout


def test_down_tells_what_died(lab: str, tmp_path: Path) -> None:
    record = next(each for each in json.loads(run_testbed("ls", "--json").stdout) if each["name"] == lab)
    (web,) = [pid for pid in in_lab("http.server") if parent(pid) == record["pid"]]
    os.kill(web, signal.SIGKILL)
    until(lambda: not start_time(web), "the service ends")
    done = run_testbed("down", lab)
    assert done.returncode == 1
    assert f"{lab} is down, but\nb/web was ended by SIGKILL" in done.stderr
    assert lab not in run_testbed("ls").stdout


def test_a_keeper_that_is_killed_leaves_nothing(lab: str) -> None:
    record = next(each for each in json.loads(run_testbed("ls", "--json").stdout) if each["name"] == lab)
    daemons = in_lab(LONG)
    assert daemons
    os.kill(record["pid"], signal.SIGKILL)
    until(lambda: not set(in_lab(LONG)) & set(daemons) and not start_time(record["pid"]), "keeper and daemons end")
    assert lab not in run_testbed("ls").stdout


def parent(pid: int) -> int | None:
    """Its parent; None when it has ended, as those of other runs may."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_lab_whose_up_was_ended_is_taken_down(file: Path, name: str, tmp_path: Path, number: int) -> None:
    command = f"[sh, -c, 'until test -e {tmp_path}/go; do sleep 0.02; done; echo ready; exec sleep {LONG}']"
    late = f"{{command: {command}, ready: {{log: ready}}}}"
    file.write_text(f"name: {name}\nnodes: {{a: {{services: {{late: {late}}}}}}}\nlinks: []\n")
    # Of a job in the background of a script, SIGINT is ignored from the beginning.
    words = ["env", "--default-signal=INT", sys.executable, "-m", "testbed.cli", "up", str(file), "--directory"]
    with subprocess.Popen([*words, str(tmp_path / "first")]) as building:
        until((tmp_path / "first/a.late.log").exists, "the service starts")
        building.send_signal(number)
    (tmp_path / "go").touch()
    done = run_testbed("up", file, "--directory", tmp_path / "second")  # waits until the other one is gone
    try:
        assert done.returncode == 0, done.stderr
        until(lambda: in_lab(LONG), "what says `ready` sleeps a moment later")
        assert len(in_lab(LONG)) == 1
    finally:
        run_testbed("down", name)
    assert in_lab(LONG) == []


def test_what_exec_leaves_running_is_the_lab_s(lab: str) -> None:
    done = run_testbed("exec", "--lab", lab, "a", "--", "sh", "-c", f"setsid sleep 1{LONG} >/dev/null 2>&1 &")
    assert done.returncode == 0, done.stderr
    until(lambda: in_lab(f"1{LONG}"), "it sleeps")
    assert not {*in_lab(f"1{LONG}")} & {*sweep()}
    run_testbed("down", lab)
    assert in_lab(f"1{LONG}") == []


def test_a_record_is_there_or_not_but_never_half(name: str) -> None:
    record = registry.Record(
        name, os.getpid(), start_time(os.getpid()) or "", "/nowhere", {str(n): n for n in range(999)}
    )
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            record.write()

    record.write()
    writing = threading.Thread(target=write)
    writing.start()
    try:
        assert all(registry.find(name) == record for _ in range(300))
    finally:
        ended.set()
        writing.join()
        record.remove()


def test_run_ends_as_its_command_does(file: Path, tmp_path: Path) -> None:
    inside = run_testbed(
        "run", file, "--directory", tmp_path / "logs", "--in", "b", "--", "sh", "-c", "ip -br a; exit 9"
    )
    assert inside.returncode == 9, inside.stderr
    assert "10.0.0.2/24" in inside.stdout
    outside = run_testbed("run", file, "--directory", tmp_path / "logs", "--", "sh", "-c", "kill -15 $$")
    assert outside.returncode == 128 + signal.SIGTERM
    nowhere = run_testbed("run", file, "--in", "c", "--", "true")
    assert nowhere.returncode == 2
    assert "no node 'c'" in nowhere.stderr


def test_run_takes_the_lab_down_when_it_is_ended(file: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "testbed.cli",
        "run",
        str(file),
        "--directory",
        str(tmp_path / "logs"),
        "--in",
        "b",
    ]
    running = subprocess.Popen(
        [*command, "--", "sh", "-c", f"echo in; sleep {LONG}"], stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    with running.stdout:
        assert running.stdout.readline() == "in\n"
        running.terminate()
        assert running.wait(10) == 128 + signal.SIGTERM
    until(lambda: not in_lab(LONG), "what the command started ends")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        pytest.param(("up", "/no/such.yaml"), 1, "/no/such.yaml: cannot be read", id="no file"),
        pytest.param(("down", "no-such-lab"), 1, "no lab 'no-such-lab' is running", id="no lab"),
        pytest.param(("exec", "--lab", "no-such-lab", "a", "--", "true"), 1, "no lab 'no-such-lab'", id="exec, no lab"),
        pytest.param(("exec", "a"), 2, "Missing argument 'COMMAND", id="exec, no command"),
        pytest.param(("exec", "a", "--"), 2, "Missing argument 'COMMAND", id="exec, nothing behind the dashes"),
        pytest.param(("exec", "--jsn", "a", "ls"), 2, "No such option '--jsn'", id="exec, unknown option"),
        pytest.param(("frobnicate",), 2, "No such command 'frobnicate'", id="no command"),
        pytest.param(("dwon",), 2, "'down'", id="a command, misspelt"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(words: tuple[str, ...], status: int, message: str) -> None:
    done = run_testbed(*words)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_lab_that_cannot_be_built_is_told_and_not_up(file: Path, name: str) -> None:
    file.write_text(file.read_text().replace("  a:\n", "  a: {nft: nonsense}\n"))
    done = run_testbed("up", file)
    assert done.returncode == 1
    assert "nft refused the rules of a" in done.stderr
    assert name not in run_testbed("ls").stdout


def test_validate_tells_every_problem(file: Path, tmp_path: Path) -> None:
    assert run_testbed("validate", file).stdout == f"{file}: {file.read_text().split()[1]}: 2 nodes, 1 links\n"
    file.write_text("nodes: {A: }\nlinkz: []\n")
    done = run_testbed("validate", file)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 3


def test_validate_goes_on_behind_a_file_that_is_wrong(file: Path, tmp_path: Path) -> None:
    wrong, missing = tmp_path / "wrong.yaml", tmp_path / "missing.yaml"
    wrong.write_text("name: x\nnods: {}\n")
    done = run_testbed("validate", wrong, missing, file)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{file}: ")
    assert [line.partition(" ")[2] for line in done.stderr.splitlines() if line.startswith("Error:")] == [
        f"{wrong}:1:1: document: 'nodes' is a required property",
        f"{missing}: cannot be read: [Errno 2] No such file or directory: '{missing}'",
    ]
    told = run_testbed("validate", wrong, missing, file, "--json")
    assert [json.loads(line)["valid"] for line in told.stdout.splitlines()] == [False, False, True]


def test_a_reader_that_has_enough_is_no_error(file: Path) -> None:
    plan = subprocess.Popen(
        [sys.executable, "-m", "testbed.cli", "plan", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert plan.stdout is not None
    assert plan.stderr is not None
    with plan:
        plan.stdout.close()
        assert plan.stderr.read() == ""


def test_a_closed_output_is_no_error() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m testbed.cli ls >&-"], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_plan_can_be_read_and_parsed(file: Path) -> None:
    assert "a: address 10.0.0.1/24 on eth0" in run_testbed("plan", file).stdout.splitlines()
    operations = json.loads(run_testbed("plan", "--json", file).stdout)
    assert operations[0]["operation"] == "MakeNamespace"


def test_a_plan_and_a_diagram_of_a_scenario_are_those_of_its_topology(file: Path, tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text(f"name: x\ntopology: {file.name}\nsteps: [run: {{in: a, command: [ls]}}]\n")
    for command in ("plan", "diagram"):
        assert run_testbed(command, scenario).stdout == run_testbed(command, file).stdout != ""


def test_what_a_diagram_shows_is_told_as_json(tmp_path: Path) -> None:
    """With the addresses that are given by place, which the file does not have."""
    file = tmp_path / "lab.yaml"
    file.write_text(
        "name: drawn\nnodes: {a: {}, b: {kind: router, engine: {datapath: kernel}}}\n"
        "links: [{ends: [{node: a, impair: {loss: 5%}}, {node: b}]}]\n"
    )
    assert run_testbed("diagram", file, "--json", "-o", tmp_path / "drawn.json").stdout == ""
    drawn = json.loads((tmp_path / "drawn.json").read_text())
    assert drawn["name"] == "drawn"
    assert [(node["name"], node["kind"], node["engine"]) for node in drawn["nodes"]] == [
        ("a", "host", None),
        ("b", "router", "kernel"),
    ]
    ((a, b),) = [link["ends"] for link in drawn["links"]]
    assert (a["node"], a["interface"], a["impair"]["loss"], b["impair"]) == ("a", "eth0", 0.05, None)
    assert len({*a["addresses"], *b["addresses"]}) == 4


def completed(*words: str) -> list[str]:
    """What a shell offers behind these words; the last is what was typed of the next one."""
    line = ["testbed", *words]
    result = subprocess.run(
        [sys.executable, "-c", "from testbed.cli import main; main(prog_name='testbed')"],
        env={
            **os.environ,
            "_TESTBED_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(line),
            "COMP_CWORD": str(len(line) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr == ""
    return [offer.partition(",")[2] for offer in result.stdout.splitlines()]


def test_labs_and_nodes_are_offered(lab: str) -> None:
    assert completed("do") == ["down"]
    assert lab in completed("down", lab[:-1])  # other tests have such labs, too
    assert not any(completed("down", f"{lab}x"))
    assert completed("exec", "--lab", lab, "") == ["a", "b"]
    assert completed("shell", "--lab", lab, "b") == ["b"]
    assert lab in completed("exec", "--lab", lab[:-1])


def test_the_nodes_of_a_file_are_offered(file: Path, tmp_path: Path) -> None:
    assert completed("run", str(file), "--in", "") == ["a", "b"]
    assert completed("run", "--json", str(file), "--in", "b") == ["b"]
    (tmp_path / "torn.yaml").write_text("nodes: [")
    for nothing in (str(tmp_path / "torn.yaml"), str(tmp_path / "none.yaml"), str(tmp_path)):
        assert not any(completed("run", nothing, "--in", ""))
    assert not any(completed("run", "--in", ""))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_what_the_shell_evaluates(shell: str) -> None:
    assert "_TESTBED_COMPLETE" in run_testbed("completion", shell).stdout


def test_each_command_has_its_help_with_an_example_exit_codes_and_json_where_it_prints_results() -> None:
    runner = CliRunner()
    assert "\b" not in runner.invoke(main, ["--help"]).stdout
    commands = ["validate", "plan", "diagram", "up", "down", "report", "impair", "ls", "exec", "shell", "run"]
    for command in commands:
        text = runner.invoke(main, [command, "--help"], prog_name="testbed").stdout
        assert f"  testbed {command}" in text.partition("Examples:")[2]
        assert "Exit codes: " in text
        assert ("--json" in text) == (command != "shell")


def test_how_a_command_ended_is_told_as_json(lab: str, file: Path, tmp_path: Path) -> None:
    says = ("sh", "-c", "echo out; echo err >&2; exit 3")
    told = run_testbed("exec", "--json", "--lab", lab, "b", "--", *says)
    assert told.returncode == 3, told.stderr
    ended = {"node": "b", "command": list(says), "exit": 3, "stdout": "out\n", "stderr": "err\n"}
    assert json.loads(told.stdout) == {"lab": lab, **ended}
    told = run_testbed("run", "--json", file, "--in", "b", "--directory", tmp_path / "others", "--", *says)
    assert told.returncode == 3, told.stderr
    assert json.loads(told.stdout) == {"lab": lab, **ended}
    for words in (("exec", "--json", "--lab", lab), ("run", "--json", file, "--in")):
        missing = run_testbed(*words, "b", "--", "no-such-command")
        assert (missing.returncode, missing.stdout) == (1, "")
        assert "b: cannot run 'no-such-command': No such file or directory\n" in missing.stderr


def test_results_are_told_as_json(lab: str, file: Path, tmp_path: Path) -> None:
    report = tmp_path / "lab.html"
    told = json.loads(run_testbed("report", lab, "-o", report, "--json").stdout)
    assert told == {"lab": lab, "report": str(report)}
    assert json.loads(run_testbed("validate", file, "--json").stdout)["nodes"] == 2
    assert json.loads(run_testbed("down", lab, "--json").stdout)["name"] == lab
    file.write_text("name: x\nnods: {}\n")
    wrong = run_testbed("validate", file, "--json")
    assert (wrong.returncode, wrong.stderr) == (1, "")
    assert json.loads(wrong.stdout)["problems"] == [
        {"source": str(file), "line": 1, "column": 1, "key": "document", "what": "'nodes' is a required property"},
        {"source": str(file), "line": 2, "column": 1, "key": "nods", "what": "unknown key; did you mean 'nodes'?"},
    ]
    missing = run_testbed("validate", tmp_path / "missing.yaml", "--json")
    (problem,) = json.loads(missing.stdout)["problems"]
    assert (problem["line"], problem["column"], problem["key"]) == (None, None, None)


def run_and_read_stderr(file: Path, *command: str, is_terminal: bool) -> bytes:
    """What `testbed run` told on standard error, a terminal or a pipe."""
    here, there = os.openpty() if is_terminal else os.pipe()
    with os.fdopen(here, "rb", buffering=0) as reading:
        with os.fdopen(there, "wb") as told:
            subprocess.run(
                [sys.executable, "-m", "testbed.cli", "run", file, "--directory", file.parent / "logs", *command],
                env={**os.environ, "TERM": "xterm"},
                stdout=subprocess.DEVNULL,
                stderr=told,
                timeout=PATIENCE,
                check=True,
            )
        return b"".join(all_of(reading))


def all_of(reading: RawIOBase) -> Iterator[bytes]:
    """What is left in a pipe, or in a terminal, which gives no more than 4 KiB at once and ends with an error."""
    with contextlib.suppress(OSError):
        while part := reading.read(1 << 16):
            yield part


@pytest.mark.parametrize(
    ("is_terminal", "is_told"), [pytest.param(True, True, id="terminal"), pytest.param(False, False, id="pipe")]
)
def test_progress_of_what_takes_long_is_told_on_a_terminal_only(
    tmp_path: Path, is_terminal: bool, is_told: bool
) -> None:
    slow = tmp_path / "slow.yaml"
    slow.write_text(
        "name: slow\nnodes:\n  a:\n    services:\n"
        "      late:\n"
        "        command: [sh, -c, 'trap \"sleep 2.5; exit 0\" TERM; sleep 3; echo here; sleep 60 & wait']\n"
        "        ready: {log: here}\n"
    )
    told = run_and_read_stderr(slow, "--", "true", is_terminal=is_terminal)
    assert (b"building slow" in told, b"taking slow down" in told) == (is_told, is_told)


@pytest.mark.parametrize("as_json", [pytest.param((), id="text"), pytest.param(("--json",), id="JSON")])
def test_a_step_that_takes_long_is_told_while_it_does(file: Path, tmp_path: Path, as_json: tuple[str, ...]) -> None:
    scenario = tmp_path / "scenario.yaml"
    step = "run: {in: a, command: [sh, -c, sleep 3, '[/no markup]']}"
    scenario.write_text(f"name: x\ntopology: {file.name}\nsteps: [{step}]\n")
    assert b"[/no markup]" in run_and_read_stderr(scenario, *as_json, is_terminal=True)


def test_of_what_is_done_within_a_second_no_progress_is_told(file: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    told = run_and_read_stderr(file, "--", "true", is_terminal=True)
    assert b"building" not in told or time.monotonic() - began > 1


@pytest.mark.parametrize(
    ("environment", "is_coloured"),
    [pytest.param({}, True, id="terminal"), pytest.param({"NO_COLOR": "1"}, False, id="not wanted")],
)
def test_steps_are_coloured_on_a_terminal_where_it_is_wanted(
    file: Path, tmp_path: Path, environment: dict[str, str], is_coloured: bool
) -> None:
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text(f"name: x\ntopology: {file.name}\nsteps: [run: {{in: a, command: ['true']}}]\n")
    here, there = os.openpty()
    others = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with os.fdopen(here, "rb", buffering=0) as reading:
        subprocess.run(
            [sys.executable, "-m", "testbed.cli", "run", scenario],
            env={**others, "TERM": "xterm", **environment},
            stdout=there,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
            check=True,
        )
        told = reading.read(1 << 16)
        os.close(there)
    assert b"run in a: true" in told
    assert (b"\x1b[" in told) == is_coloured


def test_a_command_outside_of_the_lab_is_not_the_lab_s(file: Path, tmp_path: Path) -> None:
    """Else what it starts, another lab perhaps, would be killed when this one is gone."""
    done = run_testbed("run", file, "--directory", tmp_path / "logs", "--", "sh", "-c", 'echo "[$TESTBED_OWNER]"')
    assert done.stdout == "[]\n", done.stderr


def test_two_labs_do_not_write_into_one_folder(lab: str, file: Path, tmp_path: Path) -> None:
    record = next(each for each in json.loads(run_testbed("ls", "--json").stdout) if each["name"] == lab)
    before = sorted(Path(record["directory"]).iterdir())
    done = run_testbed("run", file, "--directory", record["directory"], "--", "true")
    assert done.returncode == 2
    assert "in use by another lab" in done.stderr
    assert sorted(Path(record["directory"]).iterdir()) == before
    run_testbed("down", lab)
    assert run_testbed("run", file, "--directory", record["directory"], "--", "true").returncode == 0


def test_a_lab_of_another_pid_namespace_is_left_alone(lab: str) -> None:
    script = f"stat -Lc %i /proc/self/ns/pid; exec {sys.executable} -m testbed.cli ls"
    there = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", script]
    done = subprocess.run(there, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert lab not in done.stdout, done.stderr
    left = registry.directory().with_name(f"testbed-{os.geteuid()}-{done.stdout.split()[0]}")
    assert not left.exists()  # who only looks leaves nothing
    assert lab in run_testbed("ls").stdout


def test_a_record_of_no_lab_is_left_to_who_is_just_making_one(name: str, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as keeper:
        gone = registry.Record(name, keeper.pid, start_time(keeper.pid) or "", str(tmp_path), {})
        keeper.kill()
    gone.write()
    path = registry.directory() / f"{name}.json"
    try:
        with registry.lock():
            assert gone not in registry.records()
            assert path.exists()  # it might have been written meanwhile
        assert gone not in registry.records()
        assert not path.exists()
    finally:
        gone.remove()


def test_down_leaves_another_lab_alone_that_has_just_taken_the_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["sleep", "60"]) as keeper:
        first = registry.Record(name, keeper.pid, start_time(keeper.pid) or "", str(tmp_path), {})
        second = dataclasses.replace(first, pid=os.getpid(), started=start_time(os.getpid()) or "")

        def taken(_: registry.Record) -> None:
            second.write()

        monkeypatch.setattr(registry, "_wait_gone", taken)
        registry.down(first)
    try:
        assert second in registry.records()
    finally:
        second.remove()
