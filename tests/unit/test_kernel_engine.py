"""The kernel datapath's decisions, with a conntrack that is a dict."""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from builders import packet

from nfq_engine.core.conntrack import Stage, State
from nfq_engine.core.decision import Reason, Verdict
from nfq_engine.core.kernel_engine import FirstDecision, KernelEngine, Mapping
from nfq_engine.core.nat import PortRange
from nfq_engine.core.option import Operation, pack_number
from nfq_engine.core.packet import Endpoint, FlowTuple, Hook, Protocol
from nfq_engine.core.rule_text import parse_command
from nfq_engine.core.sockopt import Socket, SocketApi
from nfq_engine.core.sockref import Flag, Sockref
from nfq_engine.core.surroundings import AddressType
from nfq_engine.core.tproxy_table import Arrival, Deletion
from nfq_engine.core.tracked import Tracked

CLIENT, SERVER = Endpoint.of("10.0.0.1", 1234), Endpoint.of("10.0.1.2", 80)
PROXY, FOREIGN = Endpoint.of("10.0.0.2", 50080), Endpoint.of("198.51.100.7", 53)
NOBODY = Endpoint(bytes(4), 0)


@dataclass
class FakeConntrack:
    """Entries, and what was deleted of them."""

    entries: list[Tracked] = field(default_factory=list)
    deleted: list[Tracked] = field(default_factory=list)
    walks: int = 0

    def find(self, flow: FlowTuple) -> Tracked | None:
        return next((entry for entry in self.entries if flow in (entry.original, entry.reply)), None)

    def delete(self, doomed: Iterable[Tracked]) -> None:
        for entry in list(doomed):
            self.deleted.append(entry)
            self.entries.remove(entry)

    def ours(self, naming: bytes = b"") -> Sequence[Tracked]:
        self.walks += 1
        return list(self.entries)

    def add(
        self, original: FlowTuple, inside: FlowTuple, final: FlowTuple | None = None, state: State = State.ESTABLISHED
    ) -> Tracked:
        reply = (final or inside).inverse()
        if final is not None and inside.destination != original.destination:
            reply = FlowTuple(reply.protocol, inside.destination, final.source)
        entry = Tracked(original, reply, len(self.entries) + 1, 1 << 31, state, 60)
        self.entries.append(entry)
        return entry


class NoInterfaces:
    def first_address(self, interface: str, size: int) -> bytes | None:
        return PROXY.address if interface == "eth0" and size == 4 else None

    def address_type(self, address: bytes) -> AddressType:
        return AddressType.UNICAST


@pytest.fixture
def conntrack() -> FakeConntrack:
    return FakeConntrack()


@pytest.fixture(params=list(Deletion))
def engine(conntrack: FakeConntrack, request: pytest.FixtureRequest) -> KernelEngine:
    return KernelEngine(NoInterfaces(), random.Random(1), PortRange(40000, 40003), conntrack, request.param)


def flow(source: Endpoint, destination: Endpoint, protocol: Protocol = Protocol.UDP) -> FlowTuple:
    return FlowTuple(protocol, source, destination)


def decide(engine: KernelEngine, hook: Hook, of: FlowTuple, now: float = 0.0) -> FirstDecision:
    return engine.decide(Arrival(hook, packet(of), "eth0", "", now))


def add(
    engine: KernelEngine,
    flags: Flag,
    local: Endpoint = PROXY,
    foreign: Endpoint = FOREIGN,
    protocol: Protocol = Protocol.UDP,
    remote: Endpoint = NOBODY,
) -> Sockref:
    sockref = Sockref(protocol, local, foreign, remote, {len(engine.sockrefs) + 1}, 0.0, flags)
    engine.sockrefs.add(sockref)
    return sockref


# Decisions.


def test_rule_redirects(engine: KernelEngine) -> None:
    engine.ruleset.apply(parse_command(shlex.split("-A PREROUTING -p tcp --dport 80 -j TPROXY --on-port 50080")))
    first = decide(engine, Hook.PREROUTING, of := flow(CLIENT, SERVER, Protocol.TCP))
    assert first.mapping == Mapping(Stage.DESTINATION, of, PROXY)
    assert first.decision.reason is Reason.REDIRECT
    assert first.decision.is_marked


