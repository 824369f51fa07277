"""Expectations, traces and ladders on live traffic through a gateway that translates or relays."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scapy.utils import RawPcapNgReader
from wires import Chain, chain, wire

from testbed.capture import CaptureError, CaptureSession
from testbed.checksums import checksum_errors
from testbed.connections import Connection, connections
from testbed.expect import ExpectationError, Watch
from testbed.ladder import ladder
from testbed.trace import trace

pytestmark = pytest.mark.lab

TRANSLATION = """
table inet lab {
    chain before { type nat hook prerouting priority -100
        tcp dport 8080 dnat ip to 10.8.2.2:80
        tcp dport 8080 dnat ip6 to [fd08:2::2]:80
    }
    chain after { type nat hook postrouting priority 100
        oifname eth1 snat ip to 10.8.2.1
        oifname eth1 snat ip6 to fd08:2::1
    }
}
"""
REDIRECTION = """
table inet lab {
    chain before { type nat hook prerouting priority -100
        tcp dport 80 redirect to :50080
    }
}
"""
SO_ORIGINAL_DST = 80
PATIENCE = 10.0  # seconds
REQUEST, ANSWER = b"GET /\r\n\r\n", b"x" * 200_000

FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])


@pytest.fixture
def nodes() -> Iterator[Chain]:
    with chain() as built:
        yield built


@pytest.fixture
def session(nodes: Chain, tmp_path: Path) -> Iterator[CaptureSession]:
    with CaptureSession(nodes.points, tmp_path) as running:
        yield running


def receive(sock: socket.socket, amount: int) -> bytes:
    """That many bytes, or fewer when the other end closes."""
    received = b""
    while len(received) < amount and (part := sock.recv(amount - len(received))):
        received += part
    return received


def serve(listener: socket.socket) -> None:
    """Answer one request; the client closes first."""
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(PATIENCE)
        receive(connection, len(REQUEST))
        connection.sendall(ANSWER)
        assert connection.recv(1) == b""


def relay(listener: socket.socket, nodes: Chain) -> None:
    """Pass one request and its answer on to where the client wanted to go."""
    inward, _ = listener.accept()
    port, address = struct.unpack("!2xH4s8x", inward.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16))
    outward = nodes.gateway.socket(socket.AF_INET, socket.SOCK_STREAM)
    with inward, outward:
        for end in (inward, outward):
            end.settimeout(PATIENCE)
        outward.connect((socket.inet_ntoa(address), port))
        outward.sendall(receive(inward, len(REQUEST)))
        inward.sendall(receive(outward, len(ANSWER)))
        assert inward.recv(1) == b""


@contextlib.contextmanager
def listening(sock: socket.socket, port: int, work: Callable[[], None]) -> Iterator[None]:
    """A server in a thread, for one connection."""
    thread = threading.Thread(target=work, daemon=True)
    with sock:
        sock.settimeout(PATIENCE)
        sock.bind(("", port))
        sock.listen()
        thread.start()
        yield
        thread.join(PATIENCE)
        assert not thread.is_alive()


def fetch(nodes: Chain, family: socket.AddressFamily, address: tuple[str, int]) -> None:
    """A request to a server, by way of the gateway."""
    listener = nodes.server.socket(family, socket.SOCK_STREAM)
    with listening(listener, 80, lambda: serve(listener)):
        _request(nodes, family, address)


def _request(nodes: Chain, family: socket.AddressFamily, address: tuple[str, int]) -> None:
    with nodes.client.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(PATIENCE)
        client.connect(address)
        client.sendall(REQUEST)
        assert receive(client, len(ANSWER)) == ANSWER


def the_connection(session: CaptureSession) -> Connection:
    session.settle()
    (connection,) = connections(trace(session.frames()))
    return connection


@FAMILIES
def test_translation_changes_addresses_and_ports_and_nothing_else(
    nodes: Chain, session: CaptureSession, family: socket.AddressFamily
) -> None:
    nodes.load_rules(TRANSLATION)
    is_v4 = family is socket.AF_INET
    gateway, net = ("10.8.1.1", "ip") if is_v4 else ("fd08:1::1", "ipv6")
    watch = Watch(session)
    watch.mark()
    fetch(nodes, family, (gateway, 8080))
    changed = {f"{net}.src", f"{net}.dst", "tcp.dport"}
    pairs = watch.expect_same({"tcp.dport": 8080}, at=("client:eth0", "server:eth0"), changed=changed)
    assert len(pairs) >= 4
    watch.expect_conversations(
        "client:eth0", [f"tcp 10.8.1.2 > {gateway}:8080" if is_v4 else "tcp fd08:1::2 > [fd08:1::1]:8080"]
    )
    watch.expect_conversations(
        "server:eth0", ["tcp 10.8.2.1 > 10.8.2.2:80" if is_v4 else "tcp fd08:2::1 > [fd08:2::2]:80"]
    )
    watch.expect_sequence(
        ("client:eth0", {"tcp.flags": "S"}),
        ("server:eth0", {"tcp.flags": "S"}),
        ("client:eth0", {"tcp.flags": "SA", "net.src": gateway}),
    )
    assert [error for frame in session.frames() for error in checksum_errors(frame)] == []


@FAMILIES
def test_every_packet_of_a_translated_connection_is_followed_over_all_points(
    nodes: Chain, session: CaptureSession, family: socket.AddressFamily
) -> None:
    nodes.load_rules(TRANSLATION)
    fetch(nodes, family, ("10.8.1.1" if family is socket.AF_INET else "fd08:1::1", 8080))
    connection = the_connection(session)
    (leg,) = connection.legs
    ways = {leg.is_forward(journey): journey.points for journey in leg.journeys}
    assert ways == {True: session.points, False: tuple(reversed(session.points))}
    assert {journey.points for journey in leg.journeys} == set(ways.values())
    drawn = ladder(connection, session.points, 120).plain
    assert "✗" not in drawn
    assert f"{'10.8.2.1' if family is socket.AF_INET else '[fd08:2::1]'}" in drawn


def test_a_relayed_connection_is_drawn_as_two_legs(nodes: Chain, session: CaptureSession) -> None:
    nodes.load_rules(REDIRECTION)
    listener = nodes.gateway.socket(socket.AF_INET, socket.SOCK_STREAM)
    with listening(listener, 50080, lambda: relay(listener, nodes)):
        fetch(nodes, socket.AF_INET, ("10.8.2.2", 80))
    connection = the_connection(session)
    assert [(leg.initiator.split(":")[0], leg.responder) for leg in connection.legs] == [
        ("10.8.1.2", "10.8.2.2:80"),
        ("10.8.2.1", "10.8.2.2:80"),
    ]
    lines = ladder(connection, session.points, 120).plain.splitlines()
    assert lines[0].endswith("in 2 legs")
    assert lines[1].endswith("at client:eth0, gateway:eth0")
    assert lines[2].endswith("at gateway:eth1, server:eth0")


def test_a_frame_that_comes_after_the_expectation_was_made_is_seen(nodes: Chain, session: CaptureSession) -> None:
    watch = Watch(session)
    watch.mark()
    timer = threading.Timer(0.1, _send, args=(nodes, b"later"))
    timer.start()
    (frame,) = watch.expect("server:eth0", lambda udp, raw: udp.dport == 9 and raw.load == b"later", count=1)
    timer.join()
    assert not frame.outgoing


def _send(nodes: Chain, payload: bytes) -> None:
    with nodes.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(payload, ("10.8.2.2", 9))


def test_a_failure_shows_where_the_packet_was_seen_instead_and_how_its_connection_went(
    nodes: Chain, session: CaptureSession
) -> None:
    nodes.load_rules("table ip lab { chain c { type filter hook forward priority 0; udp dport 9 drop; }\n }")
    watch = Watch(session)
    watch.mark()
    _send(nodes, b"dropped")
    with pytest.raises(ExpectationError) as caught:
        watch.expect("server:eth0", {"net.src": "10.8.1.2", "udp.dport": 9}, within=0.1)
    text = str(caught.value)
    assert text.startswith("expected at server:eth0 within 0.1 s: 1 frame or more with net.src 10.8.1.2, udp.dport 9\n")
    assert ", 0 of them as expected\n" in text
    assert "such frames were seen at gateway:eth0: 1, the first +" in text
    assert "  gateway:eth0: udp 10.8.1.2 > 10.8.2.2:9\n  gateway:eth1: none\n" in text
    assert text.endswith(f"capture file: {session.path}")


def test_frames_that_expectations_were_about_have_comments_in_the_file(nodes: Chain, tmp_path: Path) -> None:
    with CaptureSession(nodes.points, tmp_path) as session:
        _send(nodes, b"hello")
        Watch(session).expect("server:eth0", {"udp.dport": 9})
    with RawPcapNgReader(str(session.path)) as reader:
        comments = [(meta.ifname, meta.comments) for _, meta in reader if meta.comments]
    wording = b"satisfied: expected at server:eth0 within 2 s: 1 frame or more with udp.dport 9"
    assert comments == [(b"server:eth0", [wording])]


def test_absence_is_not_believed_of_an_interface_that_is_down(tmp_path: Path) -> None:
    with wire() as link, CaptureSession(link.points, tmp_path) as session:
        Watch(session).expect_none("left:eth0", {"udp.dport": 9}, during=0.05)
        link.set_link("down")
        with pytest.raises(CaptureError, match="left:eth0 is not capturing"):
            Watch(session).expect_none("left:eth0", {"udp.dport": 9}, during=0.05)


def test_nothing_is_believed_of_a_capture_that_lost_frames(tmp_path: Path) -> None:
    send = ctypes.PyDLL(None).send  # keeps the interpreter's lock, so that the reader cannot help
    with wire() as link, link.udp_sender() as sender, CaptureSession(link.points, tmp_path, ring_bytes=1) as session:
        for _ in range(5000):
            send(sender.fileno(), b"x" * 1400, 1400, 0)
        with pytest.raises(CaptureError, match=r"right:eth0 lost \d+ frames"):
            Watch(session).expect("right:eth0", {"udp.dport": 9})
        with pytest.raises(CaptureError, match=r"right:eth0 lost \d+ frames"):
            Watch(session).expect_none("right:eth0", {"udp.dport": 10}, during=0.05)
