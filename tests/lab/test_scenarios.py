"""Scenarios: the examples come out as they should, and a failure says what it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.lab

EXAMPLES = sorted((Path(__file__).parents[2] / "topologies" / "scenarios").glob("*.yaml"))

LAB = """\
name: two
topology:
  name: two
  nodes: {a: , b: }
  links: [{ends: [{node: a, addresses: [10.0.0.1/24]}, {node: b, addresses: [10.0.0.2/24]}]}]
steps:
"""


def run_testbed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A testbed command, to its end."""
    command = [sys.executable, "-m", "testbed.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def written(folder: Path, *steps: str) -> Path:
    path = folder / "scenario.yaml"
    path.write_text(LAB + "".join(f"  - {step}\n" for step in steps))
    return path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_passes(tmp_path: Path, path: Path) -> None:
    result = run_testbed("run", path, "--directory", tmp_path, "--json")
    told = json.loads(result.stdout)
    assert [step for step in told["steps"] if step["failure"]] == []
    assert (result.returncode, told["passed"], told["not_done"]) == (0, True, [])


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize(
    ("step", "words"),
    [
        pytest.param("run: {in: a, command: [sh, -c, echo gone; exit 3]}", ["ended with 3", "| gone"], id="exit"),
        pytest.param("run: {in: a, command: [echo, ay], output: ^be}", ["printed nothing like '^be'"], id="output"),
        pytest.param('fetch: {in: a, url: "http://10.0.0.2/"}', ["no answer", "refused"], id="fetch"),
        pytest.param('expect: {at: "b:eth0", within: 10ms, match: {tcp.dport: 9}}', ["capture.pcapng"], id="expect"),
        pytest.param('expect: {at: "b:eth0", never: 10ms, match: {udp.dport: 9}}', ["seen there: 1 frame"], id="never"),
        pytest.param("change: {in: a, ip: link set eth7 down}", ["eth7"], id="change"),
    ],
)
def test_a_step_that_fails_is_the_last_and_says_why(tmp_path: Path, step: str, words: list[str]) -> None:
    sending = "send: {in: a, packet: {ip.dst: 10.0.0.2, udp.sport: 40000, udp.dport: 9}}"
    seen = 'expect: {at: "b:eth0", match: {udp.dport: 9}, count: 1}'
    path = written(tmp_path, sending, seen, step, "change: {in: a, ip: link set eth0 down}")
    result = run_testbed("run", path, "--directory", tmp_path / "logs", "--report", tmp_path / "report.html")
    lines = result.stdout.splitlines()
    assert result.returncode == 1
    assert [line.split()[:2] for line in lines[:3]] == [["ok", "1"], ["ok", "2"], ["FAILED", "3"]]
    assert all(word in result.stdout for word in words), result.stdout
    assert lines[-1] == "two: step 3 failed, 1 were not done"
    assert "10.0.0.2:9" in (tmp_path / "report.html").read_text()


def server_of(folder: Path, answering: str) -> str:
    """A step that starts a server on port 80 of b, which reads once from `one` and then does what is asked."""
    script = folder / "server.py"
    script.write_text(
        "import socket, time\nlistener = socket.create_server(('10.0.0.2', 80))\n"
        f"while True:\n    with listener.accept()[0] as one:\n        one.recv(4096)\n        {answering}\n"
    )
    return f'start: {{in: b, name: web, command: ["{{python}}", {script}], ready: {{port: 80}}}}'


@pytest.mark.parametrize(
    ("url", "answer", "complaint"),
    [
        pytest.param(
            "http://10.0.0.2/",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf",
            "not one that can be read",
            id="half",
        ),
        pytest.param("http://10.0.0.2/", b"220 mail\r\n", "not one that can be read", id="no HTTP"),
        pytest.param("https://10.0.0.2:80/", b"220 mail\r\n", "not one that can be read", id="no TLS"),
        pytest.param(
            "http://10.0.0.2/",
            b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.2:81/\r\nContent-Length: 0\r\n\r\n",
            "answered, with status 302",
            id="redirect",
        ),
        pytest.param(
            "http://10.0.0.2/",
            b"HTTP/1.1 302 Found\r\nLocation: http://[fd00::2/\r\nContent-Length: 0\r\n\r\n",
            "answered, with status 302",
            id="redirect to nowhere",
        ),
    ],
)
def test_a_server_that_answers_in_some_way_does_not_fail_as_it_should(
    tmp_path: Path, url: str, answer: bytes, complaint: str
) -> None:
    path = written(
        tmp_path,
        server_of(tmp_path, f"one.sendall({answer!r})"),
        'fetch: {in: a, url: "http://10.0.0.2:81/", fails: true}',
        f'fetch: {{in: a, url: "{url}", fails: true, within: 5s}}',
    )
    result = run_testbed("run", path, "--directory", tmp_path / "logs")
    assert [line.split()[:2] for line in result.stdout.splitlines()[:3]] == [["ok", "1"], ["ok", "2"], ["FAILED", "3"]]
    assert complaint in result.stdout


@pytest.mark.parametrize("url", ["http://[fd00::2/", "http://no-such-name.invalid/", "http:///page"])
def test_a_url_that_nobody_can_be_asked_for_does_not_fail_as_it_should(tmp_path: Path, url: str) -> None:
    path = written(tmp_path, f'fetch: {{in: a, url: "{url}", fails: true}}')
    result = run_testbed("run", path, "--directory", tmp_path / "logs")
    assert result.returncode == 1, result.stdout


def test_a_fetch_takes_no_longer_than_it_may_although_something_comes_all_the_time(tmp_path: Path) -> None:
    slowly = "one.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 50\\r\\n\\r\\n'); "
    slowly += "[(one.sendall(b'.'), time.sleep(0.1)) for _ in range(50)]"
    path = written(tmp_path, server_of(tmp_path, slowly), 'fetch: {in: a, url: "http://10.0.0.2/", within: 1s}')
    result = run_testbed("run", path, "--directory", tmp_path / "logs")
    assert "FAILED   2" in result.stdout
    assert "took longer than 1 s" in result.stdout


def test_a_command_that_a_signal_ends_ends_as_a_shell_tells_it(tmp_path: Path) -> None:
    path = written(tmp_path, "run: {in: a, command: [sh, -c, kill -9 $$], exit: 137}")
    result = run_testbed("run", path, "--directory", tmp_path / "logs")
    assert result.returncode == 0, result.stdout


def test_a_step_is_tried_again_until_it_comes_out_as_it_should(tmp_path: Path) -> None:
    count = "echo x >> seen; test $(wc -l < seen)"
    in_time = f"run: {{in: a, command: [sh, -c, 'cd {tmp_path}; {count} -ge 3'], retry: 10s}}"
    never = f"run: {{in: a, command: [sh, -c, 'cd {tmp_path}; {count} -lt 3'], retry: 5s}}"
    result = run_testbed("run", written(tmp_path, in_time, never), "--directory", tmp_path / "logs")
    assert [line.split()[:2] for line in result.stdout.splitlines()[:2]] == [["ok", "1"], ["FAILED", "2"]]
    assert (tmp_path / "seen").read_text().count("x") >= 5


@pytest.mark.parametrize(
    ("step", "is_kept"), [pytest.param("{exit: 0}", True, id="failed"), pytest.param("{exit: 1}", False, id="passed")]
)
def test_a_lab_is_kept_for_a_look_when_a_step_failed(tmp_path: Path, step: str, is_kept: bool) -> None:
    name = f"kept-{os.getpid()}"
    path = written(tmp_path, f"run: {{in: a, command: ['false'], {step[1:-1]}}}")
    path.write_text(path.read_text().replace("  name: two", f"  name: {name}"))
    result = run_testbed("run", path, "--keep", "--directory", os.path.relpath(tmp_path / "logs"))
    assert result.returncode == (1 if is_kept else 0)
    directories = [
        os.path.normpath(lab["directory"])
        for lab in json.loads(run_testbed("ls", "--json").stdout)
        if lab["name"] == name
    ]
    assert directories == [str(tmp_path / "logs")] * is_kept
    assert (f"testbed shell --lab {name} a|b" in result.stderr) is is_kept
    asked = run_testbed("exec", "--lab", name, "b", "--", "ip", "-brief", "address")
    assert ("10.0.0.2/24" in asked.stdout) is is_kept
    assert run_testbed("down", name).returncode == (0 if is_kept else 1)


def test_a_program_is_started_and_killed(tmp_path: Path) -> None:
    echo = '["{python}", -m, testbed.traffic, tcp-echo, --port, 7, --notify-fd, "{notify_fd}"]'
    ask = "run: {in: a, command: [bash, -c, 'exec 3<>/dev/tcp/10.0.0.2/7; echo hello >&3; head -1 <&3']"
    path = written(
        tmp_path,
        f"start: {{in: b, name: echo, command: {echo}, ready: notify}}",
        f"{ask}, output: ^hello$}}",
        "kill: {in: b, name: echo, signal: KILL}",
        f"{ask}, exit: 1}}",
        "kill: {in: b, name: echo}",
    )
    result = run_testbed("run", path, "--directory", tmp_path / "logs")
    assert [line.split()[0] for line in result.stdout.splitlines()[:4]] == ["ok"] * 4
    assert "b/echo" in result.stdout.splitlines()[4]
    assert "was killed" in result.stdout or "SIGKILL" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--", "true"], "its steps say what is done", id="a command"),
        pytest.param(["--in", "a"], "its steps say what is done", id="a node"),
    ],
)
def test_a_scenario_takes_no_command(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = run_testbed("run", written(tmp_path, "kill: {in: a, name: x}"), *arguments)
    assert result.returncode in (1, 2)
    assert words in result.stderr or "no program" in result.stderr


def test_a_topology_needs_a_command() -> None:
    result = run_testbed("run", EXAMPLES[0].parents[1] / "transparent-proxy.yaml")
    assert result.returncode == 2
    assert "is a topology: say what to run" in result.stderr