def test_listener_gets_what_is_for_its_foreign_address(engine: KernelEngine) -> None:
    sockref = add(engine, Flag.LISTEN)
    first = decide(engine, Hook.PREROUTING, of := flow(CLIENT, FOREIGN))
    assert first.mapping == Mapping(Stage.DESTINATION, of, PROXY)
    assert (first.decision.reason, first.decision.is_marked) == (Reason.SOCKREF, True)
    assert len(sockref.related) == 1


def test_nobodys_connection_is_left_alone(engine: KernelEngine) -> None:
    for hook in (Hook.PREROUTING, Hook.OUTPUT, Hook.POSTROUTING):
        first = decide(engine, hook, flow(CLIENT, SERVER))
        assert first.mapping is None
        assert (first.decision.verdict, first.decision.is_marked) == (Verdict.ACCEPT, False)


def test_mark_only_marks_and_maps_nothing(engine: KernelEngine) -> None:
    sockref = add(engine, Flag.MARK_ONLY, PROXY, PROXY)
    for hook in (Hook.OUTPUT, Hook.POSTROUTING):
        first = decide(engine, hook, flow(PROXY, SERVER))
        assert first.mapping is None
        assert first.decision.is_marked
    assert len(sockref.related) == 1


def test_own_connection_is_marked_before_it_is_mapped(engine: KernelEngine) -> None:
    add(engine, Flag.CONNECT)
    of = flow(PROXY, SERVER)
    output = decide(engine, Hook.OUTPUT, of)
    assert (output.mapping, output.decision.is_marked) == (None, True)
    assert decide(engine, Hook.POSTROUTING, of).mapping == Mapping(Stage.SOURCE, of, FOREIGN)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", Reason.MALFORMED), (packet(flow(CLIENT, FOREIGN))[:-4], Reason.MALFORMED)],
    ids=["empty", "short"],
)
def test_what_cannot_be_read_is_dropped(engine: KernelEngine, data: bytes, reason: Reason) -> None:
    first = engine.decide(Arrival(Hook.PREROUTING, data, "eth0", "", 0.0))
    assert (first.decision.verdict, first.decision.reason) == (Verdict.DROP, reason)


def test_one_way_datagram_is_rewritten_and_no_connection(engine: KernelEngine) -> None:
    sockref = add(engine, Flag.LISTEN | Flag.UNIDIR)
    first = decide(engine, Hook.PREROUTING, flow(CLIENT, FOREIGN))
    assert first.mapping is None
    assert first.decision.payload is not None
    assert first.decision.payload[16:24] == PROXY.address + CLIENT.port.to_bytes(2, "big") + PROXY.port.to_bytes(
        2, "big"
    )
    assert not sockref.related


def test_unidir_is_nothing_to_tcp(engine: KernelEngine) -> None:
    add(engine, Flag.LISTEN | Flag.UNIDIR, protocol=Protocol.TCP)
    of = flow(CLIENT, FOREIGN, Protocol.TCP)
    assert decide(engine, Hook.PREROUTING, of).mapping == Mapping(Stage.DESTINATION, of, PROXY)


def one_way(engine: KernelEngine) -> None:
    engine.ruleset.apply(parse_command(shlex.split("-A PREROUTING -p udp -j TPROXY --on-port 50080")))
    socket = Socket(1, Protocol.UDP, Endpoint(bytes(4), 50080), False, False, False, 0)
    assert SocketApi(engine).set(socket, pack_number(Operation.FLAGS, Flag.LISTEN | Flag.UNIDIR), 0.0) == 0


def test_redirect_to_a_one_way_listener_is_rewritten_and_no_connection(engine: KernelEngine) -> None:
    one_way(engine)
    first = decide(engine, Hook.PREROUTING, flow(CLIENT, SERVER))
    assert (first.decision.reason, first.mapping) == (Reason.UNIDIR, None)
    assert first.decision.payload == packet(flow(CLIENT, PROXY))
    of = flow(CLIENT, SERVER, Protocol.TCP)
    assert decide(engine, Hook.PREROUTING, of).decision.reason is Reason.NO_MAPPING


