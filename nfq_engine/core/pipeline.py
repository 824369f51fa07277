"""The engine: one packet at one hook, one decision.

Owns: the order of the stages. Must not touch the kernel, read a clock or know what a queue is. Place in the path: the
daemon tries `hot.translate` first and asks `decide` for what that does not know.

    parse -> known connection?  yes: its rewrite
                                no:  destination stage (PREROUTING, OUTPUT)   source stage (POSTROUTING)
                                     sockref by foreign address               sockref by local address
                                     else the ruleset
                                     choose a tuple, enter the connection     choose a tuple, complete the connection

The table of tproxy.md section 2 says which sockrefs count at which hook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, assert_never

from nfq_engine.core import ruleset
from nfq_engine.core.conntrack import TRANSITIONS, Connection, ConnectionTable, Direction, Entry, Stage, State, event_of
from nfq_engine.core.decision import Counters, Decision, Reason, Verdict
from nfq_engine.core.hotpath import HotPath
from nfq_engine.core.nat import Allocator, Choice, PortRange, Taken
from nfq_engine.core.packet import (
    Endpoint,
    FlowTuple,
    Hook,
    IcmpError,
    Malformed,
    Segment,
    Unrelated,
    parse,
)
from nfq_engine.core.rewrite import Rewrite, patch_icmp_error, patch_segment
from nfq_engine.core.ruleset import BuiltinChain, RulePacket, Ruleset
from nfq_engine.core.sockref import Flag, Sockref, SockrefTable
from nfq_engine.core.surroundings import Chance, Interfaces

_LOOPBACK: Final = {4: bytes((127, 0, 0, 1)), 16: bytes(15) + b"\x01"}
_ANY_PORT: Final = 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A packet as it came to a hook. Interfaces are names, empty where the hook has none; `now` is in seconds.

    `is_cut`: the packet's end did not fit into the queue's message and stands as zeros in `data`, so the packet can be
    let through as it is, but not be rewritten.
    """

    hook: Hook
    data: bytes
    in_interface: str
    out_interface: str
    now: float
    mark: int = 0
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class _Target:
    """Where the destination stage sends a new connection, and on whose word."""

    to: Endpoint
    reason: Reason
    sockref: Sockref | None = None
    rule: str = ""
    is_marked: bool = False


