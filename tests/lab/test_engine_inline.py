"""The engine on live traffic, datapath inline: client - gateway - server, real sockets, captures and counters."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_lab import PATIENCE, until
from scapy.layers import inet
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw, fuzz

from nfq_engine.client import ControlError, Flag, Tproxy
from testbed.lab import Lab, LabError, NodeHandle
from testbed.process import ServiceError
from testbed.topology import Readiness
from testbed.topology_file import loads

pytestmark = pytest.mark.lab

TOPOLOGY = """
name: engine
nodes:
  client:
  gateway:
    kind: router
    engine:
      rules:
        - -A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080
        - -A PREROUTING -p udp -m udp --dport 80 -j TPROXY --on-port 50080
        - -A PREROUTING -p tcp -m tcp --dport 81 -j DROP
        - -A OUTPUT -p tcp -m tcp --dport 82 -j TPROXY --on-port 50082
  server:
links:
  - ends: [{node: client}, {node: gateway}]
  - ends: [{node: gateway}, {node: server}]
"""
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
FOREIGN = {4: "198.51.100.7", 6: "2001:db8::7"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}

versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(loads(TOPOLOGY), tmp_path) as running:
        yield running


@pytest.fixture
def tproxy(lab: Lab) -> Iterator[Tproxy]:
    with lab["gateway"].call(Tproxy) as client:
        yield client


def bound(
    node: NodeHandle, kind: int, version: int, address: str, port: int = 0, listen: bool = False
) -> socket.socket:
    sock = node.namespace.socket(FAMILY[version], kind)
    sock.settimeout(PATIENCE)
    sock.bind((address, port))
    if listen:
        sock.listen()
    return sock


def connect(node: NodeHandle, address: str, port: int, patience: float = PATIENCE) -> socket.socket:
    sock = node.namespace.socket(FAMILY[6 if ":" in address else 4], TCP)
    sock.settimeout(patience)
    try:
        sock.connect((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def control(lab: Lab, *arguments: str) -> Any:
    return json.loads(lab["gateway"].run(["tproxyctl", *arguments, "--json"]).stdout)


def reasons(lab: Lab, hook: str) -> dict[str, int]:
    hooks: dict[str, dict[str, int]] = control(lab, "counters")["hooks"]
    return hooks.get(hook, {})


def exchange(near: socket.socket, far: socket.socket, size: int) -> None:
    """Send `size` bytes each way at once over a TCP connection, and compare."""
    data = os.urandom(size)
    received: list[bytes] = []

    def answer() -> None:
        got = b""
        while len(got) < size:
            got += far.recv(1 << 16)
        received.append(got)
        far.sendall(got)

    thread = threading.Thread(target=answer)
    thread.start()
    near.sendall(data)
    back = b""
    while len(back) < size:
        back += near.recv(1 << 16)
    thread.join()
    assert received == [data]
    assert back == data


@versions
def test_redirected_connection_reaches_the_proxy_as_if_it_were_the_server(
    lab: Lab, tproxy: Tproxy, version: int
) -> None:
    client, server = lab["client"], lab["server"]
    with bound(lab["gateway"], TCP, version, "0.0.0.0" if version == 4 else "::", 50080, listen=True) as proxy:
        near = connect(client, server.address(version), 80)
        far, peer = proxy.accept()
        with near, far:
            exchange(near, far, 200_000)
            assert peer[0] == client.address(version)
            assert near.getpeername()[:2] == (server.address(version), 80)
            assert str(tproxy.original_destination(far)).rpartition(":")[2] == "80"
    assert reasons(lab, "PREROUTING")["redirect"] == 1
    assert lab.capture is not None
    lab.capture.settle()
    assert lab.capture.frames("server:eth0") == [
        frame for frame in lab.capture.frames("server:eth0") if frame.ip is None or frame.ip.tcp is None
    ], "nothing of it reaches the server"


@versions
@pytest.mark.parametrize("port", [0, 4711], ids=["port-picked", "port-given"])
def test_connection_from_a_foreign_address(lab: Lab, tproxy: Tproxy, version: int, port: int) -> None:
    gateway, client, server = lab["gateway"], lab["client"], lab["server"]
    with (
        bound(server, TCP, version, server.address(version), 8080, listen=True) as listener,
        bound(gateway, TCP, version, gateway.address(version, "eth1")) as near,
    ):
        tproxy.assign(near, client.address(version), port)
        tproxy.set_flags(near, Flag.CONNECT)
        near.connect((server.address(version), 8080))
        far, peer = listener.accept()
        with far:
            exchange(near, far, 200_000)
        assert peer[0] == client.address(version)
        assert peer[1] == (port or near.getsockname()[1]), "a free port is kept"
        assert tproxy.query(near).port == peer[1], "the picked port is written back"
        assert tproxy.flags(near) & Flag.APPLIED


@versions
@pytest.mark.parametrize("size", [10, 1400, 5000, 60_000])
def test_datagrams_to_a_foreign_address(lab: Lab, tproxy: Tproxy, version: int, size: int) -> None:
    """5000 and 60,000 bytes come in fragments, and are more than NetfilterQueue's own loop can take."""
    gateway, client = lab["gateway"], lab["client"]
    with (
        bound(gateway, UDP, version, gateway.address(version, "eth0"), 7007) as service,
        bound(client, UDP, version, client.address(version)) as asking,
    ):
        tproxy.assign(service, FOREIGN[version], 7)
        tproxy.set_flags(service, Flag.LISTEN)
        data = os.urandom(size)
        asking.sendto(data, (FOREIGN[version], 7))
        got, peer = service.recvfrom(1 << 16)
        service.sendto(got, peer)
        back, source = asking.recvfrom(1 << 16)
    assert back == data
    assert peer[0] == client.address(version)
    assert source[:2] == (FOREIGN[version], 7)


