"""Who is told what happens: the listeners of `tproxyctl monitor` and `tproxyctl trace`.

Owns: the subscriptions, and the form of an event. Must not know why something happened. Place: beside the packets; the
core calls `tell` and a datapath calls `saw` while somebody listens, and neither while nobody does.

A listener that does not read loses events, and is told how many, rather than holding up packets.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from nfq_engine import wire
from nfq_engine.core.conntrack import Connection
from nfq_engine.core.decision import Reason, Verdict
from nfq_engine.core.events import Event, Subject, unobserved
from nfq_engine.core.packet import FlowTuple, IcmpError, Segment, parse
from nfq_engine.core.rule_text import parse_command
from nfq_engine.core.ruleset import BuiltinChain, Drop, RulePacket, Ruleset
from nfq_engine.core.sockref import Sockref
from nfq_engine.core.tracked import Tracked
from nfq_engine.shell.control import Caller
from nfq_engine.shell.datapath import Datapath, Seen
from nfq_engine.shell.forms import flow_form, sockref_form

_CHAIN: Final = "filter"


class PacketFilter:
    """Which packets a listener wants: a rule without a target, as to iptables; an empty one wants all."""

    def __init__(self, arguments: list[str]) -> None:
        """RuleError when the arguments are none of a rule."""
        self._wants_all = not arguments
        self._ruleset = Ruleset()
        # A chain of one's own takes both -i and -o.
        for command in (["-N", _CHAIN], ["-A", _CHAIN, *arguments, "-j", "DROP"], ["-A", "PREROUTING", "-j", _CHAIN]):
            self._ruleset.apply(parse_command(command))

    def wants(self, packet: RulePacket, now: float) -> bool:
        """Does the rule match?"""
        return self._wants_all or isinstance(self._ruleset.evaluate(BuiltinChain.PREROUTING, packet, now), Drop)


@dataclass(slots=True)
class _Listener:
    """One subscription: all events, or with a filter the packets that it wants; `lost`: events it did not read.

    `is_brief`: packets that go by an earlier decision need not be told.
    """

    caller: Caller
    filter: PacketFilter | None
    is_brief: bool = False
    lost: int = 0

    def tell(self, line: bytes) -> None:
        """Put an encoded event into its outbox, behind the number of those that did not fit."""
        if self.lost and self.caller.deliver(wire.encode({"event": "lost", "events": self.lost})):
            self.lost = 0
        if self.lost or not self.caller.deliver(line):
            self.lost += 1


class Publisher:
    """Tells listeners what a datapath and its table do."""

    def __init__(self, datapath: Datapath) -> None:
        self._datapath = datapath
        self._monitors: list[_Listener] = []
        self._tracers: list[_Listener] = []

    def __len__(self) -> int:
        return len(self._monitors) + len(self._tracers)

    def monitor(self, caller: Caller) -> None:
        """Tell a client every event from now on."""
        self._monitors.append(_Listener(caller, None))
        self._listen()

    def trace(self, caller: Caller, arguments: list[str], *, is_brief: bool) -> None:
        """Tell a client of every packet that a filter wants, at each hook; RuleError when the filter is none.

        `is_brief`: of those that are decided anew; the hot path is as fast as when nobody listens.
        """
        self._tracers.append(_Listener(caller, PacketFilter(arguments), is_brief))
        self._listen()

    def forget(self, caller: Caller) -> None:
        """A client has gone."""
        self._monitors = [listener for listener in self._monitors if listener.caller is not caller]
        self._tracers = [listener for listener in self._tracers if listener.caller is not caller]
        self._listen()

    def _listen(self) -> None:
        """Be told what somebody wants to know, and no more."""
        self._datapath.table.observe = self._happened if self._monitors else unobserved
        self._datapath.on_packet = self._saw if self._monitors or self._tracers else None
        self._datapath.is_traced = any(not listener.is_brief for listener in self._tracers)

    def _happened(self, event: Event, subject: Subject) -> None:
        """Something happened to a sockref or a connection."""
        form = {"sockref": sockref_form(subject)} if isinstance(subject, Sockref) else _connection_form(subject)
        self._tell_monitors({"time": time.time(), "event": event.value, **form})

    def _saw(self, seen: Seen) -> None:
        """A packet got its verdict."""
        is_dropped = seen.decision.verdict is Verdict.DROP
        if not self._tracers and not is_dropped:
            return
        before = _flow_of(seen.data)
        if is_dropped:
            self._tell_monitors({"time": time.time(), "event": "dropped", **_packet_form(seen, before)})
        after = seen.after or (_flow_of(seen.decision.payload) if seen.decision.payload is not None else before)
        wanting = [listener for listener in self._tracers if _wants(listener, seen, before, after)]
        if not wanting:
            return
        form = {"time": time.time(), "event": "packet", **_packet_form(seen, before)}
        form["after"] = flow_form(after) if after is not None and seen.decision.verdict is Verdict.ACCEPT else None
        form["by"] = self._authority(seen, before)
        line = wire.encode(form)
        for listener in wanting:
            listener.tell(line)

    def _authority(self, seen: Seen, before: FlowTuple | None) -> str:
        """The rule and the sockrefs on whose word a packet's connection is translated, as far as there are any."""
        if before is None:
            return ""
        if seen.decision.reason is Reason.UNIDIR:
            sockrefs: Iterable[Sockref] = self._datapath.table.sockrefs.at_foreign(before.protocol, before.destination)
            return ", ".join(map(_name, sockrefs))
        connection = self._datapath.connection_of(seen.hook, before)
        if connection is None:
            return seen.decision.detail if seen.decision.reason is Reason.REDIRECT else ""
        return ", ".join(filter(None, (connection.rule, *map(_name, connection.sockrefs))))

    def _tell_monitors(self, message: wire.Message) -> None:
        line = wire.encode(message)
        for listener in self._monitors:
            listener.tell(line)


