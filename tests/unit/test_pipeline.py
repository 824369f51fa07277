"""The engine as dialogues: a packet goes in at a hook, a decision comes out. The engine is on the gateway."""

from __future__ import annotations

import pytest
from builders import endpoint, flow, packet
from dialogue import Dialogue

from nfq_engine.core.conntrack import UNANSWERED, Direction, State
from nfq_engine.core.decision import Reason, Verdict
from nfq_engine.core.option import Operation, pack_address, pack_number
from nfq_engine.core.packet import Endpoint, Hook, Protocol
from nfq_engine.core.rule_values import Owner
from nfq_engine.core.sockref import Flag
from nfq_engine.core.tproxy_table import LOOPBACK, Arrival

RULES = (
    "-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080",
    "-A PREROUTING -p udp -m udp --dport 80 -j TPROXY --on-port 50080",
    "-A PREROUTING -p tcp -m tcp --dport 81 -j DROP",
    "-A PREROUTING -p tcp -m tcp --dport 82 -j TPROXY --on-port 0",
    "-A OUTPUT -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080",
)

versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
protocols = pytest.mark.parametrize("protocol", list(Protocol), ids=["tcp", "udp"])


@pytest.fixture
def world() -> Dialogue:
    return Dialogue(*RULES)


@versions
@protocols
def test_redirect_and_its_answers(world: Dialogue, version: int, protocol: Protocol) -> None:
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
def test_redirect_at_output_comes_by_lo_and_is_translated_once(world: Dialogue, version: int) -> None:
    asked = flow(endpoint("outside", 4000, version), endpoint("server", 80, version))
    loopback = Endpoint.of("127.0.0.1" if version == 4 else "::1", 50080)
    inside = flow(asked.source, loopback)
    assert world.send(Hook.OUTPUT, asked) == (Reason.REDIRECT, inside)
    assert world.send(Hook.POSTROUTING, inside, interface="lo") == (Reason.ESTABLISHED, inside)
    assert world.send(Hook.OUTPUT, inside.inverse(), "SA") == (Reason.ESTABLISHED, inside.inverse())
    assert world.send(Hook.POSTROUTING, inside.inverse(), "SA", "lo") == (Reason.TRANSLATED, asked.inverse())


def test_redirect_to_port_0_keeps_the_port(world: Dialogue) -> None:
    _, inside = world.send(Hook.PREROUTING, flow(endpoint("client", 4000), endpoint("server", 82)))
    assert inside.destination == endpoint("gateway", 82)


@versions
@protocols
def test_listener_on_a_foreign_address(world: Dialogue, version: int, protocol: Protocol) -> None:
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
    world: Dialogue, version: int, protocol: Protocol, port: int, expected: int
) -> None:
    local = endpoint("outside", 5000, version)
    socket = world.assign(local, endpoint("client", port, version), Flag.CONNECT, protocol)
    inside = flow(local, endpoint("server", 8080, version), protocol)
    wire = flow(endpoint("client", expected, version), inside.destination, protocol)
    assert world.send(Hook.OUTPUT, inside) == (Reason.NO_MAPPING, inside)
    assert world.send(Hook.POSTROUTING, inside) == (Reason.SOCKREF, wire)
    assert world.send(Hook.PREROUTING, wire.inverse(), "SA", "eth1") == (Reason.TRANSLATED, inside.inverse())
    queried = world.get(socket, pack_number(Operation.QUERY))
    assert queried == pack_address(Operation.QUERY, wire.source), "a picked port is written back"


def test_both_sides_of_one_connection(world: Dialogue) -> None:
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


def test_sockref_narrowed_to_a_peer_serves_only_that_peer(world: Dialogue) -> None:
    peer, stranger = endpoint("client", 4000), endpoint("client", 4001)
    local, general = endpoint("gateway", 7008), endpoint("gateway", 7007)
    world.assign(general, endpoint("foreign", 7), Flag.LISTEN, Protocol.UDP)
    world.assign(local, endpoint("foreign", 7), Flag.ESTABLISHED, Protocol.UDP, remote=peer)
    for source, expected in ((peer, local), (stranger, general)):
        _, inside = world.send(Hook.PREROUTING, flow(source, endpoint("foreign", 7), Protocol.UDP))
        assert inside.destination == expected


