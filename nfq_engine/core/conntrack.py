"""Connections: who talks to whom, as what, and in which state.

Owns: the connection table with its keys for every wire tuple, the TCP and UDP states, the timeouts. Must not know how a
mapping is chosen (nat.py) or why (pipeline.py). Place in the path: asked once for every packet.

Rules that hold here:

* a connection has three tuples in its original direction: `original` as it arrived, `inside` as the kernel's own
  conntrack and the sockets of this host see it, `final` as it leaves. Everything else is derived from them:

      original direction   original  --destination stage-->  inside             --source stage-->  final
      reply direction      final⁻¹   --destination stage-->  inside⁻¹           --source stage-->  original⁻¹

* a wire tuple belongs to one connection at the most in each stage;
* `state` changes in `Connection.advance` and nowhere else;
* the clock is an argument.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Final

from nfq_engine.core.packet import TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, FlowTuple, Hook, Protocol
from nfq_engine.core.rewrite import Rewrite

if TYPE_CHECKING:
    from nfq_engine.core.sockref import Sockref


PACKET: Final = 1 << 48  # one packet in `Entry.traffic`, whose lower bits count bytes


class Direction(IntEnum):
    """Which way a packet of a connection goes."""

    ORIGINAL = 0
    REPLY = 1


class Stage(IntEnum):
    """Which half of a tuple may change: destinations before routing, sources after it."""

    DESTINATION = 0
    SOURCE = 1

    @classmethod
    def at(cls, hook: Hook) -> Stage:
        """The stage that runs at a hook."""
        return cls.SOURCE if hook is Hook.POSTROUTING else cls.DESTINATION


class State(Enum):
    """What conntrack calls the states of TCP, and the two of UDP."""

    NONE = "NONE"
    SYN_SENT = "SYN_SENT"
    SYN_SENT2 = "SYN_SENT2"  # both sides sent a SYN: simultaneous open
    SYN_RECV = "SYN_RECV"
    ESTABLISHED = "ESTABLISHED"
    FIN_WAIT = "FIN_WAIT"
    CLOSE_WAIT = "CLOSE_WAIT"
    LAST_ACK = "LAST_ACK"
    TIME_WAIT = "TIME_WAIT"
    CLOSE = "CLOSE"
    UNREPLIED = "UNREPLIED"
    ASSURED = "ASSURED"


class Event(Enum):
    """What a packet means to the state of its connection."""

    SYN = "syn"
    SYN_ACK = "syn-ack"
    FIN = "fin"
    ACK = "ack"
    RST = "rst"
    DATAGRAM = "datagram"


def event_of(protocol: Protocol, tcp_flags: int) -> Event:
    """The event that a packet with these flags is; RST counts before SYN, SYN before FIN, as in conntrack."""
    if protocol is Protocol.UDP:
        return Event.DATAGRAM
    if tcp_flags & TCP_RST:
        return Event.RST
    if tcp_flags & TCP_SYN:
        return Event.SYN_ACK if tcp_flags & TCP_ACK else Event.SYN
    return Event.FIN if tcp_flags & TCP_FIN else Event.ACK


_BOTH: Final = (Direction.ORIGINAL, Direction.REPLY)
_OPEN: Final = (
    State.SYN_SENT,
    State.SYN_SENT2,
    State.SYN_RECV,
    State.ESTABLISHED,
    State.FIN_WAIT,
    State.CLOSE_WAIT,
    State.LAST_ACK,
    State.TIME_WAIT,
)

# (state, event, direction) -> state. What is not listed leaves the state as it is. The kernel's own table
# (net/netfilter/nf_conntrack_proto_tcp.c, tcp_conntracks) without its window tracking.
TRANSITIONS: Final[dict[tuple[State, Event, Direction], State]] = {
    # The first packet. A FIN, RST or SYN+ACK starts no connection; an ACK may (kernel: nf_conntrack_tcp_loose).
    (State.NONE, Event.SYN, Direction.ORIGINAL): State.SYN_SENT,
    (State.NONE, Event.ACK, Direction.ORIGINAL): State.ESTABLISHED,
    (State.NONE, Event.DATAGRAM, Direction.ORIGINAL): State.UNREPLIED,
    # Opening (RFC 9293 section 3.5).
    (State.SYN_SENT, Event.SYN_ACK, Direction.REPLY): State.SYN_RECV,
    (State.SYN_SENT, Event.SYN, Direction.REPLY): State.SYN_SENT2,
    (State.SYN_SENT2, Event.SYN_ACK, Direction.ORIGINAL): State.SYN_RECV,
    (State.SYN_SENT2, Event.SYN_ACK, Direction.REPLY): State.SYN_RECV,
    (State.SYN_RECV, Event.ACK, Direction.ORIGINAL): State.ESTABLISHED,
    # Closing (RFC 9293 section 3.6), whoever begins.
    **{(State.SYN_RECV, Event.FIN, way): State.FIN_WAIT for way in _BOTH},
    **{(State.ESTABLISHED, Event.FIN, way): State.FIN_WAIT for way in _BOTH},
    **{(State.FIN_WAIT, Event.ACK, way): State.CLOSE_WAIT for way in _BOTH},
    **{(State.FIN_WAIT, Event.FIN, way): State.LAST_ACK for way in _BOTH},
    **{(State.CLOSE_WAIT, Event.FIN, way): State.LAST_ACK for way in _BOTH},
    **{(State.LAST_ACK, Event.ACK, way): State.TIME_WAIT for way in _BOTH},
    **{(state, Event.RST, way): State.CLOSE for state in _OPEN for way in _BOTH},
    (State.UNREPLIED, Event.DATAGRAM, Direction.REPLY): State.ASSURED,
}

# Seconds without a packet until a connection is forgotten; the kernel's defaults (Documentation/networking/
# nf_conntrack-sysctl.rst).
TIMEOUTS: Final[dict[State, float]] = {
    State.SYN_SENT: 120,
    State.SYN_SENT2: 120,
    State.SYN_RECV: 60,
    State.ESTABLISHED: 432_000,
    State.FIN_WAIT: 120,
    State.CLOSE_WAIT: 60,
    State.LAST_ACK: 30,
    State.TIME_WAIT: 120,
    State.CLOSE: 10,
    State.UNREPLIED: 30,
    State.ASSURED: 120,
}

# The same for an established one that was never answered: there may be none, and it costs an attacker one segment.
UNANSWERED: Final = 300.0

# Where a packet without SYN, FIN or RST that goes a way cannot change the state, so the hot path need not ask.
_SETTLED: Final = frozenset(
    {
        (State.ESTABLISHED, Direction.ORIGINAL),
        (State.ESTABLISHED, Direction.REPLY),
        (State.UNREPLIED, Direction.ORIGINAL),
        (State.ASSURED, Direction.ORIGINAL),
        (State.ASSURED, Direction.REPLY),
    }
)
_REPLACEABLE: Final = frozenset({State.TIME_WAIT, State.CLOSE})

_FEW_DEADLINES: Final = 1000  # so many may be stale at any time

_identifiers = itertools.count(1)


class Connection:
    """One connection, both directions, with the entries that find it."""

    __slots__ = (
        "created",
        "deadline",
        "entries",
        "final",
        "identifier",
        "inside",
        "is_marked",
        "original",
        "rule",
        "sockrefs",
        "state",
        "was_answered",
    )

    def __init__(self, original: FlowTuple, inside: FlowTuple, now: float) -> None:
        self.original = original
        self.inside = inside
        self.final = inside
        self.created = now
        self.deadline = math.inf  # when `ConnectionTable.expired` looks at it next
        self.state = State.NONE
        self.entries: dict[tuple[Stage, Direction], Entry] = {}
        self.is_marked = False
        self.was_answered = False  # as far as `advance` was told
        self.rule = ""
        self.sockrefs: tuple[Sockref, ...] = ()
        self.identifier = next(_identifiers)

    @property
    def reply(self) -> FlowTuple:
        """The tuple of the reply direction, as it arrives."""
        return self.final.inverse()

    @property
    def is_mapped(self) -> bool:
        """Is anything translated?"""
        return self.original != self.final

    @property
    def is_replaceable(self) -> bool:
        """May a new SYN take this connection's place (TIME_WAIT, CLOSE)?"""
        return self.state in _REPLACEABLE

    @property
    def last_seen(self) -> float:
        """When its last packet came by."""
        return max((entry.last_seen for entry in self.entries.values()), default=self.created)

    @property
    def expires(self) -> float:
        """When it is forgotten if no packet comes."""
        if self.state is State.ESTABLISHED and not self._is_answered:
            return self.last_seen + UNANSWERED
        return self.last_seen + TIMEOUTS[self.state]

    @property
    def _is_answered(self) -> bool:
        """Has anything come the other way? Where both ways share a key, that cannot be told."""
        is_told = (Stage.DESTINATION, Direction.REPLY) in self.entries
        return self.was_answered or not is_told or self.traffic(Direction.REPLY)[0] > 0

    def advance(self, event: Event, direction: Direction) -> None:
        """Move on by one packet: the only place where `state` changes."""
        self.state = TRANSITIONS.get((self.state, event, direction), self.state)
        self.was_answered |= direction is Direction.REPLY
        for entry in self.entries.values():
            entry.is_settled = (self.state, entry.direction) in _SETTLED

    def traffic(self, direction: Direction) -> tuple[int, int]:
        """Packets and bytes of one direction: counted at the destination stage, which each packet passes once."""
        entry = self.entries.get((Stage.DESTINATION, direction))
        return divmod(entry.traffic, PACKET) if entry is not None else (0, 0)


