"""Impaired links: who impairs them, what the plan makes for them, and the stage that a lab starts for some.

Owns: the choice between the kernel and the stage, the names in the namespace between the nodes, the stage's files, the
reading of counters. An impaired link is two veth pairs whose far ends lie in a namespace of the testbed's own. Either
the kernel hands frames from one to the other, through netem and tbf (tc.py), or impair_stage.py carries them. Both keep
what the nodes have apart from what the link does: captures in a node show what it sent, and its own traffic control is
its own.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

from testbed import rtnetlink, tc
from testbed.impair_model import Counts
from testbed.impair_stage import RECORD
from testbed.netns import Namespace
from testbed.process import Program
from testbed.topology import End, Impairment, Link, Readiness, Topology

WIRE: Final = "(wire)"  # the namespace between the nodes; no node may be called that
LOG: Final = "impairments.log"  # in the lab's directory: who impairs what, and what the stage has to say
KERNEL_MEANS: Final = ("netem", "tbf", "tc-redirect")  # by the names of capabilities.py


def is_impaired(link: Link) -> bool:
    """Whether a link does anything to its packets."""
    return any(end.impair is not None for end in link.ends)


def disciplines(impairment: Impairment) -> tuple[str, ...]:
    """What of the kernel's can do this."""
    chances = (impairment.loss, impairment.duplicate, impairment.reorder, impairment.corrupt)
    is_for_netem = any((impairment.delay, impairment.jitter, *chances))
    return (*(("netem",) if is_for_netem else ()), *(("tbf",) if impairment.rate is not None else ()))


def why_in_user_space(link: Link, kernel: Collection[str]) -> str | None:
    """Why the stage impairs a link; None when the kernel does. `kernel`: what it has of KERNEL_MEANS.

    A seed promises the same choices on every machine: netem's are others, and before Linux 6.7 it takes no seed.
    """
    impairments = [end.impair for end in link.ends if end.impair is not None]
    if any(impairment.seed is not None for impairment in impairments):
        return "its seed asks for that"
    wanted = {"tc-redirect"}.union(*map(disciplines, impairments))
    lacking = [name for name in KERNEL_MEANS if name in wanted.difference(kernel)]
    return f"this kernel has no {' and no '.join(lacking)}" if lacking else None


def notes(topology: Topology, kernel: Collection[str]) -> list[str]:
    """Who impairs what the ends of impaired links send, a line for each way of doing it."""
    ways: dict[str, list[str]] = {}
    for link in topology.links:
        reason = why_in_user_space(link, kernel)
        for end in link.ends:
            if end.impair is not None and disciplines(end.impair):
                by_kernel = f"by the kernel's {' and '.join(disciplines(end.impair))}"
                way = by_kernel if reason is None else f"in user space: {reason}"
                ways.setdefault(way, []).append(end.label)
    return [f"{', '.join(labels)}: impaired {way}" for way, labels in ways.items()]


def wire_ends(number: int) -> tuple[End, End]:
    """The ends in between that face the left and the right end of the link of that number."""
    return End(WIRE, f"l{number}"), End(WIRE, f"r{number}")


class Stage:
    """The running stage of a lab."""

    def __init__(self, links: Mapping[int, Link], namespace: Namespace, directory: Path) -> None:
        """Start it for links, by their numbers, and wait until it carries frames; ServiceError when it does not."""
        directions = [
            {"label": end.label, "source": source, "target": target, "impairment": asdict(end.impair or Impairment())}
            for end, source, target in _directions(links)
        ]
        self._labels = [str(direction["label"]) for direction in directions]
        self._counters = directory / "impairments.counters"
        self._counters.write_bytes(bytes(RECORD.size * len(directions)))
        config = directory / "impairments.json"
        config.write_text(json.dumps(directions, indent=1))
        files = (str(config), str(self._counters))
        command = ("{python}", "-m", "testbed.impair_stage", *files, "{notify_fd}")
        self.program = Program("the impairments", command, namespace, directory / LOG, Readiness(notify=True))

    def counts(self) -> Mapping[str, Counts]:
        """What became of the frames that each end of an impaired link sent, by its label."""
        data = self._counters.read_bytes()
        return {label: Counts(*record) for label, record in zip(self._labels, RECORD.iter_unpack(data), strict=True)}


def kernel_counts(links: Mapping[int, Link], wire: Namespace) -> dict[str, Counts]:
    """What became of the frames of links that the kernel impairs; it does not count what it corrupts."""
    with wire.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        interfaces = rtnetlink.received(netlink)
        queues = tc.queues(netlink)
    found = {}
    for end, source, target in _directions(links):
        _, seen = interfaces[source]
        index, _ = interfaces[target]
        netem = queues.get((index, "netem"), tc.Queue())
        tbf = queues.get((index, "tbf"), tc.Queue())
        found[end.label] = Counts(
            seen=seen,
            lost=max(0, netem.dropped - tbf.dropped),  # netem counts those that its child drops, too
            overflowed=tbf.dropped,
            duplicated=max(0, netem.passed + netem.waiting + netem.dropped - seen),
            reordered=netem.overtook,
        )
    return found


def _directions(links: Mapping[int, Link]) -> Iterator[tuple[End, str, str]]:
    """Both directions of each link: who sends, where it comes in between the nodes, where it goes out."""
    for number, link in links.items():
        left, right = (end.interface for end in wire_ends(number))
        yield link.left, left, right
        yield link.right, right, left
