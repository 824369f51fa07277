"""The tproxy table: what becomes of a new connection, by its sockrefs first and its rules second.

Owns: sockrefs, ruleset, counters, and the order in which they are asked (tproxy.md section 2). Must not know who
carries a decision out: `pipeline.Engine` rewrites every packet itself, `kernel_engine.KernelEngine` leaves it to the
kernel's NAT. Place in the path: asked once for every new connection, at each of its two stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, assert_never

from nfq_engine.core import ruleset
from nfq_engine.core.conntrack import Connection
from nfq_engine.core.decision import Counters, Decision, Reason, Verdict
from nfq_engine.core.events import Observer, unobserved
from nfq_engine.core.nat import PortRange, Taken
from nfq_engine.core.one_way import Listener, Listeners, Origins, Redirected, digest_of, payload_of
from nfq_engine.core.packet import Endpoint, FlowTuple, Hook, Protocol, Segment
from nfq_engine.core.rewrite import Rewrite, patch_segment
from nfq_engine.core.rule_values import Owner
from nfq_engine.core.ruleset import BuiltinChain, RulePacket, Ruleset
from nfq_engine.core.sockref import Flag, Sockref, SockrefTable
from nfq_engine.core.surroundings import Chance, Interfaces

LOOPBACK: Final = {4: bytes((127, 0, 0, 1)), 16: bytes(15) + b"\x01"}


class Deletion(StrEnum):
    """How the connections of a sockref are found when they are to be deleted (tproxy.md section 7)."""

    SCAN = "scan"  # walk all tracked connections and compare
    LINKED = "linked"  # each sockref has a list of its own


@dataclass(frozen=True, slots=True)
class Arrival:
    """A packet as it came to a hook. Interfaces are names, empty where the hook has none; `now` is in seconds.

    `is_cut`: the packet's end did not fit into the queue's message and stands as zeros in `data`, so the packet can be
    let through as it is, but not be rewritten. `owner`: of the socket that sent it, at OUTPUT, if the ruleset asks.
    """

    hook: Hook
    data: bytes
    in_interface: str
    out_interface: str
    now: float
    mark: int = 0
    is_cut: bool = False
    owner: Owner | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where the destination stage sends a new connection, and on whose word."""

    to: Endpoint
    reason: Reason
    sockref: Sockref | None = None
    rule: str = ""
    is_marked: bool = False


