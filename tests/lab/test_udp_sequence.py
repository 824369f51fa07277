"""UDP for any destination: FLAGS=LISTEN|UNIDIR on a socket without a foreign address, and who learns where a datagram
was going. Programs are unmodified C; what counts is what the client gets."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_lab import ANY, FOREIGN, PATIENCE, UDP, EngineLab, engine_lab, until

from nfq_engine.client import Flag
from testbed.process import Program

pytestmark = [pytest.mark.lab, pytest.mark.needs("seccomp-notify")]

RULE = ("-A PREROUTING -i eth0 -p udp -m udp --dport 5000:5999 -j TPROXY --on-port 50053",)
SOURCES = Path(__file__).parents[1] / "programs"
ONE_WAY = Flag.LISTEN | Flag.UNIDIR
versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: apt install gcc")
    folder = tmp_path_factory.mktemp("programs")
    for name in ("udp_listener", "udp_origin"):
        subprocess.run(["cc", "-Wall", "-o", folder / name, SOURCES / f"{name}.c"], check=True)
    return folder


@pytest.fixture(params=["inline", "kernel"])
def datapath(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def lab(tmp_path: Path, datapath: str) -> Iterator[EngineLab]:
    with engine_lab(tmp_path, RULE, datapath) as running:
        yield running


def one_way_listener(lab: EngineLab, version: int = 4, address: str = "", port: int = 50053) -> socket.socket:
    listener = lab.bound(lab.gateway, UDP, address or lab.gateway.address(version, "eth0"), port)
    lab.tproxy.set_flags(listener, ONE_WAY)
    return listener


def run(lab: EngineLab, programs: Path, name: str, *arguments: str) -> Program:
    """Start a program and wait until it listens; whatever it fails with, it has said on its standard output."""
    words = " ".join((str(programs / name), *arguments))
    command = ["tproxyctl", "run", "--recvorigaddrs", "--", "sh", "-c", f"{words}; true"]
    program = lab.gateway.start(f"{name}{len(lab.lab.programs)}", command)
    until(lambda: "local" in program.log.read_text(), f"{name} listens")
    return program


def test_answer_of_an_unmodified_program_comes_from_where_the_datagram_was_sent(
    lab: EngineLab, datapath: str, programs: Path
) -> None:
    program = run(lab, programs, "udp_listener", lab.gateway.address(4, "eth0"), "50053")
    client = lab.bound(lab.client, UDP, lab.client.address(), 40000)
    client.sendto(b"who are you?", (FOREIGN[4], 5353))
    data, peer = client.recvfrom(100)
    assert (data, peer) == (b"who are you?", (FOREIGN[4], 5353))
    assert program.wait(PATIENCE) == 0
    told = program.log.read_text()
    assert f"source {lab.client.address()}:40000" in told
    assert f"destination {FOREIGN[4]}:5353" in told
    assert lab.reasons("PREROUTING")["unidir"] == 1
    assert lab.reasons("POSTROUTING")["sockref"] == 1


def test_next_datagram_of_a_peer_goes_to_the_socket_that_was_made_for_it(lab: EngineLab, datapath: str) -> None:
    listener = one_way_listener(lab)
    known, other = lab.open(lab.client, UDP), lab.open(lab.client, UDP)
    known.sendto(b"first", (FOREIGN[4], 5353))
    _, peer = listener.recvfrom(10)
    special = lab.bound(lab.gateway, UDP, lab.gateway.address(4, "eth0"))
    lab.tproxy.assign(special, FOREIGN[4], 5353)
    lab.tproxy.connect(special, *peer)
    lab.tproxy.set_flags(special, Flag.ESTABLISHED)

    def converse(number: int) -> None:
        known.sendto(b"to special", (FOREIGN[4], 5353))
        assert special.recvfrom(10) == (b"to special", peer)
        special.sendto(b"%d" % number, peer)
        assert known.recvfrom(10) == (b"%d" % number, (FOREIGN[4], 5353))

    for number in range(3):
        converse(number)
    if datapath == "kernel":  # once the engine knows of the connection
        before = lab.queued()
        for number in range(3, 6):
            converse(number)
        assert lab.queued() == before
    other.sendto(b"other", (FOREIGN[4], 5353))
    assert listener.recvfrom(10)[0] == b"other"
    special.close()
    until(lambda: len(lab.ask("sockrefs")) == 1, "unassigned")
    known.sendto(b"again", (FOREIGN[4], 5353))
    assert listener.recvfrom(10)[0] == b"again"


@versions
@pytest.mark.parametrize("is_wildcard", [False, True], ids=["address", "wildcard"])
def test_no_state_is_kept_of_a_one_way_redirect(lab: EngineLab, datapath: str, version: int, is_wildcard: bool) -> None:
    listener = one_way_listener(lab, version, ANY[version] if is_wildcard else "")
    client = lab.open(lab.client, UDP, version)
    for number in range(3):
        client.sendto(b"%d" % number, (FOREIGN[version], 5000 + number))
        data, peer = listener.recvfrom(10)
        assert (data, peer[1]) == (b"%d" % number, client.getsockname()[1])
    assert lab.reasons("PREROUTING") == {"unidir": 3}
    assert lab.ask("connections") == []
    if datapath == "kernel":
        assert lab.tracked("udp") == []
    listener.sendto(b"!", peer)
    data, answered_by = client.recvfrom(10)
    assert answered_by[:2] == (lab.gateway.address(version, "eth0"), 50053), "it came from the listener's own address"


def test_ipv6_socket_for_both_families_is_one_for_ipv4_too(lab: EngineLab) -> None:
    listener = lab.open(lab.gateway, UDP, 6)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", 50053))
    lab.tproxy.set_flags(listener, ONE_WAY)
    lab.open(lab.client, UDP).sendto(b"4", (FOREIGN[4], 5000))
    lab.open(lab.client, UDP, 6).sendto(b"6", (FOREIGN[6], 5000))
    assert {listener.recv(10), listener.recv(10)} == {b"4", b"6"}
    assert lab.reasons("PREROUTING") == {"unidir": 2}


def test_setting_the_flags_ends_what_was_redirected_before_and_closing_ends_the_flags(lab: EngineLab) -> None:
    listener = lab.bound(lab.gateway, UDP, lab.gateway.address(4, "eth0"), 50053)
    client, other = lab.open(lab.client, UDP), lab.open(lab.client, UDP)

    def answered(client: socket.socket) -> str:
        client.sendto(b"?", (FOREIGN[4], 5353))
        data, peer = listener.recvfrom(10)
        listener.sendto(data, peer)
        answered_by: str = client.recvfrom(10)[1][0]
        return answered_by

    assert answered(client) == FOREIGN[4], "a redirect is a mapping"
    lab.tproxy.set_flags(listener, ONE_WAY)
    assert answered(client) == lab.gateway.address(4, "eth0")
    listener.close()
    until(lambda: not lab.ask("sockrefs"), "the closed listener is forgotten")
    listener = lab.bound(lab.gateway, UDP, lab.gateway.address(4, "eth0"), 50053)
    assert answered(other) == FOREIGN[4]


def test_listener_is_among_the_sockrefs_and_other_calls_on_it_find_none(lab: EngineLab) -> None:
    listener = one_way_listener(lab)
    [entry] = lab.ask("sockrefs")
    assert entry["local"] == {"address": lab.gateway.address(4, "eth0"), "port": 50053}
    assert entry["foreign"] == {"address": "0.0.0.0", "port": 0}
    assert entry["flags"] == ["LISTEN", "UNIDIR"]
    for call in (
        lab.tproxy.query,
        lab.tproxy.flags,
        lab.tproxy.alloc,
        lab.tproxy.unassign,
        lambda sock: lab.tproxy.set_flags(sock, Flag.LISTEN),
    ):
        with pytest.raises(FileNotFoundError):
            call(listener)
    assert lab.ask("sockrefs") == [entry]
    assert lab.ask("counters")["sockrefs"] == 1


def test_traffic_of_connections_passes_beside_a_listener(tmp_path: Path, datapath: str) -> None:
    """A rule for all of UDP: answers to the gateway's own questions match it too, but they are nothing new."""
    rule = "-A PREROUTING -p udp -j TPROXY --on-port 50053"
    with engine_lab(tmp_path, (rule,), datapath) as lab:
        listener = one_way_listener(lab, 4, ANY[4])
        server = lab.bound(lab.server, UDP, lab.server.address(), 53)
        asking = lab.bound(lab.gateway, UDP, lab.gateway.address(4, "eth1"), 6000)
        lab.tproxy.assign(asking, lab.client.address(), 6000)
        lab.tproxy.set_flags(asking, Flag.CONNECT)
        for sock in (lab.open(lab.gateway, UDP), asking):
            for _ in range(3):
                sock.sendto(b"question", (lab.server.address(), 53))
                _, peer = server.recvfrom(10)
                server.sendto(b"answer", peer)
                assert sock.recvfrom(10) == (b"answer", (lab.server.address(), 53))
        assert peer == (lab.client.address(), 6000)
        lab.open(lab.client, UDP).sendto(b"new", (FOREIGN[4], 1))
        assert listener.recv(10) == b"new"


