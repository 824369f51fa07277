"""What the demo's counters are compared with, for packets that a gateway's captures show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import demo_checks
import demo_main
import pytest
from scapy.layers.inet import IP, TCP
from scapy.packet import Packet
from scenes import GATEWAY_IN, GATEWAY_OUT, Scene

HEADERS = 40
HOSTS = {4000: "10.0.0.1", 80: "10.0.0.2", 5000: "10.0.0.3", 90: "10.0.0.4"}  # by the one port that each has
TIMESTAMPS = [("Timestamp", (1, 1))]


def packet(source: int, destination: int, flags: str, size: int = 0, options: Sequence[object] = ()) -> Packet:
    """A packet between the hosts that have these ports."""
    header = TCP(sport=source, dport=destination, flags=flags, options=list(options))
    return IP(src=HOSTS[source], dst=HOSTS[destination]) / header / bytes(size)


def test_what_comes_before_the_first_answer_is_new_at_each_link() -> None:
    """A SYN that is sent again is; a request is not. The same addresses at the other link are another connection."""
    scene = Scene()
    first = [scene.see(GATEWAY_IN, packet(4000, 80, "S"), outgoing=False) for _ in range(2)]
    scene.see(GATEWAY_IN, packet(80, 4000, "SA"), outgoing=True)
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


# ---- the checks on counters, with a connection that the relay opened and one that came to it ----


def ends(source: int, destination: int) -> dict[str, dict[str, object]]:
    """A flow as the engine tells it."""
    source_end, destination_end = ({"address": HOSTS[port], "port": port} for port in (source, destination))
    return {"source": source_end, "destination": destination_end}


def listed(source: int, destination: int, packets: tuple[int, int], bytes_: tuple[int, int]) -> dict[str, Any]:
    flow, back = ends(source, destination), ends(destination, source)
    return {
        "original": flow,
        "final": flow,
        "reply": back,
        "packets": dict(zip(("original", "reply"), packets, strict=True)),
        "bytes": dict(zip(("original", "reply"), bytes_, strict=True)),
    }


def run_with(hooks: tuple[int, int, int], connections: list[dict[str, Any]], dropped: int = 0) -> demo_checks.Run:
    """The gateway saw SYN, answer and data of a connection that came, and SYN and answer of one of its own."""
    scene = Scene()
    scene.see(GATEWAY_IN, packet(4000, 80, "S"), outgoing=False)
    scene.see(GATEWAY_IN, packet(80, 4000, "SA"), outgoing=True)
    scene.see(GATEWAY_IN, packet(4000, 80, "PA", 100), outgoing=False)
    scene.see(GATEWAY_OUT, packet(5000, 90, "S"), outgoing=True)
    scene.see(GATEWAY_OUT, packet(90, 5000, "SA"), outgoing=False)
    counters = {
        "hooks": {hook: {"some": n} for hook, n in zip(("PREROUTING", "OUTPUT", "POSTROUTING"), hooks, strict=True)},
        "queue": {"dropped_full": dropped, "dropped_unread": 0},
    }
    nothing: Any = None
    return demo_checks.Run(
        frames=scene.frames,
        fetched=nothing,
        asked=nothing,
        web_log=nothing,
        gateway_sockets=nothing,
        gateway_addresses={"10.0.0.3"},
        client=nothing,
        server=nothing,
        counters=counters,
        connections=connections,
        rules_before="",
        rules_during="",
        rules_after="",
    )


INWARD = listed(4000, 80, (2, 1), (180, 40))
OUTWARD = listed(5000, 90, (1, 1), (40, 40))
CHECKS = {"inline": demo_checks.every_packet_was_counted, "kernel": demo_checks.only_first_packets_were_counted}


@pytest.mark.parametrize(("datapath", "hooks"), [("inline", (3, 2, 2)), ("kernel", (1, 1, 1))])
def test_counters_that_agree_pass(datapath: str, hooks: tuple[int, int, int]) -> None:
    assert list(CHECKS[datapath](run_with(hooks, [INWARD, OUTWARD]))) == []


@pytest.mark.parametrize("datapath", CHECKS)
@pytest.mark.parametrize(
    ("connections", "wrong"),
    [
        pytest.param([INWARD], 2, id="a connection is not listed"),
        pytest.param([listed(4000, 80, (1, 1), (40, 40)), OUTWARD], 1, id="a packet that came was not counted"),
        pytest.param([listed(4000, 80, (2, 1), (181, 40)), OUTWARD], 1, id="a byte too many"),
        pytest.param([INWARD, listed(5000, 90, (2, 1), (80, 40))], 1, id="a packet too many left"),
        pytest.param([INWARD, OUTWARD, listed(5000, 80, (1, 0), (40, 0))], 1, id="a connection that nobody saw"),
    ],
)
def test_counters_of_a_connection_that_do_not_agree_are_told(
    datapath: str, connections: list[dict[str, Any]], wrong: int
) -> None:
    hooks = (3, 2, 2) if datapath == "inline" else (1, 1, 1)
    assert len(list(CHECKS[datapath](run_with(hooks, connections)))) == wrong


@pytest.mark.parametrize(("datapath", "hooks"), [("kernel", (3, 2, 2)), ("inline", (1, 1, 1))])
def test_counters_of_the_other_datapath_are_told(datapath: str, hooks: tuple[int, int, int]) -> None:
    problems = list(CHECKS[datapath](run_with(hooks, [INWARD, OUTWARD])))
    assert [problem.split()[3] for problem in problems] == ["PREROUTING,", "OUTPUT,", "POSTROUTING,"]


def test_a_queue_that_lost_packets_is_told() -> None:
    [problem] = CHECKS["kernel"](run_with((1, 1, 1), [INWARD, OUTWARD], dropped=1))
    assert problem.startswith("the queue lost packets")


def test_counters_are_taken_when_no_packet_is_between_two_hooks() -> None:
    """A reading in the midst of traffic, as one that had 2,767 packets at OUTPUT and 2,655 at POSTROUTING."""
    readings = iter([(2700, 2655), (2767, 2655), (2767, 2767), (2767, 2767), (2768, 2768)])

    def read() -> dict[str, Any]:
        output, postrouting = next(readings)
        return {"hooks": {"OUTPUT": {"accepted": output}, "POSTROUTING": {"accepted": postrouting}}}

    assert demo_main.counters_at_rest(read)["hooks"]["POSTROUTING"] == {"accepted": 2767}
