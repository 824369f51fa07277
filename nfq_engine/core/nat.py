"""NAT: choose the tuples of a new connection so that each belongs to nobody else.

Owns: the search for a unique tuple. Must not know why a mapping is wanted. Place in the path: between the look-up that
says 'this connection becomes ...' and the connection table.

Two choices are made for a connection, each once. The destination stage chooses `inside`. If the wished tuple is taken,
because one client reached two servers from one port and both are redirected to one proxy, the *source* port of the new
one is changed on the way in and back on the way out: the kernel's NAT does the same at LOCAL_IN, and the proxy sees two
peers. The source stage chooses `final`.

A connection in TIME_WAIT or CLOSE that stands in the way of a new SYN is no obstacle: it is named in the answer, and
the caller forgets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nfq_engine.core.conntrack import Connection, ConnectionTable, Stage
from nfq_engine.core.packet import Endpoint, FlowTuple
from nfq_engine.core.surroundings import Chance


@dataclass(frozen=True, slots=True)
class PortRange:
    """The ports to pick from, both ends included (the kernel's ip_local_port_range)."""

    first: int
    last: int

    def from_random(self, chance: Chance) -> Iterator[int]:
        """Every port once, from a random one on."""
        count = self.last - self.first + 1
        start = int(chance.random() * count)
        return (self.first + (start + step) % count for step in range(count))


@dataclass(frozen=True, slots=True)
class Choice:
    """The tuple that was found, and the dead connections that must go for it."""

    flow: FlowTuple
    displaced: tuple[Connection, ...] = ()


@dataclass(frozen=True, slots=True)
class Taken:
    """No tuple was found: the wished one belongs to a living connection, and no other may be tried, or none is free."""

    is_exhausted: bool


@dataclass(frozen=True, slots=True)
class Allocator:
    """Finds unique tuples in a connection table.

    `is_reserved` says whether an endpoint is a sockref's foreign one, which NAT may not pick by itself.
    """

    connections: ConnectionTable
    ports: PortRange
    chance: Chance
    is_reserved: Callable[[FlowTuple], bool]

    def destination(self, original: FlowTuple, to: Endpoint, *, may_displace: bool, may_move: bool) -> Choice | Taken:
        """Choose `inside` for a new connection whose destination becomes `to`.

        `may_displace`: the packet is a SYN, so dead connections may be replaced. `may_move`: the source port may be
        changed when the wished tuple is taken, that is, answers pass the source stage on this host.
        """
        wished = FlowTuple(original.protocol, original.source, to)
        choice = self._claim(self.connections.holders(original, wished), wished, may_displace)
        if choice is not None:
            return choice
        if not may_move:
            return Taken(is_exhausted=False)
        for port in self.ports.from_random(self.chance):
            moved = FlowTuple(original.protocol, Endpoint(original.source.address, port), to)
            if not self.connections.holders(original, moved):
                return Choice(moved)
        return Taken(is_exhausted=True)

    def source(self, connection: Connection, foreign: Endpoint, *, may_displace: bool) -> Choice | Taken:
        """Choose `final` for a connection that leaves as `foreign`; port 0 lets us pick, the old port first."""
        inside = connection.inside
        if foreign.port:
            wished = FlowTuple(inside.protocol, foreign, inside.destination)
            return self._claim(self._reply_holders(connection, wished), wished, may_displace) or Taken(False)
        kept = FlowTuple(inside.protocol, Endpoint(foreign.address, inside.source.port), inside.destination)
        if not self.is_reserved(kept):
            choice = self._claim(self._reply_holders(connection, kept), kept, may_displace)
            if choice is not None:
                return choice
        for port in self.ports.from_random(self.chance):
            picked = FlowTuple(inside.protocol, Endpoint(foreign.address, port), inside.destination)
            if not self.is_reserved(picked) and not self._reply_holders(connection, picked):
                return Choice(picked)
        return Taken(is_exhausted=True)

    def _reply_holders(self, connection: Connection, final: FlowTuple) -> list[Connection]:
        """The connection, if it is another one, whose packets the answers to `final` would be taken for."""
        entry = self.connections.find(Stage.DESTINATION, final.inverse())
        return [] if entry is None or entry.connection is connection else [entry.connection]

    @staticmethod
    def _claim(holders: list[Connection], flow: FlowTuple, may_displace: bool) -> Choice | None:
        """The choice of a tuple if its holders can all be displaced."""
        if all(may_displace and holder.is_replaceable for holder in holders):
            return Choice(flow, tuple(holders))
        return None
