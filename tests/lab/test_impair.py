"""Impaired links: what arrives at the far end, what was counted, and that nothing is left of them.

Links with a seed are impaired in user space on every machine; without one, by the kernel where it can.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from traffic_checks import gets_through

from testbed import registry
from testbed.capabilities import Capabilities
from testbed.frames import Frame
from testbed.impair import LOG
from testbed.impair_model import Counts, Direction
from testbed.keeper import hand_over
from testbed.lab import Lab, LabError
from testbed.owner import start_time
from testbed.process import ServiceError
from testbed.shapes import chain
from testbed.topology import Impairment
from testbed.topology_file import load, loads
from testbed.traffic import content

pytestmark = pytest.mark.lab

PAIR = "name: impaired\nnodes: {a: , b: }\nlinks: [{ends: [{node: a, impair: %s}, {node: b, impair: %s}]}]"
ONE_WAY = "name: impaired\nnodes: {a: , b: }\nlinks: [{ends: [{node: a, impair: %s}, {node: b}]}]"
READY_LAB = Path(__file__).parents[2] / "topologies/lossy-link.yaml"
PATIENCE = 10.0
QUIET = 0.25  # seconds without a frame after which no more are expected
TYPE = bytes.fromhex("88b5")  # of frames that no stack answers (IEEE 802, local experiments)
MACS = {"a": bytes.fromhex("02000000000a"), "b": bytes.fromhex("02000000000b")}

NEEDS_NETEM = pytest.mark.needs("netem", "tc-redirect")
NEEDS_TBF = pytest.mark.needs("tbf", "tc-redirect")
# The same link by either means: `%` takes what comes behind the impairment.
STAGE = pytest.param(", seed: 7", id="user space")
NETEM = pytest.param("", id="netem", marks=NEEDS_NETEM)
TBF = pytest.param("", id="tbf", marks=NEEDS_TBF)


@contextmanager
def running(text: str, folder: Path) -> Iterator[Lab]:
    """A lab that is captured."""
    with Lab(loads(text), folder) as lab:
        yield lab


def send(lab: Lab, node: str, count: int, size: int = 200, gap: float = 0.0) -> None:
    """Send numbered frames of a size on average from one of the two nodes; no gap is shorter than `gap` seconds."""
    (other,) = MACS.keys() - {node}
    with lab[node].namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.bind(("eth0", 0))
        for number in range(count):
            length = size // 2 + number % size if size < 900 else size
            sender.send(
                MACS[other] + MACS[node] + TYPE + number.to_bytes(2, "big") + bytes([number & 0xFF]) * (length - 16)
            )
            if gap:
                select.select((), (), (), gap)


def settled(lab: Lab) -> None:
    """Wait until nothing has been seen anywhere for a while, and the user-space stage has nothing left."""
    assert lab.capture is not None
    deadline = time.monotonic() + PATIENCE
    while True:
        before = -1
        while before != lab.capture.total:
            before = lab.capture.total
            lab.capture.wait(before, QUIET)
            lab.capture.settle()
        # A busy machine may keep the stage from its work for longer than that.
        if time.monotonic() > deadline or lab._stage is None or carried(lab):
            return


def carried(lab: Lab) -> bool:
    """Whether all that went into the impaired links has come out of them, or never will."""
    assert lab.capture is not None
    other = {end.label: far.label for link in lab.topology.links for end, far in (link.ends, link.ends[::-1])}
    for label, counts in lab.impairments.items():
        sent = sum(frame.outgoing and TYPE in tags_and_type(frame) for frame in lab.capture.frames(label))
        arrived = sum(not frame.outgoing for frame in lab.capture.frames(other[label]))
        if counts.seen < sent or arrived != counts.seen - counts.lost - counts.overflowed + counts.duplicated:
            return False
    return True


def tags_and_type(frame: Frame) -> list[bytes]:
    """The type of a frame, and those of the tags before it, of which there are two at most."""
    return [frame.data[place : place + 2] for place in (12, 16, 20)]


def at_rest(lab: Lab) -> tuple[Mapping[str, Counts], list[Frame]]:
    """What was counted and all frames that were seen, of one moment: the kernel reports groups whenever it likes."""
    assert lab.capture is not None
    while True:
        settled(lab)
        counts, frames = lab.impairments, lab.capture.frames()
        lab.capture.wait(len(frames), QUIET)  # for what was on its way
        lab.capture.settle()
        if lab.impairments == counts and lab.capture.total == len(frames):
            return counts, frames


def seen(lab: Lab, node: str, *, outgoing: bool) -> list[Frame]:
    """What a node sent, or what arrived there."""
    assert lab.capture is not None
    return [frame for frame in lab.capture.frames(f"{node}:eth0") if frame.outgoing is outgoing]


def numbered(frames: list[Frame]) -> dict[int, Frame]:
    """The frames of `send`, by number; the last one where one came twice."""
    return {int.from_bytes(each.data[14:16], "big"): each for each in frames if each.data[12:14] == TYPE}


def ways(lab: Lab, source: str, target: str) -> list[float]:
    """How long each frame of `send` was on its way, in seconds, in the order of sending."""
    sent, arrived = numbered(seen(lab, source, outgoing=True)), numbered(seen(lab, target, outgoing=False))
    assert sent.keys() == arrived.keys()
    return [(arrived[number].time_ns - frame.time_ns) / 1e9 for number, frame in sent.items()]


# ---- what arrives ----


def test_every_frame_meets_the_fate_that_the_seed_says(tmp_path: Path) -> None:
    """Both directions at once, whole frames compared; an own model is asked what becomes of what was captured."""
    text = PAIR % (
        "{loss: 20%, duplicate: 10%, corrupt: 10%, delay: 3ms, jitter: 2ms, seed: 7}",
        "{reorder: 30%, corrupt: 20%, delay: 5ms, rate: 100mbit, seed: 8}",
    )
    expected = {
        "a": Impairment(loss=0.2, duplicate=0.1, corrupt=0.1, delay=0.003, jitter=0.002, seed=7),
        "b": Impairment(reorder=0.3, corrupt=0.2, delay=0.005, rate=10**8, seed=8),
    }
    with running(text, tmp_path) as lab:
        for _ in range(3):
            send(lab, "a", 100)
            send(lab, "b", 80)
        all_counts, frames = at_rest(lab)
    for node, other in (("a", "b"), ("b", "a")):
        counts = all_counts[f"{node}:eth0"]
        sent = [frame for frame in frames if frame.point == f"{node}:eth0" and frame.outgoing]
        arrived = [frame for frame in frames if frame.point == f"{other}:eth0" and not frame.outgoing]
        model = Direction(expected[node], f"{node}:eth0")
        since = sent[-counts.seen :]  # some were sent before the stage was there
        leaves = [each.frame for frame in since for each in model.departures(frame.time_ns / 1e9, frame.data)]
        assert Counter(frame.data for frame in arrived) == Counter(leaves)
        assert counts == model.counts
        assert counts.corrupted > 10
    assert all_counts["a:eth0"].lost > 30
    assert all_counts["a:eth0"].duplicated > 10
    assert all_counts["b:eth0"].reordered > 30


@NEEDS_NETEM
def test_what_netem_does_agrees_with_its_counters(tmp_path: Path) -> None:
    with running(PAIR % ("{loss: 20%, corrupt: 10%}", "{duplicate: 20%, delay: 3ms}"), tmp_path) as lab:
        before = lab.impairments
        send(lab, "a", 300)
        send(lab, "b", 300)
        settled(lab)
        arrived = {node: [f for f in seen(lab, node, outgoing=False) if f.data[12:14] == TYPE] for node in "ab"}
        lossy, doubling = lab.impairments["a:eth0"], lab.impairments["b:eth0"]
    assert abs(len(arrived["b"]) - (300 - lossy.lost + before["a:eth0"].lost)) < 6  # other frames are among the lost
    assert abs(len(arrived["a"]) - (300 + doubling.duplicated - before["b:eth0"].duplicated)) < 6
    assert 30 < lossy.lost < 90
    assert 30 < doubling.duplicated < 90
    broken = [frame for frame in arrived["b"] if len(set(frame.data[16:])) > 1]
    assert 10 < len(broken) < 60


@pytest.mark.parametrize("seed", [STAGE, NETEM])
def test_the_delay_is_as_long_and_the_jitter_as_wide_as_asked_for(seed: str, tmp_path: Path) -> None:
    with running(ONE_WAY % f"{{delay: 20ms, jitter: 10ms{seed}}}", tmp_path) as lab:
        send(lab, "a", 120, gap=0.005)  # for longer than a busy machine keeps the stage waiting
        send(lab, "b", 60, gap=0.01)
        settled(lab)
        there, back = ways(lab, "a", "b"), ways(lab, "b", "a")
    assert 0.0098 <= min(there) < 0.016
    assert max(there) > 0.025
    # A busy machine is late, never early, and not with most of all six.
    blocks = [sorted(there[begin : begin + 20]) for begin in range(0, 120, 20)]
    assert min(block[15] for block in blocks) < 0.03
    assert min(back) < 0.0098


@pytest.mark.parametrize("seed", [STAGE, NETEM])
def test_reordered_frames_overtake_others(seed: str, tmp_path: Path) -> None:
    with running(ONE_WAY % f"{{delay: 200ms, reorder: 30%{seed}}}", tmp_path) as lab:
        send(lab, "a", 100)
        settled(lab)
        there, counts = ways(lab, "a", "b"), lab.impairments["a:eth0"]
        order = list(numbered(seen(lab, "b", outgoing=False)))
    assert order != sorted(order)
    overtaking = {number for place, number in enumerate(order) if number > min(order[place:])}
    early = sum(way < 0.2 or number in overtaking for number, way in enumerate(there))
    assert 15 < early < 45
    assert abs(early - counts.reordered) < 6  # other frames are among those that were counted


def lateness(sent: Mapping[int, Frame], arrived: Mapping[int, Frame], each: float) -> list[float]:
    """How many seconds after its time each frame arrived, at a rate at which one takes `each` seconds."""
    found, free = [], 0.0
    for number, frame in sent.items():
        free = max(free, frame.time_ns / 1e9) + each
        found.append(arrived[number].time_ns / 1e9 - free)
    return found


@pytest.mark.parametrize(
    ("impairment", "means"),
    [
        pytest.param("rate: 4mbit, seed: 7", "in user space: its seed asks for that", id="user space"),
        pytest.param("rate: 4mbit", "by the kernel's tbf", id="tbf", marks=NEEDS_TBF),
        pytest.param(
            "rate: 4mbit, delay: 5ms", "by the kernel's netem and tbf", id="netem", marks=[NEEDS_NETEM, NEEDS_TBF]
        ),
    ],
)
def test_a_rate_is_kept_within_a_tenth(impairment: str, means: str, tmp_path: Path) -> None:
    with running(ONE_WAY % f"{{{impairment}}}", tmp_path) as lab:
        send(lab, "a", 240, size=1000)
        settled(lab)
        sent, arrived = (numbered(seen(lab, node, outgoing=node == "a")) for node in "ab")
        assert lab.impairments["a:eth0"].seen >= 240
        assert (tmp_path / LOG).read_text() == f"a:eth0: impaired {means}\n"
    assert list(arrived) == list(range(240))
    late = lateness(sent, arrived, 8000 / 4e6)
    assert min(late) > -0.01  # tbf lets three pass at once
    assert min(late[100:]) < 0.02  # a busy machine is late, and not with all


@pytest.mark.parametrize("seed", [STAGE, TBF])
def test_what_finds_no_room_in_front_of_a_rate_is_lost_and_counted(seed: str, tmp_path: Path) -> None:
    with running(ONE_WAY % f"{{rate: 2mbit{seed}}}", tmp_path) as lab:
        for _ in range(6):  # a socket alone may be kept waiting until the kernel's queue has room
            send(lab, "a", 60, size=1500)
        settled(lab)
        arrived = sum(frame.data[12:14] == TYPE for frame in seen(lab, "b", outgoing=False))
        counts = lab.impairments["a:eth0"]
    assert 0 < 360 - arrived <= counts.overflowed
    assert 0 <= counts.overflowed - (360 - arrived) <= counts.seen - 360 < 6  # the kernel's own frames count, too


def test_what_finds_no_room_in_front_of_a_stage_that_is_too_slow_is_counted(tmp_path: Path) -> None:
    with running(ONE_WAY % "{seed: 1}", tmp_path) as lab:
        stage = stage_of(tmp_path)
        os.kill(stage, signal.SIGSTOP)
        try:
            send(lab, "a", 8000, size=1500)
        finally:
            os.kill(stage, signal.SIGCONT)
        send(lab, "a", 1, size=1500)
        settled(lab)
        counts = lab.impairments["a:eth0"]
        arrived = sum(frame.data[12:14] == TYPE for frame in seen(lab, "b", outgoing=False))
    assert arrived < 8001
    assert counts.overflowed >= 8001 - arrived
    assert counts.seen >= 8001


@pytest.mark.parametrize(
    ("seed", "most"),
    [
        pytest.param(", seed: 7", 0, id="user space"),
        # Where it flips a bit of the sender's MAC, nobody minds.
        pytest.param("", 10, id="netem", marks=NEEDS_NETEM),
    ],
)
def test_corrupt_datagrams_reach_no_program(seed: str, most: int) -> None:
    open_one = partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    with Lab(loads(ONE_WAY % f"{{corrupt: 100%{seed}}}"), capture=False) as lab:
        # The receiver's MAC is told: the question for it would be corrupt, too.
        lab["a"].run(["ip", "neigh", "replace", "10.0.0.2", "lladdr", "02:00:00:00:00:0b", "dev", "eth0"])
        with lab["b"].call(open_one) as receiver, lab["a"].call(open_one) as sender:
            receiver.bind(("10.0.0.2", 9))
            receiver.settimeout(QUIET)
            for _ in range(50):
                sender.sendto(bytes(100), ("10.0.0.2", 9))
            arrived: list[bytes] = []
            with suppress(TimeoutError):
                while True:
                    arrived.append(receiver.recv(200))
    assert arrived == [bytes(100)] * len(arrived)
    assert len(arrived) <= most


@pytest.mark.parametrize(
    "impairment",
    [
        pytest.param("{delay: 1ms, seed: 1}", id="user space"),
        pytest.param("{rate: 100mbit}", id="tbf", marks=NEEDS_TBF),
    ],
)
def test_vlan_tags_are_kept(impairment: str, tmp_path: Path) -> None:
    one = MACS["b"] + MACS["a"] + bytes.fromhex("8100 2007") + TYPE + bytes(1500)  # a priority; as long as can be
    two = MACS["b"] + MACS["a"] + bytes.fromhex("88a8 0064 8100 0007") + TYPE + bytes(100)
    with running(ONE_WAY % impairment, tmp_path) as lab:
        with lab["a"].namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            sender.bind(("eth0", 0))
            sender.send(one)
            sender.send(two)
        settled(lab)
        arrived = [frame for frame in seen(lab, "b", outgoing=False) if frame.vlans]
    assert [(frame.data, frame.vlans) for frame in arrived] == [(one, (7,)), (two, (100, 7))]


# ---- whole transfers ----

SERVICE = (
    "{services: {web: {command: ['{python}', -m, testbed.traffic, http-server, --port, '80', --size, '%d', "
    "--notify-fd, '{notify_fd}'], ready: notify}}}"
)


def fetch(lab: Lab, node: str, host: str, folder: Path) -> bytes:
    """A file over HTTP."""
    target = folder / "got"
    lab[node].run(
        ["python", "-m", "testbed.traffic", "fetch", f"http://{host}/", "--output", str(target), "--timeout", "50"]
    )
    return target.read_bytes()


@pytest.mark.parametrize("seed", [STAGE, NETEM])
def test_tcp_delivers_every_byte_over_a_link_that_does_everything_at_once(seed: str, tmp_path: Path) -> None:
    impairment = "{delay: 1ms, jitter: 500us, loss: 1%, duplicate: 2%, reorder: 5%, corrupt: 1%" + seed + "}"
    text = f"name: impaired\nnodes: {{a: , b: {SERVICE % 150_000}}}\n"
    text += f"links: [{{ends: [{{node: a}}, {{node: b}}], impair: {impairment}}}]"
    with running(text, tmp_path) as lab:
        assert fetch(lab, "a", "10.0.0.2", tmp_path) == content(150_000)
        assert fetch(lab, "a", "[fd00::2]", tmp_path) == content(150_000)
        counts = lab.impairments["b:eth0"]
    assert counts.lost + counts.duplicated + counts.reordered > 0


def test_tcp_over_the_ready_lab_delivers_every_byte(tmp_path: Path) -> None:
    with Lab(load(READY_LAB), tmp_path) as lab:
        assert fetch(lab, "client", "10.0.0.2", tmp_path) == content(262144)
        assert lab.impairments["server:eth0"].lost > 0


@pytest.mark.parametrize(
    "impairment",
    [
        pytest.param("{delay: 1ms, seed: 1}", id="user space"),
        pytest.param("{rate: 200mbit}", id="tbf", marks=NEEDS_TBF),
    ],
)
def test_packets_that_come_joined_pass_one_by_one_and_whole(impairment: str, tmp_path: Path) -> None:
    """A link before the impaired one has offload, so the router gets segments joined, with half a checksum."""
    text = f"""
