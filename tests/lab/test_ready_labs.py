"""The ready labs: each has a page, and shows on the wire what its page says."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from testbed.addressing import addressed
from testbed.capture import CaptureSession
from testbed.lab import Lab
from testbed.plan import plan
from testbed.topology_file import load
from testbed.traffic import content

pytestmark = pytest.mark.lab

TOPOLOGIES = Path(__file__).parents[2] / "topologies"
FILES = sorted(TOPOLOGIES.glob("*.yaml"))
PATIENCE = 10.0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_lab_can_be_planned_and_has_a_page_that_tells_how_to_try_it(file: Path) -> None:
    topology = load(file)
    assert topology.name == file.stem
    assert list(plan(addressed(topology)))
    page = file.with_suffix(".md").read_text()
    assert page.startswith("# ")
    assert f"testbed run topologies/{file.name} --in " in page


def test_each_page_has_a_lab() -> None:
    assert {page.stem for page in TOPOLOGIES.glob("*.md")} == {file.stem for file in FILES}


def said(lab: Lab, node: str, service: str = "web") -> list[dict[str, Any]]:
    """What a service printed."""
    log = lab.programs[node, service].log.read_text()
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


def capture_of(lab: Lab) -> CaptureSession:
    assert lab.capture is not None
    return lab.capture


def fetch(lab: Lab, node: str, url: str, size: int) -> None:
    """Fetch what the lab's web server has, and compare."""
    command = ["python", "-m", "testbed.traffic", "fetch", url]
    done = json.loads(lab[node].run(command).stdout)
    assert (done["status"], done["size"]) == (200, size)


def peers(lab: Lab, service: str = "web") -> list[str]:
    return [entry["peer"] for entry in said(lab, "server", service)]


def foreign_listener(lab: Lab) -> None:
    for address in ("198.51.100.7", "2001:db8::7"):
        command = ["python", "-m", "testbed.traffic", "udp-ask", address, "--port", "7", "--count", "3"]
        assert json.loads(lab["client"].run(command).stdout)["senders"] == [f"{address} 7"]
    assert not lab["gateway"].run(["ip", "-o", "addr", "show", "to", "198.51.100.7"]).stdout


def two_proxies(lab: Lab) -> None:
    fetch(lab, "client", "http://10.0.2.2/", 65536)
    assert peers(lab) == ["10.0.0.1"]
    for point in ("client:eth0", "first:eth1", "second:eth1", "server:eth0"):
        lab.expect_conversations(point, ["tcp 10.0.0.1 > 10.0.2.2:80"])


def colliding_ports(lab: Lab) -> None:
    def ask(node: str) -> bytes:
        with lab[node].namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as asking:
            asking.settimeout(PATIENCE)
            asking.bind(("", 5555))
            asking.connect(("10.0.3.2", 80))
            asking.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: asking.recv(1 << 16), b""))

    with ThreadPoolExecutor(3) as pool:
        for answer in pool.map(ask, "abc"):
            assert answer.endswith(content(4096))
    seen = sorted((entry["peer"], entry["port"]) for entry in said(lab, "server"))
    assert seen == [("10.0.0.1", 5555), ("10.0.1.1", 5555), ("10.0.2.1", 5555)]


def asymmetric(lab: Lab) -> None:
    fetch(lab, "client", "http://10.0.1.2/", 65536)
    assert peers(lab) == ["10.0.0.1"]
    assert ways(lab, "server:eth0") == {("10.0.0.1", "10.0.1.2")}
    assert ways(lab, "server:eth1") == {("10.0.1.2", "10.0.0.1")}


def ways(lab: Lab, point: str) -> set[tuple[str, str]]:
    """Who sent TCP to whom at a point."""
    capture = capture_of(lab)
    capture.settle()
    packets = [frame.ip for frame in capture.frames(point) if frame.ip is not None and frame.ip.tcp is not None]
    return {(packet.source, packet.destination) for packet in packets}


def bridged(lab: Lab) -> None:
    for node in "ab":
        fetch(lab, node, "http://10.0.1.2/", 65536)
    assert peers(lab) == [lab[node].address() for node in "ab"]
    lab["a"].run(["bash", "-c", f"echo hello > /dev/udp/{lab['b'].address()}/9"])
    lab.expect(at="b:eth0", match={"ip.src": lab["a"].address(), "udp.dport": 9})
    lab.expect_none(at="gateway:eth0", match={"udp.dport": 9}, during=0.1)


def local_origin(lab: Lab) -> None:
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        with lab["gateway"].namespace.socket(family, socket.SOCK_STREAM) as asking:
            asking.settimeout(PATIENCE)
            asking.connect((lab["server"].address(version), 7))
            asking.sendall(b"hello")
            assert asking.recv(100) == b"hello"
    assert ways(lab, "server:eth0") == set()
    assert len(said(lab, "gateway", "echo")) == 2


def nat_behind_nat(lab: Lab) -> None:
    fetch(lab, "client", "http://10.0.2.2/", 65536)
    fetch(lab, "client", "http://10.0.2.2:81/", 65536)
    assert peers(lab) == ["10.0.1.1"]
    assert peers(lab, "direct") == ["10.0.2.1"]


def ipv6_only(lab: Lab) -> None:
    fetch(lab, "client", "http://[fd00:0:0:1::2]/", 65536)
    assert peers(lab) == ["fd00::1"]
    capture_of(lab).settle()
    frames = capture_of(lab).frames("server:eth0")
    assert {frame.ip.layout.version for frame in frames if frame.ip is not None} == {6}


def dual_stack(lab: Lab) -> None:
    fetch(lab, "client", "http://10.0.1.2/", 65536)
    fetch(lab, "client", "http://[fd00:0:0:1::2]/", 65536)
    assert peers(lab) == ["10.0.0.1", "fd00::1"]


def chain_50(lab: Lab) -> None:
    for version in (4, 6):
        command = ["python", "-m", "testbed.traffic", "udp-ask", lab["n50"].address(version), "--port", "7"]
        assert json.loads(lab["n01"].run(command).stdout)["answered"] == 1


def star_50(lab: Lab) -> None:
    clients = [node.name for node in lab.topology.nodes if node.name.startswith("c")]

    def ask(node: str) -> bytes:
        with lab[node].namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as asking:
            asking.settimeout(PATIENCE)
            asking.connect(("10.0.0.2", 80))
            asking.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: asking.recv(1 << 16), b""))

    with ThreadPoolExecutor(8) as pool:
        for answer in pool.map(ask, clients):
            assert answer.endswith(content(4096))
    assert sorted(peers(lab)) == sorted(lab[node].address() for node in clients)


PLAYS: dict[str, Callable[[Lab], None]] = {
    "foreign-listener": foreign_listener,
    "two-proxies": two_proxies,
    "colliding-ports": colliding_ports,
    "asymmetric": asymmetric,
    "bridged": bridged,
    "local-origin": local_origin,
    "nat-behind-nat": nat_behind_nat,
    "ipv6-only": ipv6_only,
    "dual-stack": dual_stack,
    "chain-50": chain_50,
    "star-50": star_50,
}


def test_every_lab_is_played() -> None:
    elsewhere = {"transparent-proxy", "lossy-link"}  # test_demo.py, test_impair.py
    assert set(PLAYS) | elsewhere == {file.stem for file in FILES}


@pytest.mark.parametrize("name", PLAYS)
def test_a_lab_shows_what_its_page_says(name: str, tmp_path: Path) -> None:
    with Lab(load(TOPOLOGIES / f"{name}.yaml"), tmp_path) as lab:
        PLAYS[name](lab)
    assert lab.left_over == []
