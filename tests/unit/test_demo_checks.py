"""What the demo's counters are compared with, for packets that a gateway's captures show."""

from __future__ import annotations

from collections.abc import Sequence

import demo_checks
import pytest
from scapy.layers.inet import IP, TCP
from scapy.packet import Packet
from scenes import GATEWAY_IN, GATEWAY_OUT, Scene

HEADERS = 40
TIMESTAMPS = [("Timestamp", (1, 1))]


def packet(source: int, destination: int, flags: str, size: int = 0, options: Sequence[object] = ()) -> Packet:
    ends = {"sport": source, "dport": destination}
    return IP(src="10.0.0.1", dst="10.0.0.2") / TCP(**ends, flags=flags, options=list(options)) / bytes(size)


def test_what_comes_before_the_first_answer_is_new_at_each_link() -> None:
    """A SYN that is sent again is; a request is not. The same addresses at the other link are another connection."""
    scene = Scene()
    first = [scene.see(GATEWAY_IN, packet(4000, 80, "S"), outgoing=False) for _ in range(2)]
    answer = packet(80, 4000, "SA")
    answer[IP].src, answer[IP].dst = "10.0.0.2", "10.0.0.1"
    scene.see(GATEWAY_IN, answer, outgoing=True)
    scene.see(GATEWAY_IN, packet(4000, 80, "PA", 100), outgoing=False)
    other = scene.see(GATEWAY_OUT, packet(4000, 80, "S"), outgoing=True)
    assert list(demo_checks.unanswered(scene.frames)) == [*first, other]


@pytest.mark.parametrize(
    ("outgoing", "packets", "expected"),
    [
        pytest.param(True, 4, (4, 4 * HEADERS + 2500), id="not cut"),
        pytest.param(True, 2, (2, 2 * HEADERS + 2500), id="three segments of one"),
        pytest.param(True, 5, (4, 4 * HEADERS + 2500), id="more counted than captured"),
        pytest.param(False, 2, (4, 4 * HEADERS + 2500), id="what arrives was not cut here"),
    ],
)
def test_segments_cut_behind_conntrack_repeat_only_their_headers(
    outgoing: bool, packets: int, expected: tuple[int, int]
) -> None:
    scene = Scene()
    frames = [scene.see(GATEWAY_OUT, packet(4000, 80, "PA", size), outgoing=outgoing) for size in (0, 1000, 1000, 500)]
    assert demo_checks.uncut(frames, packets) == expected


def test_the_headers_of_segments_are_those_with_data() -> None:
    scene = Scene()
    frames = [
        scene.see(GATEWAY_OUT, packet(4000, 80, flags, size, options), outgoing=True)
        for flags, size, options in (("S", 0, []), ("A", 1000, TIMESTAMPS), ("A", 1000, TIMESTAMPS))
    ]
    assert demo_checks.uncut(frames, 2) == (2, HEADERS + HEADERS + 12 + 2000)


def test_nothing_captured_is_nothing() -> None:
    assert demo_checks.uncut([], 3) == (0, 0)
