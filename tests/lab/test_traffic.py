"""The ready clients and servers: as services of a topology, asked from another node."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.lab import Lab
from testbed.topology_file import loads
from testbed.traffic import content

pytestmark = pytest.mark.lab

PATIENCE = 10.0
PAGE_BYTES = 10_000
TOPOLOGY = f"""\
name: traffic
nodes:
  client:
  server:
    services:
      tcp: {{command: ["{{python}}", -m, testbed.traffic, tcp-echo, --port, 7, --notify-fd, "{{notify_fd}}"],
        ready: {{notify: true}}}}
      udp: {{command: ["{{python}}", -m, testbed.traffic, udp-echo, --port, 7, --notify-fd, "{{notify_fd}}"],
        ready: {{notify: true}}}}
      web: {{command: ["{{python}}", -m, testbed.traffic, http-server, --port, 80, --size, {PAGE_BYTES}, --notify-fd,
        "{{notify_fd}}"], ready: {{notify: true}}}}
links:
  - ends:
      - {{node: client, addresses: [10.0.0.1/24, "fd00::1/64"]}}
      - {{node: server, addresses: [10.0.0.2/24, "fd00::2/64"]}}
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(loads(TOPOLOGY), tmp_path_factory.mktemp("traffic")) as running:
        yield running


def ask(lab: Lab, *words: object) -> dict[str, object]:
    """What a client prints in the node `client`."""
    output = lab["client"].run(["python", "-m", "testbed.traffic", *map(str, words)], timeout=60).stdout
    said: dict[str, object] = json.loads(output)
    return said


@pytest.mark.parametrize("address", [pytest.param("10.0.0.2", id="ipv4"), pytest.param("fd00::2", id="ipv6")])
def test_clients_get_what_servers_answer(lab: Lab, address: str) -> None:
    # More than the sockets' buffers hold on both ways: it must read while it sends.
    tcp = ask(lab, "tcp-ask", address, "--port", 7, "--size", 20_000_000, "--timeout", 30)
    assert (tcp["sent"], tcp["answered"], tcp["peer"]) == (20_000_000, 20_000_000, f"{address} 7")
    udp = ask(lab, "udp-ask", address, "--port", 7, "--count", 2)
    assert (udp["answered"], udp["senders"]) == (2, [f"{address} 7"])
    host = f"[{address}]" if ":" in address else address
    page = ask(lab, "fetch", f"http://{host}/")
    assert (page["status"], page["sha256"]) == (200, hashlib.sha256(content(PAGE_BYTES)).hexdigest())


