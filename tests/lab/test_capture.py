"""Captures in real namespaces: nothing missed, nothing twice, nothing lost without saying so."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Dot1Q, Ether
from scapy.utils import RawPcapNgReader
from traffic_checks import tcpdump
from wires import Wire, routes, wait_until, wire

from testbed.capture import CaptureError, CapturePoint, CaptureSession
from testbed.checksums import checksum_errors
from testbed.frames import Frame
from testbed.netns import Namespace
from testbed.packet_ring import Captured
from testbed.pcapng import PcapngWriter

pytestmark = pytest.mark.lab

# Sends numbered datagrams at a steady rate: rate, amount.
STEADY = """
import socket, sys, time
rate, amount = int(sys.argv[1]), int(sys.argv[2])
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.connect(("10.9.0.2", 9))
began, sent = time.perf_counter(), 0
while sent < amount:
    due = min(amount, int((time.perf_counter() - began) * rate) + 1)
    while sent < due:
        sender.send(b"%08d" % sent)
        sent += 1
"""


@pytest.fixture
def link() -> Iterator[Wire]:
    """A wire whose right end takes datagrams on port 9, so that nobody complains about them."""
    with wire() as built, built.right.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(("10.9.0.2", 9))
        yield built


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _datagrams(session: CaptureSession, at: str) -> list[Frame]:
    """What went to port 9."""
    return [frame for frame in session.frames(at) if frame.ip is not None and frame.ip.destination_port == 9]


def _payloads(session: CaptureSession, at: str) -> list[bytes]:
    return [frame.ip.payload for frame in _datagrams(session, at) if frame.ip is not None]


def test_sees_what_is_sent_right_after_start_once_at_either_end(link: Wire, tmp_path: Path) -> None:
    expected = [b"%d" % number for number in range(50)]
    with link.udp_sender() as sender, CaptureSession(link.points, tmp_path) as session:
        for payload in expected:
            sender.send(payload)
        session.settle()
        assert _payloads(session, "left:eth0") == expected
        assert _payloads(session, "right:eth0") == expected
        assert all(frame.outgoing for frame in _datagrams(session, "left:eth0"))
        assert not any(frame.outgoing for frame in _datagrams(session, "right:eth0"))
        session.verify()


def test_both_directions_are_seen(link: Wire, tmp_path: Path) -> None:
    with CaptureSession(link.points, tmp_path) as session:
        with link.udp_sender(port=10) as sender:
            sender.send(b"nobody listens")
            with pytest.raises(ConnectionRefusedError):
                sender.recv(1)
        session.settle()
        ipv4 = [frame for frame in session.frames("left:eth0") if frame.ip and frame.ip.layout.version == 4]
        told = [str(frame).partition(" ")[2] for frame in ipv4 if frame.ip and frame.ip.icmp]
        assert told == ["left:eth0 in: 10.9.0.2 > 10.9.0.1 icmp port unreachable, about 10.9.0.1"]


def test_a_burst_is_complete_and_in_order(link: Wire, tmp_path: Path) -> None:
    expected = [b"%08d" % number for number in range(3000)]
    with link.udp_sender() as sender, CaptureSession(link.points, tmp_path) as session:
        for payload in expected:
            sender.send(payload)
        session.settle()
        assert _payloads(session, "right:eth0") == expected
        session.verify()


def test_keeps_up_with_50000_packets_a_second(link: Wire, tmp_path: Path) -> None:
    amount = 20_000
    with CaptureSession(link.points, tmp_path) as session:
        subprocess.run(
            [*_inside(link.left), sys.executable, "-c", STEADY, "50000", str(amount)], check=True, timeout=10
        )
        session.settle()
        session.verify()
        assert _payloads(session, "left:eth0") == [b"%08d" % number for number in range(amount)]
        assert len(_datagrams(session, "right:eth0")) == amount


def _inside(namespace: Namespace) -> list[str]:
    return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{namespace.fileno()}", "--"]


def test_a_lost_frame_is_an_error(link: Wire, tmp_path: Path) -> None:
    # Called through PyDLL, send keeps the interpreter's lock, and the reader cannot help the tiny ring.
    send = ctypes.PyDLL(None).send
    payload = b"x" * 1400
    with link.udp_sender() as sender, CaptureSession(link.points, tmp_path, ring_bytes=1) as session:
        for _ in range(5000):
            send(sender.fileno(), payload, len(payload), 0)
        session.settle()
        lost = session.statistics()["right:eth0"].dropped
        assert lost > 0
        assert session.statistics()["right:eth0"].seen + lost >= 5000
        with pytest.raises(CaptureError, match=rf"right:eth0 lost {lost} frames, beside \d+ that it saw"):
            session.verify()
    with pytest.raises(CaptureError, match=f"right:eth0 lost {lost} frames"):
        session.verify()


def test_a_clock_that_is_set_back_is_an_error(link: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that come then may be older than a mark, and nobody would look at them."""
    with CaptureSession(link.points, tmp_path) as session:
        session.verify()
        now = time.time_ns
        monkeypatch.setattr("testbed.capture.time.time_ns", lambda: now() - 3_000_000_000)
        with pytest.raises(CaptureError, match=r"the clock was set back by (2\.99|3\.00)\d s"):
            session.verify()
        monkeypatch.undo()