@pytest.mark.parametrize("hook", [Hook.PREROUTING, Hook.OUTPUT], ids=lambda hook: hook.name)
def test_mark_only_is_marked_skips_the_table_and_translates_nothing(world: Dialogue, hook: Hook) -> None:
    local = endpoint("gateway", 80)
    world.mark_only(local)
    towards = flow(endpoint("client", 4000), local)
    data = packet(towards if hook is Hook.PREROUTING else flow(local, endpoint("server", 80)))
    decision = world.put(hook, data)
    assert (decision.verdict, decision.reason, decision.payload) == (Verdict.ACCEPT, Reason.MARK_ONLY, None)
    assert decision.is_marked


def test_proxys_own_connection_is_marked_before_the_filter_sees_it(world: Dialogue) -> None:
    world.assign(endpoint("outside", 5000), endpoint("client", 0), Flag.CONNECT, Protocol.TCP)
    decision = world.put(Hook.OUTPUT, packet(flow(endpoint("outside", 5000), endpoint("server", 8080))))
    assert decision.is_marked
    assert decision.payload is None


def test_second_connection_from_one_client_port_moves_there_and_back(world: Dialogue) -> None:
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


def test_clash_of_a_given_port_drops_and_names_the_addresses(world: Dialogue) -> None:
    for local in (5000, 5001):
        world.assign(endpoint("outside", local), endpoint("client", 4711), Flag.CONNECT, Protocol.TCP)
        of = flow(endpoint("outside", local), endpoint("server", 8080))
        world.send(Hook.OUTPUT, of)
        decision = world.put(Hook.POSTROUTING, packet(of))
    assert (decision.verdict, decision.reason) == (Verdict.DROP, Reason.CLASH)
    assert "10.0.1.1:5001" in decision.detail
    assert "10.0.0.1:4711" in decision.detail
    assert len(world.engine.connections) == 1


def test_no_free_port_drops(world: Dialogue) -> None:
    """The range has four ports, and the socket's own is kept first: the sixth connection finds none."""
    target = endpoint("server", 8080)
    for number in range(6):
        local = Endpoint.of(f"10.0.2.{number + 1}", 5000)
        world.assign(local, endpoint("client", 0), Flag.CONNECT, Protocol.TCP)
        world.send(Hook.OUTPUT, flow(local, target))
        decision = world.put(Hook.POSTROUTING, packet(flow(local, target)))
    assert (decision.verdict, decision.reason) == (Verdict.DROP, Reason.NO_FREE_PORT)


def test_interface_without_an_address_drops(world: Dialogue) -> None:
    decision = world.put(Hook.PREROUTING, packet(flow(endpoint("client", 4000), endpoint("server", 80))), "eth9")
    assert (decision.verdict, decision.reason) == (Verdict.DROP, Reason.NO_INTERFACE_ADDRESS)


def test_drop_rule_drops(world: Dialogue) -> None:
    decision = world.put(Hook.PREROUTING, packet(flow(endpoint("client", 4000), endpoint("server", 81))))
    assert (decision.verdict, decision.reason) == (Verdict.DROP, Reason.RULE_DROP)
    assert len(world.engine.connections) == 0


@pytest.mark.parametrize("flags", ["SA", "FA", "R"])
def test_segment_that_begins_nothing_passes_untouched(world: Dialogue, flags: str) -> None:
    of = flow(endpoint("client", 4000), endpoint("server", 80))
    assert world.send(Hook.PREROUTING, of, flags) == (Reason.NO_CONNECTION, of)
    assert len(world.engine.connections) == 0


def test_rule_does_not_take_over_a_connection_that_was_there_before(world: Dialogue) -> None:
    of = flow(endpoint("client", 4000), endpoint("server", 8080))
    world.send(Hook.PREROUTING, of)
    world.rule("-A PREROUTING -p tcp --dport 8080 -j TPROXY --on-port 50080")
    assert world.send(Hook.PREROUTING, of, "A")[1] == of


def test_every_packet_is_counted_once(world: Dialogue) -> None:
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


@versions
def test_rule_with_an_address_of_one_family_leaves_the_other_alone(version: int) -> None:
    world = Dialogue("-A PREROUTING -p tcp --dport 80 -j TPROXY --on-port 50080 --on-ip 10.0.0.2")
    asked = flow(endpoint("client", 4000, version), endpoint("server", 80, version))
    inside = flow(asked.source, endpoint("gateway", 50080))
    expected = (Reason.REDIRECT, inside) if version == 4 else (Reason.NO_MAPPING, asked)
    assert world.send(Hook.PREROUTING, asked, interface="eth1") == expected