@versions
def test_connection_of_the_gateway_itself_is_redirected_once(lab: Lab, tproxy: Tproxy, version: int) -> None:
    gateway, server = lab["gateway"], lab["server"]
    with bound(gateway, TCP, version, LOOPBACK[version], 50082, listen=True) as proxy:
        near = connect(gateway, server.address(version), 82)
        far, peer = proxy.accept()
        with near, far:
            exchange(near, far, 200_000)
            assert peer[0] == gateway.address(version, "eth1")
            assert near.getpeername()[0] == server.address(version)
            assert tproxy.original_destination(far).port == 82
    assert reasons(lab, "OUTPUT")["redirect"] == 1
    assert not any(reasons(lab, "PREROUTING").values()), "what arrives on lo has been translated already"


@versions
def test_connection_over_lo_carries_segments_larger_than_a_queue_message(lab: Lab, version: int) -> None:
    gateway = lab["gateway"]
    with bound(gateway, TCP, version, LOOPBACK[version], 8082, listen=True) as listener:
        near = connect(gateway, LOOPBACK[version], 8082)
        far, _ = listener.accept()
        with near, far:
            exchange(near, far, 1_000_000)
    assert not reasons(lab, "OUTPUT").get("oversized")


def test_one_client_port_to_two_servers_through_one_proxy(lab: Lab, tproxy: Tproxy) -> None:
    """Both connections become client:port -> gateway:50080; the second gets another source port, there and back."""
    client, gateway, server = lab["client"], lab["gateway"], lab["server"]
    destinations = [server.address(4), gateway.address(4, "eth1")]
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(bound(gateway, TCP, 4, "0.0.0.0", 50080, listen=True))
        accepted = []
        for destination in destinations:
            near = stack.enter_context(client.namespace.socket(socket.AF_INET, TCP))
            near.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            near.settimeout(PATIENCE)
            near.bind((client.address(4), 40_000))
            near.connect((destination, 80))
            far, peer = proxy.accept()
            stack.enter_context(far)
            exchange(near, far, 10_000)
            accepted.append((peer, str(tproxy.original_destination(far))))
    assert [destination for _, destination in accepted] == [f"{address}:80" for address in destinations]
    assert accepted[0][0] == (client.address(4), 40_000)
    assert accepted[1][0][0] == client.address(4)
    assert accepted[1][0][1] != 40_000


