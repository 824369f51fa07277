"""`tproxyctl run`: unmodified C programs, each call sequence of theirs checked at the far end of the wire."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from testbed.lab import Lab
from testbed.process import Program
from testbed.topology import Readiness
from testbed.topology_file import loads

pytestmark = [pytest.mark.lab, pytest.mark.needs("seccomp-notify")]

yaml = YAML(typ="safe")
SOURCES = Path(__file__).parents[1] / "programs"
TOPOLOGY = """
name: run
nodes:
  client:
  gateway:
    kind: router
    engine: {rules: ["-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080"]}
  server:
links:
  - ends: [{node: client}, {node: gateway}]
  - ends: [{node: gateway}, {node: server}]
"""
CLIENT, INNER, OUTER, SERVER, FOREIGN = "10.0.0.1", "10.0.0.2", "10.0.1.1", "10.0.1.2", "198.51.100.7"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: apt install gcc")
    folder = tmp_path_factory.mktemp("programs")
    for name in ("squid_connect", "haproxy_connect", "zorp_connect", "zorp_listener", "original_destination"):
        subprocess.run(["cc", "-Wall", "-o", folder / name, SOURCES / f"{name}.c"], check=True)
    return folder


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(loads(TOPOLOGY), tmp_path) as running:
        yield running


def listener(lab: Lab, node: str, address: str, port: int) -> socket.socket:
    sock = lab[node].namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.settimeout(30)
    sock.bind((address, port))
    sock.listen()
    return sock


def serve_one(sock: socket.socket) -> tuple[str, int]:
    connection, peer = sock.accept()
    with connection:
        connection.sendall(connection.recv(100))
    return peer[0], peer[1]


CONNECTS = [
    pytest.param("squid_connect", [OUTER, CLIENT, SERVER, "8080"], None, id="squid"),
    pytest.param("haproxy_connect", [OUTER, CLIENT, "4711", SERVER, "8080"], 4711, id="haproxy"),
    pytest.param("zorp_connect", [OUTER, CLIENT, "4712", SERVER, "8080"], 4712, id="zorp"),
]


@pytest.mark.parametrize(("name", "arguments", "port"), CONNECTS)
def test_server_sees_the_client(lab: Lab, programs: Path, name: str, arguments: list[str], port: int | None) -> None:
    with listener(lab, "server", SERVER, 8080) as server:
        program = lab["gateway"].start(name, ["tproxyctl", "run", "--", str(programs / name), *arguments])
        address, seen = serve_one(server)
    assert address == CLIENT
    assert port in (None, seen)
    finished(program)
    assert "answer hello" in program.log.read_text()


def finished(program: Program) -> None:
    assert program.wait(30) == 0


def asked(lab: Lab, address: str, port: int) -> bytes:
    with lab["client"].namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)
        sock.connect((address, port))
        sock.sendall(b"hello\n")
        sock.shutdown(socket.SHUT_WR)
        return sock.recv(100)


def test_listener_on_a_foreign_address(lab: Lab, programs: Path) -> None:
    command = ["tproxyctl", "run", "--", str(programs / "zorp_listener"), INNER, "7007", FOREIGN, "7"]
    program = lab["gateway"].start("listener", command, Readiness(log="^local"))
    assert asked(lab, FOREIGN, 7) == b"hello\n"
    finished(program)
    assert f"peer {CLIENT}" in program.log.read_text()


def test_original_destination_of_a_redirected_connection(lab: Lab, programs: Path) -> None:
    command = ["tproxyctl", "run", "--", str(programs / "original_destination"), "0.0.0.0", "50080"]
    program = lab["gateway"].start("proxy", command, Readiness(port=50080))
    assert asked(lab, SERVER, 80) == b"hello\n"
    finished(program)
    assert f"destination {SERVER}:80" in program.log.read_text()


def test_services_of_a_topology_run_unmodified(programs: Path, tmp_path: Path) -> None:
    description = yaml.load(TOPOLOGY)
    description["nodes"]["gateway"]["services"] = {
        "listener": {
            "command": [str(programs / "zorp_listener"), INNER, 7007, FOREIGN, 7],
            "ready": {"log": "^local"},  # printed behind the last call, when the port has been there for long
            "tproxy": True,
        }
    }
    with Lab(loads(json.dumps(description)), tmp_path) as lab:
        assert asked(lab, FOREIGN, 7) == b"hello\n"
        finished(lab.programs["gateway", "listener"])


def test_without_an_engine_it_is_a_kernel_without_tproxy(lab: Lab, programs: Path) -> None:
    command = ["tproxyctl", "run", "--", str(programs / "squid_connect"), CLIENT, "10.9.9.9", SERVER, "8080"]
    result = lab["client"].run(command, check=False)
    assert result.returncode != 0
    assert os.strerror(92) in result.stdout + result.stderr or "ENOPROTOOPT" in result.stdout + result.stderr


@pytest.mark.parametrize(("command", "status"), [("/nonexistent", 127), ("/etc/passwd", 126), ("false", 1)])
def test_exit_status_is_the_programs(lab: Lab, command: str, status: int) -> None:
    assert lab["gateway"].run(["tproxyctl", "run", "--", command], check=False).returncode == status