def test_vlan_tags_are_where_they_were_on_the_wire(link: Wire, tmp_path: Path) -> None:
    tagged = bytes(Ether(dst="ff:ff:ff:ff:ff:ff") / Dot1Q(vlan=7) / IP(src="10.9.0.1", dst="10.9.0.2") / UDP(dport=9))
    with link.raw_sender() as sender, CaptureSession(link.points, tmp_path) as session:
        sender.send(tagged)
        session.settle()
        # The kernel announces its multicast groups, untagged, at times of its own.
        sent, received = ([frame for frame in session.frames(at) if frame.vlans] for at in session.points)
        assert [frame.data for frame in sent] == [tagged]
        assert [frame.data for frame in received] == [tagged]
        assert received[0].vlans == (7,)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_a_checksum_left_to_the_device_is_known_and_judged_as_half(
    link: Wire, tmp_path: Path, family: socket.AddressFamily
) -> None:
    address = ("10.9.0.2", 80) if family is socket.AF_INET else ("fd09::2", 80)
    with (
        link.right.socket(family, socket.SOCK_STREAM) as server,
        link.left.socket(family, socket.SOCK_STREAM) as client,
        CaptureSession(link.points, tmp_path) as session,
    ):
        server.bind(address)
        server.listen()
        client.connect(address)
        client.send(b"half" * 1000)
        session.settle()
        segments = [frame for frame in session.frames() if frame.ip is not None and frame.ip.tcp is not None]
        assert len(segments) >= 8
        assert all(frame.half_checksum for frame in segments)
        assert [checksum_errors(frame) for frame in segments] == [[]] * len(segments)


def test_a_whole_checksum_is_judged_as_whole(link: Wire, tmp_path: Path) -> None:
    right = Ether(dst="ff:ff:ff:ff:ff:ff") / IP(src="10.9.0.1", dst="10.9.0.2") / UDP(dport=9) / b"right"
    wrong = Ether(dst="ff:ff:ff:ff:ff:ff") / IP(src="10.9.0.1", dst="10.9.0.2") / UDP(dport=9, chksum=0x1234) / b"wrong"
    with link.raw_sender() as sender, CaptureSession(link.points, tmp_path) as session:
        sender.send(bytes(right))
        sender.send(bytes(wrong))
        session.settle()
        right_frame, wrong_frame = _datagrams(session, "right:eth0")
        assert not right_frame.half_checksum
        assert checksum_errors(right_frame) == []
        assert len(checksum_errors(wrong_frame)) == 1
        assert checksum_errors(wrong_frame)[0].startswith("UDP checksum is 0x1234, should be 0x")


def test_loopback_shows_each_packet_once(link: Wire, tmp_path: Path) -> None:
    point = CapturePoint("left", "lo", link.left)
    with link.left.socket(socket.AF_INET, socket.SOCK_DGRAM) as own, CaptureSession([point], tmp_path) as session:
        own.bind(("127.0.0.1", 9))
        own.sendto(b"to myself", ("127.0.0.1", 9))
        session.settle()
        assert _payloads(session, "left:lo") == [b"to myself"]


def _down(link: Wire) -> list[CapturePoint]:
    link.set_link("down")
    return link.points


