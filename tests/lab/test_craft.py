"""Crafted packets leave the node they were sent from, and the right answer comes back, in threads and coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.packet import Packet, Raw
from scapy.volatile import RandShort

from testbed.craft import is_answer
from testbed.lab import Lab, LabError
from testbed.topology_file import loads

pytestmark = pytest.mark.lab

TOPOLOGY = """\
name: craft
nodes: {a: , r: {kind: router}, b: }
links:
  - ends: [{node: a, addresses: [10.0.0.1/24, "fd00::1/64"]}, {node: r, addresses: [10.0.0.2/24, "fd00::2/64"]}]
  - ends: [{node: r, addresses: [10.0.1.1/24, "fd01::1/64"]}, {node: b, addresses: [10.0.1.2/24, "fd01::2/64"]}]
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(loads(TOPOLOGY), tmp_path_factory.mktemp("craft")) as running:
        yield running


def namespaces() -> set[str]:
    """The namespaces of all of this process's threads that live: one that was joined is still listed for a moment."""
    found = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, PermissionError):
            found.add(str((thread / "ns/net").readlink()))
    return found


def own_namespace() -> str:
    """The calling thread's namespace."""
    return str(Path("/proc/thread-self/ns/net").readlink())


@pytest.mark.parametrize(
    ("packet", "seen"),
    [
        pytest.param(IP(dst="10.0.1.2") / UDP(sport=1, dport=9) / Raw(b"x"), {"ip.src": "10.0.0.1"}, id="ipv4"),
        pytest.param(IPv6(dst="fd01::2") / UDP(sport=1, dport=9), {"ipv6.src": "fd00::1"}, id="ipv6"),
        pytest.param(IP(src="192.0.2.9", dst="10.0.1.2", ttl=7) / UDP(dport=9), {"ip.src": "192.0.2.9"}, id="spoofed"),
        pytest.param(IPv6(src="2001:db8::9", dst="fd01::2") / UDP(dport=9), {"ipv6.src": "2001:db8::9"}, id="spoofed6"),
    ],
)
def test_packet_goes_by_the_nodes_own_routes(lab: Lab, packet: Any, seen: dict[str, object]) -> None:
    lab.mark()
    lab["a"].send(packet)
    frame = lab.expect("b:eth0", {**seen, "udp.dport": 9}, count=1)[0]
    assert frame.packet[UDP].chksum not in (0, None)
    assert frame.ip is not None
    assert frame.ip.layout.hop_limit == packet.ttl - 1 if IP in packet else packet.hlim - 1
    assert "src" not in packet.fields or packet.src == next(iter(seen.values())), "the caller's packet is as it was"


@pytest.mark.parametrize(
    ("packet", "address"),
    [
        pytest.param(IP(dst="255.255.255.255") / UDP(dport=9), "10.0.0.2", id="broadcast"),
        pytest.param(IP(dst="10.0.0.255") / UDP(dport=9), "10.0.0.2", id="broadcast of the link"),
        pytest.param(IP(dst="224.0.0.251", ttl=1) / UDP(dport=9), "10.0.0.2", id="group"),
        pytest.param(IPv6(dst="ff02::1") / UDP(dport=9), "fe80::", id="group6"),
        pytest.param(IPv6(dst="fe80::77") / UDP(dport=9), "fe80::", id="link-local"),
    ],
)
def test_what_is_for_a_link_leaves_by_the_interface_that_is_said(lab: Lab, packet: Any, address: str) -> None:
    lab.mark()
    if packet.dst == "fe80::77":
        lab["r"].run(["ip", "-6", "neigh", "replace", packet.dst, "lladdr", "02:00:00:00:00:77", "dev", "eth0"])
    lab["r"].send(packet, interface="eth0")
    frame = lab.expect("r:eth0", {"udp.dport": 9}, count=1)[0]
    assert frame.packet[packet.__class__].dst == packet.dst
    assert frame.packet[packet.__class__].src.startswith(address)


def test_a_neighbour_answers_at_its_link_local_address(lab: Lab) -> None:
    own = lab["a"].run(["ip", "-6", "-br", "addr", "show", "dev", "eth0", "scope", "link"]).stdout
    neighbour = next(word.partition("/")[0] for word in own.split() if word.startswith("fe80"))
    answer = lab["r"].sr1(IPv6(dst=neighbour) / ICMPv6EchoRequest(id=3), interface="eth0")
    assert answer is not None
    assert answer.src == neighbour


@pytest.mark.parametrize(
    ("packet", "is_answer"),
    [
        pytest.param(
            IP(dst="10.0.1.2") / ICMP(id=5, seq=6) / Raw(b"ping"),
            lambda got: (got.src, got[ICMP].type, got[ICMP].id, got[Raw].load) == ("10.0.1.2", 0, 5, b"ping"),
            id="echo",
        ),
        pytest.param(
            IPv6(dst="fd01::2") / ICMPv6EchoRequest(id=5, seq=6, data=b"ping"),
            lambda got: (got.src, got.payload.id) == ("fd01::2", 5),
            id="echo6",
        ),
        pytest.param(
            IP(dst="10.0.1.2") / TCP(sport=1234, dport=99, flags="S", seq=77),
            lambda got: (got[TCP].flags, got[TCP].ack, got[TCP].dport) == ("RA", 78, 1234),
            id="refused",
        ),
        pytest.param(
            IP(dst="10.0.1.2", ttl=1) / UDP(sport=1234, dport=99),
            lambda got: (got.src, got[ICMP].type) == ("10.0.0.2", 11),
            id="time exceeded",
        ),
        pytest.param(
            IPv6(dst="fd01::2", hlim=1) / UDP(sport=1234, dport=99),
            lambda got: (got.src, got.payload.type) == ("fd00::2", 3),
            id="time exceeded 6",
        ),
    ],
)
def test_the_answer_comes_back(lab: Lab, packet: Any, is_answer: Any) -> None:
    answer = lab["a"].sr1(packet)
    assert answer is not None
    assert is_answer(answer), answer.show(dump=True)