class Entry:
    """What happens to one wire tuple at one stage: the connection, the way, the prepared rewrite, and how often.

    With thousands of flows the hot path's time goes into objects that are in no cache, so it finds all it needs here:
    the parts of the rewrite (`key` is None when there is none), and packets and bytes in one number, `traffic`, of
    which a packet is worth `PACKET` and its bytes. `found_by` is the key that it has in the table.
    """

    __slots__ = (
        "address_delta",
        "connection",
        "delta",
        "direction",
        "found_by",
        "is_settled",
        "key",
        "last_seen",
        "rewrite",
        "traffic",
    )

    def __init__(self, connection: Connection, direction: Direction, found_by: bytes, rewrite: Rewrite | None) -> None:
        self.connection = connection
        self.found_by = found_by
        self.direction = direction
        self.rewrite = rewrite
        self.is_settled = (connection.state, direction) in _SETTLED
        self.last_seen = connection.created
        self.traffic = 0
        self.key = rewrite.key if rewrite is not None else None
        self.address_delta = rewrite.address_delta if rewrite is not None else 0
        self.delta = rewrite.delta if rewrite is not None else 0


class ConnectionTable:
    """All connections, found by any wire tuple.

    `entries[stage][protocol]` maps `FlowTuple.key` to `Entry`; the hot path reads these dicts directly. A connection
    whose source stage is still to be decided has no entry for `inside` there and is found by `undecided` instead.
    """

    def __init__(self) -> None:
        self.entries: dict[Stage, dict[Protocol, dict[bytes, Entry]]] = {
            stage: {protocol: {} for protocol in Protocol} for stage in Stage
        }
        self._undecided: dict[FlowTuple, Connection] = {}
        self._connections: dict[int, Connection] = {}
        self._deadlines: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._connections.values())

    def __contains__(self, connection: Connection) -> bool:
        return connection.identifier in self._connections

    def find(self, stage: Stage, flow: FlowTuple) -> Entry | None:
        """The entry of a wire tuple at a stage."""
        return self.entries[stage][flow.protocol].get(flow.key)

    def undecided(self, inside: FlowTuple) -> Connection | None:
        """The connection that waits for its source stage, by the tuple as the kernel sees it."""
        return self._undecided.get(inside)

    def holders(self, original: FlowTuple, inside: FlowTuple) -> list[Connection]:
        """The connections in the way of a new one with these tuples (and `final` equal to `inside`).

        Another one with the same `inside` is found by its answers while its source stage is undecided, by its own
        packets afterwards.
        """
        at_destination = self.entries[Stage.DESTINATION][original.protocol]
        found = (
            at_destination.get(original.key),
            at_destination.get(inside.inverse().key),
            self.entries[Stage.SOURCE][original.protocol].get(inside.key),
        )
        return list({entry.connection.identifier: entry.connection for entry in found if entry is not None}.values())

    def insert(self, connection: Connection) -> None:
        """Take in a new connection, whose tuples nobody may hold; its source stage is undecided."""
        self._connections[connection.identifier] = connection
        self._undecided[connection.inside] = connection
        self._put(connection, Stage.DESTINATION, Direction.ORIGINAL)
        self._put(connection, Stage.DESTINATION, Direction.REPLY)
        if connection.inside != connection.inside.inverse():  # else the original direction will have this place
            self._put(connection, Stage.SOURCE, Direction.REPLY)

    def schedule(self, connection: Connection) -> None:
        """Watch the timeout of a connection: called whenever its state may have changed."""
        if connection.expires < connection.deadline:
            connection.deadline = connection.expires
            heapq.heappush(self._deadlines, (connection.deadline, connection.identifier))
            if len(self._deadlines) > 2 * len(self._connections) + _FEW_DEADLINES:
                self._drop_stale_deadlines()

    def decide_source(self, connection: Connection, final: FlowTuple) -> None:
        """Set what the connection leaves as, once, when its first packet comes to the source stage."""
        self._undecided.pop(connection.inside, None)
        if final != connection.final:
            self._take(connection, Stage.DESTINATION, Direction.REPLY)
            connection.final = final
            self._put(connection, Stage.DESTINATION, Direction.REPLY)
        self._put(connection, Stage.SOURCE, Direction.ORIGINAL)

    def delete(self, connection: Connection) -> None:
        """Forget a connection; its next packet is a new connection's first."""
        del self._connections[connection.identifier]
        if self._undecided.get(connection.inside) is connection:
            del self._undecided[connection.inside]
        for (stage, _), entry in connection.entries.items():
            del self.entries[stage][connection.inside.protocol][entry.found_by]
        connection.entries.clear()

    def expired(self, now: float) -> list[Connection]:
        """The connections whose time is over; they are still in the table.

        A packet that only prolongs a connection costs no work here: the deadline is moved when it was due.
        """
        over = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, identifier = heapq.heappop(self._deadlines)
            connection = self._connections.get(identifier)
            if connection is None or connection.deadline != deadline:
                continue  # forgotten, or watched from an earlier deadline on
            connection.deadline = math.inf
            if connection.expires <= now:
                over.append(connection)
            else:
                self.schedule(connection)
        return over

    def _drop_stale_deadlines(self) -> None:
        """Keep each connection's deadline and no other; an established one that was closed leaves one of five days."""
        watched = self._connections.values()
        self._deadlines = [(each.deadline, each.identifier) for each in watched if each.deadline < math.inf]
        heapq.heapify(self._deadlines)

    def _put(self, connection: Connection, stage: Stage, direction: Direction) -> None:
        """Make the entry of one stage and way; where both ways share a key, the original one keeps it."""
        flow, becomes = _wire(connection, stage, direction)
        entries = self.entries[stage][flow.protocol]
        key = flow.key
        if key in entries:
            return
        rewrite = Rewrite.between(flow, becomes) if flow != becomes else None
        entries[key] = connection.entries[stage, direction] = Entry(connection, direction, key, rewrite)

    def _take(self, connection: Connection, stage: Stage, direction: Direction) -> None:
        """Remove the entry of one stage and way, if there is one."""
        entry = connection.entries.pop((stage, direction), None)
        if entry is not None:
            del self.entries[stage][connection.inside.protocol][entry.found_by]


def _wire(connection: Connection, stage: Stage, direction: Direction) -> tuple[FlowTuple, FlowTuple]:
    """The tuple that the wire shows of a connection at a stage, and the one that it becomes there."""
    match stage, direction:
        case Stage.DESTINATION, Direction.ORIGINAL:
            return connection.original, connection.inside
        case Stage.SOURCE, Direction.ORIGINAL:
            return connection.inside, connection.final
        case Stage.DESTINATION, Direction.REPLY:
            return connection.final.inverse(), connection.inside.inverse()
        case _:
            return connection.inside.inverse(), connection.original.inverse()
