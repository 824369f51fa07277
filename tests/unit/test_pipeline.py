"""The engine as dialogues: a packet goes in at a hook, a decision comes out. The engine is on the gateway."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from builders import endpoint, flow, icmp_error, packet

from nfq_engine.core.conntrack import Direction, State
from nfq_engine.core.decision import Decision, Reason, Verdict
from nfq_engine.core.nat import PortRange
from nfq_engine.core.option import Operation, pack_address, pack_number
from nfq_engine.core.packet import Endpoint, FlowTuple, Hook, IcmpError, Protocol, Segment, parse
from nfq_engine.core.pipeline import Engine
from nfq_engine.core.rule_text import restore
from nfq_engine.core.sockopt import Socket, SocketApi
from nfq_engine.core.sockref import Flag
from nfq_engine.core.tproxy_table import Arrival

RULES = """*tproxy
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080
-A PREROUTING -p udp -m udp --dport 80 -j TPROXY --on-port 50080
-A PREROUTING -p tcp -m tcp --dport 81 -j DROP
-A PREROUTING -p tcp -m tcp --dport 82 -j TPROXY --on-port 0
-A OUTPUT -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080
COMMIT
"""

versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
protocols = pytest.mark.parametrize("protocol", list(Protocol), ids=["tcp", "udp"])


class Interfaces:
    """The gateway: eth0 towards the client; eth9 has no address."""

    def first_address(self, interface: str, size: int) -> bytes | None:
        return endpoint("gateway", 0, 4 if size == 4 else 6).address if interface == "eth0" else None


@dataclass
class World:
    """An engine, its clock, and the way that packets are put to it."""

    engine: Engine
    now: float = 100.0
    cookies: Iterator[int] = field(default_factory=lambda: iter(range(1, 1000)))

    def put(self, hook: Hook, data: bytes, interface: str = "eth0") -> Decision:
        inward = interface if hook is Hook.PREROUTING else ""
        return self.engine.decide(Arrival(hook, data, inward, "" if inward else interface, self.now))

    def send(self, hook: Hook, of: FlowTuple, flags: str = "S", interface: str = "eth0") -> tuple[Reason, FlowTuple]:
        """Put one packet of a flow; the reason, and the flow that it has afterwards."""
        data = packet(of, flags=flags)
        decision = self.put(hook, data, interface)
        assert decision.verdict is Verdict.ACCEPT, decision
        parsed = parse(decision.payload or data)
        assert isinstance(parsed, Segment)
        return decision.reason, parsed.flow

    def socket(self, local: Endpoint, protocol: Protocol, *, reuse: bool = False) -> Socket:
        return Socket(next(self.cookies), protocol, local, False, reuse, True, 0)

    def assign(
        self, local: Endpoint, foreign: Endpoint, flags: Flag, protocol: Protocol, remote: Endpoint | None = None
    ) -> Socket:
        api, socket = SocketApi(self.engine), self.socket(local, protocol, reuse=True)
        assert api.set(socket, pack_address(Operation.ASSIGN, foreign), self.now) == 0
        if remote is not None:
            assert api.set(socket, pack_address(Operation.CONNECT, remote), self.now) == 0
        assert api.set(socket, pack_number(Operation.FLAGS, flags), self.now) == 0
        return socket


@pytest.fixture
def world() -> World:
    engine = Engine(Interfaces(), random.Random(1), PortRange(40_000, 40_003))
    restore(RULES, engine.ruleset)
    return World(engine)


@versions
@protocols
def test_redirect_and_its_answers(world: World, version: int, protocol: Protocol) -> None:
    asked = flow(endpoint("client", 4000, version), endpoint("server", 80, version), protocol)
    inside = flow(asked.source, endpoint("gateway", 50080, version), protocol)
    assert world.send(Hook.PREROUTING, asked) == (Reason.REDIRECT, inside)
    assert world.send(Hook.OUTPUT, inside.inverse(), "SA") == (Reason.ESTABLISHED, inside.inverse())
    assert world.send(Hook.POSTROUTING, inside.inverse(), "SA") == (Reason.TRANSLATED, asked.inverse())
    assert world.send(Hook.PREROUTING, asked, "A") == (Reason.TRANSLATED, inside)
    (connection,) = world.engine.connections
    assert connection.state is (State.ESTABLISHED if protocol is Protocol.TCP else State.ASSURED)
    assert (connection.traffic(Direction.ORIGINAL)[0], connection.traffic(Direction.REPLY)[0]) == (2, 1)


@versions
def test_redirect_at_output_comes_by_lo_and_is_translated_once(world: World, version: int) -> None:
    asked = flow(endpoint("outside", 4000, version), endpoint("server", 80, version))
    loopback = Endpoint.of("127.0.0.1" if version == 4 else "::1", 50080)
    inside = flow(asked.source, loopback)
    assert world.send(Hook.OUTPUT, asked) == (Reason.REDIRECT, inside)
    assert world.send(Hook.POSTROUTING, inside, interface="lo") == (Reason.ESTABLISHED, inside)
    assert world.send(Hook.OUTPUT, inside.inverse(), "SA") == (Reason.ESTABLISHED, inside.inverse())
    assert world.send(Hook.POSTROUTING, inside.inverse(), "SA", "lo") == (Reason.TRANSLATED, asked.inverse())


def test_redirect_to_port_0_keeps_the_port(world: World) -> None:
    _, inside = world.send(Hook.PREROUTING, flow(endpoint("client", 4000), endpoint("server", 82)))
    assert inside.destination == endpoint("gateway", 82)


@versions
@protocols
def test_listener_on_a_foreign_address(world: World, version: int, protocol: Protocol) -> None:
    local, foreign = endpoint("gateway", 7007, version), endpoint("foreign", 7, version)
    world.assign(local, foreign, Flag.LISTEN, protocol)
    asked = flow(endpoint("client", 4000, version), foreign, protocol)
    inside = flow(asked.source, local, protocol)
    assert world.send(Hook.PREROUTING, asked) == (Reason.SOCKREF, inside)
    assert world.send(Hook.POSTROUTING, inside.inverse(), "SA") == (Reason.TRANSLATED, asked.inverse())


@versions
@protocols
@pytest.mark.parametrize(("port", "expected"), [(0, 5000), (4711, 4711)], ids=["picked", "given"])
def test_connection_from_a_foreign_address(
    world: World, version: int, protocol: Protocol, port: int, expected: int
) -> None:
    local = endpoint("outside", 5000, version)
    socket = world.assign(local, endpoint("client", port, version), Flag.CONNECT, protocol)
    inside = flow(local, endpoint("server", 8080, version), protocol)
    wire = flow(endpoint("client", expected, version), inside.destination, protocol)
    assert world.send(Hook.OUTPUT, inside) == (Reason.NO_MAPPING, inside)
    assert world.send(Hook.POSTROUTING, inside) == (Reason.SOCKREF, wire)
    assert world.send(Hook.PREROUTING, wire.inverse(), "SA", "eth1") == (Reason.TRANSLATED, inside.inverse())
    queried = SocketApi(world.engine).get(socket, pack_number(Operation.QUERY))
    assert queried == pack_address(Operation.QUERY, wire.source), "a picked port is written back"


def test_both_sides_of_one_connection(world: World) -> None:
    """A socket with a foreign address connects to another one's foreign address, over lo."""
    one, other = endpoint("outside", 5000), endpoint("gateway", 7007)
    world.assign(one, endpoint("client", 4711), Flag.CONNECT, Protocol.TCP)
    world.assign(other, endpoint("foreign", 7), Flag.LISTEN, Protocol.TCP)
    asked = flow(one, endpoint("foreign", 7))
    between, final = flow(one, other), flow(endpoint("client", 4711), other)
    assert world.send(Hook.OUTPUT, asked) == (Reason.SOCKREF, between)
    assert world.send(Hook.POSTROUTING, between) == (Reason.SOCKREF, final)
    assert world.send(Hook.OUTPUT, final.inverse(), "SA") == (Reason.TRANSLATED, between.inverse())
    assert world.send(Hook.POSTROUTING, between.inverse(), "SA") == (Reason.TRANSLATED, asked.inverse())


