"""Connections: the states as dialogues, the timeouts, and that nothing is left of what was deleted."""

from __future__ import annotations

import pytest
from builders import endpoint, flow
from hypothesis import given, settings
from hypothesis import strategies as st

from nfq_engine.core.conntrack import TIMEOUTS, Connection, ConnectionTable, Direction, Event, Stage, State
from nfq_engine.core.packet import Endpoint, FlowTuple, Protocol

ORIGINAL, REPLY = Direction.ORIGINAL, Direction.REPLY
OPEN = [(Event.SYN, ORIGINAL), (Event.SYN_ACK, REPLY), (Event.ACK, ORIGINAL)]

DIALOGUES = {
    "first syn": (OPEN[:1], State.SYN_SENT),
    "answered": (OPEN[:2], State.SYN_RECV),
    "open": (OPEN, State.ESTABLISHED),
    "syn repeated": ([OPEN[0], *OPEN], State.ESTABLISHED),
    "both at once": ([OPEN[0], (Event.SYN, REPLY), (Event.SYN_ACK, ORIGINAL), OPEN[2]], State.ESTABLISHED),
    "closing": ([*OPEN, (Event.FIN, ORIGINAL)], State.FIN_WAIT),
    "half closed": ([*OPEN, (Event.FIN, ORIGINAL), (Event.ACK, REPLY)], State.CLOSE_WAIT),
    "closed by both": (
        [*OPEN, (Event.FIN, ORIGINAL), (Event.ACK, REPLY), (Event.FIN, REPLY), (Event.ACK, ORIGINAL)],
        State.TIME_WAIT,
    ),
    "closed by the other side first": (
        [*OPEN, (Event.FIN, REPLY), (Event.ACK, ORIGINAL), (Event.FIN, ORIGINAL), (Event.ACK, REPLY)],
        State.TIME_WAIT,
    ),
    "closed at once": ([*OPEN, (Event.FIN, ORIGINAL), (Event.FIN, REPLY), (Event.ACK, ORIGINAL)], State.TIME_WAIT),
    "refused": ([OPEN[0], (Event.RST, REPLY)], State.CLOSE),
    "reset": ([*OPEN, (Event.RST, ORIGINAL)], State.CLOSE),
    "picked up in the middle": ([(Event.ACK, ORIGINAL)], State.ESTABLISHED),
    "one-way datagrams": ([(Event.DATAGRAM, ORIGINAL)] * 3, State.UNREPLIED),
    "answered datagram": ([(Event.DATAGRAM, ORIGINAL), (Event.DATAGRAM, REPLY)], State.ASSURED),
}


def connected(table: ConnectionTable, original: FlowTuple, inside: FlowTuple | None = None) -> Connection:
    connection = Connection(original, inside or original, 0.0)
    table.insert(connection)
    return connection


@pytest.mark.parametrize(("events", "expected"), DIALOGUES.values(), ids=DIALOGUES.keys())
def test_states(events: list[tuple[Event, Direction]], expected: State) -> None:
    connection = Connection(flow(endpoint("client", 1), endpoint("server", 2)), endpoint_flow(), 0.0)
    for event, direction in events:
        connection.advance(event, direction)
    assert connection.state is expected


def endpoint_flow() -> FlowTuple:
    return flow(endpoint("client", 1), endpoint("gateway", 2))


def test_every_state_has_a_timeout() -> None:
    assert set(TIMEOUTS) == set(State) - {State.NONE}


def test_shorter_timeout_of_a_later_state_counts_from_then() -> None:
    table = ConnectionTable()
    connection = connected(table, flow(endpoint("client", 1), endpoint("server", 2)))
    for event, direction in OPEN:
        connection.advance(event, direction)
        table.schedule(connection)
    assert table.expired(1000.0) == []
    connection.advance(Event.RST, REPLY)
    connection.entries[Stage.DESTINATION, REPLY].last_seen = 1000.0
    table.schedule(connection)
    assert table.expired(1009.0) == []
    assert table.expired(1010.0) == [connection]


def test_deadlines_of_closed_connections_do_not_pile_up() -> None:
    """An established connection is watched five days ahead; most are closed long before."""
    table = ConnectionTable()
    for number in range(5000):
        connection = connected(table, flow(endpoint("client", number), endpoint("server", 2)))
        connection.advance(Event.ACK, ORIGINAL)
        table.schedule(connection)
        if number % 100:
            table.delete(connection)
    assert len(table._deadlines) < 2000
    assert len(table.expired(1e6)) == len(table) == 50


def test_connection_to_itself_is_found_and_deleted() -> None:
    table = ConnectionTable()
    here = endpoint("gateway", 7)
    connection = connected(table, flow(here, here))
    table.decide_source(connection, connection.inside)
    table.delete(connection)
    assert not any(entries for stage in table.entries.values() for entries in stage.values())


small = st.builds(Endpoint, st.sampled_from([b"\1\1\1\1", b"\2\2\2\2"]), st.integers(1, 3))
tuples = st.builds(FlowTuple, st.sampled_from(list(Protocol)), small, small)
steps = st.lists(st.tuples(st.integers(0, 2), tuples, small, small), max_size=40)


@settings(max_examples=300)
@given(steps)
def test_each_wire_tuple_is_one_connections_and_nothing_stays_behind(
    commands: list[tuple[int, FlowTuple, Endpoint, Endpoint]],
) -> None:
    table = ConnectionTable()
    living: list[Connection] = []
    for what, original, to, foreign in commands:
        inside = FlowTuple(original.protocol, original.source, to)
        if what == 0 and not table.holders(original, inside):
            living.append(connected(table, original, inside))
        elif what == 1 and living:
            table.delete(living.pop(0))
        elif what == 2 and living and table.undecided(living[-1].inside) is living[-1]:
            final = FlowTuple(living[-1].original.protocol, foreign, living[-1].inside.destination)
            holder = table.find(Stage.DESTINATION, final.inverse())
            if holder is None or holder.connection is living[-1]:
                table.decide_source(living[-1], final)
        assert len(table) == len(living)
        for connection in living:
            for (stage, _), entry in connection.entries.items():
                assert entry.connection is connection
                assert entry in table.entries[stage][connection.original.protocol].values()
    for connection in living:
        table.delete(connection)
    assert not any(entries for stage in table.entries.values() for entries in stage.values())
