"""Connections: the states as dialogues, the timeouts, and that nothing is left of what was deleted."""

from __future__ import annotations

import pytest
from builders import endpoint, flow
from hypothesis import given, settings
from hypothesis import strategies as st

from nfq_engine.core.conntrack import (
    TIMEOUTS,
    TRANSITIONS,
    Connection,
    ConnectionTable,
    Direction,
    Event,
    Stage,
    State,
    event_of,
)
from nfq_engine.core.packet import TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, Endpoint, FlowTuple, Protocol

ORIGINAL, REPLY = Direction.ORIGINAL, Direction.REPLY
OPEN = [(Event.SYN, ORIGINAL), (Event.SYN_ACK, REPLY), (Event.ACK, ORIGINAL)]

CLOSE_1, CLOSE_2 = (Event.FIN, ORIGINAL), (Event.FIN, REPLY)
CROSSED = [OPEN[0], (Event.SYN, REPLY)]

# What both sides say, and the state that it ends in.
DIALOGUES = {
    # Opening.
    "first syn": (OPEN[:1], State.SYN_SENT),
    "answered": (OPEN[:2], State.SYN_RECV),
    "open": (OPEN, State.ESTABLISHED),
    "syn repeated": ([OPEN[0], *OPEN], State.ESTABLISHED),
    "answer repeated": ([*OPEN[:2], OPEN[1], OPEN[2]], State.ESTABLISHED),
    "answer repeated too late": ([*OPEN, OPEN[1]], State.ESTABLISHED),
    "an old connection's ack before the answer": ([OPEN[0], (Event.ACK, REPLY)], State.SYN_SENT),
    "server speaks first": ([*OPEN[:2], (Event.ACK, REPLY)], State.SYN_RECV),
    "both at once": (CROSSED, State.SYN_SENT2),
    "both at once, answered": ([*CROSSED, (Event.SYN_ACK, ORIGINAL), OPEN[2]], State.ESTABLISHED),
    "both at once, answered by the other": ([*CROSSED, OPEN[1], OPEN[2]], State.ESTABLISHED),
    "picked up in the middle": ([(Event.ACK, ORIGINAL)], State.ESTABLISHED),
    # Closing.
    "closed before it was open": ([*OPEN[:2], CLOSE_1], State.FIN_WAIT),
    "closed by the server before it was open": ([*OPEN[:2], CLOSE_2], State.FIN_WAIT),
    "closing": ([*OPEN, CLOSE_1], State.FIN_WAIT),
    "closing, server first": ([*OPEN, CLOSE_2], State.FIN_WAIT),
    "half closed": ([*OPEN, CLOSE_1, (Event.ACK, REPLY)], State.CLOSE_WAIT),
    "half closed, more data": (
        [*OPEN, CLOSE_1, (Event.ACK, REPLY), *[(Event.ACK, way) for way in Direction]],
        State.CLOSE_WAIT,
    ),
    "closed by both": ([*OPEN, CLOSE_1, (Event.ACK, REPLY), CLOSE_2], State.LAST_ACK),
    "closed by both, acknowledged": ([*OPEN, CLOSE_1, (Event.ACK, REPLY), CLOSE_2, OPEN[2]], State.TIME_WAIT),
    "closed by both, server first": ([*OPEN, CLOSE_2, OPEN[2], CLOSE_1, (Event.ACK, REPLY)], State.TIME_WAIT),
    "closed at once": ([*OPEN, CLOSE_1, CLOSE_2, (Event.ACK, ORIGINAL)], State.TIME_WAIT),
    "closed at once, server first": ([*OPEN, CLOSE_2, CLOSE_1], State.LAST_ACK),
    "fin repeated": ([*OPEN, CLOSE_1, CLOSE_2, OPEN[2], CLOSE_2], State.TIME_WAIT),
    "syn in time-wait": ([*OPEN, CLOSE_1, CLOSE_2, *OPEN[2:], OPEN[0]], State.TIME_WAIT),  # the pipeline replaces it
    # Resets, by either side.
    **{
        f"{name}, reset by {way.name.lower()}": ([*events, (Event.RST, way)], State.CLOSE)
        for way in Direction
        for name, events in {
            "syn": OPEN[:1],
            "both at once": CROSSED,
            "answered": OPEN[:2],
            "open": OPEN,
            "closing": [*OPEN, CLOSE_1],
            "half closed": [*OPEN, CLOSE_1, (Event.ACK, REPLY)],
            "last ack": [*OPEN, CLOSE_1, CLOSE_2],
            "time-wait": [*OPEN, CLOSE_1, CLOSE_2, OPEN[2]],
        }.items()
    },
    "data after a reset": ([OPEN[0], (Event.RST, REPLY), OPEN[2]], State.CLOSE),
    # Datagrams.
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


def test_every_transition_is_in_a_dialogue() -> None:
    said = set()
    for events, _ in DIALOGUES.values():
        state = State.NONE
        for event, direction in events:
            said.add((state, event, direction))
            state = TRANSITIONS.get((state, event, direction), state)
    assert set(TRANSITIONS) <= said


FLAGS = [
    pytest.param(TCP_SYN, Event.SYN, id="syn"),
    pytest.param(TCP_SYN | TCP_ACK, Event.SYN_ACK, id="syn-ack"),
    pytest.param(TCP_ACK, Event.ACK, id="ack"),
    pytest.param(TCP_FIN | TCP_ACK, Event.FIN, id="fin-ack"),
    pytest.param(TCP_RST, Event.RST, id="rst"),
    pytest.param(TCP_RST | TCP_ACK, Event.RST, id="rst-ack"),
    pytest.param(TCP_SYN | TCP_ACK | 0xC8, Event.SYN_ACK, id="push-and-congestion-bits-say-nothing"),
]


@pytest.mark.parametrize(("flags", "event"), FLAGS)
def test_what_flags_mean(flags: int, event: Event) -> None:
    assert event_of(Protocol.TCP, flags) is event
    assert event_of(Protocol.UDP, flags) is Event.DATAGRAM


def endpoint_flow() -> FlowTuple:
    return flow(endpoint("client", 1), endpoint("gateway", 2))


def test_every_state_has_a_timeout() -> None:
    assert set(TIMEOUTS) == set(State) - {State.NONE}


# The kernel's defaults, in seconds.
IDLE = {
    "first syn": 120,
    "both at once": 120,
    "answered": 60,
    "open": 5 * 24 * 3600,
    "closing": 120,
    "half closed": 60,
    "closed by both": 30,
    "closed by both, acknowledged": 120,
    "open, reset by reply": 10,
    "one-way datagrams": 30,
    "answered datagram": 120,
}


@pytest.mark.parametrize(("name", "seconds"), IDLE.items(), ids=IDLE.keys())
def test_idle_connection_is_over_after(name: str, seconds: float) -> None:
    table = ConnectionTable()
    connection = connected(table, flow(endpoint("client", 1), endpoint("server", 2)))
    for event, direction in DIALOGUES[name][0]:
        connection.advance(event, direction)
        table.schedule(connection)
    assert table.expired(seconds - 0.1) == []
    assert table.expired(seconds) == [connection]


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
            for way in (connection.original, connection.reply):
                found = table.find(Stage.DESTINATION, way)
                assert found is not None
                assert found.connection is connection
            for (stage, _), entry in connection.entries.items():
                assert entry.connection is connection
                assert entry in table.entries[stage][connection.original.protocol].values()
    for connection in living:
        table.delete(connection)
    assert not any(entries for stage in table.entries.values() for entries in stage.values())
