"""Datapath `kernel`: the first packet of a connection is decided here, the kernel's NAT does the rest.

Owns: the decision on a first packet at each hook, and the lists of connections that sockrefs made. Must not touch the
kernel: it asks a `Conntrack`, is told what conntrack reports, and gives mappings as values. Place in the path: what
`pipeline.Engine` is to the inline datapath.

    first packet -> decided already, its entry not yet reported?  the same again
                    destination stage (PREROUTING, OUTPUT)        source stage (POSTROUTING)
                    sockref by foreign address, else the rules    sockref by local address
                    -> the mapping of its destination             a free foreign port -> the mapping of its source

A connection made on a sockref's word waits until conntrack reports its entry, or until nothing came of it; from then on
it is known by the entry's tuple and number, until conntrack reports its end. What a rule redirects is left to conntrack
alone. Destinations need no search for a free tuple: the kernel moves the source port where two connections would look
alike to the proxy, as `nat.py` does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, assert_never

from nfq_engine.core.conntrack import Connection, Stage
from nfq_engine.core.decision import Decision, Reason, Verdict
from nfq_engine.core.known_redirects import Known, KnownRedirects
from nfq_engine.core.nat import PortRange, Taken
from nfq_engine.core.one_way import Listener
from nfq_engine.core.packet import Endpoint, FlowTuple, Hook, IcmpError, Malformed, Protocol, Segment, Unrelated, parse
from nfq_engine.core.sockref import Flag, Sockref
from nfq_engine.core.surroundings import Chance, Interfaces
from nfq_engine.core.tproxy_table import Arrival, Deletion, TproxyTable, not_mapped
from nfq_engine.core.tracked import Conntrack, Tracked

# Seconds until a decision of which conntrack reported nothing is forgotten: the packet was dropped later on. A SYN that
# is sent again after 1 or 3 seconds still gets the same answer.
_PATIENCE: Final = 10.0


@dataclass(frozen=True, slots=True)
class Mapping:
    """What the kernel's NAT is to make of a packet of `flow`: another destination, or another source."""

    stage: Stage
    flow: FlowTuple
    to: Endpoint

    @property
    def after(self) -> FlowTuple:
        """The packet's tuple when the kernel has done it."""
        if self.stage is Stage.DESTINATION:
            return FlowTuple(self.flow.protocol, self.flow.source, self.to)
        return FlowTuple(self.flow.protocol, self.to, self.flow.destination)


@dataclass(frozen=True, slots=True)
class FirstDecision:
    """The decision on a first packet, and the mapping that must be in place before the packet goes on.

    `flow` is the packet's tuple, None when it was not read. `of`: the connection, made on a sockref's word, that the
    packet belongs to although it came here: no further packet of this tuple need come.
    """

    decision: Decision
    flow: FlowTuple | None = None
    mapping: Mapping | None = None
    of: Connection | None = None