def _with_tunnel(link: Wire) -> list[CapturePoint]:
    # Entered, since a tunnel device is made by opening a file.
    with link.left.entered(), routes(link.left) as netlink:
        netlink.link("add", ifname="tun0", kind="tuntap", mode="tun")
        netlink.link("set", index=netlink.link_lookup(ifname="tun0")[0], state="up")
    return [CapturePoint("left", "tun0", link.left)]


NEEDS_TUN = pytest.mark.skipif(
    not os.access("/dev/net/tun", os.R_OK | os.W_OK),
    reason="this user may not open /dev/net/tun: there is no device here that carries no Ethernet frames",
)
REFUSED = {
    "no such interface": (
        lambda link: [*link.points, CapturePoint("right", "eth7", link.right)],
        "no capture at right:eth7: there is no such interface",
    ),
    "interface down": (_down, "no capture at left:eth0: the interface is down"),
    "not Ethernet": (_with_tunnel, "no capture at left:tun0: frames of hardware type 65534 are no Ethernet frames"),
    "given twice": (lambda link: link.points + link.points, "a capture point is given twice"),
}


@pytest.mark.parametrize(
    ("points", "message"),
    [
        pytest.param(*case, id=name, marks=[NEEDS_TUN] if name == "not Ethernet" else [])
        for name, case in REFUSED.items()
    ],
)
def test_a_capture_that_cannot_be_made_is_refused_and_leaves_nothing(
    link: Wire, tmp_path: Path, points: Callable[[Wire], list[CapturePoint]], message: str
) -> None:
    before = _open_files()
    with pytest.raises(CaptureError) as caught:
        CaptureSession(points(link), tmp_path).start()
    assert str(caught.value) == message
    assert _open_files() == before


def test_nothing_is_left_open_after_the_end(link: Wire, tmp_path: Path) -> None:
    before = _open_files()
    for _ in range(3):
        with CaptureSession(link.points, tmp_path):
            pass
    assert _open_files() == before


def test_a_capture_that_was_never_armed_is_an_error(link: Wire, tmp_path: Path) -> None:
    session = CaptureSession(link.points, tmp_path)
    for ask in (session.verify, session.frames, session.settle, session.statistics):
        with pytest.raises(CaptureError, match="never armed"):
            ask()


def test_an_unknown_point_is_named(link: Wire, tmp_path: Path) -> None:
    with (
        CaptureSession(link.points, tmp_path) as session,
        pytest.raises(CaptureError, match="no capture at 'left:eth9', only at left:eth0, right:eth0"),
    ):
        session.frames("left:eth9")


def test_an_interface_that_goes_down_is_an_error_until_it_is_up_again(link: Wire, tmp_path: Path) -> None:
    with link.udp_sender() as sender, CaptureSession(link.points, tmp_path) as session:
        link.set_link("down")
        assert not session.statistics()["left:eth0"].armed
        with pytest.raises(CaptureError, match="left:eth0 is not capturing: the interface is down or gone"):
            session.verify()
        session.verify(["right:eth0"])
        link.set_link("up")
        session.verify()
        wait_until(lambda: _gets_through(sender), "the left end has its route again")
        wait_until(lambda: b"back" in _payloads(session, "right:eth0"), "the captures see frames again")


def test_an_interface_that_has_another_name_now_is_an_error(link: Wire, tmp_path: Path) -> None:
    with CaptureSession(link.points, tmp_path) as session:
        with routes(link.left) as netlink:
            index = netlink.link_lookup(ifname="eth0")[0]
            netlink.link("set", index=index, state="down")
            netlink.link("set", index=index, ifname="old0", state="up")
        with pytest.raises(CaptureError, match=r"left:eth0 is not capturing: .*another name"):
            session.verify()
        session.verify(["right:eth0"])


def test_a_comment_longer_than_the_file_can_hold_is_cut(link: Wire, tmp_path: Path) -> None:
    with link.udp_sender() as sender, CaptureSession(link.points, tmp_path) as session:
        sender.send(b"x")
        session.settle()
        session.annotate(session.frames("left:eth0")[0], "x" + "→" * 30_000)
    comments = [comment for _, about in _read_back(session.path) for comment in about.comments or []]
    assert [comment.decode() for comment in comments] == ["x" + "→" * 21_844]


def _gets_through(sender: socket.socket) -> bool:
    try:
        return sender.send(b"back") == 4
    except OSError:
        return False