@pytest.mark.parametrize("hook", [Hook.PREROUTING, Hook.OUTPUT], ids=lambda hook: hook.name)
def test_policy_drops_what_nobody_wants(world: Dialogue, hook: Hook) -> None:
    world.rule(f"-P {hook.name} DROP")
    assert world.refused(hook, flow(endpoint("client", 4000), endpoint("server", 8080))) is Reason.RULE_DROP
    assert world.send(hook, flow(endpoint("client", 4000), endpoint("server", 80)))[0] is Reason.REDIRECT


@versions
@protocols
def test_sockref_wins_over_the_rules(world: Dialogue, version: int, protocol: Protocol) -> None:
    local, server = endpoint("gateway", 7007, version), endpoint("server", 80, version)
    world.assign(local, server, Flag.LISTEN, protocol)
    asked = flow(endpoint("client", 4000, version), server, protocol)
    assert world.send(Hook.PREROUTING, asked) == (Reason.SOCKREF, flow(asked.source, local, protocol))


def test_entry_that_does_not_qualify_hides_none_that_does(world: Dialogue) -> None:
    """At PREROUTING those who only connect are skipped, at POSTROUTING those who only listen, at both the orphans."""
    foreign = endpoint("foreign", 7)
    orphan = world.assign(endpoint("gateway", 7001), foreign, Flag.LISTEN)
    world.send(Hook.PREROUTING, flow(endpoint("client", 1), foreign))
    world.close(orphan)
    world.assign(endpoint("gateway", 7002), foreign, Flag.CONNECT, remote=endpoint("client", 0))
    world.assign(endpoint("gateway", 7003), foreign, Flag.LISTEN)
    asked = flow(endpoint("client", 2), foreign)
    assert world.send(Hook.PREROUTING, asked) == (Reason.SOCKREF, flow(asked.source, endpoint("gateway", 7003)))


@versions
def test_connection_narrowed_to_a_peer(world: Dialogue, version: int) -> None:
    local, peer = endpoint("outside", 5000, version), endpoint("server", 8080, version)
    foreign = endpoint("client", 4711, version)
    world.assign(local, foreign, Flag.CONNECT, remote=peer)
    for destination, source, reason in (
        (peer, foreign, Reason.SOCKREF),
        (endpoint("server", 8081, version), local, Reason.ESTABLISHED),
    ):
        world.send(Hook.OUTPUT, flow(local, destination))
        assert world.send(Hook.POSTROUTING, flow(local, destination)) == (reason, flow(source, destination))


def test_picked_port_serves_the_next_connection_too(world: Dialogue) -> None:
    local, foreign = endpoint("outside", 5000), endpoint("client", 5000)
    socket = world.assign(local, endpoint("client", 0), Flag.CONNECT, Protocol.UDP)
    world.assign(endpoint("gateway", 1), foreign, Flag.CONNECT, Protocol.UDP)
    picked = set()
    for port in (53, 54):
        of = flow(local, endpoint("server", port), Protocol.UDP)
        world.send(Hook.OUTPUT, of)
        reason, wire = world.send(Hook.POSTROUTING, of)
        assert reason is Reason.SOCKREF
        picked.add(wire.source)
    assert picked == {world.sockref(socket).foreign}
    assert picked != {foreign}, "the socket's own port is another sockref's there"


@versions
@pytest.mark.parametrize(("who", "reason"), [("outside", Reason.NO_MAPPING), ("server", Reason.REDIRECT)])
def test_rule_sees_the_types_of_addresses(world: Dialogue, version: int, who: str, reason: Reason) -> None:
    world.rule("-A PREROUTING -p tcp -m addrtype --src-type UNICAST ! --dst-type LOCAL -j TPROXY --on-port 50080")
    asked = flow(endpoint("client", 4000, version), endpoint(who, 8080, version))
    assert world.send(Hook.PREROUTING, asked)[0] is reason


@pytest.mark.parametrize(("owner", "reason"), [(Owner(1, 2), Reason.REDIRECT), (None, Reason.NO_MAPPING)])
def test_rule_sees_the_owner(world: Dialogue, owner: Owner | None, reason: Reason) -> None:
    world.rule("-A OUTPUT -p tcp -m owner --uid-owner 1 -j TPROXY --on-port 50080")
    data = packet(flow(endpoint("outside", 4000), endpoint("server", 8080)))
    assert world.engine.decide(Arrival(Hook.OUTPUT, data, "", "eth1", 0.0, owner=owner)).reason is reason