name: impaired
offload: true
nodes: {{c: , r: {{kind: router}}, s: {SERVICE % 1_000_000}}}
links:
  - {{ends: [{{node: c}}, {{node: r}}], impair: {impairment}}}
  - ends: [{{node: r}}, {{node: s}}]
"""
    with running(text, tmp_path) as lab:
        assert fetch(lab, "c", "10.0.1.2", tmp_path) == content(1_000_000)
        settled(lab)
        assert lab.capture is not None
        assert any(len(frame.data) > 1514 and frame.half_checksum for frame in lab.capture.frames("r:eth1"))
        arrived = seen(lab, "c", outgoing=False)
    assert max(len(frame.data) for frame in arrived) == 1514
    assert not any(frame.half_checksum for frame in arrived)


# ---- changes while the lab runs ----

NOTHING_YET = pytest.param("{}", id="nothing yet")


def arrive(lab: Lab) -> int:
    """How many of a hundred frames that a sends arrive at b."""
    before = sum(frame.data[12:14] == TYPE for frame in seen(lab, "b", outgoing=False))
    send(lab, "a", 100)
    settled(lab)
    return sum(frame.data[12:14] == TYPE for frame in seen(lab, "b", outgoing=False)) - before


@pytest.mark.parametrize("impairment", [NOTHING_YET, pytest.param("{loss: 100%, seed: 7}", id="user space")])
def test_what_a_link_does_is_changed_for_the_next_frame(impairment: str, tmp_path: Path) -> None:
    with running(ONE_WAY % impairment, tmp_path) as lab:
        assert arrive(lab) == (100 if impairment == "{}" else 0)
        lab.impair("a:eth0", Impairment(loss=0.5))
        assert 25 < arrive(lab) < 75
        lab.impair("a:eth0", Impairment(loss=1))
        lost = lab.impairments["a:eth0"].lost
        assert arrive(lab) == 0
        assert lab.impairments["a:eth0"].lost - lost >= 100
        lab.impair("a:eth0", Impairment())
        assert arrive(lab) == 100
        lab.impair("b:eth0", Impairment(delay=0.05))
        send(lab, "b", 10)
        settled(lab)
        assert min(ways(lab, "b", "a")) >= 0.0498
    entries = [entry.what for entry in lab.journal.entries]
    assert "a:eth0: loss=0.5" in entries
    assert "a:eth0: nothing" in entries


def test_a_packet_is_the_same_behind_a_link_that_takes_longer_than_others(tmp_path: Path) -> None:
    with running(ONE_WAY % "{delay: 1500ms, seed: 7}", tmp_path) as lab:
        lab["a"].send(IP(dst=lab["b"].address()) / UDP(dport=9))
        ((before, after),) = lab.expect_same({"udp.dport": 9}, at=("a:eth0", "b:eth0"), within=PATIENCE)
        assert after.time_ns - before.time_ns > 1_490_000_000
        lab.impair("a:eth0", Impairment(delay=2.2))
        lab.mark()
        lab["a"].send(IP(dst=lab["b"].address()) / UDP(dport=10))
        lab.expect_same({"udp.dport": 10}, at=("a:eth0", "b:eth0"), within=PATIENCE)


@NEEDS_TBF
@pytest.mark.parametrize("before", ["{rate: 1mbit}", pytest.param("{delay: 1ms}", marks=NEEDS_NETEM)])
def test_the_kernel_is_told_of_a_change_and_nothing_that_was_counted_is_forgotten(before: str, tmp_path: Path) -> None:
    with running(ONE_WAY % before, tmp_path) as lab:
        for _ in range(6):
            send(lab, "a", 60, size=1500)
        settled(lab)
        earlier, before_that = lab.impairments["a:eth0"], len(seen(lab, "b", outgoing=False))
        lab.impair("a:eth0", Impairment(rate=4_000_000))  # tbf in the place of tbf, or of netem
        send(lab, "a", 100, size=1000)
        settled(lab)
        sent, arrived = numbered(seen(lab, "a", outgoing=True)), numbered(seen(lab, "b", outgoing=False)[before_that:])
        late = lateness({number: sent[number] for number in arrived}, arrived, 8000 / 4e6)
        assert len(late) == 100
        assert min(late) > -0.01
        assert min(late[50:]) < 0.015
        lab.impair("a:eth0", Impairment())
        assert arrive(lab) == 100
        counts = lab.impairments["a:eth0"]
    assert counts.overflowed == earlier.overflowed
    assert 0 <= counts.seen - earlier.seen - 200 < 6
    assert counts.duplicated == 0


@pytest.mark.parametrize(
    ("topology", "label", "wanted", "complaint"),
    [
        pytest.param("{}", "c:eth0", Impairment(), "is no end of an impaired link, only a:eth0, b:eth0", id="end"),
        pytest.param("{rate: 1mbit}", "a:eth0", Impairment(seed=1), "takes no seed", marks=NEEDS_TBF, id="seed"),
        pytest.param(
            "{rate: 1mbit}", "a:eth0", Impairment(delay=5, jitter=3), "ends at 2.1 s", marks=NEEDS_TBF, id="jitter"
        ),
    ],
)
def test_a_change_that_cannot_be_is_refused(topology: str, label: str, wanted: Impairment, complaint: str) -> None:
    with Lab(loads(ONE_WAY % topology), capture=False) as lab, pytest.raises(LabError, match=complaint):
        lab.impair(label, wanted)


def test_where_no_link_is_impaired_a_change_says_so() -> None:
    with Lab(chain(2), capture=False) as lab, pytest.raises(LabError, match="impaired link, there is none"):
        lab.impair("n0:right", Impairment())


def test_a_kernel_without_netem_says_how_to_have_it_done(capabilities: Capabilities) -> None:
    if capabilities.has("netem") or not capabilities.has("tbf"):
        pytest.skip("needs a kernel with tbf and without netem")
    with Lab(loads(ONE_WAY % "{rate: 1mbit}"), capture=False) as lab:
        with pytest.raises(LabError, match=r"this kernel has no netem: `impair: \{\}` in the topology"):
            lab.impair("a:eth0", Impairment(loss=0.1))
        lab.impair("a:eth0", Impairment(rate=2_000_000))


def test_a_stage_that_was_killed_is_told(tmp_path: Path) -> None:
    def change_after_the_end() -> None:
        with running(ONE_WAY % "{seed: 1}", tmp_path) as lab:
            os.kill(stage_of(tmp_path), signal.SIGKILL)
            lab.impair("a:eth0", Impairment(loss=1))

    with pytest.raises(ServiceError, match="the impairments was ended by SIGKILL"):
        change_after_the_end()


def test_a_running_lab_is_told_by_command(name: str, tmp_path: Path) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text((ONE_WAY % "{}").replace("impaired", name))
    assert run_testbed("up", str(file), "--directory", str(tmp_path / "logs")).returncode == 0
    try:
        told = run_testbed("impair", "--lab", name, "a:eth0", "--loss", "100%", "--json")
        assert told.returncode == 0, told.stderr
        assert json.loads(told.stdout)["impairment"]["loss"] == 1
        with registry.find(name).namespace("a") as a, registry.find(name).namespace("b") as b:
            assert not gets_through(a, b, "10.0.0.2")
            assert run_testbed("impair", "--lab", name, "a:eth0").stdout == "a:eth0: nothing\n"
            assert gets_through(a, b, "10.0.0.2")
        wrong = run_testbed("impair", "--lab", name, "a:eth0", "--loss", "1")
        assert (wrong.returncode, "'1' is no number followed by %" in wrong.stderr) == (2, True), wrong.stderr
        nowhere = run_testbed("impair", "--lab", name, "c:eth0")
        assert (nowhere.returncode, "c:eth0 is no end of an impaired link" in nowhere.stderr) == (1, True)
    finally:
        run_testbed("down", name)


# ---- who does it, and what is left ----


def test_an_impaired_lab_is_up_says_who_impairs_it_works_and_is_down(name: str, tmp_path: Path) -> None:
    note = "a:eth0: impaired in user space: its seed asks for that"
    file = tmp_path / "lab.yaml"
    file.write_text((ONE_WAY % "{delay: 1ms, seed: 1}").replace("impaired", name))
    up = run_testbed("up", str(file), "--directory", str(tmp_path / "logs"), "--json")
    assert (up.returncode, up.stderr) == (0, f"{note}\n")
    try:
        record = registry.find(name)
        assert json.loads(up.stdout)["pid"] == record.pid
        stage = stage_of(tmp_path / "logs")
        with record.namespace("b") as b, b.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
            receiver.bind(("10.0.0.2", 9))
            receiver.settimeout(PATIENCE)
            asked = run_testbed("exec", "--lab", name, "a", "--", "bash", "-c", "echo hello >/dev/udp/10.0.0.2/9")
            assert (asked.returncode, receiver.recv(9)) == (0, b"hello\n"), asked.stderr
        assert note in registry.ask_report(record)
    finally:
        down = run_testbed("down", name)
    assert (down.returncode, down.stdout) == (0, f"{name} is down\n"), down.stderr
    assert start_time(stage) is None
    assert (tmp_path / "logs" / LOG).read_text() == f"{note}\n"


def run_testbed(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "testbed.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)


@pytest.fixture
def name() -> str:
    """A lab's name that no other test run uses."""
    return f"impaired-{os.getpid()}"


