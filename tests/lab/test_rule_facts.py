"""What rules ask of the host: what an address is to it (-m addrtype), whose socket sent a packet (-m owner)."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_lab import ANY, TCP, UDP, EngineLab, engine_lab, until

from nfq_engine.core.surroundings import AddressType
from nfq_engine.shell import interfaces
from nfq_engine.shell.interfaces import HostInterfaces

pytestmark = pytest.mark.lab

UID, GID = 4711, 4712
versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


@pytest.fixture(params=["inline", "kernel"])
def lab(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[EngineLab]:
    with engine_lab(tmp_path, (), request.param) as running:
        yield running


def serve(lab: EngineLab, version: int) -> None:
    """Whoever is reached at port 82 says who it is: the server, or the gateway's proxy at 50082."""
    loopback = {4: "127.0.0.1", 6: "::1"}[version]  # where OUTPUT redirects to
    for node, address, port, kinds, word in (
        (lab.server, ANY[version], 82, (TCP, UDP), b"server\n"),
        (lab.gateway, loopback, 50082, (TCP, UDP), b"proxy\n"),
        (lab.gateway, lab.gateway.address(version, "eth0"), 50082, (TCP,), b"proxy\n"),
        (lab.gateway, ANY[version], 82, (TCP,), b"gateway\n"),
    ):
        for kind in kinds:
            sock = lab.open(node, kind, version)
            if version == 6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, port))
            if kind == TCP:
                sock.listen()
            answer = answer_streams if kind == TCP else answer_datagrams
            threading.Thread(target=answer, args=(sock, word), daemon=True).start()


def rule(lab: EngineLab, text: str) -> None:
    lab.rules(*text.split())


def answer_streams(listener: socket.socket, word: bytes) -> None:
    listener.settimeout(0.05)  # so that the socket is soon free of this thread when it was closed
    while listener.fileno() >= 0:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.sendall(word)


def answer_datagrams(sock: socket.socket, word: bytes) -> None:
    sock.settimeout(0.05)
    while sock.fileno() >= 0:
        with contextlib.suppress(OSError):
            _, peer = sock.recvfrom(100)
            sock.sendto(word, peer)


def reached(lab: EngineLab, protocol: str, version: int, *, is_other: bool) -> str:
    """Who answers a program of the gateway, which runs as user 4711 or as root."""
    who = [f"--reuid={UID}", f"--regid={GID}", "--clear-groups"] if is_other else []
    script = f"exec 3<>/dev/{protocol}/{lab.server.address(version)}/82; echo hello >&3; timeout 10 head -n 1 <&3"
    return lab.gateway.run(["setpriv", *who, "bash", "-c", script]).stdout.strip()


OWNERS = [
    pytest.param(f"--uid-owner {UID}", "proxy", "server", id="user"),
    pytest.param(f"--uid-owner 4000-{UID}", "proxy", "server", id="users"),
    pytest.param(f"! --uid-owner {UID}", "server", "proxy", id="another user"),
    pytest.param(f"--gid-owner {GID}", "proxy", "server", id="group"),
    pytest.param(f"--uid-owner {UID} ! --gid-owner {GID}", "server", "server", id="user of another group"),
]


@pytest.mark.needs("other-users")
@pytest.mark.parametrize(("condition", "of_other", "of_root"), OWNERS)
def test_owner_of_a_new_connection(lab: EngineLab, condition: str, of_other: str, of_root: str) -> None:
    for version in (4, 6):
        serve(lab, version)
    for protocol in ("tcp", "udp"):
        match = f"-A OUTPUT -p {protocol} -m {protocol} --dport 82 -m owner {condition} -j TPROXY --on-port 50082"
        rule(lab, match)
    for version, protocol in ((4, "tcp"), (4, "udp"), (6, "tcp"), (6, "udp")):
        assert reached(lab, protocol, version, is_other=True) == of_other, (version, protocol)
        assert reached(lab, protocol, version, is_other=False) == of_root, (version, protocol)


@pytest.mark.needs("other-users")
def test_owner_is_known_though_the_socket_is_closed_at_once(lab: EngineLab) -> None:
    rule(lab, f"-A OUTPUT -p udp -m udp --dport 99 -m owner --uid-owner {UID}")
    shout = f"for i in 1 2 3; do echo x >/dev/udp/{lab.server.address()}/99; done"
    for user in (["setpriv", f"--reuid={UID}"], []):
        lab.gateway.run([*user, "bash", "-c", shout])
    until(lambda: lab.ask("counters")["queue"]["waiting"] == 0, "all have been decided on")
    [line] = lab.gateway.run(["tproxyctl", "-L", "OUTPUT", "-nvx"]).stdout.splitlines()[2:]
    assert line.split()[0] == "3"