@versions
def test_unidir_translates_each_datagram_and_keeps_no_state(world: Dialogue, version: int) -> None:
    local, foreign = endpoint("gateway", 7007, version), endpoint("foreign", 7, version)
    world.assign(local, foreign, Flag.LISTEN | Flag.UNIDIR, Protocol.UDP)
    asked = flow(endpoint("client", 4000, version), foreign, Protocol.UDP)
    inside = flow(asked.source, local, Protocol.UDP)
    for _ in range(2):
        assert world.send(Hook.PREROUTING, asked) == (Reason.UNIDIR, inside)
    assert len(world.engine.connections) == 0
    assert world.send(Hook.OUTPUT, inside.inverse())[1] == inside.inverse(), "answers are the listener's own affair"


ONE_WAY = pack_number(Operation.FLAGS, Flag.LISTEN | Flag.UNIDIR)
REDIRECT = "-A {} -p udp -m udp --dport 53 -j TPROXY --on-port 50053"


@versions
@pytest.mark.parametrize("is_wildcard", [False, True], ids=["address", "wildcard"])
def test_redirect_to_a_one_way_listener_keeps_no_state(world: Dialogue, version: int, is_wildcard: bool) -> None:
    world.rule(REDIRECT.format("PREROUTING"))
    local = endpoint("gateway", 50053, version)
    listener = world.socket(Endpoint(bytes(len(local.address)), local.port) if is_wildcard else local, Protocol.UDP)
    assert world.set(listener, ONE_WAY) == 0
    asked = flow(endpoint("client", 4000, version), endpoint("foreign", 53, version), Protocol.UDP)
    inside = flow(asked.source, local, Protocol.UDP)
    for _ in range(2):
        assert world.send(Hook.PREROUTING, asked) == (Reason.UNIDIR, inside)
    assert len(world.engine.connections) == 0
    world.close(listener)
    other = flow(endpoint("client", 4001, version), endpoint("server", 53, version), Protocol.UDP)
    assert world.send(Hook.PREROUTING, other)[0] is Reason.REDIRECT


@versions
def test_peer_of_a_one_way_listener_gets_a_socket_of_its_own(world: Dialogue, version: int) -> None:
    """The UDP sequence of tproxy.md section 4."""
    world.rule(REDIRECT.format("PREROUTING"))
    assert world.set(world.socket(endpoint("gateway", 50053, version), Protocol.UDP), ONE_WAY) == 0
    asked = flow(endpoint("client", 4000, version), endpoint("foreign", 53, version), Protocol.UDP)
    assert world.send(Hook.PREROUTING, asked)[0] is Reason.UNIDIR
    local = endpoint("gateway", 6000, version)
    world.assign(local, asked.destination, Flag.ESTABLISHED, Protocol.UDP, remote=asked.source)
    inside = flow(asked.source, local, Protocol.UDP)
    world.send(Hook.OUTPUT, inside.inverse())
    assert world.send(Hook.POSTROUTING, inside.inverse()) == (Reason.SOCKREF, asked.inverse())
    assert world.send(Hook.PREROUTING, asked) == (Reason.TRANSLATED, inside)


@versions
def test_own_datagram_to_a_one_way_listener_keeps_no_state(world: Dialogue, version: int) -> None:
    world.rule(REDIRECT.format("OUTPUT"))
    loopback = Endpoint(LOOPBACK[len(endpoint("client", 0, version).address)], 50053)
    assert world.set(world.socket(loopback, Protocol.UDP), ONE_WAY) == 0
    asked = flow(endpoint("outside", 4000, version), endpoint("foreign", 53, version), Protocol.UDP)
    inside = flow(asked.source, loopback, Protocol.UDP)
    assert world.send(Hook.OUTPUT, asked) == (Reason.UNIDIR, inside)
    assert world.send(Hook.POSTROUTING, inside) == (Reason.UNIDIR, inside)
    assert len(world.engine.connections) == 0


def test_one_way_redirect_to_where_it_was_going_changes_nothing(world: Dialogue) -> None:
    world.rule("-A PREROUTING -p udp -j TPROXY --on-port 50053")
    local = endpoint("gateway", 50053)
    assert world.set(world.socket(local, Protocol.UDP), ONE_WAY) == 0
    asked = flow(endpoint("client", 4000), local, Protocol.UDP)
    assert world.send(Hook.PREROUTING, asked) == (Reason.UNIDIR, asked)