def test_once_serves_one_connection(world: World) -> None:
    world.assign(endpoint("outside", 5000), endpoint("client", 4711), Flag.CONNECT | Flag.ONCE, Protocol.TCP)
    first = flow(endpoint("outside", 5000), endpoint("server", 8080))
    second = flow(endpoint("outside", 5000), endpoint("server", 8081))
    for of, expected in ((first, Reason.SOCKREF), (second, Reason.ESTABLISHED)):
        world.send(Hook.OUTPUT, of)
        assert world.send(Hook.POSTROUTING, of)[0] is expected


def test_sockref_narrowed_to_a_peer_serves_only_that_peer(world: World) -> None:
    peer, stranger = endpoint("client", 4000), endpoint("client", 4001)
    local, general = endpoint("gateway", 7008), endpoint("gateway", 7007)
    world.assign(general, endpoint("foreign", 7), Flag.LISTEN, Protocol.UDP)
    world.assign(local, endpoint("foreign", 7), Flag.ESTABLISHED, Protocol.UDP, remote=peer)
    for source, expected in ((peer, local), (stranger, general)):
        _, inside = world.send(Hook.PREROUTING, flow(source, endpoint("foreign", 7), Protocol.UDP))
        assert inside.destination == expected


@pytest.mark.parametrize("hook", [Hook.PREROUTING, Hook.OUTPUT], ids=lambda hook: hook.name)
def test_mark_only_is_marked_skips_the_table_and_translates_nothing(world: World, hook: Hook) -> None:
    local, nobody = endpoint("gateway", 80), Endpoint(bytes(4), 0)
    world.assign(local, nobody, Flag.LISTEN, Protocol.TCP)
    towards = flow(endpoint("client", 4000), local)
    data = packet(towards if hook is Hook.PREROUTING else flow(local, endpoint("server", 80)))
    decision = world.put(hook, data)
    assert (decision.verdict, decision.reason, decision.payload) == (Verdict.ACCEPT, Reason.MARK_ONLY, None)
    assert decision.is_marked