@pytest.mark.parametrize(
    ("original", "inside", "is_replied", "reason"),
    [
        (flow(SERVER, CLIENT), flow(SERVER, CLIENT), False, Reason.ESTABLISHED),
        (flow(CLIENT, SERVER), flow(CLIENT, SERVER), True, Reason.ESTABLISHED),
        (flow(CLIENT, SERVER), flow(CLIENT, FOREIGN), False, Reason.ESTABLISHED),
        (flow(CLIENT, SERVER), flow(CLIENT, SERVER), False, Reason.UNIDIR),
    ],
    ids=["an answer", "answered", "mapped", "never answered nor mapped"],
)
def test_datagram_of_a_connection_is_none_for_a_one_way_listener(
    engine: KernelEngine,
    conntrack: FakeConntrack,
    original: FlowTuple,
    inside: FlowTuple,
    is_replied: bool,
    reason: Reason,
) -> None:
    one_way(engine)
    conntrack.entries = [replace(conntrack.add(original, inside), is_replied=is_replied)]
    first = decide(engine, Hook.PREROUTING, flow(CLIENT, SERVER))
    assert (first.decision.reason, first.mapping) == (reason, None)


def test_connection_of_a_sockref_is_known_by_its_answers(engine: KernelEngine, conntrack: FakeConntrack) -> None:
    one_way(engine)
    sockref = add(engine, Flag.ESTABLISHED, foreign=SERVER, remote=CLIENT)
    of = flow(PROXY, CLIENT)
    assert decide(engine, Hook.POSTROUTING, of).mapping is not None
    engine.appeared(conntrack.add(of, of, flow(SERVER, CLIENT)))
    [connection] = sockref.related
    assert decide(engine, Hook.PREROUTING, flow(CLIENT, SERVER)).of is connection


def test_redirects_to_what_becomes_a_one_way_listener_are_deleted(
    engine: KernelEngine, conntrack: FakeConntrack
) -> None:
    redirected = conntrack.add(flow(CLIENT, SERVER), flow(CLIENT, PROXY))
    conntrack.add(flow(CLIENT, FOREIGN), flow(CLIENT, Endpoint(PROXY.address, 1)))
    conntrack.add(flow(CLIENT, PROXY), flow(CLIENT, PROXY))
    conntrack.add(flow(CLIENT, SERVER, Protocol.TCP), flow(CLIENT, PROXY, Protocol.TCP))
    engine.adopt()
    one_way(engine)
    assert conntrack.deleted == [redirected]


def test_conntrack_is_walked_for_a_one_way_listener_only_where_a_rule_sent_datagrams(
    engine: KernelEngine, conntrack: FakeConntrack
) -> None:
    one_way(engine)
    assert conntrack.walks == 0
    engine.listeners.discard(1)
    decide(engine, Hook.PREROUTING, flow(CLIENT, SERVER))
    for _ in range(2):
        one_way(engine)
        assert conntrack.walks == 1
        engine.listeners.discard(1)


def test_one_way_datagram_that_came_cut_is_dropped(engine: KernelEngine) -> None:
    add(engine, Flag.LISTEN | Flag.UNIDIR)
    arrival = Arrival(Hook.PREROUTING, packet(flow(CLIENT, FOREIGN)), "eth0", "", 0.0, is_cut=True)
    assert engine.decide(arrival).decision.reason is Reason.OVERSIZED


# Foreign ports.


def test_open_port_keeps_the_connections_own(engine: KernelEngine) -> None:
    sockref = add(engine, Flag.CONNECT, foreign=Endpoint(CLIENT.address, 0))
    first = decide(engine, Hook.POSTROUTING, flow(PROXY, SERVER))
    assert first.mapping is not None
    assert first.mapping.to == sockref.foreign == Endpoint(CLIENT.address, PROXY.port)


def test_open_port_is_one_that_nobody_owns_or_uses(engine: KernelEngine, conntrack: FakeConntrack) -> None:
    sockref = add(engine, Flag.CONNECT, foreign=Endpoint(CLIENT.address, 0))
    add(engine, Flag.LISTEN, Endpoint(PROXY.address, 1), Endpoint(CLIENT.address, PROXY.port))
    for port in (40000, 40001, 40003):
        used = flow(Endpoint(CLIENT.address, port), SERVER)
        conntrack.add(used, used)
    decide(engine, Hook.POSTROUTING, flow(PROXY, SERVER))
    assert sockref.foreign == Endpoint(CLIENT.address, 40002)


