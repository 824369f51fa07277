"""Impaired links: what programs in the nodes notice, and what the stage counted."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import pytest
from traffic_checks import gets_through

from testbed import registry
from testbed.frames import Frame
from testbed.impair import WIRE
from testbed.impair_model import Direction
from testbed.keeper import hand_over
from testbed.lab import Lab
from testbed.netns import Namespace
from testbed.process import start_time
from testbed.topology import Impairment
from testbed.topology_file import load, loads

pytestmark = pytest.mark.lab

PAIR = "name: impaired\nnodes: {a: , b: }\nlinks: [{ends: [{node: a, impair: %s}, {node: b}]}]"
READY_LAB = Path(__file__).parents[2] / "topologies/lossy-link.yaml"
QUIET = 0.3  # seconds without a datagram after which no more are expected


def lab_of(impairment: str) -> Lab:
    """Two hosts; what the first sends is impaired."""
    return Lab(loads(PAIR % impairment), capture=False)


def datagrams(lab: Lab, count: int, size: int = 100) -> list[tuple[int, float]]:
    """Numbers of the datagrams that arrive at b of those that a sends, and how long each was on its way.

    The sender is told of the receiver's MAC: a lossy link may lose the question for it too.
    """
    lab["a"].run(["ip", "neigh", "replace", "10.0.0.2", "lladdr", "02:00:00:00:00:0b", "dev", "eth0"])
    lab["b"].run(["ip", "neigh", "replace", "10.0.0.1", "lladdr", "02:00:00:00:00:0a", "dev", "eth0"])
    open_one = partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    with ExitStack() as stack:
        receiver = stack.enter_context(lab["b"].call(open_one))
        sender = stack.enter_context(lab["a"].call(open_one))
        receiver.bind(("10.0.0.2", 9))
        receiver.settimeout(QUIET)
        sender.connect(("10.0.0.2", 9))
        at = []
        for number in range(count):
            at.append(time.monotonic())
            sender.send(number.to_bytes(2, "big") + bytes(size - 2))
        found: list[tuple[int, float]] = []
        while True:
            try:
                number = int.from_bytes(receiver.recv(2), "big")
            except TimeoutError:
                return found
            found.append((number, time.monotonic() - at[number]))


def test_a_delay_is_there_and_in_one_direction_only() -> None:
    with lab_of("{delay: 40ms}") as lab:
        arrived = datagrams(lab, 20)
        assert [number for number, _ in arrived] == list(range(20))
        assert all(0.04 <= way < 0.14 for _, way in arrived)
        assert lab.impairments["a:eth0"].seen >= 20
        started = time.monotonic()
        assert gets_through(lab["b"].namespace, lab["a"].namespace, "10.0.0.1")  # the way back of the same link
        assert time.monotonic() - started < 0.04


def test_neighbours_are_found_over_ipv6() -> None:
    with lab_of("{delay: 5ms}") as lab:
        assert gets_through(lab["a"].namespace, lab["b"].namespace, "fd00::2")


@pytest.mark.parametrize(
    "impairment", [pytest.param("{loss: 30%, seed: 7}", id="loss"), pytest.param("{duplicate: 30%}", id="duplicate")]
)
def test_what_arrives_agrees_with_the_counters(impairment: str) -> None:
    with lab_of(impairment) as lab:
        arrived = datagrams(lab, 120)  # twice that fits into the receiver's buffer
        counts = lab.impairments["a:eth0"]
    changed = counts.duplicated - counts.lost
    assert abs(changed) > 20
    assert abs(len(arrived) - 120 - changed) < 6  # a few frames are ARP, and some of those are lost or repeated too


def test_the_same_frames_are_lost_as_the_seed_says() -> None:
    with lab_of("{loss: 30%, seed: 7}") as lab:
        datagrams(lab, 100)
        counts = lab.impairments["a:eth0"]
    expected = Direction(Impairment(loss=0.3, seed=7), "a:eth0")
    for _ in range(counts.seen):
        expected.departures(0, bytes(60))
    assert counts == expected.counts
    assert counts.seen >= 100


def test_reordered_datagrams_overtake_others() -> None:
    with lab_of("{delay: 20ms, reorder: 30%}") as lab:
        numbers = [number for number, _ in datagrams(lab, 100)]
    assert sorted(numbers) == list(range(100))
    assert numbers != sorted(numbers)


def test_a_rate_bounds_what_passes() -> None:
    with lab_of("{rate: 4mbit}") as lab:
        arrived = datagrams(lab, 100, 958)  # 100 frames of 1000 bytes take 0.2 s
    assert len(arrived) == 100
    assert 0.19 < arrived[-1][1] < 0.5


def test_corrupt_datagrams_reach_no_program() -> None:
    with lab_of("{corrupt: 100%}") as lab:
        assert datagrams(lab, 50) == []
        assert lab.impairments["a:eth0"].corrupted >= 50


@pytest.mark.parametrize(
    ("tags", "vlans"),
    [
        pytest.param("8100 2007", (7,), id="802.1Q, with a priority"),
        pytest.param("88a8 0064 8100 0007", (100, 7), id="802.1ad, two tags"),
    ],
)
def test_vlan_tags_are_kept(tags: str, vlans: tuple[int, ...], tmp_path: Path) -> None:
    frame = bytes.fromhex(f"02000000000b 02000000000a {tags} 88b5") + bytes(range(100))
    with Lab(loads(PAIR % "{delay: 1ms, seed: 1}"), tmp_path) as lab:
        with lab["a"].namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            sender.bind(("eth0", 0))
            sender.send(frame)
        assert lab.capture is not None
        deadline = time.monotonic() + 2
        seen: list[Frame] = []
        while not seen and time.monotonic() < deadline:
            lab.capture.wait(lab.capture.total, 0.05)
            seen = [each for each in lab.capture.frames("b:eth0") if each.data[-100:] == frame[-100:]]
    assert [(each.data, each.vlans) for each in seen] == [(frame, vlans)]


def test_tcp_over_the_ready_lab_delivers_every_byte(tmp_path: Path) -> None:
    with Lab(load(READY_LAB), tmp_path) as lab:
        done = lab["client"].run(["curl", "-sS", "--max-time", "20", "http://10.0.0.2/", "-o", str(tmp_path / "got")])
        assert done.returncode == 0
        assert (tmp_path / "got").stat().st_size == 262144
        assert lab.impairments["server:eth0"].lost > 0


@pytest.fixture
def name() -> str:
    """A lab's name that no other test run uses."""
    return f"impaired-{os.getpid()}"