def test_what_answers_another_packet_is_no_answer(lab: Lab) -> None:
    """While it waits for what never comes, others are answered."""
    silent = IP(dst="10.0.1.77") / ICMP(id=1)
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(lab["a"].sr1(silent, timeout=0.5)))
    waiting.start()
    for number in range(5):
        assert lab["a"].sr1(IP(dst="10.0.1.2") / ICMP(id=2, seq=number)) is not None
    waiting.join()
    assert found == [None]


def test_a_field_left_to_chance_has_one_value(lab: Lab) -> None:
    for packet in (UDP(sport=RandShort(), dport=99), ICMP(id=RandShort())):
        assert lab["a"].sr1(IP(dst="10.0.1.2") / packet) is not None


def test_what_scapy_cannot_read_is_no_answer(lab: Lab) -> None:
    found: list[object] = []
    silent = IP(dst="10.0.1.78") / ICMP(id=3)
    waiting = threading.Thread(target=lambda: found.append(lab["a"].sr1(silent, timeout=0.5)))
    waiting.start()
    with lab["r"].namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.bind(("eth0", 0))
        for _ in range(20):
            sender.send(b"\xff" * 6 + bytes.fromhex("020000000099") + b"\x08\x00" + bytes(5))
            time.sleep(0.02)
    waiting.join()
    assert found == [None]


QUERY = IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=5000, dport=7)
OWN = IP(src="10.0.0.1", dst="10.0.0.1") / UDP(sport=53, dport=53) / b"x"
ANSWERS: dict[str, tuple[Packet, Packet, bool]] = {
    "from the port": (IP(src="10.0.0.2", dst="10.0.0.1") / UDP(sport=7, dport=5000) / b"y", QUERY / b"x", True),
    "from another port": (IP(src="10.0.0.2", dst="10.0.0.1") / UDP(sport=3128, dport=5000) / b"y", QUERY / b"x", False),
    "an empty one": (IP(src="10.0.0.2", dst="10.0.0.1") / UDP(sport=7, dport=5000), QUERY / b"x", True),
    "an empty one from elsewhere": (IP(src="10.0.0.9", dst="10.0.0.1") / UDP(sport=7, dport=5000), QUERY / b"x", False),
    "its own": (OWN, OWN, False),
    "the same from the other side": (
        IP(src="10.0.0.2", dst="10.0.0.1") / UDP(sport=53, dport=53) / b"x",
        IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=53, dport=53) / b"x",
        True,
    ),
}


@pytest.mark.parametrize(("packet", "sent", "expected"), ANSWERS.values(), ids=ANSWERS.keys())
def test_what_answers_a_datagram(packet: Packet, sent: Packet, expected: bool) -> None:
    assert is_answer(IP(bytes(packet)), IP(bytes(sent))) is expected


def test_while_a_thread_sends_from_a_node_the_others_stay_where_they_are(lab: Lab) -> None:
    before, here, there = namespaces(), own_namespace(), set[str]()

    def send() -> None:
        for number in range(1, 31):
            lab["b"].sr1(IP(dst="10.0.0.1") / ICMP(id=number))
            there.add(own_namespace())

    sending = threading.Thread(target=send)
    sending.start()
    seen = {own_namespace()}
    while sending.is_alive():
        seen.add(own_namespace())
        sending.join(0.0005)
    assert seen == there == {here}
    assert namespaces() == before == {here}


def test_threads_and_coroutines_send_from_several_nodes_at_once(lab: Lab) -> None:
    before = namespaces()

    async def ask(node: str, target: str, number: int) -> str:
        answer = await asyncio.to_thread(lab[node].sr1, IP(dst=target) / ICMP(id=number))
        assert answer is not None
        return str(answer.dst)

    async def all_of_them() -> list[str]:
        pairs = [("a", "10.0.1.2"), ("b", "10.0.0.1"), ("r", "10.0.1.2")] * 5
        return await asyncio.gather(*(ask(node, target, number) for number, (node, target) in enumerate(pairs, 1)))

    assert asyncio.run(all_of_them()) == ["10.0.0.1", "10.0.1.2", "10.0.1.1"] * 5
    assert namespaces() == before


@pytest.mark.parametrize(
    ("packet", "complaint"),
    [
        pytest.param(UDP(dport=9), "begins with IP or IPv6, not with UDP", id="no IP"),
        pytest.param(IP() / UDP(dport=9), "has no destination", id="no destination"),
        pytest.param(IP(dst="10.0.1.2") / UDP(dport=[7, 9]), "several packets in one", id="several"),
        pytest.param(IP(dst="203.0.113.1") / UDP(), "203.0.113.1: Network is unreachable", id="no route"),
        pytest.param(IP(dst="10.0.1.2") / UDP() / Raw(bytes(1600)), "Message too long", id="too large"),
    ],
)
def test_what_cannot_be_sent_is_told(lab: Lab, packet: Any, complaint: str) -> None:
    with pytest.raises(LabError, match=f"r: .*{complaint}"):
        lab["r"].send(packet)


def test_an_interface_that_is_not_there_is_told(lab: Lab) -> None:
    with pytest.raises(LabError, match="a: there is no interface 'eth7'"):
        lab["a"].send(IP(dst="10.0.0.2") / UDP(), interface="eth7")