class TproxyTable(ABC):
    """Sockrefs and rules, and what belongs to both ways of carrying them out."""

    def __init__(self, interfaces: Interfaces, chance: Chance, ports: PortRange) -> None:
        self.sockrefs = SockrefTable()
        self.listeners = Listeners()
        self.redirected = Redirected()
        self.origins = Origins()
        self.ruleset = Ruleset(chance)
        self.counters = Counters()
        self.observe: Observer = unobserved
        self.chance = chance
        self.ports = ports
        self._interfaces = interfaces

    @abstractmethod
    def delete_related(self, sockref: Sockref) -> None:
        """Delete the connections that a sockref's mappings made; the next packet of each is looked up afresh."""

    @abstractmethod
    def delete_redirects(self, listener: Listener) -> None:
        """Delete the connections that rules redirected to what is now a one-way listener."""

    def destination_target(self, arrival: Arrival, segment: Segment) -> Target | Decision:
        """What the destination stage wants: a sockref's local address, a rule's, or none but the packet's own."""
        flow = segment.flow
        sockref = self.sockrefs.find_foreign(flow.protocol, flow.destination, flow.source, _may_receive)
        if sockref is not None:
            if sockref.has(Flag.MARK_ONLY):
                return Target(flow.destination, Reason.MARK_ONLY, sockref, is_marked=True)
            return Target(sockref.local, Reason.SOCKREF, sockref, is_marked=True)
        is_own = False
        if arrival.hook is Hook.OUTPUT:
            own = self.source_sockref(flow)
            if own is not None and own.has(Flag.MARK_ONLY):
                return Target(flow.destination, Reason.MARK_ONLY, own, is_marked=True)
            # The source stage will map it; the user's filter, which comes before that, is to see the mark already.
            is_own = own is not None
        return self._ruled(arrival, segment, is_own)

    def source_sockref(self, flow: FlowTuple) -> Sockref | None:
        """The sockref that a new connection's source belongs to, at OUTPUT and POSTROUTING."""
        return self.sockrefs.find_local(flow.protocol, flow.source, flow.destination, _may_send)

    def is_one_way(self, flow: FlowTuple, target: Target) -> bool:
        """Is a datagram translated by itself, with no connection? Its sockref says so, or the listener that a rule's
        redirect leads to."""
        if target.sockref is not None:
            return target.sockref.is_one_way
        is_redirect = flow.protocol is Protocol.UDP and target.reason is Reason.REDIRECT
        return is_redirect and self.listeners.hear(target.to)

    def pass_one_way(self, arrival: Arrival, segment: Segment, target: Target) -> Decision:
        """Rewrite a datagram that is translated by itself."""
        flow = segment.flow
        inside = FlowTuple(flow.protocol, flow.source, target.to)
        if inside == flow:
            return Decision(Verdict.ACCEPT, Reason.UNIDIR, is_marked=True, detail=target.rule)
        self.origins.note(flow, inside, digest_of(payload_of(arrival.data, segment)), arrival.now)
        payload = patch_segment(arrival.data, segment, Rewrite.between(flow, inside))
        return Decision(Verdict.ACCEPT, Reason.UNIDIR, payload, is_marked=True, detail=target.rule)

    def is_reserved(self, final: FlowTuple) -> bool:
        """Is the source of this tuple some sockref's foreign endpoint, so that NAT must not pick it?"""
        return self.sockrefs.has_foreign(final.protocol, final.source)

    @staticmethod
    def relate(sockref: Sockref, connection: Connection) -> None:
        """Note that a connection was mapped, or marked, on a sockref's word."""
        sockref.flags |= Flag.APPLIED
        if connection not in sockref.related:  # a mark-only one may have been met at OUTPUT already
            sockref.related.add(connection)
            connection.sockrefs += (sockref,)

    def unrelate(self, connection: Connection) -> None:
        """Take a connection that has gone off its sockrefs, and with it the orphan whose last it was."""
        for sockref in connection.sockrefs:
            sockref.related.discard(connection)
            if sockref.has(Flag.ORPHAN) and not sockref.related:
                self.sockrefs.remove(sockref)

    def _ruled(self, arrival: Arrival, segment: Segment, is_own: bool) -> Target | Decision:
        """What the table's ruleset says of a new connection; `is_own`: it is a proxy's, so it is marked in any case."""
        flow = segment.flow
        chain = BuiltinChain.PREROUTING if arrival.hook is Hook.PREROUTING else BuiltinChain.OUTPUT
        packet = RulePacket(
            flow=flow,
            in_interface=arrival.in_interface,
            out_interface=arrival.out_interface,
            length=len(arrival.data),
            mark=arrival.mark,
            owner=arrival.owner,
        )
        if self.ruleset.looks_at_types:
            packet = replace(
                packet,
                source_type=self._interfaces.address_type(flow.source.address),
                destination_type=self._interfaces.address_type(flow.destination.address),
            )
        verdict = self.ruleset.evaluate(chain, packet, arrival.now)
        match verdict:
            case ruleset.Accept():
                return Target(flow.destination, Reason.NO_MAPPING, is_marked=is_own)
            case ruleset.Drop():
                return Decision(Verdict.DROP, Reason.RULE_DROP, detail=verdict.rule)
            case ruleset.Redirect():
                return self._redirected(arrival, flow, verdict)
            case _:
                assert_never(verdict)

    def _redirected(self, arrival: Arrival, flow: FlowTuple, verdict: ruleset.Redirect) -> Target | Decision:
        """Where a TPROXY rule sends a connection."""
        size = len(flow.destination.address)
        address = verdict.on_ip
        if address is None and arrival.hook is Hook.OUTPUT:
            address = LOOPBACK[size]
        elif address is None:
            address = self._interfaces.first_address(arrival.in_interface, size)
        if address is None:
            detail = f"{arrival.in_interface} has no address for {flow}"
            return Decision(Verdict.DROP, Reason.NO_INTERFACE_ADDRESS, detail=detail)
        to = Endpoint(address, verdict.on_port or flow.destination.port)
        if flow.protocol is Protocol.UDP:
            self.redirected.add(to)
        return Target(to, Reason.REDIRECT, rule=verdict.rule, is_marked=True)


def _may_receive(sockref: Sockref) -> bool:
    """Does a sockref count where destinations are looked up?"""
    if sockref.has(Flag.ORPHAN) or sockref.is_spent:
        return False
    if not sockref.foreign.port and not sockref.has(Flag.MARK_ONLY):
        return False  # the port is yet to be chosen
    return sockref.has(Flag.LISTEN | Flag.ESTABLISHED | Flag.MARK_ONLY)


def _may_send(sockref: Sockref) -> bool:
    """Does a sockref count where sources are looked up?"""
    if sockref.has(Flag.ORPHAN) or sockref.is_spent:
        return False
    return sockref.has(Flag.CONNECT | Flag.ESTABLISHED | Flag.MARK_ONLY)


def not_mapped(taken: Taken, flow: FlowTuple, to: Endpoint) -> Decision:
    """Drop a packet whose mapping cannot be set up, naming the four addresses."""
    reason = Reason.NO_FREE_PORT if taken.is_exhausted else Reason.CLASH
    return Decision(Verdict.DROP, reason, detail=f"{flow} as {to}")
