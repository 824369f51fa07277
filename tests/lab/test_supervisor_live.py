"""Unmodified programs under `tproxyctl run`, and a live engine: what they are told, and what remains of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_lab import PATIENCE, UDP, EngineLab, engine_lab, until
from supervisor_runs import IP_RECVORIGADDRS, compile_c

from testbed.process import Program
from testbed.topology import ENGINE, Readiness

pytestmark = [pytest.mark.lab, pytest.mark.needs("seccomp-notify")]
pytest_plugins = ["supervisor_fixtures"]

RUN = ("tproxyctl", "run", "--")
RUN_WITH_ADDRESSES = ("tproxyctl", "run", "--recvorigaddrs", "--")
PORT = 50080


@pytest.fixture(params=["inline", "kernel"])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineLab]:
    with engine_lab(tmp_path, datapath=request.param) as running:
        yield running


def lines(program: Program) -> list[str]:
    return program.log.read_text().splitlines()


def finished(program: Program) -> list[str]:
    """What it printed; it must have ended well."""
    assert program.wait(60) == 0, program.account()
    return lines(program)


def engine_descriptors(lab: EngineLab) -> int:
    lab.tproxy.call({"call": "counters"})  # so the test's own connection is among them
    return len(list(Path(f"/proc/{lab.lab.programs['gateway', ENGINE].pid}/fd").iterdir()))


def client_socket(lab: EngineLab) -> socket.socket:
    """A UDP socket of the client's that talks to the server, where nobody listens."""
    near = lab.bound(lab.client, UDP, lab.client.address())
    near.connect((lab.server.address(), 80))
    return near


@pytest.mark.parametrize("how", ["blocking", "nonblocking", "many"])
def test_datagrams_come_with_their_original_addresses(lab: EngineLab, programs: Path, how: str) -> None:
    command = [*RUN_WITH_ADDRESSES, programs / "udp_origins", how, "0.0.0.0", PORT, 6]
    program = lab.gateway.start("service", list(map(str, command)), Readiness(log="local"))
    sockets = [client_socket(lab) for _ in range(3)]
    for near in sockets:
        near.send(b"one")
        near.send(b"two")
        assert {near.recv(100), near.recv(100)} == {b"one", b"two"}  # from the server, to which the socket is connected
    names = [f"{ip}:{port}" for ip, port in (near.getsockname() for near in sockets)]
    expected = {f"{word} from {name} to {lab.server.address()}:80" for word in ("one", "two") for name in names}
    assert sorted(finished(program)[1:]) == sorted(expected)
    assert len(lab.ask("connections")) == 3


DUAL_STACK = """
import socket
service = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
service.setsockopt(socket.SOL_IP, 11273, 1)
service.bind(("::", 50080))
print("ready", flush=True)
data, controls, _, peer = service.recvmsg(100, 100)
print(*(f"{level} {kind} {value.hex()}" for level, kind, value in controls), flush=True)
service.sendto(data, peer)
"""


def test_an_ipv6_socket_is_told_of_ipv4_datagrams(lab: EngineLab) -> None:
    command = [*RUN_WITH_ADDRESSES, sys.executable, "-c", DUAL_STACK]
    program = lab.gateway.start("service", command, Readiness(log="ready"))
    near = client_socket(lab)
    near.send(b"mapped")
    assert near.recv(100) == b"mapped"
    source, port = near.getsockname()
    addresses = socket.inet_aton(source) + socket.inet_aton(lab.server.address())
    ports = port.to_bytes(2, "big") + (80).to_bytes(2, "big")
    assert finished(program)[1:] == [f"0 {IP_RECVORIGADDRS} {(addresses + ports).hex()}"]


def test_a_datagram_that_was_not_redirected_comes_without_addresses(lab: EngineLab, programs: Path) -> None:
    command = [*RUN_WITH_ADDRESSES, programs / "udp_origins", "blocking", "0.0.0.0", PORT, 1]
    program = lab.gateway.start("service", list(map(str, command)), Readiness(log="local"))
    near = lab.bound(lab.client, UDP, lab.client.address())
    near.connect((lab.gateway.address(4, "eth0"), PORT))
    near.send(b"direct")
    assert near.recv(100) == b"direct"
    assert finished(program)[1:] == ["direct without addresses"]


def test_without_the_option_there_are_no_original_addresses(lab: EngineLab, programs: Path) -> None:
    result = lab.gateway.run([*RUN, str(programs / "udp_origins"), "blocking", "0.0.0.0", str(PORT), "1"], check=False)
    assert result.stdout == "RECVORIGADDRS: ENOPROTOOPT\n"


def test_a_program_that_waits_for_a_datagram_outlives_the_engine(lab: EngineLab, programs: Path) -> None:
    command = [*RUN_WITH_ADDRESSES, programs / "udp_origins", "blocking", "0.0.0.0", PORT, 2]
    program = lab.gateway.start("service", list(map(str, command)), Readiness(log="local"))
    near = client_socket(lab)
    near.send(b"one")
    assert near.recv(100) == b"one"
    engine = lab.lab.programs["gateway", ENGINE]
    os.kill(engine.pid, signal.SIGKILL)
    assert engine.wait(PATIENCE) == -signal.SIGKILL
    lab.lab._start_engine(lab.lab.topology.node("gateway"))
    later = client_socket(lab)
    later.send(b"two")
    assert later.recv(100) == b"two"
    port = later.getsockname()[1]
    assert finished(program)[-1] == f"two from {lab.client.address()}:{port} to {lab.server.address()}:80"


def test_threads_children_and_several_programs_at_once_leave_nothing(lab: EngineLab, programs: Path) -> None:
    before = engine_descriptors(lab)
    command = [*RUN, str(programs / "many_assigns"), lab.gateway.address(4, "eth1"), lab.client.address()]
    running = [lab.gateway.start(f"program-{number}", command) for number in range(3)]
    assert [finished(program) for program in running] == [["failed 0"]] * 3
    until(lambda: lab.ask("sockrefs") == [], "the sockrefs of closed sockets go")
    until(lambda: engine_descriptors(lab) == before, "descriptors and connections of the programs go")


def test_a_killed_program_s_sockrefs_go(lab: EngineLab, programs: Path) -> None:
    local, foreign = lab.gateway.address(4, "eth0"), "198.51.100.7"
    command = [*RUN, str(programs / "zorp_listener"), local, "7007", foreign, "7"]
    program = lab.gateway.start("listener", command, Readiness(port=7007))
    assert len(lab.ask("sockrefs")) == 1
    program.kill()
    until(lambda: lab.ask("sockrefs") == [], "the sockref of the killed program goes")


def test_a_static_program_needs_no_loader(lab: EngineLab, tmp_path: Path) -> None:
    target = tmp_path / "static"
    compile_c("squid_connect.c", target, "-static")
    assert b"statically linked" in subprocess.run(["file", target], capture_output=True, check=True).stdout
    far = lab.bound(lab.server, socket.SOCK_STREAM, lab.server.address(), 8080, listen=True)
    arguments = [lab.gateway.address(4, "eth1"), lab.client.address(), lab.server.address(), "8080"]
    program = lab.gateway.start("static", [*RUN, str(target), *arguments])
    connection, peer = far.accept()
    with connection:
        connection.sendall(connection.recv(100))
    assert peer[0] == lab.client.address()
    assert finished(program) == ["answer hello"]
