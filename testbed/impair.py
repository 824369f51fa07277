"""Impaired links: who impairs them, what the plan makes for them, and the stage that a lab starts for some.

Owns: the choice between the kernel and the stage, the names in the namespace between the nodes, the stage's files,
changes while the lab runs, the reading of counters. An impaired link is two veth pairs whose far ends lie in a
namespace of the testbed's own. Either the kernel hands frames from one to the other, through netem and tbf (tc.py), or
impair_stage.py carries them. Both keep what the nodes have apart from what the link does: captures in a node show what
it sent, and its own traffic control is its own.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

from testbed import capabilities, rtnetlink, tc
from testbed.impair_model import Counts
from testbed.impair_stage import CONTROL, RECORD
from testbed.netns import Namespace
from testbed.process import Program, ServiceError
from testbed.topology import End, Impairment, Link, Readiness, Topology

WIRE: Final = "(wire)"  # the namespace between the nodes; no node may be called that
LOG: Final = "impairments.log"  # in the lab's directory: who impairs what, and what the stage has to say
KERNEL_MEANS: Final = ("netem", "tbf", "tc-redirect")  # by the names of capabilities.py
_PATIENCE: Final = 10.0  # seconds for the stage to take over a change
_LAST_BREATH: Final = 0.5  # seconds from the closing of its sockets to its end


class ImpairError(Exception):
    """What a link does cannot be changed like that; the message says why, and what to do."""


def is_impaired(link: Link) -> bool:
    """Whether a link does anything to its packets."""
    return any(end.impair is not None for end in link.ends)


def kernel_means(topology: Topology) -> frozenset[str]:
    """What the kernel has that impairs links; not looked for where none is impaired."""
    is_wanted = any(map(is_impaired, topology.links))
    return frozenset(filter(capabilities.probe().has, KERNEL_MEANS)) if is_wanted else frozenset()


def disciplines(impairment: Impairment) -> tuple[str, ...]:
    """What of the kernel's can do this."""
    chances = (impairment.loss, impairment.duplicate, impairment.reorder, impairment.corrupt)
    is_for_netem = any((impairment.delay, impairment.jitter, *chances))
    return (*(("netem",) if is_for_netem else ()), *(("tbf",) if impairment.rate is not None else ()))


def described(impairment: Impairment) -> str:
    """What is done to packets; without a word of what is not."""
    return " ".join(f"{key}={value:.10g}" for key, value in asdict(impairment).items() if value) or "nothing"


def why_in_user_space(link: Link, kernel: Collection[str]) -> str | None:
    """Why the stage impairs a link; None when the kernel does. `kernel`: what it has of KERNEL_MEANS.

    A link that does nothing yet may be told to do anything. A seed promises the same choices on every machine: netem's
    are others, and before Linux 6.7 it takes no seed.
    """
    impairments = [end.impair for end in link.ends if end.impair is not None]
    if any(impairment.seed is not None for impairment in impairments):
        return "its seed asks for that"
    if any(impairment.jitter > tc.MOST_JITTER for impairment in impairments):
        return f"netem's jitter ends at {tc.MOST_JITTER:.1f} s"
    wanted = {"tc-redirect"}.union(*(disciplines(impairment) or KERNEL_MEANS for impairment in impairments))
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


def requests(interface: int, impairment: Impairment, sender: str, mtu: int) -> list[rtnetlink.Request]:
    """Have the kernel impair what an interface sends: netem, tbf, or tbf inside netem.

    In the place of the same disciplines, if there are any: then what is under way stays so.
    """
    wanted = disciplines(impairment)
    found = [tc.netem(interface, impairment, sender)] if "netem" in wanted else []
    if impairment.rate is not None:
        found.append(tc.tbf(interface, impairment.rate, mtu, inside_netem="netem" in wanted))
    return found