@versions
def test_redirects_to_what_becomes_a_one_way_listener_are_deleted(world: Dialogue, version: int) -> None:
    world.rule(REDIRECT.format("PREROUTING"))
    for port in (4000, 4001):
        asked = flow(endpoint("client", port, version), endpoint("foreign", 53, version), Protocol.UDP)
        assert world.send(Hook.PREROUTING, asked)[0] is Reason.REDIRECT
    passing = flow(endpoint("client", 4000, version), endpoint("server", 54, version), Protocol.UDP)
    world.send(Hook.PREROUTING, passing)
    assert world.set(world.socket(endpoint("gateway", 50053, version), Protocol.UDP), ONE_WAY) == 0
    assert [connection.original for connection in world.engine.connections] == [passing]
    assert world.send(Hook.PREROUTING, asked)[0] is Reason.UNIDIR


@versions
def test_unidir_is_nothing_to_tcp(world: Dialogue, version: int) -> None:
    local, foreign = endpoint("gateway", 7007, version), endpoint("foreign", 7, version)
    world.assign(local, foreign, Flag.LISTEN | Flag.UNIDIR)
    asked = flow(endpoint("client", 4000, version), foreign)
    assert world.send(Hook.PREROUTING, asked) == (Reason.SOCKREF, flow(asked.source, local))
    assert world.send(Hook.POSTROUTING, flow(local, asked.source), "SA") == (Reason.TRANSLATED, asked.inverse())


@versions
@protocols
def test_mark_only_source_is_marked_at_both_hooks(world: Dialogue, version: int, protocol: Protocol) -> None:
    local = endpoint("outside", 5000, version)
    world.mark_only(local, protocol)
    of = flow(local, endpoint("server", 80, version), protocol)
    for hook in (Hook.OUTPUT, Hook.POSTROUTING):
        decision = world.put(hook, packet(of))
        assert (decision.reason, decision.payload, decision.is_marked) == (Reason.MARK_ONLY, None, True)
    answer = world.put(Hook.PREROUTING, packet(of.inverse(), flags="SA"), "eth1")
    assert (answer.reason, answer.is_marked) == (Reason.ESTABLISHED, True)


@protocols
def test_what_nobody_wants_is_neither_changed_nor_marked(world: Dialogue, protocol: Protocol) -> None:
    of = flow(endpoint("client", 4000), endpoint("server", 8080), protocol)
    for hook, way, reason in (
        (Hook.PREROUTING, of, Reason.NO_MAPPING),
        (Hook.POSTROUTING, of, Reason.ESTABLISHED),
        (Hook.PREROUTING, of.inverse(), Reason.ESTABLISHED),
        (Hook.POSTROUTING, of.inverse(), Reason.ESTABLISHED),
    ):
        decision = world.put(hook, packet(way, flags="S" if way is of else "SA"))
        assert (decision.reason, decision.payload, decision.is_marked) == (reason, None, False)


@versions
@pytest.mark.parametrize("hooks", [(Hook.OUTPUT, Hook.POSTROUTING), (Hook.POSTROUTING,)], ids=["usual", "late"])
def test_connection_of_a_socket_to_itself_passes(world: Dialogue, version: int, hooks: tuple[Hook, ...]) -> None:
    here = endpoint("gateway", 7007, version)
    of = flow(here, here)
    for flags in ("S", "SA", "A"):
        for hook in hooks:
            assert world.send(hook, of, flags)[1] == of


@versions
def test_datagram_to_ones_own_one_way_address_passes(world: Dialogue, version: int) -> None:
    local, foreign = endpoint("gateway", 7007, version), endpoint("foreign", 7, version)
    world.assign(local, foreign, Flag.LISTEN | Flag.UNIDIR, Protocol.UDP)
    itself = flow(local, local, Protocol.UDP)
    assert world.send(Hook.OUTPUT, flow(local, foreign, Protocol.UDP)) == (Reason.UNIDIR, itself)
    assert world.send(Hook.POSTROUTING, itself)[1] == itself


@versions
def test_connection_first_seen_at_postrouting_is_mapped_there(world: Dialogue, version: int) -> None:
    """The engine was started, or the old connection deleted, between the two hooks."""
    local, foreign = endpoint("outside", 5000, version), endpoint("client", 4711, version)
    world.assign(local, foreign, Flag.CONNECT)
    inside = flow(local, endpoint("server", 8080, version))
    wire = flow(foreign, inside.destination)
    decision = world.put(Hook.POSTROUTING, packet(inside))
    assert (decision.reason, decision.payload, decision.is_marked) == (Reason.SOCKREF, packet(wire), True)
    assert world.send(Hook.PREROUTING, wire.inverse(), "SA") == (Reason.TRANSLATED, inside.inverse())