def test_refused_redirect_looks_like_the_servers_refusal(lab: Lab) -> None:
    with pytest.raises(ConnectionRefusedError):
        connect(lab["client"], lab["server"].address(4), 80)


@versions
def test_port_unreachable_comes_from_the_server_it_was_sent_to(lab: Lab, version: int) -> None:
    """The gateway's ICMP error about a redirected datagram: its source and embedded destination are the server's."""
    client, server = lab["client"], lab["server"]
    with bound(client, UDP, version, client.address(version)) as asking:
        asking.connect((server.address(version), 80))
        asking.send(b"anybody there?")
        with pytest.raises(ConnectionRefusedError):
            asking.recv(100)
    assert lab.capture is not None
    lab.capture.settle()
    packets = [frame.ip for frame in lab.capture.frames("client:eth0") if frame.ip is not None]
    errors = [packet for packet in packets if packet.icmp is not None and packet.icmp.embedded is not None]
    assert [error.source for error in errors] == [server.address(version)]
    assert reasons(lab, "POSTROUTING")["icmp-translated"] == 1


def test_packets_with_nothing_to_change_come_to_the_queue_once(lab: Lab) -> None:
    """After a connection's first packets, those that POSTROUTING would leave alone do not come there any more."""
    client, server, gateway = lab["client"], lab["server"], lab["gateway"]
    with (
        bound(server, UDP, 4, server.address(4), 9000) as sink,
        bound(client, UDP, 4, client.address(4), 9001) as source,
    ):
        for number in range(25):
            source.sendto(number.to_bytes(4, "big"), (server.address(4), 9000))
            assert int.from_bytes(sink.recv(10), "big") == number
            if number == 4:  # the engine notes it when it has no packet to handle
                assert sum(reasons(lab, "POSTROUTING").values()) <= 5
    assert sum(reasons(lab, "PREROUTING").values()) == 25
    assert sum(reasons(lab, "POSTROUTING").values()) <= 5
    assert (
        "udp . 10.0.0.1 . 9001 . 10.0.1.2 . 9000" in gateway.run(["nft", "list", "table", "inet", "nfq_tproxy"]).stdout
    )


def test_port_used_again_is_translated_although_its_last_connection_was_not(lab: Lab, tproxy: Tproxy) -> None:
    gateway, client, server = lab["gateway"], lab["client"], lab["server"]
    peers = []
    with bound(server, TCP, 4, server.address(4), 8080, listen=True) as listener:
        for is_foreign in (False, True):
            near = bound(gateway, TCP, 4, gateway.address(4, "eth1"), 5555)
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closed by a reset
            if is_foreign:
                tproxy.assign(near, client.address(4))
                tproxy.set_flags(near, Flag.CONNECT)
            near.connect((server.address(4), 8080))
            far, peer = listener.accept()
            with far:
                exchange(near, far, 10_000)
                near.close()
                with pytest.raises(ConnectionResetError):
                    far.recv(1)
            peers.append(peer[0])
    assert peers == [gateway.address(4, "eth1"), client.address(4)]


def test_drop_rule_drops_and_counts(lab: Lab) -> None:
    with pytest.raises(TimeoutError):
        connect(lab["client"], lab["server"].address(4), 81, 0.2)
    assert reasons(lab, "PREROUTING")["rule-drop"] >= 1


def test_unrelated_traffic_is_forwarded_untouched(lab: Lab) -> None:
    client, server = lab["client"], lab["server"]
    with bound(server, TCP, 4, server.address(4), 8080, listen=True) as listener:
        near = connect(client, server.address(4), 8080)
        far, peer = listener.accept()
        with near, far:
            exchange(near, far, 100_000)
            assert peer == near.getsockname()
    assert reasons(lab, "PREROUTING")["no-mapping"] == 1
    assert "translated" not in {reason for reason, count in reasons(lab, "PREROUTING").items() if count}