class Stage:
    """The running stage of a lab."""

    def __init__(self, links: Mapping[int, Link], namespace: Namespace, directory: Path) -> None:
        """Start it for links, by their numbers, and wait until it carries frames; ServiceError when it does not."""
        directions = [
            {"label": end.label, "source": source, "target": target, "impairment": asdict(end.impair or Impairment())}
            for end, source, target, _ in _directions(links)
        ]
        self._namespace = namespace
        self.labels: Final = [str(direction["label"]) for direction in directions]
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
        return {label: Counts(*record) for label, record in zip(self.labels, RECORD.iter_unpack(data), strict=True)}

    def change(self, label: str, impairment: Impairment) -> None:
        """Do something else to what an end sends; it does when this returns. ServiceError when the stage is gone."""
        message = json.dumps({"label": label, "impairment": asdict(impairment)}).encode()
        with self._namespace.socket(socket.AF_UNIX, socket.SOCK_DGRAM, 0) as asking:
            asking.bind("")  # any abstract name, to be answered at
            asking.settimeout(_PATIENCE)
            try:
                asking.sendto(message, CONTROL)
                asking.recv(16)
            except OSError as error:
                self.program.wait(_LAST_BREATH)
                self.program.check()
                raise ServiceError(f"the impairments do not answer: {error}") from error


class KernelImpairments:
    """What the kernel's disciplines do to the links of a lab that it impairs."""

    def __init__(self, links: Mapping[int, Link], wire: Namespace, kernel: Collection[str]) -> None:
        """For links, by their numbers, as they were built in the namespace `wire`. `kernel`: as in plan.plan."""
        self._wire = wire
        self._kernel = kernel
        self._ways = {end.label: (source, target, mtu) for end, source, target, mtu in _directions(links)}
        self._now = {end.label: end.impair or Impairment() for link in links.values() for end in link.ends}
        self.labels: Final = list(self._ways)
        self._earlier: dict[str, Counts] = {}  # before the disciplines were exchanged for others

    def counts(self) -> dict[str, Counts]:
        """What became of the frames that each end sent, by its label; the kernel does not count what it corrupts."""
        with self._netlink() as netlink:
            interfaces = rtnetlink.received(netlink)
            queues = tc.queues(netlink)
        found = {}
        for label, (source, target, _) in self._ways.items():
            _, seen = interfaces[source]
            index, _ = interfaces[target]
            netem = queues.get((index, "netem"), tc.Queue())
            tbf = queues.get((index, "tbf"), tc.Queue())
            earlier = self._earlier.get(label, Counts())
            came = seen - earlier.seen
            found[label] = Counts(
                seen=seen,
                # netem counts those that its child drops, too
                lost=earlier.lost + max(0, netem.dropped - tbf.dropped),
                overflowed=earlier.overflowed + tbf.dropped,
                duplicated=earlier.duplicated + max(0, netem.passed + netem.waiting + netem.dropped - came),
                reordered=earlier.reordered + netem.overtook,
            )
        return found

    def change(self, label: str, impairment: Impairment) -> None:
        """Do something else to what an end sends; ImpairError when this kernel cannot.

        What is under way meanwhile gets lost when other disciplines than before are needed.
        """
        if impairment.seed is not None:
            raise ImpairError(f"the kernel impairs {label}, and takes no seed: `seed` in the topology has it staged")
        if impairment.jitter > tc.MOST_JITTER:
            raise ImpairError(f"the kernel impairs {label}, and its jitter ends at {tc.MOST_JITTER:.1f} s")
        if lacking := [name for name in disciplines(impairment) if name not in self._kernel]:
            what = " and no ".join(lacking)
            raise ImpairError(f"this kernel has no {what}: `impair: {{}}` in the topology has {label} staged")
        _, target, mtu = self._ways[label]
        is_other = disciplines(impairment) != disciplines(self._now[label])
        earlier = self.counts()[label] if is_other else None
        with self._netlink() as netlink:
            index, _ = rtnetlink.received(netlink)[target]
            if is_other:
                _send(netlink, [tc.remove(index)], but=errno.ENOENT)  # there was none
            _send(netlink, requests(index, impairment, label, mtu))
        self._now[label] = impairment
        if earlier is not None:
            self._earlier[label] = earlier

    def _netlink(self) -> socket.socket:
        return self._wire.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)


def _send(netlink: socket.socket, messages: list[rtnetlink.Request], but: int = 0) -> None:
    for _, code in rtnetlink.send(netlink, messages):
        if code != but:
            raise ImpairError(f"the kernel refused the impairment: {os.strerror(code)}")


def _directions(links: Mapping[int, Link]) -> Iterator[tuple[End, str, str, int]]:
    """Both directions of each link: who sends, where it comes in between the nodes, where it goes out, the MTU."""
    for number, link in links.items():
        left, right = (end.interface for end in wire_ends(number))
        yield link.left, left, right, link.mtu
        yield link.right, right, left, link.mtu
