"""What a datapath is to the daemon, and what both of them do with a queued packet.

Owns: the way from a queued packet to an `Arrival`, verdicts on the slow path, the log of dropped packets. Must not know
who rewrites: `inline` and `kernel_nat` do. Place in the path: between the queue and the core.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from nfq_engine import wire
from nfq_engine.core.conntrack import Connection
from nfq_engine.core.decision import Decision, Reason, Verdict
from nfq_engine.core.packet import FlowTuple, Hook, claimed_length
from nfq_engine.core.rule_values import Owner
from nfq_engine.core.tproxy_table import Arrival, TproxyTable
from nfq_engine.shell.divert import Layout
from nfq_engine.shell.interfaces import HostInterfaces
from nfq_engine.shell.queue import CUT, LARGEST_COPY, QueuedPacket

log: Final = logging.getLogger("tproxyd")

_DROPS_LOGGED: Final = 20  # a tick, so that a flood of bad packets is no flood of lines


@dataclass(frozen=True, slots=True)
class Seen:
    """A packet at a hook and its verdict. `after` is its tuple afterwards, when the kernel is to rewrite it."""

    hook: Hook
    in_interface: str
    out_interface: str
    mark: int
    data: bytes
    decision: Decision
    after: FlowTuple | None = None


class Source(Protocol):
    """Something that the daemon can wait for."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


class Datapath(ABC):
    """Gives each queued packet its verdict, and knows the connections that come of it."""

    layout: Layout

    def __init__(self, table: TproxyTable, interfaces: HostInterfaces, mark: int) -> None:
        self.table = table
        self.slice_begin = 0.0  # the time that packets of this turn are said to have come: one object for all of them
        self.slice_end = 0.0  # when to leave the rest of the queue for later
        # The queue's: have a packet handled again, whole; and whose socket sent the packet that is being handled.
        self.handle_whole: Callable[[QueuedPacket], None] = lambda packet: packet.drop()
        self.owner: Callable[[], Owner | None] = lambda: None
        self.on_packet: Callable[[Seen], None] | None = None  # is told of every decision, if somebody listens
        self.is_traced = False  # and of packets that go by an earlier one
        self._interfaces = interfaces
        self._mark = mark
        self._drops_to_log = _DROPS_LOGGED

    # What the daemon calls.

    @abstractmethod
    def callback(self) -> Callable[[QueuedPacket], None]:
        """What the queue calls for each packet; it raises SliceOver when it has taken long enough."""

    def release(self) -> None:  # noqa: B027 - most hold nothing back
        """All packets that wait have been handled: give the verdicts that were held back."""

    @property
    def sources(self) -> Iterable[tuple[Source, Callable[[], object]]]:
        """What else to wait for, and what to do then."""
        return ()

    @abstractmethod
    def settle(self) -> None:
        """Take in all news, so that an answer is right now."""

    def collect(self) -> None:  # noqa: B027 - most count everything themselves
        """Take in what the kernel has counted, so that all counters are right now."""

    def take_over(self) -> None:  # noqa: B027 - most decide everything themselves
        """`collect`, and let the kernel decide nothing by itself until `adjust`: rules may change, and count anew."""

    def adjust(self) -> None:  # noqa: B027 - most have told it nothing
        """Sockrefs or rules may have changed: let the kernel know, before anybody is told that it is done."""

    def tick(self, now: float) -> None:
        """What has to be done now and then: the next drops may be logged again."""
        if self._drops_to_log < 0:
            log.warning("%d more drops were not logged", -self._drops_to_log)
        self._drops_to_log = _DROPS_LOGGED

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of the kernel."""

    # What is answered from it.

    @abstractmethod
    def connections(self) -> list[wire.Message]:
        """Every connection, as JSON."""

    @abstractmethod
    def connection_count(self) -> int:
        """How many there are."""

    @abstractmethod
    def original(self, inside: FlowTuple) -> FlowTuple | None:
        """How the mapped connection arrived that a local socket sees as `inside`; None: there is no such."""

    @abstractmethod
    def connection_of(self, hook: Hook, flow: FlowTuple) -> Connection | None:
        """The connection that a packet with this tuple belongs to, as far as it is known here who mapped it."""

    # What both do.

    def _is_for_later(self, packet: QueuedPacket, data: bytes) -> bool:
        """Did the packet come cut, and is it sent on to come again whole?"""
        if len(data) == CUT and claimed_length(data) > CUT:
            self.handle_whole(packet)
            return True
        return False

    def _arrival(self, packet: QueuedPacket, hook: Hook, data: bytes) -> Arrival:
        missing = claimed_length(data) - len(data) if len(data) >= LARGEST_COPY else 0
        return Arrival(
            hook=hook,
            data=data + bytes(missing) if missing > 0 else data,
            in_interface=self._interfaces.name(packet.indev),
            out_interface=self._interfaces.name(packet.outdev),
            now=time.monotonic(),
            mark=packet.get_mark(),
            is_cut=missing > 0,
            owner=self.owner() if hook is Hook.OUTPUT and self.table.ruleset.looks_at_owners else None,
        )

    @staticmethod
    def _fault(hook: Hook, data: bytes) -> Decision:
        """The decision after an error of ours, whatever it is: the packet is dropped, none may get stuck."""
        log.exception("a packet at %s was dropped: %s", hook.name, data[:64].hex())
        return Decision(Verdict.DROP, Reason.FAULT)

    def _show(
        self, packet: QueuedPacket, hook: Hook, data: bytes, decision: Decision, after: FlowTuple | None = None
    ) -> None:
        """Tell who wants to know of a packet and its verdict."""
        if self.on_packet is not None:
            in_interface, out_interface = self._interfaces.name(packet.indev), self._interfaces.name(packet.outdev)
            self.on_packet(Seen(hook, in_interface, out_interface, packet.get_mark(), data, decision, after))

    def _give(self, packet: QueuedPacket, hook: Hook, decision: Decision) -> None:
        """Give a packet the verdict that was decided."""
        if decision.verdict is Verdict.DROP:
            self._drops_to_log -= 1
            if self._drops_to_log >= 0:
                log.warning("dropped at %s: %s: %s", hook.name, decision.reason.value, decision.detail)
            packet.drop()
            return
        if decision.is_marked:
            packet.set_mark(packet.get_mark() | self._mark)
        if decision.payload is not None:
            packet.set_payload(decision.payload)
        packet.accept()
