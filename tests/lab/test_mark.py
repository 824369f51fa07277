"""The mark (tproxy.md section 6): the user's own filter drops everything that does not carry it, on packet and
connection, at all of its hooks; bits of the user's own are on both, and stay."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_lab import ANY, FOREIGN, TCP, UDP, EngineLab, engine_lab, exchange

from nfq_engine.client import Flag

pytestmark = pytest.mark.lab

# 7000, 7001: where proxies listen; 7002: where the server does; 7003: what rules redirect.
USERS = """
table inet users {
    chain mark_prerouting { type filter hook prerouting priority -310; meta mark set meta mark | 0x5; }
    chain mark_output { type filter hook output priority -310; meta mark set meta mark | 0x5; }
    chain connection_prerouting { type filter hook prerouting priority -190; ct mark set ct mark | 0x60; }
    chain connection_output { type filter hook output priority -190; ct mark set ct mark | 0x60; }
    chain check {
        th dport 7000-7003 jump judge
        th sport 7000-7003 jump judge
    }
    chain judge {
        meta mark == 0x40000005 ct mark == 0x40000060 accept
        meta mark == 0x40000005 ct state untracked accept
        drop
    }
    chain input { type filter hook input priority 0; meta l4proto { tcp, udp } jump check; }
    chain forward { type filter hook forward priority 0; meta l4proto { tcp, udp } jump check; }
    chain output { type filter hook output priority 0; meta l4proto { tcp, udp } jump check; }
}
"""
RULES = (
    "-A PREROUTING -p {0} -m {0} --dport 7003 -d {1} -j TPROXY --on-port 7000",
    "-A PREROUTING -p {0} -m {0} --dport 7003 -j TPROXY --on-port 7002 --on-ip {1}",
    "-A OUTPUT -p {0} -m {0} --dport 7003 -j TPROXY --on-port 7001",
)
LOOPBACK = {4: "127.0.0.1", 6: "::1"}


@pytest.fixture(params=["inline", "kernel"])
def lab(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[EngineLab]:
    with engine_lab(tmp_path, (), request.param, ("--mark", str(0x40000000))) as running:
        addresses = [running.server.address(version) for version in (4, 6)]
        rules = [rule.format(word, address) for address in addresses for word in ("tcp", "udp") for rule in RULES]
        running.tproxy.call({"call": "restore", "text": "\n".join(["*tproxy", *rules, "COMMIT"])})
        running.gateway.run(["nft", USERS])
        yield running


def talk(near: socket.socket, server: tuple[str, int], listening: socket.socket) -> None:
    """Some packets each way, over TCP or UDP."""
    near.connect(server)
    if near.type == TCP:
        far, _ = listening.accept()
        with far:
            exchange(near, far, 50_000)
        return
    for _ in range(3):
        near.send(b"question")
        data, peer = listening.recvfrom(100)
        listening.sendto(data, peer)
        assert near.recv(100) == b"question"


def at(lab: EngineLab, address: str, port: int, kind: int) -> socket.socket:
    return lab.bound(lab.gateway, kind, address, port, listen=kind == TCP)


def redirect(lab: EngineLab, kind: int, version: int) -> None:
    proxy = at(lab, lab.gateway.address(version, "eth0"), 7000, kind)
    talk(lab.open(lab.client, kind, version), (lab.server.address(version), 7003), proxy)


def redirect_elsewhere(lab: EngineLab, kind: int, version: int) -> None:
    server = lab.bound(lab.server, kind, lab.server.address(version), 7002, listen=kind == TCP)
    talk(lab.open(lab.client, kind, version), (FOREIGN[version], 7003), server)


def redirect_at_output(lab: EngineLab, kind: int, version: int) -> None:
    proxy = at(lab, LOOPBACK[version], 7001, kind)
    talk(lab.open(lab.gateway, kind, version), (lab.server.address(version), 7003), proxy)


def foreign_listener(lab: EngineLab, kind: int, version: int) -> None:
    proxy = at(lab, lab.gateway.address(version, "eth0"), 7000, kind)
    lab.tproxy.assign(proxy, FOREIGN[version], 53)
    lab.tproxy.set_flags(proxy, Flag.LISTEN)
    talk(lab.open(lab.client, kind, version), (FOREIGN[version], 53), proxy)


def foreign_connect(lab: EngineLab, kind: int, version: int) -> None:
    server = lab.bound(lab.server, kind, lab.server.address(version), 7002, listen=kind == TCP)
    near = lab.bound(lab.gateway, kind, lab.gateway.address(version, "eth1"))
    lab.tproxy.assign(near, lab.client.address(version), 0)
    lab.tproxy.set_flags(near, Flag.CONNECT)
    talk(near, (lab.server.address(version), 7002), server)


def mark_only_connect(lab: EngineLab, kind: int, version: int) -> None:
    server = lab.bound(lab.server, kind, lab.server.address(version), 7002, listen=kind == TCP)
    near = lab.bound(lab.gateway, kind, lab.gateway.address(version, "eth1"))
    lab.tproxy.assign(near, ANY[version])
    talk(near, (lab.server.address(version), 7002), server)


def mark_only_listener(lab: EngineLab, kind: int, version: int) -> None:
    address = lab.gateway.address(version, "eth0")
    proxy = at(lab, address, 7000, kind)
    lab.tproxy.assign(proxy, ANY[version])
    talk(lab.open(lab.client, kind, version), (address, 7000), proxy)


CASES = [
    redirect,
    redirect_elsewhere,
    redirect_at_output,
    foreign_listener,
    foreign_connect,
    mark_only_connect,
    mark_only_listener,
]


@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_tproxied_passes_a_filter_for_the_mark(
    lab: EngineLab, case: Callable[[EngineLab, int, int], None], version: int
) -> None:
    for kind in (TCP, UDP):
        case(lab, kind, version)


def test_one_way_datagrams_carry_the_mark(lab: EngineLab) -> None:
    proxy = lab.bound(lab.gateway, UDP, lab.gateway.address(4, "eth0"), 7000)
    lab.tproxy.set_flags(proxy, Flag.LISTEN | Flag.UNIDIR)
    lab.open(lab.client, UDP).sendto(b"one way", (lab.server.address(), 7003))
    assert proxy.recv(100) == b"one way"


@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
def test_nothing_else_carries_it(lab: EngineLab, version: int) -> None:
    """Input, forward, and output: connections past the engine, and of a socket that has given its assignment back."""
    at(lab, ANY[version], 7001, TCP)
    lab.bound(lab.server, TCP, lab.server.address(version), 7002, listen=True)
    given_back = lab.bound(lab.gateway, TCP, lab.gateway.address(version, "eth1"))
    lab.tproxy.assign(given_back, ANY[version])
    lab.tproxy.unassign(given_back)
    for near, server in (
        (lab.open(lab.client, TCP, version), (lab.gateway.address(version, "eth0"), 7001)),
        (lab.open(lab.client, TCP, version), (lab.server.address(version), 7002)),
        (given_back, (lab.server.address(version), 7002)),
    ):
        near.settimeout(0.1)
        with pytest.raises(TimeoutError):
            near.connect(server)