def test_closed_socket_unassigns_itself(lab: Lab, tproxy: Tproxy) -> None:
    gateway = lab["gateway"]
    sock = bound(gateway, TCP, 4, gateway.address(4))
    tproxy.assign(sock, FOREIGN[4], 0)
    assert len(control(lab, "sockrefs")) == 1
    sock.close()
    until(lambda: control(lab, "sockrefs") == [], "unassigned")  # the kernel tells of it by a worker


def test_killed_owner_unassigns_too(lab: Lab) -> None:
    echo = ["python", "-m", "nfq_engine.relay", "udp-echo", "--local", "10.0.0.2:7007", "--foreign", "198.51.100.7:7"]
    program = lab["gateway"].start("echo", [*echo, "--notify-fd", "{notify_fd}"], Readiness(notify=True))
    assert [entry["foreign"]["address"] for entry in control(lab, "sockrefs")] == [FOREIGN[4]]
    program.kill()
    until(lambda: control(lab, "sockrefs") == [], "unassigned")
    lab.programs.pop(("gateway", "echo"))


BAD_CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("unknown call", {"call": "dance"}, "unknown call"),
    ("no call", {}, "unknown call"),
    ("call of the wrong type", {"call": ["rules"]}, "unknown call"),
    ("arguments missing", {"call": "rules"}, "malformed request"),
    ("arguments of the wrong type", {"call": "rules", "arguments": "-F"}, "malformed request"),
    ("a socket that did not come", {"call": "setsockopt", "argument": "00", "with_socket": True}, "none came with it"),
    ("not a number", {"call": "original-destination", "protocol": "x", "local": ["", 1], "peer": []}, "malformed"),
]


@pytest.mark.parametrize(("request_", "message"), [case[1:] for case in BAD_CALLS], ids=[case[0] for case in BAD_CALLS])
def test_bad_requests_are_told_and_change_nothing(
    lab: Lab, tproxy: Tproxy, request_: dict[str, Any], message: str
) -> None:
    before = lab["gateway"].run(["tproxyctl", "-S"]).stdout
    with pytest.raises(ControlError, match=message):
        tproxy.call(request_)
    assert lab["gateway"].run(["tproxyctl", "-S"]).stdout == before


def test_garbage_on_the_control_socket_harms_nobody(lab: Lab, tproxy: Tproxy) -> None:
    with lab["gateway"].namespace.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.settimeout(PATIENCE)
        raw.connect("\0nfq-tproxy")
        raw.sendall(b"\xff\x00{]\n" + b"[" * 5000 + b"\n" + b"[1]\n")
        answers = b""
        while answers.count(b"\n") < 3:
            answers += raw.recv(1 << 16)
        assert answers.count(b"not a request") == 3
    with lab["gateway"].namespace.socket(socket.AF_UNIX, socket.SOCK_STREAM) as endless:
        endless.settimeout(PATIENCE)
        endless.connect("\0nfq-tproxy")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012 - where it breaks is timing
            for _ in range(64):
                endless.sendall(b"x" * (1 << 16))
            endless.recv(1)
    assert tproxy.call({"call": "sockrefs"}) == {"sockrefs": []}


BAD_SOCKETS = [
    pytest.param(lambda: os.open(os.devnull, os.O_RDONLY), errno.ENOTSOCK, id="not-a-socket"),
    pytest.param(lambda: socket.socket(socket.AF_INET, TCP).detach(), errno.EINVAL, id="of-another-namespace"),
    pytest.param(lambda: socket.socket(socket.AF_UNIX, TCP).detach(), errno.EINVAL, id="unix"),
]


@pytest.mark.parametrize(("make", "expected"), BAD_SOCKETS)
def test_descriptors_that_cannot_be_assigned(lab: Lab, tproxy: Tproxy, make: Any, expected: int) -> None:
    descriptor = make()
    with os.fdopen(descriptor, "rb"), pytest.raises(OSError) as caught:  # noqa: PT011
        tproxy.setsockopt(descriptor, b"\x01\0\0\0" + socket.inet_aton(FOREIGN[4]) + b"\0\x07\0\0")
    assert caught.value.errno == expected