def test_frames_can_be_waited_for_while_the_capture_runs(link: Wire, tmp_path: Path) -> None:
    with link.udp_sender() as sender, CaptureSession(link.points, tmp_path) as session:
        sender.send(b"first")
        session.settle()
        mark, amount = session.mark(), len(session.frames())
        sender.send(b"second")
        session.wait(amount, timeout=2)
        session.settle()
        later = session.frames("right:eth0", since=mark)
        assert [frame.ip.payload for frame in later if frame.ip and frame.ip.destination_port == 9] == [b"second"]


def test_frames_and_statistics_stay_after_the_end(link: Wire, tmp_path: Path) -> None:
    with link.udp_sender() as sender, CaptureSession(link.points, tmp_path) as session:
        sender.send(b"the last words")
    assert _payloads(session, "right:eth0") == [b"the last words"]
    assert session.statistics()["right:eth0"].armed
    session.verify()
    session.stop()


def test_the_file_is_whole_while_the_capture_runs(link: Wire, tmp_path: Path) -> None:
    with link.udp_sender() as sender, CaptureSession(link.points, tmp_path) as session:
        sender.send(b"hello")
        session.settle()
        frames = session.frames()
        # One that comes meanwhile is in the file first.
        assert [data for data, _ in _read_back(session.path)[: len(frames)]] == [frame.data for frame in frames]


def test_the_file_is_in_the_order_of_time_with_names_and_comments(link: Wire, tmp_path: Path) -> None:
    with link.udp_sender() as sender, CaptureSession(link.points, tmp_path) as session:
        for number in range(20):
            sender.send(b"%d" % number)
        session.settle()
        chosen = _datagrams(session, "right:eth0")[7]
        session.annotate(chosen, "matched: the eighth, für alle")
        session.annotate(chosen, "and again")
    frames = session.frames()
    packets = _read_back(session.path)
    assert [data for data, _ in packets] == [frame.data for frame in frames]
    assert [meta.ifname.decode() for _, meta in packets] == [frame.point for frame in frames]
    assert [meta.direction for _, meta in packets] == [2 if frame.outgoing else 1 for frame in frames]
    assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
    assert [frame.time_ns for frame in frames] == sorted(frame.time_ns for frame in frames)
    assert packets[chosen.number - 1][1].comments == ["matched: the eighth, für alle".encode(), b"and again"]
    assert sum(meta.comments is not None for _, meta in packets) == 1


def _read_back(path: Path) -> list[tuple[bytes, RawPcapNgReader.PacketMetadata]]:
    """The packets of a file as Scapy's reader sees them."""
    with RawPcapNgReader(str(path)) as reader:
        return list(reader)


def test_tcpdump_opens_the_file(link: Wire, tmp_path: Path) -> None:
    with link.udp_sender() as sender, CaptureSession(link.points, tmp_path) as session:
        sender.send(b"hello")
    assert tcpdump(session.path, "udp").count("> 10.9.0.2.9: UDP, length 5") == 2


def test_frames_that_were_read_but_are_not_in_the_file_yet_are_an_error(
    link: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_free, add = threading.Event(), PcapngWriter.add

    def add_late(self: PcapngWriter, frames: Sequence[Captured]) -> None:
        if any(frame[2].endswith(b"late") for frame in frames):  # not the kernel's own, which may come alone
            is_free.wait(10)
        add(self, frames)

    with link.udp_sender() as sender, CaptureSession(link.points, tmp_path) as session:
        monkeypatch.setattr(PcapngWriter, "add", add_late)
        sender.send(b"late")
        with pytest.raises(CaptureError, match=r"not all frames were read within 0.2 s at (left|right):eth0"):
            session.settle(0.2)
        is_free.set()
        session.settle()
        assert _payloads(session, "right:eth0") == [b"late"]


def test_a_full_disk_is_an_error_that_names_it(link: Wire, tmp_path: Path) -> None:
    (tmp_path / "capture.pcapng").symlink_to("/dev/full")
    session = CaptureSession(link.points, tmp_path)
    session.start()
    with pytest.raises(CaptureError, match="No space left"):
        session.settle()
    with pytest.raises(CaptureError, match="No space left"):
        session.verify()
    with contextlib.suppress(CaptureError, OSError):
        session.stop()