def kept(impairment: str, name: str, folder: Path) -> registry.Record:
    """A lab with an impaired link that is handed over to a keeper."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(loads((ONE_WAY % impairment).replace("impaired", name)), folder))
        record = hand_over(lab)
        stack.pop_all()
    return record


def stage_of(folder: Path) -> int:
    """The stage of the lab with a directory."""
    (found,) = with_words("testbed.impair_stage", str(folder / "impairments.json"))
    return found


def with_words(*words: str) -> list[int]:
    """The processes with all those words in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if {word.encode() for word in words} <= set((process / "cmdline").read_bytes().split(b"\0")):
                found.append(int(process.name))
    return found


@pytest.mark.parametrize(
    "impairment",
    [
        pytest.param("{delay: 1ms, seed: 1}", id="user space"),
        pytest.param("{rate: 100mbit}", id="tbf", marks=NEEDS_TBF),
    ],
)
def test_a_lab_that_is_handed_over_stays_impaired_until_it_is_down(impairment: str, name: str, tmp_path: Path) -> None:
    record = kept(impairment, name, tmp_path)
    try:
        assert list(record.nodes) == ["a", "b"]
        with record.namespace("a") as a, record.namespace("b") as b:
            assert gets_through(a, b, "10.0.0.2")
    finally:
        registry.down(record)
    assert with_words("testbed.impair_stage", str(tmp_path / "impairments.json")) == []


def test_the_stage_goes_with_a_killed_keeper(name: str, tmp_path: Path) -> None:
    record = kept("{delay: 1ms, seed: 1}", name, tmp_path)
    with closing(os.fdopen(os.pidfd_open(stage_of(tmp_path)))) as end:
        os.kill(record.pid, signal.SIGKILL)
        assert select.select([end], (), (), 5)[0] == [end]


def test_the_stage_goes_with_a_killed_lab() -> None:
    script = (
        "import signal; from testbed.lab import Lab; from testbed.topology_file import loads\n"
        f"with Lab(loads({ONE_WAY % '{delay: 1ms, seed: 1}'!r}), capture=False) as lab:\n"
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