def test_other_rules_of_the_same_chain_make_connections_as_always(tmp_path: Path, datapath: str) -> None:
    with engine_lab(tmp_path, (), datapath) as lab:
        for text in (
            "-N own",
            "-A PREROUTING -i eth0 -p udp -j own",
            "-A own -p udp --dport 5353 -j TPROXY --on-port 50053",
            "-A own -p udp --dport 53 -j TPROXY --on-port 50054",
        ):
            lab.rules(*text.split())
        one_way_listener(lab)
        proxy = lab.bound(lab.gateway, UDP, lab.gateway.address(4, "eth0"), 50054)
        server = lab.bound(lab.server, UDP, lab.server.address(), 54)
        for answering, port in ((proxy, 53), (server, 54)):
            client = lab.open(lab.client, UDP)
            for number in range(3):
                client.sendto(b"%d" % number, (lab.server.address(), port))
                data, peer = answering.recvfrom(10)
                assert data == b"%d" % number
                answering.sendto(b"answer", peer)
                assert client.recvfrom(10) == (b"answer", (lab.server.address(), port))
        assert lab.reasons("PREROUTING")["redirect"] == 1
        counted = lab.gateway.run(["tproxyctl", "-L", "own", "-nvx"]).stdout.splitlines()[2:]
        assert [line.split()[0] for line in counted] == ["0", "1"]
        [rule] = lab.gateway.run(["tproxyctl", "-L", "PREROUTING", "-nvx"]).stdout.splitlines()[2:]
        assert rule.split()[0] == "2", "the first datagram of each connection"