def test_no_free_port(engine: KernelEngine, conntrack: FakeConntrack) -> None:
    sockref = add(engine, Flag.CONNECT, foreign=Endpoint(CLIENT.address, 0))
    for port in (PROXY.port, *range(40000, 40004)):
        used = flow(Endpoint(CLIENT.address, port), SERVER)
        conntrack.add(used, used)
    first = decide(engine, Hook.POSTROUTING, flow(PROXY, SERVER))
    assert (first.decision.verdict, first.decision.reason) == (Verdict.DROP, Reason.NO_FREE_PORT)
    assert sockref.foreign.port == 0
    assert not sockref.related


@pytest.mark.parametrize(
    ("state", "reason"),
    [(State.ESTABLISHED, Reason.CLASH), (State.TIME_WAIT, Reason.SOCKREF), (State.CLOSE, Reason.SOCKREF)],
)
def test_given_port_that_is_used(engine: KernelEngine, conntrack: FakeConntrack, state: State, reason: Reason) -> None:
    """A connection that is dead makes way for a SYN."""
    add(engine, Flag.CONNECT, foreign=CLIENT, protocol=Protocol.TCP)
    used = flow(CLIENT, SERVER, Protocol.TCP)
    entry = conntrack.add(used, used, state=state)
    first = decide(engine, Hook.POSTROUTING, flow(PROXY, SERVER, Protocol.TCP))
    assert first.decision.reason is reason
    assert conntrack.deleted == ([] if reason is Reason.CLASH else [entry])


# From decision to report to end.


def test_packet_that_comes_again_gets_the_same_answer(engine: KernelEngine) -> None:
    add(engine, Flag.LISTEN | Flag.ONCE)
    of = flow(CLIENT, FOREIGN)
    first = decide(engine, Hook.PREROUTING, of)
    assert decide(engine, Hook.PREROUTING, of, 3.0).mapping == first.mapping
    other = flow(replace(CLIENT, port=1), FOREIGN)
    assert decide(engine, Hook.PREROUTING, other).mapping is None


def test_reported_connection_leaves_the_list_when_it_ends(engine: KernelEngine, conntrack: FakeConntrack) -> None:
    sockref = add(engine, Flag.LISTEN)
    of = flow(CLIENT, FOREIGN)
    decide(engine, Hook.PREROUTING, of)
    entry = conntrack.add(of, flow(CLIENT, PROXY))
    engine.appeared(entry)
    engine.expire(1e9)
    assert len(sockref.related) == 1
    assert engine.sockrefs_of(entry) == (sockref,)
    engine.went(replace(entry, identifier=99))  # of an earlier connection with this tuple
    assert len(sockref.related) == 1
    engine.went(entry)
    assert not sockref.related


def test_connection_that_is_not_reported_leaves_the_list_in_the_end(engine: KernelEngine) -> None:
    sockref = add(engine, Flag.LISTEN)
    decide(engine, Hook.PREROUTING, flow(CLIENT, FOREIGN), 100.0)
    engine.expire(109.0)
    assert len(sockref.related) == 1
    engine.expire(110.0)
    assert not sockref.related


def test_one_connection_of_two_sockrefs_is_on_both_lists(engine: KernelEngine, conntrack: FakeConntrack) -> None:
    """A local socket with a foreign address talks to a local socket with a foreign address."""
    caller, listener = Endpoint.of("10.0.0.2", 7), Endpoint.of("203.0.113.1", 8)
    sending = add(engine, Flag.CONNECT, caller, listener)
    receiving = add(engine, Flag.LISTEN)
    decide(engine, Hook.OUTPUT, flow(caller, FOREIGN))
    decide(engine, Hook.POSTROUTING, flow(caller, PROXY))
    assert sending.related == receiving.related
    engine.appeared(conntrack.add(flow(caller, FOREIGN), flow(caller, PROXY), flow(listener, PROXY)))
    engine.delete_related(sending)
    assert not sending.related
    assert not receiving.related
    assert conntrack.entries == []