class KernelEngine(TproxyTable):
    """The tproxy table over the kernel's conntrack."""

    def __init__(
        self,
        interfaces: Interfaces,
        chance: Chance,
        ports: PortRange,
        conntrack: Conntrack,
        deletion: Deletion = Deletion.LINKED,
    ) -> None:
        super().__init__(interfaces, chance, ports)
        self.on_forget: Callable[[Connection], None] = lambda _: None
        self.known = KnownRedirects(self.ruleset, self.sockrefs)
        self._conntrack = conntrack
        self._deletion = deletion
        self._waiting: dict[tuple[Stage, FlowTuple], Connection] = {}
        self._deadlines: deque[tuple[float, Connection]] = deque()
        self._reported: dict[FlowTuple, tuple[Connection, Tracked]] = {}  # by the original tuple

    def decide(self, arrival: Arrival) -> FirstDecision:
        """Decide on the first packet of a connection."""
        parsed = parse(arrival.data)
        match parsed:
            case Segment():
                first = self._segment(arrival, parsed)
            case IcmpError() | Unrelated():
                first = FirstDecision(Decision(Verdict.ACCEPT, Reason.UNRELATED))
            case Malformed(why):
                self.counters.count_malformed(why.value)
                first = FirstDecision(Decision(Verdict.DROP, Reason.MALFORMED, detail=why.value))
            case _:
                assert_never(parsed)
        if arrival.is_cut and first.decision.payload is not None:
            first = FirstDecision(Decision(Verdict.DROP, Reason.OVERSIZED, detail=f"{len(arrival.data)} bytes"))
        return first

    def recall(self, interface: str, data: bytes) -> Known | None:
        """What rules said of a packet like this one at PREROUTING; None: `decide` has to be asked."""
        return None if self._waiting else self.known.find(interface, data)

    @property
    def awaits_reports(self) -> bool:
        """Could a report of conntrack tell anything? What rules redirect is left to conntrack alone."""
        return bool(self.sockrefs or self._waiting or self._reported)

    def appeared(self, tracked: Tracked) -> None:
        """Conntrack has a new entry that carries our mark."""
        connection = self._waiting.get((Stage.DESTINATION, tracked.original))
        if connection is None:
            connection = self._waiting.get((Stage.SOURCE, tracked.inside))
        if connection is None:
            return  # a rule redirected it, or nobody asks any more
        self._stop_waiting(connection)
        connection.original, connection.inside, connection.final = tracked.original, tracked.inside, tracked.final
        self._reported[tracked.original] = (connection, tracked)

    def went(self, tracked: Tracked) -> None:
        """Conntrack has deleted an entry."""
        connection, entry = self._reported.get(tracked.original, (None, None))
        if connection is not None and entry is not None and entry.identifier == tracked.identifier:
            self._forget(connection)

    def sockrefs_of(self, tracked: Tracked) -> tuple[Sockref, ...]:
        """The sockrefs on whose word an entry was made; none when a rule redirected it."""
        connection, _ = self._reported.get(tracked.original, (None, None))
        return connection.sockrefs if connection is not None else ()

    def waiting(self, stage: Stage, flow: FlowTuple) -> Connection | None:
        """The connection decided on at a stage that conntrack has not reported yet."""
        return self._waiting.get((stage, flow))

    def resynchronise(self) -> None:
        """Reports were lost: compare with what conntrack has now."""
        present = {tracked.original: tracked for tracked in self._conntrack.ours()}
        for original, (_, entry) in list(self._reported.items()):
            if original not in present or present[original].identifier != entry.identifier:
                self.went(entry)
        for tracked in present.values():
            self.appeared(tracked)

    def expire(self, now: float) -> None:
        """Forget the decisions that came to nothing."""
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, connection = self._deadlines.popleft()
            if connection.deadline == deadline:
                self._forget(connection)

    def delete_related(self, sockref: Sockref) -> None:
        """Delete the connections that a sockref's mappings made; the next packet of each is looked up afresh."""
        related = list(sockref.related)
        match self._deletion:
            case Deletion.LINKED:
                doomed = [
                    self._reported[connection.original][1] for connection in related if self._is_reported(connection)
                ]
            case Deletion.SCAN:
                doomed = [entry for entry in self._conntrack.ours(sockref.local.address) if self._is_of(entry, sockref)]
            case _:
                assert_never(self._deletion)
        self._conntrack.delete(doomed)
        for connection in related:
            self._forget(connection)

    def adopt(self) -> None:
        """Know of the redirects that an earlier engine has left in conntrack."""
        for entry in self._conntrack.ours():
            if entry.original.protocol is Protocol.UDP and entry.is_mapped:
                self.redirected.add(entry.inside.destination)

    def delete_redirects(self, listener: Listener) -> None:
        """Delete the connections that rules redirected to what is now a one-way listener."""
        self._conntrack.delete(
            [
                entry
                for entry in self._conntrack.ours()
                if entry.original.protocol is Protocol.UDP
                and entry.inside != entry.original
                and listener.hears(entry.inside.destination)
                and not self.sockrefs_of(entry)
            ]
        )

    def _is_of(self, entry: Tracked, sockref: Sockref) -> bool:
        """Did a mapping of this sockref make an entry? Orphans may have the same addresses as a living one."""
        connection, _ = self._reported.get(entry.original, (None, None))
        return entry.shows(sockref) and (connection is None or sockref in connection.sockrefs)

    # The two stages.

    def _segment(self, arrival: Arrival, segment: Segment) -> FirstDecision:
        stage = Stage.at(arrival.hook)
        waiting = self._waiting.get((stage, segment.flow))
        if waiting is not None and (stage is Stage.DESTINATION or waiting.final != waiting.inside):
            return self._repeated(waiting, stage, segment.flow)
        if stage is Stage.DESTINATION:
            return self._decide_destination(arrival, segment)
        return self._decide_source(arrival, segment, waiting)

    @staticmethod
    def _repeated(connection: Connection, stage: Stage, flow: FlowTuple) -> FirstDecision:
        """The same answer as to the packet before, whose connection has not been reported."""
        to = connection.inside.destination if stage is Stage.DESTINATION else connection.final.source
        if to == (flow.destination if stage is Stage.DESTINATION else flow.source):
            return FirstDecision(Decision(Verdict.ACCEPT, Reason.ESTABLISHED, is_marked=True), flow)
        decision = Decision(Verdict.ACCEPT, Reason.TRANSLATED, is_marked=True)
        return FirstDecision(decision, flow, Mapping(stage, flow, to))

    def _decide_destination(self, arrival: Arrival, segment: Segment) -> FirstDecision:
        """Find the destination that a sockref or a rule gives a new connection."""
        flow = segment.flow
        if self.listeners and flow.protocol is Protocol.UDP and (entry := self._under_way(flow)) is not None:
            connection, _ = self._reported.get(entry.original, (None, None))
            return FirstDecision(Decision(Verdict.ACCEPT, Reason.ESTABLISHED), flow, of=connection)
        target = self.destination_target(arrival, segment)
        if isinstance(target, Decision):
            return FirstDecision(target)
        if self.is_one_way(flow, target):
            return FirstDecision(self.pass_one_way(arrival, segment, target), flow)
        sockref = target.sockref
        if target.reason is Reason.REDIRECT and arrival.hook is Hook.PREROUTING:
            self.known.remember(arrival.in_interface, arrival.data, flow.destination, target.to)
        inside = FlowTuple(flow.protocol, flow.source, target.to)
        if sockref is not None:
            self._wait(Connection(flow, inside, arrival.now), sockref)
        decision = Decision(Verdict.ACCEPT, target.reason, is_marked=target.is_marked, detail=target.rule)
        return FirstDecision(decision, flow, Mapping(Stage.DESTINATION, flow, target.to) if inside != flow else None)

    def _under_way(self, flow: FlowTuple) -> Tracked | None:
        """Conntrack's entry of the connection that this datagram belongs to, which came here before conntrack saw it.

        Datagrams that rules could redirect to a one-way listener do. An entry that maps nothing and was never answered
        decides nothing: the next packet of such a connection counts as new for conntrack, too.
        """
        entry = self._conntrack.find(flow)
        is_known = entry is not None and (entry.is_mapped or entry.is_replied or flow != entry.original)
        return entry if is_known else None

    def _decide_source(self, arrival: Arrival, segment: Segment, connection: Connection | None) -> FirstDecision:
        """Find the source that a sockref gives a new connection; `connection`: it was met at the destination stage."""
        inside = segment.flow
        sockref = self.source_sockref(inside)
        if sockref is None:
            return FirstDecision(Decision(Verdict.ACCEPT, Reason.NO_MAPPING))
        if sockref.has(Flag.MARK_ONLY):
            self._wait(connection or Connection(inside, inside, arrival.now), sockref)
            return FirstDecision(Decision(Verdict.ACCEPT, Reason.MARK_ONLY, is_marked=True), inside)
        source = self._free_source(inside, sockref.foreign, may_displace=segment.is_syn)
        if isinstance(source, Taken):
            return FirstDecision(not_mapped(source, inside, sockref.foreign))
        connection = connection or Connection(inside, inside, arrival.now)
        connection.final = FlowTuple(inside.protocol, source, inside.destination)
        self._wait(connection, sockref)
        if not sockref.foreign.port:
            self.sockrefs.set_foreign(sockref, source)
        decision = Decision(Verdict.ACCEPT, Reason.SOCKREF, is_marked=True)
        return FirstDecision(decision, inside, Mapping(Stage.SOURCE, inside, source))

    def _free_source(self, inside: FlowTuple, foreign: Endpoint, *, may_displace: bool) -> Endpoint | Taken:
        """The source to leave with, whose answers conntrack will take for nobody else's; port 0 lets us pick.

        A dead connection that is in the way of a SYN is deleted. Were the port left to the kernel's choice, it could
        pick one that a sockref owns.
        """
        for number, source in enumerate(self._candidates(inside, foreign)):
            holder = self._conntrack.find(FlowTuple(inside.protocol, inside.destination, source))
            if holder is None:
                return source
            if number == 0 and may_displace and holder.is_replaceable:
                self._conntrack.delete([holder])
                return source
        return Taken(is_exhausted=not foreign.port)

    def _candidates(self, inside: FlowTuple, foreign: Endpoint) -> Iterator[Endpoint]:
        """The foreign endpoint itself; without a port, the address with the connection's own port, then with others."""
        if foreign.port:
            yield foreign
            return
        own = inside.source.port
        for port in (own, *self.ports.from_random(self.chance)):
            source = Endpoint(foreign.address, port)
            if not self.sockrefs.has_foreign(inside.protocol, source):
                yield source

    # Connections on their way from a decision to conntrack's report.

    def _wait(self, connection: Connection, sockref: Sockref) -> None:
        """Expect conntrack to report a connection."""
        self.relate(sockref, connection)
        self._waiting[Stage.DESTINATION, connection.original] = connection
        self._waiting[Stage.SOURCE, connection.inside] = connection
        connection.deadline = connection.created + _PATIENCE
        self._deadlines.append((connection.deadline, connection))

    def _stop_waiting(self, connection: Connection) -> None:
        for key in ((Stage.DESTINATION, connection.original), (Stage.SOURCE, connection.inside)):
            if self._waiting.get(key) is connection:
                del self._waiting[key]
        connection.deadline = math.inf

    def _is_reported(self, connection: Connection) -> bool:
        return self._reported.get(connection.original, (None, None))[0] is connection

    def _forget(self, connection: Connection) -> None:
        """A connection has gone, from conntrack or before it came there."""
        self._stop_waiting(connection)
        if self._is_reported(connection):
            del self._reported[connection.original]
        self.unrelate(connection)
        self.on_forget(connection)