def test_proxys_own_connection_is_marked_before_the_filter_sees_it(world: World) -> None:
    world.assign(endpoint("outside", 5000), endpoint("client", 0), Flag.CONNECT, Protocol.TCP)
    decision = world.put(Hook.OUTPUT, packet(flow(endpoint("outside", 5000), endpoint("server", 8080))))
    assert decision.is_marked
    assert decision.payload is None


def test_second_connection_from_one_client_port_moves_there_and_back(world: World) -> None:
    first = flow(endpoint("client", 4000), endpoint("server", 80))
    second = flow(endpoint("client", 4000), endpoint("outside", 80))
    proxy = endpoint("gateway", 50080)
    assert world.send(Hook.PREROUTING, first)[1] == flow(first.source, proxy)
    _, moved = world.send(Hook.PREROUTING, second)
    assert moved.destination == proxy
    assert moved.source.address == second.source.address
    assert moved.source.port != 4000
    assert world.send(Hook.OUTPUT, moved.inverse(), "SA") == (Reason.ESTABLISHED, moved.inverse())
    assert world.send(Hook.POSTROUTING, moved.inverse(), "SA") == (Reason.TRANSLATED, second.inverse())


def test_clash_of_a_given_port_drops_and_names_the_addresses(world: World) -> None:
    for local in (5000, 5001):
        world.assign(endpoint("outside", local), endpoint("client", 4711), Flag.CONNECT, Protocol.TCP)
        of = flow(endpoint("outside", local), endpoint("server", 8080))
        world.send(Hook.OUTPUT, of)
        decision = world.put(Hook.POSTROUTING, packet(of))
    assert (decision.verdict, decision.reason) == (Verdict.DROP, Reason.CLASH)
    assert "10.0.1.1:5001" in decision.detail
    assert "10.0.0.1:4711" in decision.detail
    assert len(world.engine.connections) == 1


