"""The engine under arbitrary packets and calls: nothing is raised, nothing contradicts itself, nothing stays behind.

Few addresses and ports, so that connections, sockrefs and picked ports get into each other's way. `Dialogue` compares
the hot path with the slow one all the while, and whatever leaves has right checksums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from builders import endpoint, flow, icmp_error, packet
from dialogue import Dialogue
from hypothesis import given, settings
from hypothesis import strategies as st

from nfq_engine.core.conntrack import Stage
from nfq_engine.core.decision import Verdict
from nfq_engine.core.nat import PortRange
from nfq_engine.core.option import Operation, pack_address, pack_number
from nfq_engine.core.packet import Endpoint, FlowTuple, Hook, Protocol, Segment, parse
from nfq_engine.core.pipeline import Engine
from nfq_engine.core.sockopt import Socket
from nfq_engine.core.sockref import Flag
from nfq_engine.core.tproxy_table import Deletion

RULES = (
    "-A PREROUTING -p tcp --dport 1 -j TPROXY --on-port 2",
    "-A PREROUTING -p udp --dport 1 -j TPROXY --on-port 0 --on-ip 10.0.1.1",
    "-A OUTPUT -p tcp --dport 1 -j TPROXY --on-port 2",
    "-A PREROUTING -p tcp --dport 3 -j DROP",
)
KINDS = (Flag.CONNECT, Flag.LISTEN, Flag.ESTABLISHED)
EXTRAS = (Flag(0), Flag.ONCE, Flag.UNIDIR)

names = st.sampled_from(["client", "gateway", "server"])
ends = st.builds(endpoint, names, st.integers(1, 3))
foreign_ends = st.builds(endpoint, names, st.integers(0, 3))
protocols = st.sampled_from(list(Protocol))
flows = st.builds(flow, ends, ends, protocols)
tcp_flags = st.sampled_from(["S", "S", "SA", "A", "FA", "R"])
hooks = st.sampled_from([Hook.PREROUTING, Hook.OUTPUT, Hook.POSTROUTING])
numbers = st.integers(0, 5)  # which of those that there are


class Play:
    """A dialogue, and the sockets in it."""

    def __init__(self, deletion: Deletion) -> None:
        self.world = Dialogue(*RULES, ports=PortRange(2, 4), deletion=deletion)
        self.sockets: list[Socket] = []

    def send(self, hook: Hook, of: FlowTuple, flags: str) -> FlowTuple | None:
        """One packet; how it left, unless it was dropped."""
        data = built(of, flags)
        decision = self.world.put(hook, data)
        if decision.verdict is Verdict.DROP:
            return None
        parsed = parse(decision.payload or data)
        assert isinstance(parsed, Segment)
        assert (decision.payload or data) == built(parsed.flow, flags)
        return parsed.flow

    def travel(self, hook: Hook, of: FlowTuple, flags: str) -> None:
        """One packet through both stages."""
        between = self.send(hook, of, flags)
        if between is not None and hook is not Hook.POSTROUTING:
            self.send(Hook.POSTROUTING, between, flags)

    def go_on(self, number: int, is_reply: bool, flags: str) -> None:
        """One more packet of a connection."""
        connections = list(self.world.engine.connections)
        if connections:
            connection = connections[number % len(connections)]
            self.travel(Hook.PREROUTING, connection.reply if is_reply else connection.original, flags)

    def meet(self, number: int, peer: Endpoint, flags: str) -> None:
        """A packet from a peer to the foreign address of a sockref."""
        sockrefs = list(self.world.engine.sockrefs)
        if sockrefs:
            sockref = sockrefs[number % len(sockrefs)]
            self.travel(Hook.PREROUTING, flow(peer, sockref.foreign, sockref.protocol), flags)

    def leave(self, number: int, peer: Endpoint, flags: str) -> None:
        """A packet from the local address of a sockref to a peer."""
        sockrefs = list(self.world.engine.sockrefs)
        if sockrefs:
            sockref = sockrefs[number % len(sockrefs)]
            self.travel(Hook.OUTPUT, flow(sockref.local, peer, sockref.protocol), flags)

    def complain(self, number: int, is_reply: bool, hook: Hook) -> None:
        """An ICMP error about a packet of a connection."""
        connections = list(self.world.engine.connections)
        if connections:
            connection = connections[number % len(connections)]
            of = connection.final if is_reply else connection.inside.inverse()
            self.world.put(hook, icmp_error(built(of, "A"), endpoint("server", 0).address, of.source.address))

    def assign(
        self, local: Endpoint, foreign: Endpoint, remote: Endpoint | None, protocol: Protocol, flags: int
    ) -> None:
        """A new socket, with whatever comes of its calls."""
        socket = self.world.socket(local, protocol, reuse=True)
        self.sockets.append(socket)
        self.world.set(socket, pack_address(Operation.ASSIGN, foreign))
        if remote is not None:
            self.world.set(socket, pack_address(Operation.CONNECT, remote))
        self.world.set(socket, pack_number(Operation.FLAGS, flags))

    def call(self, number: int, argument: bytes) -> None:
        """A call by one of the sockets."""
        if self.sockets:
            self.world.set(self.sockets[number % len(self.sockets)], argument)

    def close(self, number: int) -> None:
        """One of the sockets is closed."""
        if self.sockets:
            self.world.close(self.sockets.pop(number % len(self.sockets)))


@cache
def built(of: FlowTuple, flags: str) -> bytes:
    return packet(of, flags=flags)


Step = Callable[[Play], None]
nobody = st.just(Endpoint(bytes(4), 0))
kinds = st.builds(lambda kind, extra: int(kind | extra), st.sampled_from(KINDS), st.sampled_from(EXTRAS))
arguments = st.one_of(
    st.builds(pack_number, st.just(Operation.FLAGS), kinds),
    st.builds(pack_number, st.just(Operation.ALLOC)),
    st.builds(pack_address, st.just(Operation.CONNECT), st.one_of(ends, nobody)),
)


def step(name: str, *given_: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[str, tuple[object, ...]]]:
    return st.tuples(st.just(name), st.tuples(*given_))


steps = st.lists(
    st.one_of(
        step("travel", hooks, flows, tcp_flags),
        step("go_on", numbers, st.booleans(), tcp_flags),
        step("go_on", numbers, st.booleans(), tcp_flags),
        step("meet", numbers, ends, tcp_flags),
        step("meet", numbers, ends, tcp_flags),
        step("leave", numbers, ends, tcp_flags),
        step("leave", numbers, ends, tcp_flags),
        step("complain", numbers, st.booleans(), hooks),
        step("assign", ends, foreign_ends, st.one_of(st.none(), ends), protocols, kinds),
        step("assign", ends, foreign_ends, st.none(), protocols, kinds),
        step("assign", ends, nobody, st.none(), protocols, kinds),
        step("call", numbers, arguments),
        step("close", numbers),
        step("wait", st.sampled_from([1.0, 31.0, 130.0])),
    ),
    min_size=25,
    max_size=50,
)


def check(engine: Engine) -> None:
    """What holds after every step."""
    table, sockrefs = engine.connections, engine.sockrefs
    connections = list(table)
    entries = [entry for stage in table.entries.values() for found in stage.values() for entry in found.values()]
    assert {id(entry) for entry in entries} == {id(entry) for each in connections for entry in each.entries.values()}
    assert all(entry.connection in table for entry in entries)
    for connection in connections:
        for way in (connection.original, connection.reply):
            found = table.find(Stage.DESTINATION, way)
            assert found is not None
            assert found.connection is connection
        assert all(connection in sockref.related for sockref in connection.sockrefs)
        assert len(connection.sockrefs) == len(set(connection.sockrefs))
    assert {id(each) for each in table._undecided.values()} <= {id(each) for each in connections}
    for sockref in sockrefs:
        assert sockref.cookies or sockref.related, "an entry of nobody"
        assert sockref.has(Flag.ORPHAN) is not bool(sockref.cookies)
        assert sockref.related <= set(connections)
        assert sockref in sockrefs.at_local(sockref.protocol, sockref.local)
        assert sockref in sockrefs.at_foreign(sockref.protocol, sockref.foreign)
    assert all(sockref in sockrefs for sockref in sockrefs._by_cookie.values())


@settings(max_examples=120)
@given(st.sampled_from(list(Deletion)), steps)
def test_whatever_comes(deletion: Deletion, script: list[tuple[str, tuple[object, ...]]]) -> None:
    play = Play(deletion)
    for name, given_ in script:
        getattr(play.world if name == "wait" else play, name)(*given_)
        check(play.world.engine)
    while play.sockets:
        play.close(0)
    play.world.wait(1e6)
    for engine in (play.world.engine, play.world.twin):
        table, sockrefs = engine.connections, engine.sockrefs
        left = [found for stage in table.entries.values() for found in stage.values()]
        assert not any((*left, len(table), table._undecided, table._deadlines))
        assert not any((sockrefs._by_local, sockrefs._by_foreign, sockrefs._by_cookie))