def test_owner_is_not_to_be_asked_for_in_prerouting(lab: EngineLab) -> None:
    result = lab.gateway.run(["tproxyctl", "-A", "PREROUTING", "-m", "owner", "--uid-owner", "1"], check=False)
    assert result.returncode == 1
    assert "owner: used from PREROUTING" in result.stderr


def word_from(lab: EngineLab, address: str) -> bytes:
    """Who answers the client at port 82 of an address; nobody while the address is just coming or going."""
    with lab.client.namespace.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, TCP) as near:
        near.settimeout(2)
        try:
            near.connect((address, 82))
            return near.recv(10)
        except OSError:  # no answer, or that of a router which has no way to it
            return b""


@versions
def test_type_of_a_destination_follows_the_hosts_addresses(lab: EngineLab, version: int) -> None:
    serve(lab, version)
    rule(lab, "-A PREROUTING -p tcp -m addrtype ! --dst-type LOCAL -j TPROXY --on-port 50082")
    assert word_from(lab, lab.server.address(version)) == b"proxy\n"
    assert word_from(lab, lab.gateway.address(version, "eth0")) == b"gateway\n"
    new, route = {4: ("192.0.2.1", "203.0.113.0/24"), 6: ("2001:db8:1::1", "2001:db8:2::/64")}[version]
    inside = {4: "203.0.113.9", 6: "2001:db8:2::9"}[version]
    assert word_from(lab, new) == word_from(lab, inside) == b"proxy\n"
    lab.gateway.run(["ip", "address", "add", new, "dev", "lo"])
    lab.gateway.run(["ip", "route", "add", "local", route, "dev", "lo"])
    until(lambda: word_from(lab, new) == b"gateway\n", "the new address is local")
    until(lambda: word_from(lab, inside) == b"gateway\n", "the new route is local")
    lab.gateway.run(["ip", "address", "del", new, "dev", "lo"])
    until(lambda: word_from(lab, new) == b"proxy\n", "the address is nobody's again")


def test_type_of_a_source(lab: EngineLab) -> None:
    serve(lab, 4)
    rule(lab, "-A OUTPUT -p tcp -m tcp --dport 82 -m addrtype --src-type LOCAL -j TPROXY --on-port 50082")
    assert reached(lab, "tcp", 4, is_other=False) == "proxy"
    lab.rules("-F", "OUTPUT")
    rule(lab, "-A OUTPUT -p tcp -m tcp --dport 82 -m addrtype --src-type UNICAST -j TPROXY --on-port 50082")
    assert reached(lab, "tcp", 4, is_other=False) == "server"


def test_types_of_addresses_are_the_kernels(lab: EngineLab) -> None:
    lab.gateway.run(["ip", "address", "add", "192.0.2.1/24", "brd", "+", "dev", "eth0"])
    expected = {
        "127.0.0.1": "local",
        "127.9.9.9": "local",
        "192.0.2.1": "local",
        "192.0.2.255": "broadcast",
        "192.0.2.2": "unicast",
        "255.255.255.255": "broadcast",
        "0.0.0.0": "broadcast",
        "224.0.0.1": "multicast",
        "198.51.100.7": "unicast",
        "::1": "local",
        "fd00::2": "local",
        "fd00::1": "unicast",
        "ff02::1": "multicast",
    }
    with lab.gateway.namespace.entered():
        host = HostInterfaces()
        found = {address: host.address_type(packed(address)) for address in expected}
    host.close()
    assert found == {address: AddressType[name.upper()] for address, name in expected.items()}


def test_routes_of_others_are_no_reason_to_look_again(lab: EngineLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that learns thousands of routes a second has one table of its own addresses."""
    looks: list[int] = []

    def look(size: int) -> list[tuple[int, int, AddressType]]:
        looks.append(size)
        return []

    monkeypatch.setattr(interfaces, "_local_routes", look)
    with lab.gateway.namespace.entered():
        host = HostInterfaces()
    for command in ("route add 203.0.113.0/24 dev eth1", "route add local 203.0.113.9 dev lo"):
        host.address_type(packed("203.0.113.9"))
        lab.gateway.run(["ip", *command.split()])
        host.forget()
    assert looks == [4]
    host.address_type(packed("203.0.113.9"))
    assert looks == [4, 4]
    host.close()


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
