"""What tproxyctl shows while it happens: the commands monitor, trace and top.

Owns: how an event and a rate look as a line. Must not know how events come about (`shell/publisher.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, Final

import click

from nfq_engine import wire
from nfq_engine.cli_forms import ask, console, endpoint, engine, examples, flow, table

if TYPE_CHECKING:
    from rich.console import RenderableType

_as_json: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON, an event a line.")
_count: Final = click.option("-c", "--count", type=click.IntRange(1), metavar="N", help="End after N events.")

_TCP_FLAGS: Final = ((0x02, "S"), (0x10, "A"), (0x08, "P"), (0x01, "F"), (0x04, "R"))


@click.command(epilog=examples("monitor", "monitor --json -c 10"))
@_as_json
@_count
def monitor(*, as_json: bool, count: int | None) -> None:
    """Print events as they happen: assign, unassign, new, mapped, deleted, and dropped with its reason.

    New, mapped and deleted tell of connections: those that come to the queue, or with datapath kernel those that carry
    the mark. Ends with Ctrl-C.
    """
    _print_events({"call": "monitor"}, as_json=as_json, count=count)


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=examples("trace -p tcp --dport 80", "trace --json --count 10 --decisions -s 10.0.0.0/24"),
)
@_as_json
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N packets.")
@click.option(
    "--decisions",
    is_flag=True,
    help="Without packets that go by an earlier decision on the hot path: these are neither shown nor slowed.",
)
@click.argument("filter_", metavar="[FILTER]...", nargs=-1, type=click.UNPROCESSED)
def trace(filter_: tuple[str, ...], *, as_json: bool, count: int | None, decisions: bool) -> None:
    """Print the way of each packet that FILTER wants: hook, tuple before and after, and who decided.

    FILTER is a rule as to iptables, without chain and target; it may match the packet as it came or as it goes on.
    Options of this command come before it. With datapath kernel only first packets come by. Ends with Ctrl-C.
    """
    request = {"call": "trace", "arguments": list(filter_), "decisions": decisions}
    _print_events(request, as_json=as_json, count=count)


def _print_events(request: wire.Message, *, as_json: bool, count: int | None) -> None:
    """Print what a subscription brings, until there is enough or somebody interrupts."""
    with engine() as control, suppress(KeyboardInterrupt):
        control.call(request)
        events = control.events()
        for _ in range(count) if count is not None else repeat(None):
            event = next(events)
            click.echo(json.dumps(event) if as_json else event_line(event))


def event_line(event: dict[str, Any]) -> str:
    """An event as one line of text."""
    if event["event"] == "lost":
        return f"{event['events']} events were lost: they came faster than they were read"
    when = datetime.fromtimestamp(event["time"]).astimezone().strftime("%H:%M:%S.%f")
    if "sockref" in event:
        entry = event["sockref"]
        what = f"{entry['protocol']} {endpoint(entry['foreign'])} for {endpoint(entry['local'])}"
        if entry["remote"]["port"]:
            what += f" with {endpoint(entry['remote'])}"
        return f"{when} {event['event']:8} {what} {'|'.join(entry['flags'])}".rstrip()
    if "connection" in event:
        entry = event["connection"]
        inside = f" inside {flow(entry['inside'])}" if entry["inside"] != entry["original"] else ""
        final = f" leaves as {flow(entry['final'])}" if entry["final"] != entry["inside"] else ""
        return f"{when} {event['event']:8} #{entry['id']} {entry['protocol']} {flow(entry['original'])}{inside}{final}"
    return f"{when} {_packet_line(event)}"


def _packet_line(event: dict[str, Any]) -> str:
    """A packet at a hook."""
    parts = [event["hook"] if event["event"] == "packet" else f"dropped  {event['hook']}"]
    parts += [f"{way}={event[name]}" for way, name in (("in", "in_interface"), ("out", "out_interface")) if event[name]]
    if event["before"]:
        about = "icmp error about " if event["is_error"] else ""
        parts.append(f"{about}{event['protocol']} {flow(event['before'])}")
    if event["tcp_flags"] is not None:
        parts.append("".join(["[", *(letter for bit, letter in _TCP_FLAGS if event["tcp_flags"] & bit), "]"]))
    parts.append(f"{event['length']} bytes: {event['reason']}")
    if event["verdict"] == "drop":
        parts.append(f"({event['detail']})" if event["detail"] else "")
        return " ".join(parts).rstrip()
    if event["by"]:
        parts.append(f"by {event['by']}")
    if event["after"] and event["after"] != event["before"]:
        parts.append(f"=> {flow(event['after'])}")
    return " ".join(parts)


# top


@dataclass(frozen=True, slots=True)
class Rate:
    """What a connection carried since the last look, both directions together, in a second."""

    connection: dict[str, Any]
    packets: float
    bytes: float


@click.command(epilog=examples("top", "top -i 5 -n 10", "top --json -c 1"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a look a line.")
@click.option("-i", "--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds a look.")
@click.option("-n", "--lines", type=click.IntRange(1), default=20, show_default=True, help="How many connections.")
@click.option("-c", "--count", type=click.IntRange(1), metavar="N", help="End after N looks.")
def top(*, interval: float, lines: int, count: int | None, as_json: bool) -> None:
    """Show the busiest connections, again and again, until Ctrl-C."""
    looks = islice(_looks(interval), count)
    if as_json:
        with suppress(KeyboardInterrupt):
            for rates, total in looks:
                click.echo(json.dumps({"connections": total, "busiest": [asdict(rate) for rate in rates[:lines]]}))
        return
    terminal = console()
    try:
        if not terminal.is_terminal:
            for rates, total in looks:
                terminal.print(_screen(rates, total, lines))
            return
        from rich.live import Live

        with Live(console=terminal, screen=count is None, auto_refresh=False) as live:
            for rates, total in looks:
                live.update(_screen(rates, total, min(lines, max(terminal.height - 3, 1))), refresh=True)
    except KeyboardInterrupt:
        pass


def _looks(interval: float) -> Iterator[tuple[list[Rate], int]]:
    """The rates of all connections, and how many there are, once an interval."""
    before, then = ask({"call": "connections"})["connections"], time.monotonic()
    while True:
        time.sleep(interval)
        after, now = ask({"call": "connections"})["connections"], time.monotonic()
        yield rates(before, after, now - then), len(after)
        before, then = after, now


def rates(before: list[dict[str, Any]], after: list[dict[str, Any]], seconds: float) -> list[Rate]:
    """What the connections of the second listing carried since the first one, the busiest first."""
    earlier = {entry["id"]: _carried(entry) for entry in before}
    found = []
    for entry in after:
        packets, octets = _carried(entry)
        old_packets, old_octets = earlier.get(entry["id"], (0, 0))
        found.append(Rate(entry, (packets - old_packets) / seconds, (octets - old_octets) / seconds))
    return sorted(found, key=lambda rate: (-rate.bytes, -rate.packets))


def _carried(entry: dict[str, Any]) -> tuple[int, int]:
    """Packets and bytes of both directions; 0 where the kernel does not count."""
    return sum(entry["packets"][way] or 0 for way in entry["packets"]), sum(
        entry["bytes"][way] or 0 for way in entry["bytes"]
    )


def _screen(found: list[Rate], total: int, lines: int) -> RenderableType:
    """One look at the busiest connections."""
    from rich.console import Group
    from rich.text import Text

    listing = table(("protocol", "state", "original", "inside", "packets/s", "kB/s"))
    for rate in found[:lines]:
        entry = rate.connection
        inside = flow(entry["inside"]) if entry["inside"] != entry["original"] else ""
        listing.add_row(
            entry["protocol"],
            entry["state"],
            flow(entry["original"]),
            inside,
            f"{rate.packets:,.0f}",
            f"{rate.bytes / 1000:,.1f}",
        )
    heading = f"{total} connections, the {min(lines, total)} busiest"
    if any(rate.connection["packets"]["original"] is None for rate in found):
        heading += "; the kernel does not count: sysctl net.netfilter.nf_conntrack_acct=1 makes it, for new ones"
    return Group(Text(heading), listing)