def _wants(listener: _Listener, seen: Seen, *flows: FlowTuple | None) -> bool:
    """Does a listener want a packet, as it came or as it goes on?"""
    now = time.monotonic()
    return listener.filter is not None and any(
        listener.filter.wants(RulePacket(flow, seen.in_interface, seen.out_interface, len(seen.data), seen.mark), now)
        for flow in dict.fromkeys(flows)
        if flow is not None
    )


def _packet_form(seen: Seen, before: FlowTuple | None) -> wire.Message:
    """A packet and its verdict."""
    parsed = parse(seen.data)
    return {
        "hook": seen.hook.name,
        "in_interface": seen.in_interface,
        "out_interface": seen.out_interface,
        "length": len(seen.data),
        "protocol": before.protocol.name.lower() if before is not None else None,
        "tcp_flags": parsed.tcp_flags if isinstance(parsed, Segment) else None,
        "is_error": isinstance(parsed, IcmpError),
        "before": flow_form(before) if before is not None else None,
        "verdict": seen.decision.verdict.name.lower(),
        "reason": seen.decision.reason.value,
        "detail": seen.decision.detail,
    }


def _connection_form(subject: Connection | Tracked) -> wire.Message:
    flows = {name: flow_form(getattr(subject, name)) for name in ("original", "inside", "final")}
    return {
        "connection": {
            "id": subject.identifier,
            "protocol": subject.original.protocol.name.lower(),
            **flows,
            "is_mapped": subject.is_mapped,
        }
    }


def _name(sockref: Sockref) -> str:
    """A sockref in a trace line."""
    return f"sockref {sockref.foreign} of {sockref.local}"


def _flow_of(data: bytes) -> FlowTuple | None:
    """The tuple of a packet, or of the packet that an ICMP error is about."""
    parsed = parse(data)
    return parsed.flow if isinstance(parsed, Segment | IcmpError) else None