def test_no_free_port_drops(world: World) -> None:
    """The range has four ports, and the socket's own is kept first: the sixth connection finds none."""
    target = endpoint("server", 8080)
    for number in range(6):
        local = Endpoint.of(f"10.0.2.{number + 1}", 5000)
        world.assign(local, endpoint("client", 0), Flag.CONNECT, Protocol.TCP)
        world.send(Hook.OUTPUT, flow(local, target))
        decision = world.put(Hook.POSTROUTING, packet(flow(local, target)))
    assert (decision.verdict, decision.reason) == (Verdict.DROP, Reason.NO_FREE_PORT)


def test_syn_replaces_a_connection_in_time_wait(world: World) -> None:
    asked = flow(endpoint("client", 4000), endpoint("server", 80))
    inside = flow(asked.source, endpoint("gateway", 50080))
    world.send(Hook.PREROUTING, asked)
    world.send(Hook.OUTPUT, inside.inverse(), "SA")
    for hook, of, flags in (
        (Hook.PREROUTING, asked, "A"),
        (Hook.PREROUTING, asked, "FA"),
        (Hook.OUTPUT, inside.inverse(), "FA"),
        (Hook.PREROUTING, asked, "A"),
    ):
        world.send(hook, of, flags)
    (old,) = world.engine.connections
    assert old.state is State.TIME_WAIT
    assert world.send(Hook.PREROUTING, asked) == (Reason.REDIRECT, inside)
    (new,) = world.engine.connections
    assert new is not old
    assert new.state is State.SYN_SENT


def test_interface_without_an_address_drops(world: World) -> None:
    decision = world.put(Hook.PREROUTING, packet(flow(endpoint("client", 4000), endpoint("server", 80))), "eth9")
    assert (decision.verdict, decision.reason) == (Verdict.DROP, Reason.NO_INTERFACE_ADDRESS)


def test_drop_rule_drops(world: World) -> None:
    decision = world.put(Hook.PREROUTING, packet(flow(endpoint("client", 4000), endpoint("server", 81))))
    assert (decision.verdict, decision.reason) == (Verdict.DROP, Reason.RULE_DROP)
    assert len(world.engine.connections) == 0


@pytest.mark.parametrize("flags", ["SA", "FA", "R"])
def test_segment_that_begins_nothing_passes_untouched(world: World, flags: str) -> None:
    of = flow(endpoint("client", 4000), endpoint("server", 80))
    assert world.send(Hook.PREROUTING, of, flags) == (Reason.NO_CONNECTION, of)
    assert len(world.engine.connections) == 0


def test_rule_does_not_take_over_a_connection_that_was_there_before(world: World) -> None:
    of = flow(endpoint("client", 4000), endpoint("server", 8080))
    world.send(Hook.PREROUTING, of)
    restore(RULES.replace("--dport 80 ", "--dport 8080 "), world.engine.ruleset)
    assert world.send(Hook.PREROUTING, of, "A")[1] == of


