"""What becomes of frames on an impaired link, without a link."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6MLReport2,
    ICMPv6ND_NS,
    ICMPv6ND_RS,
    IPv6,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from testbed.impair_model import Departure, Direction
from testbed.topology import Impairment

FRAMES = [bytes(14) + bytes([number]) * 86 for number in range(200)]
EVERYTHING = Impairment(delay=0.02, jitter=0.01, loss=0.2, duplicate=0.2, reorder=0.2, corrupt=0.2)


def sent(impairment: Impairment, label: str = "a:eth0", gap: float = 0.001) -> list[list[Departure]]:
    """What leaves for each of the frames, sent at even times."""
    direction = Direction(impairment, label)
    return [direction.departures(number * gap, frame) for number, frame in enumerate(FRAMES)]


def test_the_same_seed_gives_each_frame_the_same_fate() -> None:
    assert sent(EVERYTHING) == sent(EVERYTHING)


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(ARP(), id="ARP"),
        pytest.param(IP() / Raw(bytes(8)), id="IGMP"),
        pytest.param(IPv6() / ICMPv6ND_NS(), id="neighbour solicitation"),
        pytest.param(IPv6() / ICMPv6ND_RS(), id="router solicitation"),
        pytest.param(IPv6() / IPv6ExtHdrHopByHop() / ICMPv6MLReport2(), id="group membership"),
    ],
)
def test_what_kernels_send_by_themselves_moves_no_other_frames_fate(layers: Packet) -> None:
    if IP in layers:
        layers[IP].proto = 2
    own = bytes(Ether() / layers)
    direction = Direction(EVERYTHING, "a:eth0")
    mixed = []
    for number, frame in enumerate(FRAMES):
        if number % 3 == 0:
            direction.departures(number * 0.001, own)
        mixed.append(direction.departures(number * 0.001, frame))
    assert mixed == sent(EVERYTHING)


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(IPv6() / ICMPv6EchoRequest(), id="echo"),
        pytest.param(IPv6() / UDP() / Raw(bytes([135] * 8)), id="UDP"),
        pytest.param(IP() / UDP(), id="UDP over IPv4"),
    ],
)
def test_what_programs_send_has_one_order(layers: Packet) -> None:
    direction = Direction(EVERYTHING, "a:eth0")
    direction.departures(0, bytes(Ether() / layers))
    assert direction.departures(0.001, FRAMES[1]) == sent(EVERYTHING)[1]


@pytest.mark.parametrize(
    ("other", "label"),
    [
        pytest.param(replace(EVERYTHING, seed=1), "a:eth0", id="another seed"),
        pytest.param(EVERYTHING, "b:eth0", id="the other direction"),
    ],
)
def test_other_seeds_and_directions_choose_otherwise(other: Impairment, label: str) -> None:
    assert sent(other, label) != sent(EVERYTHING)


def test_which_frames_are_lost_does_not_depend_on_what_else_happens_to_them() -> None:
    only_loss = Impairment(loss=0.2)
    assert [not gone for gone in sent(EVERYTHING)] == [not gone for gone in sent(only_loss)]


@given(delay=st.floats(0, 1), rate=st.none() | st.integers(10_000_000, 10**9))
@settings(max_examples=30)
def test_with_delay_and_rate_only_all_arrives_whole_and_in_order(delay: float, rate: int | None) -> None:
    departures = [each for frame in sent(Impairment(delay=delay, rate=rate)) for each in frame]
    assert [departure.frame for departure in departures] == FRAMES
    assert sorted(departures, key=lambda departure: departure.when) == departures


@given(st.binary(min_size=15, max_size=100))
def test_corruption_flips_one_bit_behind_the_ethernet_header(frame: bytes) -> None:
    (departure,) = Direction(Impairment(corrupt=1), "a:eth0").departures(0, frame)
    changed = int.from_bytes(departure.frame, "big") ^ int.from_bytes(frame, "big")
    assert changed.bit_count() == 1
    assert departure.frame[:14] == frame[:14]


def test_jitter_keeps_to_its_bounds() -> None:
    delays = [frame[0].when - number * 0.001 for number, frame in enumerate(sent(Impairment(delay=0.02, jitter=0.005)))]
    assert 0.015 <= min(delays) < 0.017
    assert 0.023 < max(delays) <= 0.025


def test_a_rate_spaces_frames_and_its_full_queue_drops_them() -> None:
    direction = Direction(Impairment(rate=800_000), "a:eth0")  # 100 bytes take a millisecond
    assert [direction.departures(0, frame)[0].when for frame in FRAMES[:3]] == pytest.approx([0.001, 0.002, 0.003])
    assert sum(len(direction.departures(0, bytes(10_000))) for _ in range(100)) == 26  # of 256 KiB, 300 are taken
    assert direction.counts.overflowed == 74


def test_what_waits_passes_at_the_new_rate() -> None:
    direction = Direction(Impairment(rate=64_000, delay=0.5), "a:eth0")
    waiting = [direction.departures(0, bytes(1000))[0] for _ in range(100)]
    assert waiting[-1].when == pytest.approx(13)
    at_new_rate = direction.change(Impairment(rate=6_400_000), 0)
    moved = [at_new_rate(each) for each in waiting]
    assert [each.when for each in moved] == pytest.approx([0.5 + number * 0.00125 for number in range(1, 101)])
    (behind,) = direction.departures(0, bytes(1000))
    assert behind.when == pytest.approx(101 * 0.00125)
    assert direction.counts.overflowed == 0
    at_once = direction.change(Impairment(), 0.1)
    assert [at_once(each).when for each in moved if each.sent > 0.1] == pytest.approx([0.6] * 20)
    assert direction.departures(0.1, bytes(1000))[0].when == 0.1


def test_after_a_change_the_same_choices_are_made_for_what_happens_now() -> None:
    changed, fresh = Direction(Impairment(loss=0.9), "a:eth0"), Direction(EVERYTHING, "a:eth0")
    for frame in FRAMES[:100]:
        changed.departures(0, frame)
        fresh.departures(0, frame)
    changed.change(EVERYTHING, 0)
    assert [changed.departures(0, frame) for frame in FRAMES[100:]] == [
        fresh.departures(0, frame) for frame in FRAMES[100:]
    ]
    assert changed.counts.seen == 200


def test_a_change_with_a_seed_begins_anew() -> None:
    changed, seeded = Direction(EVERYTHING, "a:eth0"), replace(EVERYTHING, seed=5)
    changed.departures(0, FRAMES[0])
    changed.change(seeded, 0)
    assert [changed.departures(number * 0.001, frame) for number, frame in enumerate(FRAMES)] == sent(seeded)


def test_counts_tell_what_happened() -> None:
    direction = Direction(EVERYTHING, "a:eth0")
    out = [direction.departures(0, frame) for frame in FRAMES]
    counts = direction.counts
    assert counts.seen == len(FRAMES)
    assert counts.lost == sum(not frame for frame in out)
    assert counts.duplicated == sum(len(frame) == 2 for frame in out)
    assert counts.reordered == sum(frame[0].when == 0 for frame in out if frame)
    assert counts.corrupted == sum(frame[0].frame != FRAMES[at] for at, frame in enumerate(out) if frame)
