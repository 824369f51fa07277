"""How connections and sockrefs end: ONCE, orphans, deletion, reuse, expiry; and that nothing of them stays."""

from __future__ import annotations

import pytest
from builders import endpoint, flow
from dialogue import Dialogue

from nfq_engine.core.conntrack import State
from nfq_engine.core.decision import Reason
from nfq_engine.core.option import Operation, pack_number
from nfq_engine.core.packet import Endpoint, FlowTuple, Hook, Protocol
from nfq_engine.core.sockref import Flag
from nfq_engine.core.tproxy_table import Deletion

REDIRECT = "-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080"
LOCAL, FOREIGN, CLIENT = endpoint("gateway", 7007), endpoint("foreign", 7), endpoint("client", 4000)

deletions = pytest.mark.parametrize("deletion", list(Deletion))


def open_and_close(world: Dialogue, asked: FlowTuple, inside: FlowTuple) -> None:
    """A whole TCP connection of a client to the gateway, closed by the client."""
    assert world.send(Hook.PREROUTING, asked)[1] == inside
    for hook, of, flags in (
        (Hook.OUTPUT, inside.inverse(), "SA"),
        (Hook.POSTROUTING, inside.inverse(), "SA"),
        (Hook.PREROUTING, asked, "A"),
        (Hook.PREROUTING, asked, "FA"),
        (Hook.OUTPUT, inside.inverse(), "FA"),
        (Hook.POSTROUTING, inside.inverse(), "FA"),
        (Hook.PREROUTING, asked, "A"),
    ):
        world.send(hook, of, flags)


def is_empty(world: Dialogue) -> bool:
    """Is there no connection, no sockref, and no entry of either?"""
    table, sockrefs = world.engine.connections, world.engine.sockrefs
    hashes = (sockrefs._by_local, sockrefs._by_foreign, sockrefs._by_cookie)
    entries = [found for stage in table.entries.values() for found in stage.values()]
    return not any((*entries, *hashes, len(table), table._undecided))


def test_once_serves_one_connection_from_a_foreign_address() -> None:
    world = Dialogue()
    local = endpoint("outside", 5000)
    socket = world.assign(local, endpoint("client", 4711), Flag.CONNECT | Flag.ONCE)
    first, second = (flow(local, endpoint("server", port)) for port in (8080, 8081))
    for of, expected in ((first, Reason.SOCKREF), (second, Reason.ESTABLISHED)):
        world.send(Hook.OUTPUT, of)
        assert world.send(Hook.POSTROUTING, of)[0] is expected
    assert world.send(Hook.POSTROUTING, first)[0] is Reason.TRANSLATED, "the first one goes on"
    assert world.sockref(socket).has(Flag.APPLIED)


@pytest.mark.parametrize("protocol", list(Protocol), ids=["tcp", "udp"])
def test_once_serves_one_connection_to_a_foreign_address(protocol: Protocol) -> None:
    world = Dialogue()
    socket = world.assign(LOCAL, FOREIGN, Flag.LISTEN | Flag.ONCE, protocol)
    first, second = (flow(endpoint("client", port), FOREIGN, protocol) for port in (1, 2))
    for of, expected in ((first, Reason.SOCKREF), (second, Reason.NO_MAPPING), (first, Reason.TRANSLATED)):
        assert world.send(Hook.PREROUTING, of)[0] is expected
    assert world.set(socket, pack_number(Operation.FLAGS, Flag.LISTEN | Flag.ONCE)) == 0
    assert world.send(Hook.PREROUTING, first)[0] is Reason.SOCKREF, "FLAGS begins anew"


def test_once_is_not_spent_on_a_connection_that_could_not_be_mapped() -> None:
    world = Dialogue()
    local, server = endpoint("outside", 5000), endpoint("server", 8080)
    taken = flow(endpoint("client", 4711), server)
    world.send(Hook.PREROUTING, taken)
    world.send(Hook.POSTROUTING, taken)
    world.assign(local, taken.source, Flag.CONNECT | Flag.ONCE)
    world.send(Hook.OUTPUT, flow(local, server))
    assert world.refused(Hook.POSTROUTING, flow(local, server)) is Reason.CLASH
    other = flow(local, endpoint("server", 8081))
    world.send(Hook.OUTPUT, other)
    assert world.send(Hook.POSTROUTING, other) == (Reason.SOCKREF, flow(taken.source, other.destination))


