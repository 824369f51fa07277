"""The choice of tuples: each belongs to nobody else, and the dead make way for a SYN."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from builders import endpoint, flow
from hypothesis import given
from hypothesis import strategies as st

from nfq_engine.core.conntrack import Connection, ConnectionTable, Direction, Event
from nfq_engine.core.nat import Allocator, Choice, PortRange, Taken
from nfq_engine.core.packet import Endpoint, FlowTuple, Protocol

PORTS = PortRange(40_000, 40_003)
CLIENT, SERVER, OTHER = endpoint("client", 4000), endpoint("server", 80), endpoint("server", 81)
PROXY = endpoint("gateway", 50080)
LOCAL, FOREIGN = endpoint("outside", 5000), endpoint("foreign", 4711)


@dataclass
class World:
    """A connection table, the endpoints that sockrefs own, and the allocator that respects both."""

    ports: PortRange = PORTS
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    reserved: set[Endpoint] = field(default_factory=set)
    table: ConnectionTable = field(default_factory=ConnectionTable)

    @property
    def allocator(self) -> Allocator:
        return Allocator(self.table, self.ports, self.chance, lambda final: final.source in self.reserved)

    def redirect(self, original: FlowTuple, to: Endpoint = PROXY, **may: bool) -> Choice | Taken:
        asked = {"may_displace": False, "may_move": True, **may}
        return self.allocator.destination(original, to, **asked)

    def connected(self, original: FlowTuple, inside: FlowTuple | None = None, *, is_dead: bool = False) -> Connection:
        connection = Connection(original, inside or original, 0.0)
        self.table.insert(connection)
        for event in (Event.SYN, *([Event.RST] if is_dead else [])):
            connection.advance(event, Direction.ORIGINAL)
        return connection

    def leaving(self, destination: Endpoint = SERVER, source: Endpoint = LOCAL, *, is_dead: bool = False) -> Connection:
        """A connection from a socket here that has come to its source stage."""
        return self.connected(flow(source, destination), is_dead=is_dead)

    def left(self, final: Endpoint, *, source: Endpoint, is_dead: bool = False) -> Connection:
        """A connection that has left as somebody else."""
        connection = self.leaving(source=source, is_dead=is_dead)
        self.table.decide_source(connection, flow(final, SERVER))
        return connection


def source_of(choice: Choice | Taken) -> Endpoint:
    assert isinstance(choice, Choice)
    return choice.flow.source


# The destination stage.


def test_wished_tuple_is_taken_if_it_is_free() -> None:
    assert World().redirect(flow(CLIENT, SERVER)) == Choice(flow(CLIENT, PROXY))


def test_source_port_moves_if_the_proxy_has_that_peer_already() -> None:
    world = World()
    world.connected(flow(CLIENT, SERVER), flow(CLIENT, PROXY))
    choice = world.redirect(flow(CLIENT, OTHER))
    assert isinstance(choice, Choice)
    assert choice.flow == flow(Endpoint(CLIENT.address, choice.flow.source.port), PROXY)
    assert choice.flow.source.port in range(40_000, 40_004)


def test_source_port_stays_where_answers_could_not_be_given_it_back() -> None:
    world = World()
    world.connected(flow(CLIENT, SERVER), flow(CLIENT, PROXY))
    assert world.redirect(flow(CLIENT, OTHER), may_move=False) == Taken(is_exhausted=False)


def test_no_port_is_free_when_all_have_moved_there() -> None:
    world = World()
    for number in range(5):
        original = flow(CLIENT, endpoint("server", 100 + number))
        choice = world.redirect(original)
        assert isinstance(choice, Choice)
        world.connected(original, choice.flow)
    assert world.redirect(flow(CLIENT, SERVER)) == Taken(is_exhausted=True)


@pytest.mark.parametrize("is_dead", [True, False], ids=["dead", "living"])
@pytest.mark.parametrize("may_displace", [True, False], ids=["syn", "no-syn"])
def test_only_a_syn_displaces_and_only_the_dead(is_dead: bool, may_displace: bool) -> None:
    world = World()
    holder = world.connected(flow(CLIENT, SERVER), flow(CLIENT, PROXY), is_dead=is_dead)
    choice = world.redirect(flow(CLIENT, OTHER), may_displace=may_displace, may_move=False)
    if is_dead and may_displace:
        assert choice == Choice(flow(CLIENT, PROXY), (holder,))
    else:
        assert choice == Taken(is_exhausted=False)


@pytest.mark.parametrize("is_dead", [True, False], ids=["dead", "living"])
def test_holders_are_displaced_all_or_none(is_dead: bool) -> None:
    """One has the wished tuple, which is dead; answers to another one are what the new connection would look like."""
    world = World()
    there = world.connected(flow(CLIENT, OTHER), flow(CLIENT, PROXY), is_dead=True)
    back = world.connected(flow(SERVER, LOCAL), is_dead=is_dead)
    world.table.decide_source(back, flow(SERVER, CLIENT))
    choice = world.redirect(flow(CLIENT, SERVER), may_displace=True, may_move=False)
    assert choice == (Choice(flow(CLIENT, PROXY), (back, there)) if is_dead else Taken(is_exhausted=False))
    assert there in world.table, "it is the caller who forgets them"


# The source stage.


def test_given_port_is_taken_if_it_is_free() -> None:
    world = World()
    choice = world.allocator.source(world.leaving(), FOREIGN, may_displace=False)
    assert choice == Choice(flow(FOREIGN, SERVER))


@pytest.mark.parametrize("is_dead", [True, False], ids=["dead", "living"])
@pytest.mark.parametrize("may_displace", [True, False], ids=["syn", "no-syn"])
def test_given_port_that_another_connection_has(is_dead: bool, may_displace: bool) -> None:
    world = World()
    holder = world.left(FOREIGN, source=endpoint("outside", 1), is_dead=is_dead)
    choice = world.allocator.source(world.leaving(), FOREIGN, may_displace=may_displace)
    if is_dead and may_displace:
        assert choice == Choice(flow(FOREIGN, SERVER), (holder,))
    else:
        assert choice == Taken(is_exhausted=False)


def test_given_port_of_a_connection_to_somebody_else_is_free() -> None:
    world = World()
    world.left(FOREIGN, source=endpoint("outside", 1))
    choice = world.allocator.source(world.leaving(OTHER), FOREIGN, may_displace=False)
    assert choice == Choice(flow(FOREIGN, OTHER))


def test_port_0_keeps_the_sockets_own_port() -> None:
    world = World()
    choice = world.allocator.source(world.leaving(), Endpoint(FOREIGN.address, 0), may_displace=False)
    assert source_of(choice) == Endpoint(FOREIGN.address, LOCAL.port)


@pytest.mark.parametrize("why", ["held", "reserved"])
def test_port_0_picks_another_if_its_own_is_not_to_be_had(why: str) -> None:
    world = World()
    own = Endpoint(FOREIGN.address, LOCAL.port)
    if why == "held":
        world.left(own, source=endpoint("outside", 1))
    else:
        world.reserved.add(own)
    source = source_of(world.allocator.source(world.leaving(), Endpoint(FOREIGN.address, 0), may_displace=False))
    assert source.address == FOREIGN.address
    assert source.port in range(40_000, 40_004)


def test_port_0_picks_what_is_neither_held_nor_reserved() -> None:
    world = World()
    for number, port in enumerate((LOCAL.port, 40_000, 40_001), start=1):
        world.left(Endpoint(FOREIGN.address, port), source=endpoint("outside", number))
    world.reserved.add(Endpoint(FOREIGN.address, 40_003))
    choice = world.allocator.source(world.leaving(), Endpoint(FOREIGN.address, 0), may_displace=False)
    assert source_of(choice) == Endpoint(FOREIGN.address, 40_002)
    world.reserved.add(Endpoint(FOREIGN.address, 40_002))
    exhausted = world.allocator.source(world.leaving(OTHER), Endpoint(FOREIGN.address, 0), may_displace=False)
    assert isinstance(exhausted, Choice), "to somebody else every port is free that is not reserved"
    again = world.leaving(source=endpoint("outside", 9))
    world.reserved.add(Endpoint(FOREIGN.address, 9))
    assert world.allocator.source(again, Endpoint(FOREIGN.address, 0), may_displace=False) == Taken(is_exhausted=True)


def test_own_answers_are_in_nobodys_way() -> None:
    world = World()
    connection = world.leaving()
    assert world.allocator.source(connection, LOCAL, may_displace=False) == Choice(connection.inside)


# The range.


class Always:
    """Chance that always says the same."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


