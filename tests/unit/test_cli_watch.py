"""How events and rates look."""

from __future__ import annotations

from typing import Any

import pytest

from nfq_engine.cli_watch import event_line, rates


def endpoint(text: str) -> dict[str, Any]:
    address, _, port = text.rpartition(":")
    return {"address": address, "port": int(port)}


def flow(source: str, destination: str) -> dict[str, Any]:
    return {"source": endpoint(source), "destination": endpoint(destination)}


def connection(
    number: int, packets: tuple[int | None, int | None], octets: tuple[int | None, int | None]
) -> dict[str, Any]:
    return {
        "id": number,
        "packets": dict(zip(("original", "reply"), packets, strict=True)),
        "bytes": dict(zip(("original", "reply"), octets, strict=True)),
    }


PACKET: dict[str, Any] = {
    "time": 0.0,
    "event": "packet",
    "hook": "PREROUTING",
    "in_interface": "eth0",
    "out_interface": "",
    "length": 60,
    "protocol": "tcp",
    "tcp_flags": 0x12,
    "is_error": False,
    "before": flow("10.0.0.1:4000", "10.0.1.2:80"),
    "after": flow("10.0.0.1:4000", "10.0.0.254:50080"),
    "verdict": "accept",
    "reason": "redirect",
    "detail": "",
    "by": "PREROUTING 1",
}

LINES: dict[str, tuple[dict[str, Any], str]] = {
    "translated": (
        PACKET,
        "PREROUTING in=eth0 tcp 10.0.0.1:4000 > 10.0.1.2:80 [SA] 60 bytes: redirect by PREROUTING 1 => "
        "10.0.0.1:4000 > 10.0.0.254:50080",
    ),
    "untouched": (
        {**PACKET, "after": PACKET["before"], "reason": "no-mapping", "by": ""},
        "PREROUTING in=eth0 tcp 10.0.0.1:4000 > 10.0.1.2:80 [SA] 60 bytes: no-mapping",
    ),
    "icmp error": (
        {**PACKET, "is_error": True, "tcp_flags": None, "after": None, "reason": "icmp-passed", "by": ""},
        "PREROUTING in=eth0 icmp error about tcp 10.0.0.1:4000 > 10.0.1.2:80 60 bytes: icmp-passed",
    ),
    "unreadable": (
        {
            **PACKET,
            "event": "dropped",
            "before": None,
            "tcp_flags": None,
            "verdict": "drop",
            "reason": "malformed",
            "detail": "too short",
        },
        "dropped  PREROUTING in=eth0 60 bytes: malformed (too short)",
    ),
    "narrowed sockref": (
        {
            "time": 0.0,
            "event": "assign",
            "sockref": {
                "protocol": "udp",
                "foreign": endpoint("fd00::9:53"),
                "local": endpoint("fd00::1:4000"),
                "remote": endpoint("fd00::2:9"),
                "flags": ["CONNECT", "ONCE"],
            },
        },
        "assign   udp [fd00::9]:53 for [fd00::1]:4000 with [fd00::2]:9 CONNECT|ONCE",
    ),
}


@pytest.mark.parametrize(("event", "line"), LINES.values(), ids=LINES.keys())
def test_an_event_is_one_line(event: dict[str, Any], line: str) -> None:
    time, _, rest = event_line(event).partition(" ")
    assert rest == line
    assert len(time) == len("00:00:00.000000")


def test_lost_events_are_told() -> None:
    assert event_line({"event": "lost", "events": 7}).startswith("7 events were lost")


def test_rates_are_sorted_and_count_new_connections_from_nothing() -> None:
    before = [connection(1, (10, 5), (1000, 500)), connection(9, (1, 1), (1, 1))]
    after = [
        connection(1, (12, 5), (1200, 500)),
        connection(2, (4, 0), (4000, 0)),
        connection(3, (None, None), (None, None)),
    ]
    found = rates(before, after, 2.0)
    assert [(rate.connection["id"], rate.packets, rate.bytes) for rate in found] == [
        (2, 2.0, 2000.0),
        (1, 1.0, 100.0),
        (3, 0.0, 0.0),
    ]