def test_syn_replaces_a_connection_in_time_wait() -> None:
    world = Dialogue(REDIRECT)
    asked = flow(CLIENT, endpoint("server", 80))
    inside = flow(CLIENT, endpoint("gateway", 50080))
    open_and_close(world, asked, inside)
    (old,) = world.engine.connections
    assert old.state is State.TIME_WAIT
    assert world.send(Hook.PREROUTING, asked, "A")[0] is Reason.TRANSLATED, "anything else does not"
    assert world.send(Hook.PREROUTING, asked) == (Reason.REDIRECT, inside)
    (new,) = world.engine.connections
    assert new is not old
    assert new.state is State.SYN_SENT


@pytest.mark.parametrize("flags", ["SA", "R"], ids=["living", "closed"])
def test_foreign_port_is_free_again_when_its_connection_is_closed(flags: str) -> None:
    """Two sockets take the port of one client to one server, one after the other."""
    world = Dialogue()
    server, foreign = endpoint("server", 8080), endpoint("client", 4711)
    first, second = (flow(endpoint("outside", port), server) for port in (5000, 5001))
    for of in (first, second):
        world.assign(of.source, foreign, Flag.CONNECT)
    world.send(Hook.OUTPUT, first)
    world.send(Hook.POSTROUTING, first)
    world.send(Hook.PREROUTING, flow(server, foreign), flags)
    world.send(Hook.OUTPUT, second)
    if flags == "SA":
        assert world.refused(Hook.POSTROUTING, second) is Reason.CLASH
    else:
        assert world.send(Hook.POSTROUTING, second) == (Reason.SOCKREF, flow(foreign, server))
    assert len(world.engine.connections) == 1


@deletions
def test_orphan_listener_goes_with_its_last_connection(deletion: Deletion) -> None:
    world = Dialogue(deletion=deletion)
    socket = world.assign(LOCAL, FOREIGN, Flag.LISTEN)
    asked, inside = flow(CLIENT, FOREIGN), flow(CLIENT, LOCAL)
    world.send(Hook.PREROUTING, asked)
    world.close(socket)
    (orphan,) = world.engine.sockrefs
    assert orphan.has(Flag.ORPHAN)
    assert world.send(Hook.PREROUTING, asked, "A")[1] == inside, "the connection lives on"
    other = flow(endpoint("client", 4001), FOREIGN)
    assert world.send(Hook.PREROUTING, other)[0] is Reason.NO_MAPPING, "but there are no new ones"
    world.wait(500_000)
    assert is_empty(world)


def test_listener_is_replaced_while_its_orphan_lives() -> None:
    world = Dialogue()
    asked = [flow(endpoint("client", port), FOREIGN) for port in (1, 2)]
    old = world.assign(LOCAL, FOREIGN, Flag.LISTEN)
    world.send(Hook.PREROUTING, asked[0])
    world.close(old)
    new = world.assign(LOCAL, FOREIGN, Flag.LISTEN)
    assert not world.sockref(new).has(Flag.CONNECT_ONLY), "an orphan does not count as a holder of its address"
    assert world.send(Hook.PREROUTING, asked[1]) == (Reason.SOCKREF, flow(asked[1].source, LOCAL))
    world.send(Hook.PREROUTING, asked[0], "R")
    world.wait(11)
    assert world.engine.sockrefs.at_local(Protocol.TCP, LOCAL) == [world.sockref(new)]


def test_orphan_of_both_ways_serves_neither() -> None:
    world = Dialogue()
    peer = endpoint("client", 4000)
    socket = world.assign(LOCAL, FOREIGN, Flag.ESTABLISHED, remote=endpoint("client", 0))
    world.send(Hook.PREROUTING, flow(peer, FOREIGN))
    world.close(socket)
    assert len(world.engine.sockrefs) == 1
    new = endpoint("client", 4001)
    assert world.send(Hook.PREROUTING, flow(new, FOREIGN))[0] is Reason.NO_MAPPING
    world.send(Hook.OUTPUT, flow(LOCAL, new))
    assert world.send(Hook.POSTROUTING, flow(LOCAL, new))[0] is Reason.ESTABLISHED


def test_orphan_goes_when_its_last_connection_is_replaced() -> None:
    world = Dialogue()
    socket = world.assign(LOCAL, FOREIGN, Flag.LISTEN)
    open_and_close(world, flow(CLIENT, FOREIGN), flow(CLIENT, LOCAL))
    world.close(socket)
    assert len(world.engine.sockrefs) == 1
    assert world.send(Hook.PREROUTING, flow(CLIENT, FOREIGN))[0] is Reason.NO_MAPPING
    assert len(world.engine.sockrefs) == 0