def test_answers_that_come_twice_do_not_hide_those_behind_them(lab: Lab) -> None:
    with lab["server"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as twice:
        twice.bind(("10.0.0.2", 9))
        twice.settimeout(PATIENCE)

        def serve() -> None:
            for _ in range(5):
                asked, peer = twice.recvfrom(64)
                for _ in range(2):
                    twice.sendto(asked, peer)

        serving = threading.Thread(target=serve)
        serving.start()
        said = ask(lab, "udp-ask", "10.0.0.2", "--port", 9, "--count", 5)
        serving.join()
    assert (said["sent"], said["answered"]) == (5, 5)


def test_an_answer_that_cannot_be_sent_does_not_end_the_udp_server(lab: Lab) -> None:
    asking = ["python", "-m", "testbed.traffic", "udp-ask", "10.0.0.2", "--port", "7", "--timeout", "0.3"]
    lab["server"].run(["ip", "route", "add", "unreachable", "10.0.0.1"])
    assert lab["client"].run(asking, check=False, timeout=PATIENCE).returncode == 1
    lab["server"].run(["ip", "route", "delete", "unreachable", "10.0.0.1"])
    assert ask(lab, "udp-ask", "10.0.0.2", "--port", 7)["answered"] == 1


def test_a_fetch_takes_no_longer_although_there_are_several_addresses_to_try(lab: Lab) -> None:
    rules = "table inet silent { chain out { type filter hook output priority 0; tcp dport 81 drop; }; }"
    several = "import socket; one = socket.getaddrinfo; socket.getaddrinfo = lambda *asked: one(*asked) * 3"
    script = f"{several}; from testbed.traffic import main; main()"
    lab["client"].run(["nft", rules.replace("table", "add table", 1)])
    try:
        words = ["python", "-c", script, "fetch", "http://10.0.0.2:81/", "--timeout", "0.5"]
        done = lab["client"].run(words, check=False, timeout=PATIENCE)
    finally:
        lab["client"].run(["nft", "delete", "table", "inet", "silent"])
    assert done.returncode == 1
    assert "took longer than 0.5 s" in done.stderr


def test_an_idle_or_reset_connection_keeps_nobody_from_the_tcp_server(lab: Lab) -> None:
    with lab["client"].namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as idle:
        idle.settimeout(PATIENCE)
        idle.connect(("10.0.0.2", 7))
        with lab["client"].namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as reset:
            reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            reset.settimeout(PATIENCE)
            reset.connect(("10.0.0.2", 7))
            reset.sendall(b"served")
            assert reset.recv(6) == b"served"
        assert ask(lab, "tcp-ask", "10.0.0.2", "--port", 7)["answered"] == 64
        idle.sendall(b"still here")
        assert idle.recv(16) == b"still here"


@pytest.mark.parametrize(
    ("node", "words", "status", "complaint"),
    [
        pytest.param("client", "fetch page", 2, "page: unknown url type", id="no URL"),
        pytest.param("client", "fetch http://10.0.0.2/ --output /none/x", 1, "/none/x: No such file", id="no folder"),
        pytest.param("client", "fetch http://10.0.0.2/ --timeout -1", 2, "--timeout", id="no time"),
        pytest.param("client", "udp-ask 10.0.0.2 --port 7 --timeout 0", 2, "--timeout", id="no time for datagrams"),
        pytest.param("client", "udp-ask 172.16.0.1 --port 7", 1, "Network is unreachable", id="no route"),
        pytest.param("server", "tcp-echo --port 7", 1, "Address already in use", id="TCP port in use"),
        pytest.param("server", "udp-echo --port 7", 1, "Address already in use", id="UDP port in use"),
        pytest.param("server", "http-server --port 80", 1, "Address already in use", id="HTTP port in use"),
    ],
)
def test_what_cannot_work_is_told_without_a_traceback(
    lab: Lab, node: str, words: str, status: int, complaint: str
) -> None:
    done = lab[node].run(["python", "-m", "testbed.traffic", *words.split()], check=False, timeout=PATIENCE)
    assert done.returncode == status
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("port", "complaint"),
    [
        pytest.param(8, "10.0.0.2 port 8: Connection refused", id="nobody listens"),
        pytest.param(80, "answered 0 of 64 bytes", id="no echo"),
    ],
)
def test_a_tcp_client_without_its_answer_says_so_and_fails(lab: Lab, port: int, complaint: str) -> None:
    words = ["python", "-m", "testbed.traffic", "tcp-ask", "10.0.0.2", "--port", str(port), "--timeout", "0.5"]
    failed = lab["client"].run(words, check=False, timeout=PATIENCE)
    assert failed.returncode == 1
    assert complaint in failed.stderr


def test_the_http_server_looks_up_no_name(tmp_path: Path) -> None:
    """Who asks for the host's name asks a name server, wherever /etc/hosts lacks it; here, who asks fails."""
    script = "import socket; socket.getfqdn = None; from testbed.traffic import main; main()"
    command = ["{python}", "-c", script, "http-server", "--port", "80", "--size", "9", "--notify-fd", "{notify_fd}"]
    nodes = {"server": {"services": {"web": {"command": command, "ready": {"notify": True}}}}}
    with Lab(loads(json.dumps({"name": "names", "nodes": nodes})), tmp_path) as lab:
        fetched = lab["server"].run(["python", "-m", "testbed.traffic", "fetch", "http://127.0.0.1/"]).stdout
    assert json.loads(fetched)["size"] == 9