def test_own_datagrams_are_redirected_one_way_at_output(tmp_path: Path, datapath: str, programs: Path) -> None:
    rule = "-A OUTPUT -p udp -m udp --dport 5353 -j TPROXY --on-port 50053"
    with engine_lab(tmp_path, (rule,), datapath) as lab:
        program = run(lab, programs, "udp_listener", "127.0.0.1", "50053")
        asking = lab.bound(lab.gateway, UDP, "127.0.0.1")
        asking.sendto(b"who?", ("127.0.0.9", 5353))
        assert asking.recvfrom(10) == (b"who?", ("127.0.0.9", 5353))
        assert program.wait(PATIENCE) == 0
        assert "destination 127.0.0.9:5353" in program.log.read_text()
        assert lab.reasons("OUTPUT")["unidir"] == 1
        until(lambda: lab.ask("connections") == [], "no state but the answer's, which went with its socket")


@pytest.mark.parametrize("address", ["10.0.0.2", "0.0.0.0"], ids=["address", "wildcard"])
def test_program_is_told_both_original_addresses_of_a_mapped_datagram(
    lab: EngineLab, programs: Path, address: str
) -> None:
    """The source too: as the two mappings would look alike to the proxy, the second has its source port moved."""
    client = lab.bound(lab.client, UDP, lab.client.address(), 40000)
    for port in (5000, 5001):
        program = run(lab, programs, "udp_origin", address, "50053")
        client.sendto(b"?", (FOREIGN[4], port))
        assert program.wait(PATIENCE) == 0
        told = program.log.read_text()
        assert f"source {lab.client.address()}:40000" in told
        assert f"destination {FOREIGN[4]}:{port}" in told