def test_orphan_listener_goes_with_its_last_connection(world: World) -> None:
    socket = world.assign(endpoint("gateway", 7007), endpoint("foreign", 7), Flag.LISTEN, Protocol.TCP)
    asked = flow(endpoint("client", 4000), endpoint("foreign", 7))
    inside = flow(asked.source, endpoint("gateway", 7007))
    world.send(Hook.PREROUTING, asked)
    SocketApi(world.engine).closed(socket.cookie)
    (orphan,) = world.engine.sockrefs
    assert orphan.has(Flag.ORPHAN)
    assert world.send(Hook.PREROUTING, asked, "A")[1] == inside, "the connection lives on"
    other = flow(endpoint("client", 4001), endpoint("foreign", 7))
    assert world.send(Hook.PREROUTING, other)[0] is Reason.NO_MAPPING, "but there are no new ones"
    world.now += 500_000
    world.engine.expire(world.now)
    assert len(world.engine.sockrefs) == 0
    assert len(world.engine.connections) == 0


def test_flags_delete_related_connections(world: World) -> None:
    socket = world.assign(endpoint("gateway", 7007), endpoint("foreign", 7), Flag.LISTEN, Protocol.UDP)
    asked = flow(endpoint("client", 4000), endpoint("foreign", 7), Protocol.UDP)
    world.send(Hook.PREROUTING, asked)
    assert SocketApi(world.engine).set(socket, pack_number(Operation.FLAGS, Flag.LISTEN), world.now) == 0
    assert len(world.engine.connections) == 0
    assert world.send(Hook.PREROUTING, asked)[0] is Reason.SOCKREF


@versions
@protocols
def test_icmp_errors_are_translated_in_both_directions(world: World, version: int, protocol: Protocol) -> None:
    local, foreign = endpoint("outside", 5000, version), endpoint("client", 4711, version)
    world.assign(local, foreign, Flag.CONNECT, protocol)
    inside = flow(local, endpoint("server", 8080, version), protocol)
    wire = flow(foreign, inside.destination, protocol)
    world.send(Hook.OUTPUT, inside)
    world.send(Hook.POSTROUTING, inside)
    router = endpoint("gateway", 0, version).address
    # From a router beyond us, about what we sent: to the foreign address, about the wire's packet.
    decision = world.put(Hook.PREROUTING, icmp_error(packet(wire), router, foreign.address, too_big=True))
    parsed = parse(decision.payload or b"")
    assert decision.reason is Reason.ICMP_TRANSLATED
    assert isinstance(parsed, IcmpError)
    assert (parsed.flow, parsed.source, parsed.destination) == (inside, router, local.address)
    # From our side, about the server's answer.
    about = packet(inside.inverse(), flags="SA")
    decision = world.put(Hook.POSTROUTING, icmp_error(about, local.address, inside.destination.address))
    parsed = parse(decision.payload or b"")
    assert isinstance(parsed, IcmpError)
    assert (parsed.flow, parsed.source) == (wire.inverse(), foreign.address)
    assert len(world.engine.connections) == 1


def test_every_packet_is_counted_once(world: World) -> None:
    sent = 0
    for port in (80, 81, 8080):
        for data in (packet(flow(endpoint("client", 4000), endpoint("server", port))), b"", b"\x45garbage"):
            world.put(Hook.PREROUTING, data)
            sent += 1
    assert sum(world.engine.counters.packets.values()) == sent
    assert (
        sum(world.engine.counters.malformed.values())
        == world.engine.counters.packets[Hook.PREROUTING, Reason.MALFORMED]
    )


def test_idle_connections_are_forgotten_and_nothing_of_them_stays(world: World) -> None:
    for port in range(100):
        of = flow(endpoint("client", 4000 + port), endpoint("server", 8080), Protocol.UDP)
        world.send(Hook.PREROUTING, of)
        world.send(Hook.POSTROUTING, of)
    world.now += 29
    world.engine.expire(world.now)
    assert len(world.engine.connections) == 100
    world.send(Hook.PREROUTING, flow(endpoint("client", 4000), endpoint("server", 8080), Protocol.UDP))
    world.now += 2
    world.engine.expire(world.now)
    assert len(world.engine.connections) == 1, "a packet prolongs its connection, and only that"
    world.now += 31
    world.engine.expire(world.now)
    assert not any(entries for stage in world.engine.connections.entries.values() for entries in stage.values())
