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
from typing import assert_never

from nfq_engine.core.conntrack import (
    PACKET,
    TRANSITIONS,
    Connection,
    ConnectionTable,
    Direction,
    Entry,
    Stage,
    State,
    event_of,
)
from nfq_engine.core.decision import Decision, Reason, Verdict
from nfq_engine.core.events import Event
from nfq_engine.core.hotpath import HotPath
from nfq_engine.core.nat import Allocator, Choice, PortRange, Taken
from nfq_engine.core.one_way import Listener
from nfq_engine.core.packet import (
    FlowTuple,
    Hook,
    IcmpError,
    Malformed,
    Protocol,
    Segment,
    Unrelated,
    parse,
)
from nfq_engine.core.rewrite import Rewrite, patch_icmp_error, patch_segment
from nfq_engine.core.sockref import Flag, Sockref
from nfq_engine.core.surroundings import Chance, Interfaces
from nfq_engine.core.tproxy_table import LOOPBACK, Arrival, Deletion, TproxyTable, not_mapped

__all__ = ["Arrival", "Engine"]


class Engine(TproxyTable):
    """The tproxy table with its connections: datapath `inline`."""

    def __init__(
        self, interfaces: Interfaces, chance: Chance, ports: PortRange, deletion: Deletion = Deletion.LINKED
    ) -> None:
        super().__init__(interfaces, chance, ports)
        self.connections = ConnectionTable()
        self.hot = HotPath(self.connections)
        self.allocator = Allocator(self.connections, ports, chance, self.is_reserved)
        # For whoever wants to know: a connection's tuples are all chosen; a connection is forgotten.
        self.on_complete: Callable[[Connection], None] = lambda _: None
        self.on_delete: Callable[[Connection], None] = lambda _: None
        self._deletion = deletion

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
        self.unrelate(connection)
        self.on_delete(connection)
        self.observe(Event.DELETED, connection)

    def delete_related(self, sockref: Sockref) -> None:
        """Delete the connections that a sockref's mappings made; the next packet of each is looked up afresh."""
        match self._deletion:
            case Deletion.LINKED:
                doomed = list(sockref.related)
            case Deletion.SCAN:
                doomed = [connection for connection in self.connections if sockref in connection.sockrefs]
            case _:
                assert_never(self._deletion)
        for connection in doomed:
            self.forget(connection)

    def delete_redirects(self, listener: Listener) -> None:
        """Delete the connections that rules redirected to what is now a one-way listener."""
        doomed = [
            connection
            for connection in self.connections
            if connection.rule
            and connection.inside.protocol is Protocol.UDP
            and listener.hears(connection.inside.destination)
        ]
        for connection in doomed:
            self.forget(connection)

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
        entry.traffic += PACKET + len(arrival.data)
        connection = entry.connection
        entry.last_seen = arrival.now
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
        flow, may_displace = segment.flow, segment.is_syn
        if self._is_for_one_way(flow):
            return Decision(Verdict.ACCEPT, Reason.UNIDIR, is_marked=True)
        # It came by no hook of ours before, as packets do that were under way when the engine started.
        choice = self.allocator.destination(flow, flow.destination, may_displace=may_displace, may_move=False)
        if isinstance(choice, Taken):
            return not_mapped(choice, flow, flow.destination)
        connection = self._enter(flow, choice, arrival.now)
        self.observe(Event.NEW, connection)
        return self._decide_source(arrival, segment, connection)

    def _is_for_one_way(self, flow: FlowTuple) -> bool:
        """Is it a datagram of this host's own that OUTPUT has translated by itself, and that nobody maps here?"""
        if flow.protocol is not Protocol.UDP or self.source_sockref(flow) is not None:
            return False
        at_local = self.sockrefs.at_local(flow.protocol, flow.destination)
        return any(sockref.is_one_way for sockref in at_local) or self.listeners.hear(flow.destination)

    # The destination stage: PREROUTING and OUTPUT.

    def _decide_destination(self, arrival: Arrival, segment: Segment) -> Decision:
        """Enter a new connection, with the destination that a sockref or a rule gives it."""
        target = self.destination_target(arrival, segment)
        if isinstance(target, Decision):
            return target
        flow, sockref = segment.flow, target.sockref
        if self.is_one_way(flow, target):
            return self.pass_one_way(arrival, segment, target)
        choice = self.allocator.destination(
            flow,
            target.to,
            may_displace=segment.is_syn,
            # Only answers that leave through our source stage can be given the old port back.
            may_move=arrival.hook is Hook.PREROUTING or target.to.address == LOOPBACK[len(target.to.address)],
        )
        if isinstance(choice, Taken):
            return not_mapped(choice, flow, target.to)
        connection = self._enter(flow, choice, arrival.now)
        connection.rule = target.rule
        connection.is_marked = target.is_marked
        if sockref is not None:
            self.relate(sockref, connection)
        self.observe(Event.NEW, connection)
        if connection.inside != flow:
            self.observe(Event.MAPPED, connection)
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

    # The source stage: POSTROUTING.

    def _decide_source(self, arrival: Arrival, segment: Segment, connection: Connection) -> Decision:
        """Complete a connection: with the foreign address of the sockref that its source belongs to, or its own."""
        inside = connection.inside
        sockref = self.source_sockref(inside)
        final, reason = inside, Reason.ESTABLISHED
        if sockref is not None and sockref.has(Flag.MARK_ONLY):
            reason = Reason.MARK_ONLY
        elif sockref is not None:
            choice = self.allocator.source(connection, sockref.foreign, may_displace=segment.is_syn)
            if isinstance(choice, Taken):
                self.forget(connection)
                return not_mapped(choice, inside, sockref.foreign)
            for displaced in choice.displaced:
                self.forget(displaced)
            final, reason = choice.flow, Reason.SOCKREF
            if not sockref.foreign.port:
                self.sockrefs.set_foreign(sockref, final.source)
        self.connections.decide_source(connection, final)
        if sockref is not None:
            connection.is_marked = True
            self.relate(sockref, connection)
        self.on_complete(connection)
        if final != inside:
            self.observe(Event.MAPPED, connection)
        entry = connection.entries[Stage.SOURCE, Direction.ORIGINAL]
        self._account(entry, arrival, segment, Stage.SOURCE)
        return self._rewritten(reason, arrival, segment, entry)

    # ICMP errors.

    def _icmp_error(self, arrival: Arrival, error: IcmpError) -> Decision:
        """Translate an error about a mapped connection, embedded packet included; it never changes the connection.

        The embedded packet went the other way, so it is looked up turned round. As with the kernel's NAT, the outer
        address that this stage may change becomes that of an answer, even if a router in between sent the error; and a
        redirect about a mapped connection is dropped.
        """
        stage = Stage.at(arrival.hook)
        entry = self.connections.find(stage, error.flow.inverse())
        if error.is_redirect and entry is not None and entry.connection.is_mapped:
            return Decision(Verdict.DROP, Reason.ICMP_REDIRECT, detail=str(error.flow))
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