def kept(name: str, folder: Path) -> tuple[registry.Record, int]:
    """A lab with an impaired link that is handed over to a keeper, and the stage's process."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(loads(PAIR.replace("impaired", name) % "{delay: 1ms, seed: 1}"), folder))
        stage = inside(lab.namespaces[WIRE])
        record = hand_over(lab)
        stack.pop_all()
    return record, stage


def inside(namespace: Namespace) -> int:
    """The process that runs in a namespace."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            status = (process / "ns/net").stat()
            if (status.st_dev, status.st_ino) == namespace.identity:
                return int(process.name)
    raise AssertionError("no process is in the namespace")


def test_a_lab_that_is_handed_over_stays_impaired_until_it_is_down(name: str, tmp_path: Path) -> None:
    record, stage = kept(name, tmp_path)
    try:
        assert list(record.nodes) == ["a", "b"]
        with record.namespace("a") as a, record.namespace("b") as b:
            assert gets_through(a, b, "10.0.0.2")
    finally:
        registry.down(record)
    assert start_time(stage) is None


def test_the_stage_goes_with_a_killed_keeper(name: str, tmp_path: Path) -> None:
    record, stage = kept(name, tmp_path)
    with closing(os.fdopen(os.pidfd_open(stage))) as end:
        os.kill(record.pid, signal.SIGKILL)
        assert select.select([end], (), (), 5)[0] == [end]


def test_the_stage_goes_with_a_killed_lab() -> None:
    script = (
        "import signal; from testbed.lab import Lab; from testbed.topology_file import loads\n"
        f"with Lab(loads({PAIR % '{delay: 1ms}'!r}), capture=False) as lab:\n"
        "    print(lab._stage.program.pid, flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        stage = os.pidfd_open(int(owner.stdout.readline()))
        try:
            owner.send_signal(signal.SIGKILL)
            assert select.select([stage], (), (), 5)[0] == [stage]
        finally:
            os.close(stage)