def test_program_on_every_address_is_told_both_original_addresses_of_a_one_way_datagram(
    lab: EngineLab, programs: Path
) -> None:
    program = run(lab, programs, "udp_listener", "0.0.0.0", "50053")
    lab.bound(lab.client, UDP, lab.client.address(), 40000).sendto(b"?", (FOREIGN[4], 5353))
    assert program.wait(PATIENCE) == 0
    told = program.log.read_text()
    assert f"source {lab.client.address()}:40000" in told
    assert f"destination {FOREIGN[4]}:5353" in told
    assert "ASSIGN: EINVAL" in told, "bound to no definite address"


@versions
@pytest.mark.parametrize("is_one_way", [False, True], ids=["mapping", "one-way"])
def test_python_is_told_the_original_addresses(lab: EngineLab, version: int, is_one_way: bool) -> None:
    """Of datagrams that wait in the socket together, from one port of one peer to several destinations."""
    listener = lab.bound(lab.gateway, UDP, ANY[version], 50053)
    if is_one_way:
        lab.tproxy.set_flags(listener, ONE_WAY)
    client = lab.open(lab.client, UDP, version)
    client.bind((lab.client.address(version), 40000))
    ports = [5000, 5001, 5000, 5002]
    for port in ports:
        client.sendto(b"the same", (FOREIGN[version], port))
    told = []
    for _ in ports:
        data, _, original = lab.tproxy.receive_original(listener)
        assert data == b"the same"
        assert original is not None
        assert str(original.source) == endpoint(lab.client.address(version), 40000)
        told.append(str(original.destination))
    if not is_one_way:
        told.sort()  # one of a known connection may overtake the first of a new one
        ports = sorted(ports)
    assert told == [endpoint(FOREIGN[version], port) for port in ports]
    direct = client if is_one_way else lab.bound(lab.client, UDP, lab.client.address(version), 40001)
    direct.sendto(b"the same", (lab.gateway.address(version, "eth0"), 50053))
    data, peer, original = lab.tproxy.receive_original(listener)
    assert (data, str(peer), original) == (b"the same", endpoint(*direct.getsockname()[:2]), None)


@pytest.mark.parametrize("flags", [Flag.LISTEN, ONE_WAY], ids=["mapping", "one-way"])
def test_owner_of_a_foreign_address_is_told_it(lab: EngineLab, flags: Flag) -> None:
    listener = lab.bound(lab.gateway, UDP, lab.gateway.address(4, "eth0"), 7000)
    lab.tproxy.assign(listener, FOREIGN[4], 53)
    lab.tproxy.set_flags(listener, flags)
    client = lab.bound(lab.client, UDP, lab.client.address(), 40000)
    for _ in range(2):
        client.sendto(b"?", (FOREIGN[4], 53))
        _, peer, original = lab.tproxy.receive_original(listener)
        assert original is not None
        assert str(peer) == str(original.source) == endpoint(lab.client.address(), 40000)
        assert str(original.destination) == endpoint(FOREIGN[4], 53)


def endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