def test_unprivileged_callers_may_look_but_not_touch(lab: Lab) -> None:
    gateway = lab["gateway"]
    unprivileged = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--no-new-privs"]
    refused = gateway.run([*unprivileged, "tproxyctl", "-F"], check=False)
    assert refused.returncode == 1
    assert "CAP_NET_ADMIN" in refused.stderr
    assert gateway.run([*unprivileged, "tproxyctl", "counters"]).returncode == 0


def test_bad_rule_is_refused_by_name_and_changes_nothing(lab: Lab) -> None:
    gateway = lab["gateway"]
    before = gateway.run(["tproxyctl", "-S"]).stdout
    refused = gateway.run(
        ["tproxyctl", "-A", "PREROUTING", "-p", "tcp", "--dport", "80x", "-j", "TPROXY", "--on-port", "1"], check=False
    )
    assert refused.returncode == 1
    assert "80x" in refused.stderr
    assert gateway.run(["tproxyctl", "-S"]).stdout == before
    assert "-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080" in before


def test_second_engine_in_a_namespace_is_refused(lab: Lab) -> None:
    with pytest.raises(ServiceError, match="Address already in use"):
        lab["gateway"].start("second", ["tproxyd", "--notify-fd", "{notify_fd}"], Readiness(notify=True))
    assert control(lab, "counters")["connections"] == 0


def test_engine_that_ends_takes_its_table_along(lab: Lab) -> None:
    gateway = lab["gateway"]
    assert "nfq_tproxy" in gateway.run(["nft", "list", "tables"]).stdout
    program = lab.programs["gateway", "tproxyd"]
    program.stop()
    assert program.returncode == 0
    assert gateway.run(["nft", "list", "ruleset"]).stdout == ""
    with pytest.raises(LabError, match="no tproxy engine"):
        gateway.run(["tproxyctl", "counters"])


def test_killed_engine_is_replaced(lab: Lab) -> None:
    """While it is dead the queue is closed; the next engine takes the namespace over."""
    gateway, client, server = lab["gateway"], lab["client"], lab["server"]
    lab.programs["gateway", "tproxyd"].kill()
    with pytest.raises(TimeoutError):
        connect(client, server.address(4), 8080, 0.2)
    gateway.start("tproxyd", ["tproxyd", "--notify-fd", "{notify_fd}"], Readiness(notify=True))
    with bound(server, TCP, 4, server.address(4), 8080, listen=True):
        near = connect(client, server.address(4), 8080)
        near.close()


def test_fuzzed_packets_are_counted_and_none_is_stuck(lab: Lab) -> None:
    """Live: broken headers, lengths, flags and options; the engine answers as before and the queue is empty."""
    client, server, gateway = lab["client"], lab["server"], lab["gateway"]
    mac = json.loads(gateway.run(["ip", "-json", "link", "show", "eth0"]).stdout)[0]["address"]
    with client.call(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as raw:
        raw.bind(("eth0", 0))
        for number in range(300):
            network = inet.IP(dst=server.address(4)) if number % 2 else IPv6(dst=server.address(6))
            transport = fuzz(inet.TCP() if number % 3 else inet.UDP())
            packet = bytearray(bytes(Ether(dst=mac) / network / transport / Raw(os.urandom(number % 40))))
            if number % 5 == 0:
                packet[14 + number % 20] ^= 0xFF  # break the IP header as well
            with contextlib.suppress(OSError):  # a packet can be too broken for the link
                raw.send(bytes(packet))
    until(lambda: control(lab, "counters")["queue"]["waiting"] == 0, "nothing waits")
    values = control(lab, "counters")
    assert values["malformed"], "fuzzed headers are told apart from good ones"
    assert values["hooks"]["PREROUTING"].get("fault", 0) == 0
    test_unrelated_traffic_still_flows(lab)


def test_unrelated_traffic_still_flows(lab: Lab) -> None:
    client, server = lab["client"], lab["server"]
    with bound(server, TCP, 4, server.address(4), 8080, listen=True) as listener:
        near = connect(client, server.address(4), 8080)
        far, _ = listener.accept()
        with near, far:
            exchange(near, far, 10_000)