@given(st.integers(1, 0xFFFF), st.integers(0, 50), st.floats(0, 1, exclude_max=True))
def test_every_port_of_the_range_comes_once(first: int, more: int, number: float) -> None:
    last = min(first + more, 0xFFFF)
    ports = list(PortRange(first, last).from_random(Always(number)))
    assert sorted(ports) == list(range(first, last + 1))


small = st.builds(Endpoint, st.sampled_from([CLIENT.address, SERVER.address]), st.integers(1, 3))
steps = st.tuples(st.sampled_from(list(Protocol)), small, small, small, small, st.booleans(), st.booleans())


@given(st.lists(steps, max_size=25))
def test_no_two_connections_are_alike_anywhere(
    wishes: list[tuple[Protocol, Endpoint, Endpoint, Endpoint, Endpoint, bool, bool]],
) -> None:
    """Whatever is asked for: on each stretch of the way a packet can be told whose it is, and the answer, too."""
    world = World(PortRange(2, 5))
    for protocol, source, destination, to, foreign, may_move, is_port_given in wishes:
        original = FlowTuple(protocol, source, destination)
        if any(original in (each.original, each.reply) for each in world.table):
            continue  # it would be a packet of that one
        choice = world.redirect(original, to, may_move=may_move)
        if isinstance(choice, Taken):
            continue
        connection = world.connected(original, choice.flow)
        wished = foreign if is_port_given else Endpoint(foreign.address, 0)
        left = world.allocator.source(connection, wished, may_displace=False)
        if isinstance(left, Taken):
            world.table.delete(connection)
            continue
        world.table.decide_source(connection, left.flow)
    arriving = [tuple_ for each in world.table for tuple_ in {each.original, each.reply}]
    between = [tuple_ for each in world.table for tuple_ in {each.inside, each.inside.inverse()}]
    assert len(arriving) == len(set(arriving))
    assert len(between) == len(set(between))