def test_connection_is_found_by_its_inside_if_somebody_else_changed_its_destination(
    engine: KernelEngine, conntrack: FakeConntrack
) -> None:
    sockref = add(engine, Flag.CONNECT)
    decide(engine, Hook.POSTROUTING, flow(PROXY, SERVER))
    entry = conntrack.add(flow(PROXY, CLIENT), flow(PROXY, SERVER), flow(FOREIGN, SERVER))
    engine.appeared(entry)
    assert engine.sockrefs_of(entry) == (sockref,)


def test_deletion_takes_what_is_the_sockrefs(engine: KernelEngine, conntrack: FakeConntrack) -> None:
    doomed = add(engine, Flag.LISTEN)
    kept = add(engine, Flag.LISTEN, replace(PROXY, port=1), replace(FOREIGN, port=54))
    entries = []
    for local, foreign in ((PROXY, FOREIGN), (kept.local, kept.foreign)):
        decide(engine, Hook.PREROUTING, of := flow(CLIENT, foreign))
        entries.append(conntrack.add(of, flow(CLIENT, local)))
        engine.appeared(entries[-1])
    other = conntrack.add(flow(CLIENT, SERVER), flow(CLIENT, SERVER))
    engine.delete_related(doomed)
    assert conntrack.deleted == entries[:1]
    assert conntrack.entries == [entries[1], other]
    assert (len(doomed.related), len(kept.related)) == (0, 1)


def test_orphan_goes_with_its_last_connection(engine: KernelEngine, conntrack: FakeConntrack) -> None:
    sockref = add(engine, Flag.LISTEN, protocol=Protocol.TCP)
    of = flow(CLIENT, FOREIGN, Protocol.TCP)
    decide(engine, Hook.PREROUTING, of)
    entry = conntrack.add(of, flow(CLIENT, PROXY, Protocol.TCP))
    engine.appeared(entry)
    sockref.flags |= Flag.ORPHAN
    engine.went(entry)
    assert sockref not in engine.sockrefs


def test_lost_reports_are_made_up_for(engine: KernelEngine, conntrack: FakeConntrack) -> None:
    sockref = add(engine, Flag.LISTEN)
    flows = [flow(replace(CLIENT, port=port), FOREIGN) for port in (1, 2, 3)]
    for of in flows:
        decide(engine, Hook.PREROUTING, of)
    ended = conntrack.add(flows[0], flow(flows[0].source, PROXY))
    engine.appeared(ended)
    conntrack.entries.clear()
    late = conntrack.add(flows[1], flow(flows[1].source, PROXY))
    engine.resynchronise()
    assert engine.sockrefs_of(ended) == ()
    assert engine.sockrefs_of(late) == (sockref,)
    engine.expire(1e9)
    assert {connection.original for connection in sockref.related} == {flows[1]}


@pytest.mark.parametrize(
    ("original", "reply", "shown"),
    [
        (flow(CLIENT, FOREIGN), flow(PROXY, CLIENT), True),
        (flow(PROXY, SERVER), flow(SERVER, FOREIGN), True),
        (flow(CLIENT, SERVER), flow(PROXY, CLIENT), False),
        (flow(CLIENT, FOREIGN), flow(SERVER, CLIENT), False),
        (flow(PROXY, SERVER), flow(SERVER, PROXY), False),
        (flow(CLIENT, FOREIGN, Protocol.TCP), flow(PROXY, CLIENT, Protocol.TCP), False),
    ],
    ids=["destination", "source", "another destination", "another listener", "not mapped", "another protocol"],
)
@pytest.mark.parametrize("remote", ["none", "this", "another"])
def test_what_an_entry_shows(original: FlowTuple, reply: FlowTuple, shown: bool, remote: str) -> None:
    peer = original.source if original.source != PROXY else original.destination
    narrowed = {"none": NOBODY, "this": peer, "another": Endpoint.of("192.0.2.1", 1)}[remote]
    sockref = Sockref(Protocol.UDP, PROXY, FOREIGN, narrowed, {1}, 0.0)
    entry = Tracked(original, reply, 1, 0, State.NONE, 0)
    assert entry.shows(sockref) is (shown and remote != "another")