CUT = [
    pytest.param(80, Verdict.DROP, Reason.OVERSIZED, id="to-be-rewritten"),
    pytest.param(8080, Verdict.ACCEPT, Reason.NO_MAPPING, id="to-be-left-as-it-is"),
]


@pytest.mark.parametrize(("port", "verdict", "reason"), CUT)
def test_packet_that_came_cut_is_never_rewritten(world: Dialogue, port: int, verdict: Verdict, reason: Reason) -> None:
    asked = flow(endpoint("client", 4000), endpoint("server", port), Protocol.UDP)
    decision = world.put(Hook.PREROUTING, packet(asked), is_cut=True)
    assert (decision.verdict, decision.reason, decision.payload) == (verdict, reason, None)


@versions
@protocols
def test_nobody_s_address_is_no_peer_of_a_narrowed_sockref(version: int, protocol: Protocol) -> None:
    world = Dialogue()
    local, foreign, peer = (endpoint(who, 20, version) for who in ("gateway", "foreign", "client"))
    world.assign(local, foreign, Flag.LISTEN | Flag.ONCE, protocol, remote=peer)
    forged = flow(Endpoint(bytes(len(peer.address)), 20), foreign, protocol)
    assert world.send(Hook.PREROUTING, forged) == (Reason.NO_MAPPING, forged)
    asked = flow(peer, foreign, protocol)
    assert world.send(Hook.PREROUTING, asked) == (Reason.SOCKREF, flow(peer, local, protocol))


@versions
def test_nobody_reaches_a_port_that_is_yet_to_be_chosen(version: int) -> None:
    world = Dialogue()
    world.assign(endpoint("gateway", 7007, version), endpoint("foreign", 0, version), Flag.LISTEN, Protocol.UDP)
    asked = flow(endpoint("client", 4000, version), endpoint("foreign", 0, version), Protocol.UDP)
    assert world.send(Hook.PREROUTING, asked) == (Reason.NO_MAPPING, asked)


def test_a_segment_that_is_never_answered_is_not_remembered_for_days() -> None:
    """Anybody can send such from anywhere; the kernel keeps it as long (nf_conntrack_proto_tcp.c)."""
    world = Dialogue()
    asked = flow(endpoint("client", 4000), endpoint("server", 80))
    world.send(Hook.PREROUTING, asked, "A")
    world.wait(UNANSWERED - 1)
    assert len(world.engine.connections) == 1
    world.wait(2)
    assert len(world.engine.connections) == 0
    world.send(Hook.PREROUTING, asked, "A")
    world.send(Hook.PREROUTING, asked.inverse(), "A")
    world.wait(UNANSWERED + 1)
    assert len(world.engine.connections) == 1


def test_datagram_from_port_0_stays_from_port_0(world: Dialogue) -> None:
    """Somebody else's sockref has that address, and its port is not chosen yet."""
    world.assign(endpoint("outside", 5000), endpoint("client", 0), Flag.CONNECT, Protocol.UDP)
    of = flow(endpoint("client", 0), endpoint("server", 8080), Protocol.UDP)
    assert world.send(Hook.PREROUTING, of) == (Reason.NO_MAPPING, of)
    assert world.send(Hook.POSTROUTING, of) == (Reason.ESTABLISHED, of)


def test_second_connection_from_one_port_that_cannot_be_moved_back_is_dropped(world: Dialogue) -> None:
    """At OUTPUT only answers by lo are sure to come by POSTROUTING."""
    world.rule("-I OUTPUT -p tcp --dport 80 -j TPROXY --on-port 50080 --on-ip 10.0.0.2")
    first, second = (flow(endpoint("outside", 4000), endpoint(who, 80)) for who in ("server", "foreign"))
    assert world.send(Hook.OUTPUT, first)[0] is Reason.REDIRECT
    assert world.refused(Hook.OUTPUT, second) is Reason.CLASH


def test_state_follows_a_forwarded_packet_once(world: Dialogue) -> None:
    of = flow(endpoint("client", 4000), endpoint("server", 8080))
    for way, flags in ((of, "S"), (of.inverse(), "SA"), (of, "A"), (of, "FA")):
        for hook in (Hook.PREROUTING, Hook.POSTROUTING):
            world.send(hook, way, flags)
    (connection,) = world.engine.connections
    assert connection.state is State.FIN_WAIT
    assert [connection.traffic(way)[0] for way in Direction] == [3, 1]