# Protocol, kind; what stays when the socket is closed after its first connection: flags of the sockref, connections.
CLOSED = [
    pytest.param(Protocol.TCP, Flag.CONNECT, [], 1, id="tcp-connect"),
    pytest.param(Protocol.TCP, Flag.LISTEN, [Flag.LISTEN | Flag.APPLIED | Flag.ORPHAN], 1, id="tcp-listen"),
    pytest.param(Protocol.UDP, Flag.CONNECT, [], 0, id="udp-connect"),
    pytest.param(Protocol.UDP, Flag.LISTEN, [], 0, id="udp-listen"),
]


@deletions
@pytest.mark.parametrize(("protocol", "kind", "flags", "connections"), CLOSED)
def test_what_a_closed_socket_leaves(
    deletion: Deletion, protocol: Protocol, kind: Flag, flags: list[Flag], connections: int
) -> None:
    world = Dialogue(deletion=deletion)
    bystander = flow(endpoint("client", 1), endpoint("server", 2), protocol)
    world.send(Hook.PREROUTING, bystander)
    socket = world.assign(LOCAL, FOREIGN, kind, protocol)
    if kind is Flag.LISTEN:
        world.send(Hook.PREROUTING, flow(CLIENT, FOREIGN, protocol))
    else:
        world.send(Hook.OUTPUT, flow(LOCAL, CLIENT, protocol))
        world.send(Hook.POSTROUTING, flow(LOCAL, CLIENT, protocol))
    world.close(socket)
    assert [entry.flags for entry in world.engine.sockrefs] == flags
    assert len(world.engine.connections) == 1 + connections
    assert world.send(Hook.PREROUTING, bystander)[0] is Reason.ESTABLISHED
    world.wait(500_000)
    assert is_empty(world)


@pytest.mark.parametrize("kind", [Flag.CONNECT, Flag.LISTEN], ids=["connect", "listen"])
def test_socket_without_connections_leaves_nothing(kind: Flag) -> None:
    world = Dialogue()
    world.close(world.assign(LOCAL, FOREIGN, kind))
    assert is_empty(world)


@deletions
@pytest.mark.parametrize("protocol", list(Protocol), ids=["tcp", "udp"])
def test_flags_delete_related_connections_and_no_others(deletion: Deletion, protocol: Protocol) -> None:
    world = Dialogue(deletion=deletion)
    socket = world.assign(LOCAL, FOREIGN, Flag.LISTEN, protocol)
    world.assign(endpoint("gateway", 7008), endpoint("foreign", 8), Flag.LISTEN, protocol)
    mine, others = (flow(CLIENT, endpoint("foreign", port), protocol) for port in (7, 8))
    for of in (mine, others):
        world.send(Hook.PREROUTING, of)
    assert world.set(socket, pack_number(Operation.FLAGS, Flag.LISTEN)) == 0
    assert [connection.original for connection in world.engine.connections] == [others]
    assert world.send(Hook.PREROUTING, mine)[0] is Reason.SOCKREF


@deletions
def test_deletion_may_take_an_orphan_along(deletion: Deletion) -> None:
    """One connection of two sockrefs: an orphan's listener was at its other end."""
    world = Dialogue(deletion=deletion)
    connecting = endpoint("outside", 5000)
    listener = world.assign(LOCAL, FOREIGN, Flag.LISTEN)
    socket = world.assign(connecting, endpoint("client", 4711), Flag.CONNECT)
    world.send(Hook.OUTPUT, flow(connecting, FOREIGN))
    world.send(Hook.POSTROUTING, flow(connecting, LOCAL))
    world.close(listener)
    assert len(world.engine.sockrefs) == 2
    assert world.set(socket, pack_number(Operation.FLAGS, Flag.CONNECT)) == 0
    assert [entry.local for entry in world.engine.sockrefs] == [connecting]
    world.close(socket)
    assert is_empty(world)


def test_idle_connections_are_forgotten_and_nothing_of_them_stays() -> None:
    world = Dialogue()
    flows = [flow(Endpoint(CLIENT.address, port), endpoint("server", 8080), Protocol.UDP) for port in range(100)]
    for of in flows:
        world.send(Hook.PREROUTING, of)
        world.send(Hook.POSTROUTING, of)
    world.wait(29)
    assert len(world.engine.connections) == 100
    world.send(Hook.PREROUTING, flows[0])
    world.wait(2)
    assert len(world.engine.connections) == 1, "a packet prolongs its connection, and only that"
    world.wait(31)
    assert is_empty(world)
