"""Timelines: what is on them, and where."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scenes import CLIENT, POINTS, Scene

from testbed.connections import connections
from testbed.journal import LAB, Entry, Journal, command_line
from testbed.report_ladders import LadderView, ladders
from testbed.timeline import event_text, timeline
from testbed.trace import trace

START = 1_000_000_000_000  # nanoseconds: when the clock of a scene begins
MS = 1_000_000


def entry(where: str, what: str, began: int, ended: int | None = None, **more: Any) -> Entry:
    """Something in a lab; times in milliseconds."""
    return Entry(where, what, START + began * MS, ended=None if ended is None else START + ended * MS, **more)


def end(address: str, port: int) -> dict[str, Any]:
    return {"address": address, "port": port}


def exchange(scene: Scene) -> list[LadderView]:
    scene.go((CLIENT, IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=4000, dport=53) / b"question"))
    return ladders(connections(trace(scene.frames)), POINTS, START, {})


SOCKREF = {"protocol": "udp", "foreign": end("10.0.0.9", 7), "local": end("10.0.0.2", 4000)}
FLOWS = {
    "original": {"source": end("10.0.0.1", 4000), "destination": end("10.0.1.2", 80)},
    "inside": {"source": end("10.0.0.1", 4000), "destination": end("10.0.0.2", 50080)},
    "final": {"source": end("10.0.0.1", 4000), "destination": end("10.0.0.2", 50080)},
}
DROPPED = {"hook": "PREROUTING", "protocol": "tcp", "reason": "rule-drop", "detail": "PREROUTING 1"}
EVENTS: dict[str, tuple[dict[str, Any], str]] = {
    "a sockref": (
        {"event": "assign", "sockref": SOCKREF},
        "assign udp 10.0.0.9:7 for 10.0.0.2:4000",
    ),
    "a connection": (
        {"event": "mapped", "connection": {"id": 3, "protocol": "tcp", **FLOWS}},
        "mapped #3 tcp 10.0.0.1:4000 → 10.0.1.2:80, then 10.0.0.1:4000 → 10.0.0.2:50080",
    ),
    "a dropped packet": (
        {"event": "dropped", "before": FLOWS["original"], **DROPPED},
        "dropped at PREROUTING tcp 10.0.0.1:4000 → 10.0.1.2:80: rule-drop PREROUTING 1",
    ),
    "a packet that cannot be read": (
        {"event": "dropped", "before": None, **DROPPED, "reason": "malformed", "detail": ""},
        "dropped at PREROUTING: malformed",
    ),
}


@pytest.mark.parametrize(("event", "text"), EVENTS.values(), ids=EVENTS)
def test_an_event_is_told_in_a_line(event: dict[str, Any], text: str) -> None:
    assert event_text(event) == text


def test_lanes_are_the_lab_then_node_by_node_then_connections_and_other_frames() -> None:
    scene = Scene()
    views = exchange(scene)
    entries = [entry(LAB, "links", -9, -8), entry("b", "web", -7), entry("a", "fetch", -1, 1), entry("b", "nft", 2, 3)]
    events = [("b", {"time": START / 1e9, "event": "assign", "sockref": SOCKREF})]
    found = timeline(entries, events, views, scene.frames, START, START + 10 * MS)
    assert [(lane.where, lane.label) for lane in found.lanes] == [
        ("lab", ""),
        ("b", "commands"),
        ("b", "engine's events"),
        ("a", "commands"),
        ("", "udp 10.0.0.1:4000 → 10.0.0.2:53"),
        ("", "frames of no connection"),
    ]
    (packet,) = found.lanes[4].marks
    assert (packet.target, packet.at) == ("packet-1", 0.01)
    assert found.traffic == (0.01, 0.01)


def test_what_still_runs_is_open_and_goes_on_to_the_end() -> None:
    found = timeline([entry("a", "web", 1), entry("a", "fetch", 2, 4)], [], [], [], START, START + 10 * MS)
    running, done = found.lanes[0].bars
    assert (running.begin, running.end, running.is_open) == (1, 10, True)
    assert (done.begin, done.end, done.is_open) == (2, 4, False)
    assert found.traffic is None
    assert found.begin < 1
    assert found.end > 10


def test_the_list_is_in_the_order_of_time_and_tells_what_failed() -> None:
    entries = [entry("a", "late", 5, 6), entry("a", "early", 1, 3, outcome="exit status 7", is_bad=True)]
    first, second = timeline(entries, [], [], [], START, START + 10 * MS).moments
    assert (first.text, first.at, first.length, first.is_bad) == ("early: exit status 7", 1, 2, True)
    assert (second.text, second.is_bad) == ("late", False)


def test_what_a_browser_could_not_hold_is_left_out_and_counted() -> None:
    scene = Scene()
    frame = scene.see(CLIENT, IP(src="10.0.0.1", dst="10.0.0.2"), outgoing=True)
    entries = [entry(f"n{number}", "x", number, number + 1) for number in range(130)]
    found = timeline(entries, [], [], [frame] * 2500, START, START + 200 * MS)
    assert len(found.lanes) == 120
    assert found.left_out == 11 + 2500


def test_a_journal_tells_how_something_ended() -> None:
    journal = Journal()
    with journal.during("a", "well"):
        pass
    with pytest.raises(OSError, match="no such thing"), journal.during("a", "badly"):
        raise OSError("no such thing")
    well, badly = journal.entries
    assert (well.is_bad, well.ended is not None) == (False, True)
    assert (badly.is_bad, badly.outcome) == (True, "no such thing")


def test_the_first_word_about_an_end_counts() -> None:
    found = Journal().begin("a", "x")
    found.end("exit status 1", is_bad=True)
    ended = found.ended
    found.end("later")
    assert (found.ended, found.outcome, found.is_bad) == (ended, "exit status 1", True)


def test_a_command_is_told_without_its_folder() -> None:
    assert command_line(["/usr/bin/curl", "-o", "a b"]) == "curl -o 'a b'"