class Engine:
    """The tproxy table, its sockrefs and its connections."""

    def __init__(self, interfaces: Interfaces, chance: Chance, ports: PortRange) -> None:
        self.connections = ConnectionTable()
        self.sockrefs = SockrefTable()
        self.ruleset = Ruleset()
        self.counters = Counters()
        self.hot = HotPath(self.connections)
        self.allocator = Allocator(self.connections, ports, chance, self._is_reserved)
        self.on_delete: Callable[[Connection], None] = lambda _: None
        self._interfaces = interfaces

    def decide(self, arrival: Arrival) -> Decision:
        """Decide on one packet that the hot path did not know."""
        decision = self._decide(arrival)
        if arrival.is_cut and decision.payload is not None:
            decision = Decision(Verdict.DROP, Reason.OVERSIZED, detail=f"{len(arrival.data)} bytes")
        self.counters.count(arrival.hook, decision.reason)
        return decision

    def expire(self, now: float) -> None:
        """Forget the connections whose time is over."""
        for connection in self.connections.expired(now):
            self.forget(connection)

    def forget(self, connection: Connection) -> None:
        """Delete one connection, and with it the orphan whose last it was."""
        self.connections.delete(connection)
        for sockref in connection.sockrefs:
            sockref.related.discard(connection)
            if sockref.has(Flag.ORPHAN) and not sockref.related:
                self.sockrefs.remove(sockref)
        self.on_delete(connection)

    def delete_related(self, sockref: Sockref) -> None:
        """Delete the connections that a sockref's mappings made; the next packet of each is looked up afresh."""
        for connection in list(sockref.related):
            self.forget(connection)

    def _is_reserved(self, final: FlowTuple) -> bool:
        """Is the source of this tuple some sockref's foreign endpoint, so that NAT must not pick it?"""
        return bool(self.sockrefs.at_foreign(final.protocol, final.source))

    def _decide(self, arrival: Arrival) -> Decision:
        parsed = parse(arrival.data)
        match parsed:
            case Segment():
                return self._segment(arrival, parsed)
            case IcmpError():
                return self._icmp_error(arrival, parsed)
            case Unrelated(protocol):
                return Decision(Verdict.ACCEPT, Reason.UNRELATED, detail=f"protocol {protocol}")
            case Malformed(why):
                self.counters.count_malformed(why.value)
                return Decision(Verdict.DROP, Reason.MALFORMED, detail=why.value)
            case _:
                assert_never(parsed)

    def _segment(self, arrival: Arrival, segment: Segment) -> Decision:
        """A TCP segment or UDP datagram: of a known connection, or the first of one."""
        stage = Stage.at(arrival.hook)
        entry = self.connections.find(stage, segment.flow)
        if entry is None:
            return self._first(arrival, segment, stage)
        if stage is Stage.DESTINATION and segment.is_syn and entry.connection.is_replaceable:
            self.forget(entry.connection)
            return self._first(arrival, segment, stage)
        return self._pass(arrival, segment, stage, entry)

    def _pass(self, arrival: Arrival, segment: Segment, stage: Stage, entry: Entry) -> Decision:
        """One more packet of a known connection."""
        self._account(entry, arrival, segment, stage)
        if entry.rewrite is None:
            return Decision(Verdict.ACCEPT, Reason.ESTABLISHED, is_marked=entry.connection.is_marked)
        return self._rewritten(Reason.TRANSLATED, arrival, segment, entry)

    def _account(self, entry: Entry, arrival: Arrival, segment: Segment, stage: Stage) -> None:
        """Count a packet, and let the connection's state follow it, at the one stage that every packet passes once."""
        entry.packets += 1
        entry.bytes += len(arrival.data)
        connection = entry.connection
        connection.last_seen = arrival.now
        if stage is Stage.DESTINATION or connection.state is State.NONE:
            connection.advance(event_of(segment.flow.protocol, segment.tcp_flags), entry.direction)
            self.connections.schedule(connection)

    @staticmethod
    def _rewritten(reason: Reason, arrival: Arrival, segment: Segment, entry: Entry) -> Decision:
        """Let a packet go on, rewritten if its entry says so."""
        connection, rewrite = entry.connection, entry.rewrite
        payload = patch_segment(arrival.data, segment, rewrite) if rewrite is not None else None
        return Decision(Verdict.ACCEPT, reason, payload, connection.is_marked, connection.rule)

    def _first(self, arrival: Arrival, segment: Segment, stage: Stage) -> Decision:
        """A packet that no entry knows at this stage."""
        waiting = self.connections.undecided(segment.flow) if stage is Stage.SOURCE else None
        if waiting is not None:
            return self._decide_source(arrival, segment, waiting)
        event = event_of(segment.flow.protocol, segment.tcp_flags)
        if (State.NONE, event, Direction.ORIGINAL) not in TRANSITIONS:
            return Decision(Verdict.ACCEPT, Reason.NO_CONNECTION, detail=str(segment.flow))
        if stage is Stage.DESTINATION:
            return self._decide_destination(arrival, segment)
        # It came by no hook of ours before, as packets do that were under way when the engine started.
        connection = Connection(segment.flow, segment.flow, arrival.now)
        holders = self.connections.holders(segment.flow, segment.flow)
        if not all(self._displace(holder, segment) for holder in holders):
            return _taken(Taken(is_exhausted=False), segment.flow, segment.flow.destination)
        self.connections.insert(connection)
        return self._decide_source(arrival, segment, connection)

    def _displace(self, holder: Connection, segment: Segment) -> bool:
        """Forget a dead connection that is in the way of a SYN; False when it may not be."""
        if not (segment.is_syn and holder.is_replaceable):
            return False
        self.forget(holder)
        return True

    # The destination stage: PREROUTING and OUTPUT.

    def _decide_destination(self, arrival: Arrival, segment: Segment) -> Decision:
        """Enter a new connection, with the destination that a sockref or a rule gives it."""
        target = self._target(arrival, segment)
        if isinstance(target, Decision):
            return target
        flow, sockref = segment.flow, target.sockref
        if sockref is not None and sockref.has(Flag.UNIDIR):
            rewrite = Rewrite.between(flow, FlowTuple(flow.protocol, flow.source, target.to))
            return Decision(Verdict.ACCEPT, Reason.UNIDIR, patch_segment(arrival.data, segment, rewrite), True)
        choice = self.allocator.destination(
            flow,
            target.to,
            may_displace=segment.is_syn,
            # Only answers that leave through our source stage can be given the old port back.
            may_move=arrival.hook is Hook.PREROUTING or target.to.address == _LOOPBACK[len(target.to.address)],
        )
        if isinstance(choice, Taken):
            return _taken(choice, flow, target.to)
        connection = self._enter(flow, choice, arrival.now)
        connection.rule = target.rule
        connection.is_marked = target.is_marked
        if sockref is not None:
            self._relate(sockref, connection)
        entry = connection.entries[Stage.DESTINATION, Direction.ORIGINAL]
        self._account(entry, arrival, segment, Stage.DESTINATION)
        return self._rewritten(target.reason, arrival, segment, entry)

    def _enter(self, original: FlowTuple, choice: Choice, now: float) -> Connection:
        """Put a new connection into the table, in the place of the dead ones it displaces."""
        for displaced in choice.displaced:
            self.forget(displaced)
        connection = Connection(original, choice.flow, now)
        self.connections.insert(connection)
        return connection

    def _relate(self, sockref: Sockref, connection: Connection) -> None:
        """Note that a connection was mapped, or marked, on a sockref's word."""
        sockref.flags |= Flag.APPLIED
        if connection not in sockref.related:  # a mark-only one may have been met at OUTPUT already
            sockref.related.add(connection)
            connection.sockrefs += (sockref,)

    def _target(self, arrival: Arrival, segment: Segment) -> _Target | Decision:
        """What the destination stage wants: a sockref's local address, a rule's, or none but the packet's own."""
        flow = segment.flow
        sockref = self.sockrefs.find_foreign(flow.protocol, flow.destination, flow.source, _may_receive)
        if sockref is not None:
            if sockref.has(Flag.MARK_ONLY):
                return _Target(flow.destination, Reason.MARK_ONLY, sockref, is_marked=True)
            return _Target(sockref.local, Reason.SOCKREF, sockref, is_marked=True)
        is_own = False
        if arrival.hook is Hook.OUTPUT:
            own = self.sockrefs.find_local(flow.protocol, flow.source, flow.destination, _may_send)
            if own is not None and own.has(Flag.MARK_ONLY):
                return _Target(flow.destination, Reason.MARK_ONLY, own, is_marked=True)
            # The source stage will map it; the user's filter, which comes before that, is to see the mark already.
            is_own = own is not None
        return self._ruled(arrival, segment, is_own)

    def _ruled(self, arrival: Arrival, segment: Segment, is_own: bool) -> _Target | Decision:
        """What the table's ruleset says of a new connection; `is_own`: it is a proxy's, so it is marked in any case."""
        flow = segment.flow
        chain = BuiltinChain.PREROUTING if arrival.hook is Hook.PREROUTING else BuiltinChain.OUTPUT
        packet = RulePacket(
            flow=flow,
            in_interface=arrival.in_interface,
            out_interface=arrival.out_interface,
            length=len(arrival.data),
            mark=arrival.mark,
        )
        verdict = self.ruleset.evaluate(chain, packet, arrival.now)
        match verdict:
            case ruleset.Accept():
                return _Target(flow.destination, Reason.NO_MAPPING, is_marked=is_own)
            case ruleset.Drop():
                return Decision(Verdict.DROP, Reason.RULE_DROP, detail=verdict.rule)
            case ruleset.Redirect():
                return self._redirected(arrival, flow, verdict)
            case _:
                assert_never(verdict)

    def _redirected(self, arrival: Arrival, flow: FlowTuple, verdict: ruleset.Redirect) -> _Target | Decision:
        """Where a TPROXY rule sends a connection."""
        size = len(flow.destination.address)
        address = verdict.on_ip
        if address is None and arrival.hook is Hook.OUTPUT:
            address = _LOOPBACK[size]
        elif address is None:
            address = self._interfaces.first_address(arrival.in_interface, size)
        if address is None:
            detail = f"{arrival.in_interface} has no address for {flow}"
            return Decision(Verdict.DROP, Reason.NO_INTERFACE_ADDRESS, detail=detail)
        to = Endpoint(address, verdict.on_port or flow.destination.port)
        return _Target(to, Reason.REDIRECT, rule=verdict.rule, is_marked=True)

    # The source stage: POSTROUTING.

    def _decide_source(self, arrival: Arrival, segment: Segment, connection: Connection) -> Decision:
        """Complete a connection: with the foreign address of the sockref that its source belongs to, or its own."""
        inside = connection.inside
        sockref = self.sockrefs.find_local(inside.protocol, inside.source, inside.destination, _may_send)
        is_foreign = sockref is not None and not sockref.has(Flag.MARK_ONLY)
        foreign = sockref.foreign if sockref is not None and is_foreign else inside.source
        choice = self.allocator.source(connection, foreign, may_displace=segment.is_syn)
        if isinstance(choice, Taken) and not is_foreign:
            own = Endpoint(foreign.address, _ANY_PORT)
            choice = self.allocator.source(connection, own, may_displace=segment.is_syn)
        if isinstance(choice, Taken):
            self.forget(connection)
            return _taken(choice, inside, foreign)
        for displaced in choice.displaced:
            self.forget(displaced)
        self.connections.decide_source(connection, choice.flow)
        reason = Reason.ESTABLISHED
        if sockref is not None:
            reason = Reason.SOCKREF if is_foreign else Reason.MARK_ONLY
            connection.is_marked = True
            self._relate(sockref, connection)
            if is_foreign and not foreign.port:
                self.sockrefs.set_foreign(sockref, choice.flow.source)
        entry = connection.entries[Stage.SOURCE, Direction.ORIGINAL]
        self._account(entry, arrival, segment, Stage.SOURCE)
        return self._rewritten(reason, arrival, segment, entry)

    # ICMP errors.

    def _icmp_error(self, arrival: Arrival, error: IcmpError) -> Decision:
        """Translate an error about a mapped connection, embedded packet included; it never changes the connection.

        The embedded packet went the other way, so it is looked up turned round. As with the kernel's NAT, the outer
        address that this stage may change becomes that of an answer, even if a router in between sent the error.
        """
        stage = Stage.at(arrival.hook)
        entry = self.connections.find(stage, error.flow.inverse())
        if entry is None or entry.rewrite is None:
            return Decision(Verdict.ACCEPT, Reason.ICMP_PASSED, detail=str(error.flow))
        after = entry.rewrite.flow.inverse()
        source, destination = error.source, error.destination
        if stage is Stage.DESTINATION:
            destination = after.source.address
        else:
            source = after.destination.address
        payload = patch_icmp_error(arrival.data, error, Rewrite.between(error.flow, after), source, destination)
        return Decision(Verdict.ACCEPT, Reason.ICMP_TRANSLATED, payload, entry.connection.is_marked, str(after))


def _may_receive(sockref: Sockref) -> bool:
    """Does a sockref count where destinations are looked up?"""
    if sockref.has(Flag.ORPHAN) or sockref.is_spent:
        return False
    return sockref.has(Flag.LISTEN | Flag.ESTABLISHED | Flag.MARK_ONLY)


def _may_send(sockref: Sockref) -> bool:
    """Does a sockref count where sources are looked up?"""
    if sockref.has(Flag.ORPHAN) or sockref.is_spent:
        return False
    return sockref.has(Flag.CONNECT | Flag.ESTABLISHED | Flag.MARK_ONLY)


def _taken(taken: Taken, flow: FlowTuple, to: Endpoint) -> Decision:
    """Drop a packet whose mapping cannot be set up, naming the four addresses."""
    reason = Reason.NO_FREE_PORT if taken.is_exhausted else Reason.CLASH
    return Decision(Verdict.DROP, reason, detail=f"{flow} as {to}")
