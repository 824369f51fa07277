"""The socket API: the table of errnos, and that an error changes nothing."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from builders import endpoint, flow
from dialogue import Dialogue

from nfq_engine.core.decision import Reason
from nfq_engine.core.nat import PortRange
from nfq_engine.core.option import Operation, pack_address, pack_number, unpack_address, unpack_number
from nfq_engine.core.packet import Endpoint, Hook, Protocol
from nfq_engine.core.pipeline import Engine
from nfq_engine.core.sockopt import Socket, SocketApi
from nfq_engine.core.sockref import Flag
from nfq_engine.core.surroundings import AddressType

NOW = 7.0
versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
protocols = pytest.mark.parametrize("protocol", list(Protocol), ids=["tcp", "udp"])


class NoInterfaces:
    def first_address(self, interface: str, size: int) -> bytes | None:
        return None

    def address_type(self, address: bytes) -> AddressType:
        return AddressType.UNICAST


class World:
    """An engine's socket API, sockets, and a snapshot of all that a call may change."""

    def __init__(self) -> None:
        self.engine = Engine(NoInterfaces(), random.Random(1), PortRange(40_000, 40_001))
        self.api = SocketApi(self.engine)
        self._cookies = iter(range(1, 1000))

    def socket(self, port: int = 5000, *, version: int = 4, protocol: Protocol = Protocol.TCP, **facts: bool) -> Socket:
        usual = {"is_connected": False, "has_reuse_address": False, "is_privileged": True}
        local = endpoint("outside", port, version)
        return Socket(cookie=next(self._cookies), protocol=protocol, local=local, owner=0, **{**usual, **facts})

    def set(self, socket: Socket, argument: bytes) -> int:
        return self.api.set(socket, argument, NOW)

    def assigned(self, foreign: Endpoint | None = None, **facts: object) -> Socket:
        socket = self.socket(**facts)  # type: ignore[arg-type]
        assert self.set(socket, assign(foreign or endpoint("client", 4711))) == 0
        return socket

    def snapshot(self) -> list[tuple[object, ...]]:
        return [
            (entry.protocol, entry.local, entry.foreign, entry.remote, entry.flags, frozenset(entry.cookies))
            for entry in self.engine.sockrefs
        ] + [(listener,) for listener in self.engine.listeners]


def assign(foreign: Endpoint) -> bytes:
    return pack_address(Operation.ASSIGN, foreign)


def flags(value: int) -> bytes:
    return pack_number(Operation.FLAGS, value)


FOREIGN = endpoint("client", 4711)
OTHER = endpoint("server", 9, 6)
NOBODY = Endpoint(bytes(4), 0)
MAPPED = Endpoint.of("::ffff:10.0.0.1", 4711)  # FOREIGN, as an IPv6 program writes it
ANYWHERE = Endpoint.of("0.0.0.0", 5000)

ONE_WAY = Flag.LISTEN | Flag.UNIDIR

Call = Callable[[World], int]


def udp(world: World, port: int = 5000) -> Socket:
    return world.socket(port, protocol=Protocol.UDP)


def one_way(world: World) -> Socket:
    socket = udp(world)
    assert world.set(socket, flags(ONE_WAY)) == 0
    return socket


REFUSED: list[tuple[str, int, Call]] = [
    ("argument of 7 bytes", errno.EINVAL, lambda w: w.set(w.socket(), bytes(7))),
    ("unknown op", errno.ENOPROTOOPT, lambda w: w.set(w.socket(), pack_number(99))),  # type: ignore[arg-type]
    ("version with another major", errno.EINVAL, lambda w: w.set(w.socket(), pack_number(Operation.VERSION, 1 << 24))),
    ("version with a newer minor", errno.EINVAL, lambda w: w.set(w.socket(), pack_number(Operation.VERSION, 0x020100))),
    ("version far too new", errno.EINVAL, lambda w: w.set(w.socket(), pack_number(Operation.VERSION, 0x02010000))),
    ("assign without privilege", errno.EPERM, lambda w: w.set(w.socket(is_privileged=False), assign(FOREIGN))),
    ("assign cut short", errno.EINVAL, lambda w: w.set(w.socket(), assign(FOREIGN)[:9])),
    ("assign of the other family", errno.EINVAL, lambda w: w.set(w.socket(), assign(endpoint("client", 4711, 6)))),
    ("the same over IPv6", errno.EINVAL, lambda w: w.set(w.socket(version=6), assign(FOREIGN))),
    ("assign of a mapped address over IPv6", errno.EINVAL, lambda w: w.set(w.socket(version=6), assign(MAPPED))),
    ("assign nobody over a foreign address", errno.EEXIST, lambda w: w.set(w.assigned(), assign(NOBODY))),
    ("assign over mark-only", errno.EEXIST, lambda w: w.set(w.assigned(NOBODY), assign(FOREIGN))),
    ("nobody at another's local address", errno.EEXIST, lambda w: (w.assigned(), w.set(w.socket(), assign(NOBODY)))[1]),
    ("assign when connected", errno.EINVAL, lambda w: w.set(w.socket(is_connected=True), assign(FOREIGN))),
    ("assign without a port", errno.EINVAL, lambda w: w.set(w.socket(0), assign(FOREIGN))),
    ("assign when bound to any", errno.EINVAL, lambda w: w.set(replace(w.socket(), local=ANYWHERE), assign(FOREIGN))),
    ("assign twice", errno.EEXIST, lambda w: w.set(w.assigned(), assign(FOREIGN))),
    ("assign at a taken local address", errno.EEXIST, lambda w: (w.assigned(), w.set(w.socket(), assign(FOREIGN)))[1]),
    ("foreign address taken", errno.EADDRINUSE, lambda w: (w.assigned(), w.set(w.socket(5001), assign(FOREIGN)))[1]),
    ("unassign without", errno.ENOENT, lambda w: w.set(w.socket(), pack_number(Operation.UNASSIGN))),
    ("flags without", errno.ENOENT, lambda w: w.set(w.socket(), flags(Flag.CONNECT))),
    ("one-way flags for TCP without", errno.ENOENT, lambda w: w.set(w.socket(), flags(ONE_WAY))),
    ("one-way flags when not bound", errno.ENOENT, lambda w: w.set(udp(w, port=0), flags(ONE_WAY))),
    ("one-way flags with ONCE", errno.ENOENT, lambda w: w.set(udp(w), flags(ONE_WAY | Flag.ONCE))),
    ("listen without", errno.ENOENT, lambda w: w.set(udp(w), flags(Flag.LISTEN))),
    ("get: flags of a one-way listener", errno.ENOENT, lambda w: error_of(w.api.get(one_way(w), flags(0)))),
    ("unassign a one-way listener", errno.ENOENT, lambda w: w.set(one_way(w), pack_number(Operation.UNASSIGN))),
    ("alloc for a one-way listener", errno.ENOENT, lambda w: w.set(one_way(w), pack_number(Operation.ALLOC))),
    ("flags of no kind", errno.EINVAL, lambda w: w.set(w.assigned(), flags(Flag.ONCE))),
    ("flags of two kinds", errno.EINVAL, lambda w: w.set(w.assigned(), flags(Flag.CONNECT | Flag.LISTEN))),
    ("flags that nobody knows", errno.EINVAL, lambda w: w.set(w.assigned(), flags(Flag.CONNECT | 0x100))),
    ("flags that are not for setting", errno.EINVAL, lambda w: w.set(w.assigned(), flags(Flag.CONNECT | Flag.APPLIED))),
    ("established without a remote", errno.EINVAL, lambda w: w.set(w.assigned(), flags(Flag.ESTABLISHED))),
    ("listen on a connect-only entry", errno.EINVAL, lambda w: w.set(connect_only(w), flags(Flag.LISTEN))),
    ("alloc without", errno.ENOENT, lambda w: w.set(w.socket(), pack_number(Operation.ALLOC))),
    ("alloc with a port", errno.EINVAL, lambda w: w.set(w.assigned(), pack_number(Operation.ALLOC))),
    ("alloc when none is free", errno.EFAULT, lambda w: w.set(exhausted(w), pack_number(Operation.ALLOC))),
    ("connect without", errno.ENOENT, lambda w: w.set(w.socket(), pack_address(Operation.CONNECT, FOREIGN))),
    ("connect cut short", errno.EINVAL, lambda w: w.set(w.assigned(), pack_address(Operation.CONNECT, FOREIGN)[:9])),
    (
        "connect of the other family",
        errno.EINVAL,
        lambda w: w.set(w.assigned(), pack_address(Operation.CONNECT, OTHER)),
    ),
    ("query by set", errno.ENOPROTOOPT, lambda w: w.set(w.assigned(), pack_number(Operation.QUERY))),
    ("get: argument of 7 bytes", errno.EINVAL, lambda w: error_of(w.api.get(w.socket(), bytes(7)))),
    ("get: query without", errno.ENOENT, lambda w: error_of(w.api.get(w.socket(), pack_number(Operation.QUERY)))),
    ("get: flags without", errno.ENOENT, lambda w: error_of(w.api.get(w.socket(), pack_number(Operation.FLAGS)))),
    ("get: assign", errno.ENOPROTOOPT, lambda w: error_of(w.api.get(w.assigned(), pack_number(Operation.ASSIGN)))),
]


def error_of(result: bytes | int) -> int:
    assert isinstance(result, int)
    return result


def connect_only(world: World) -> Socket:
    world.assigned()
    return world.assigned(port=5001, has_reuse_address=True)


def exhausted(world: World) -> Socket:
    for port, taken in ((5001, 40_000), (5002, 40_001)):
        world.assigned(endpoint("client", taken), port=port)
    return world.assigned(endpoint("client", 0))


@pytest.mark.parametrize(("expected", "call"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused_call_tells_its_errno_and_changes_nothing(expected: int, call: Call) -> None:
    world = World()
    before: list[list[tuple[object, ...]]] = []

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: object) -> Any:
            before.append(world.snapshot())
            return real(*arguments)

        return called

    world.api.set = watched(world.api.set)  # type: ignore[method-assign]
    world.api.get = watched(world.api.get)  # type: ignore[method-assign]
    assert call(world) == expected
    assert world.snapshot() == before[-1]


@versions
@protocols
def test_assign_flags_query_unassign(version: int, protocol: Protocol) -> None:
    world = World()
    foreign = endpoint("client", 4711, version)
    socket = world.assigned(foreign, version=version, protocol=protocol)
    assert world.set(socket, flags(Flag.CONNECT | Flag.ONCE)) == 0
    queried = world.api.get(socket, pack_number(Operation.QUERY))
    assert isinstance(queried, bytes)
    assert unpack_address(queried, len(foreign.address)) == foreign
    shown = world.api.get(socket, pack_number(Operation.FLAGS))
    assert isinstance(shown, bytes)
    assert unpack_number(shown) == 0x10001
    assert world.set(socket, pack_number(Operation.UNASSIGN)) == 0
    assert world.snapshot() == []


def test_arguments_are_twelve_bytes_for_ipv4() -> None:
    """As the original's struct in_tproxy: op, then address and port, or a number."""
    assert pack_address(Operation.ASSIGN, Endpoint.of("1.2.3.4", 0x5678)) == b"\1\0\0\0\1\2\3\4\x56\x78\0\0"
    assert len(pack_number(Operation.FLAGS, 1)) == 12


@pytest.mark.parametrize("asked", [0x02000000, 0x02000005], ids=["2.0.0", "2.0.5"])
def test_version_is_ours(asked: int) -> None:
    world = World()
    assert world.set(world.socket(), pack_number(Operation.VERSION, asked)) == 0
    reply = world.api.get(world.socket(), pack_number(Operation.VERSION))
    assert isinstance(reply, bytes)
    assert unpack_number(reply) >> 16 == 0x0200


def test_mark_only_entries_are_shared_and_go_with_the_last_socket() -> None:
    world = World()
    first, second = world.assigned(NOBODY), world.socket()
    assert world.set(second, assign(NOBODY)) == 0
    ((_, local, foreign, _, mark, cookies),) = world.snapshot()
    assert local == foreign
    assert mark == Flag.MARK_ONLY
    assert cookies == {first.cookie, second.cookie}
    for argument in (flags(Flag.LISTEN), pack_number(Operation.ALLOC), pack_address(Operation.CONNECT, FOREIGN)):
        assert world.set(first, argument) == 0
    assert world.snapshot() == [(Protocol.TCP, local, foreign, NOBODY, mark, cookies)], "they succeed and do nothing"
    world.api.closed(first.cookie)
    assert len(world.snapshot()) == 1
    world.api.closed(second.cookie)
    assert world.snapshot() == []


def test_alloc_picks_a_port_of_the_range() -> None:
    world = World()
    socket = world.assigned(endpoint("client", 0))
    assert world.set(socket, pack_number(Operation.ALLOC)) == 0
    ((_, _, foreign, *_),) = world.snapshot()
    assert isinstance(foreign, Endpoint)
    assert foreign.port in (40_000, 40_001)


def test_reused_foreign_address_is_connect_only() -> None:
    world = World()
    socket = connect_only(world)
    assert world.set(socket, flags(Flag.CONNECT)) == 0
    assert Flag.CONNECT_ONLY in world.snapshot()[1][4]  # type: ignore[operator]


@pytest.mark.parametrize(
    "other", [pytest.param("mark-only", id="mark-only"), pytest.param("narrowed", id="narrowed-to-a-peer")]
)
def test_reused_foreign_address_of_such_an_entry_is_not_connect_only(other: str) -> None:
    world = World()
    if other == "mark-only":
        holder = replace(world.socket(), local=FOREIGN)
        assert world.set(holder, assign(NOBODY)) == 0
    else:
        holder = world.assigned()
        assert world.set(holder, pack_address(Operation.CONNECT, endpoint("server", 9))) == 0
    socket = world.assigned(port=5001, has_reuse_address=True)
    assert world.set(socket, flags(Flag.LISTEN)) == 0


def test_mapped_address_is_the_ipv4_address_for_a_socket_bound_to_one() -> None:
    """The socket is of IPv6, but IPv4 is what it speaks."""
    world = World()
    socket = world.assigned(MAPPED)
    assert world.set(socket, pack_address(Operation.CONNECT, Endpoint.of("::ffff:10.0.1.2", 9))) == 0
    ((_, _, foreign, remote, *_),) = world.snapshot()
    assert (foreign, remote) == (FOREIGN, endpoint("server", 9))
    assert world.set(world.socket(5001), assign(Endpoint.of("::", 0))) == 0
    assert world.snapshot()[1][4] == Flag.MARK_ONLY


def test_mark_only_twice_by_one_socket_counts_it_once() -> None:
    world = World()
    socket = world.assigned(NOBODY)
    assert world.set(socket, assign(NOBODY)) == 0
    world.api.closed(socket.cookie)
    assert world.snapshot() == []


REFUSED_FLAGS = [
    pytest.param(Flag.LISTEN, id="listen-on-connect-only"),
    pytest.param(Flag.ESTABLISHED, id="established-without-a-remote"),
    pytest.param(Flag.CONNECT | Flag.LISTEN, id="two-kinds"),
    pytest.param(Flag.CONNECT | Flag.MARK_ONLY, id="not-for-setting"),
]


@pytest.mark.parametrize("wanted", REFUSED_FLAGS)
@protocols
def test_refused_flags_delete_no_connection(wanted: Flag, protocol: Protocol) -> None:
    world = Dialogue()
    world.assign(endpoint("gateway", 1), FOREIGN, Flag.CONNECT, protocol)
    socket = world.assign(endpoint("gateway", 2), FOREIGN, Flag.CONNECT | Flag.ONCE, protocol)
    of = flow(endpoint("gateway", 2), endpoint("server", 9), protocol)
    world.send(Hook.OUTPUT, of)
    world.send(Hook.POSTROUTING, of)
    before = world.sockref(socket).flags
    assert world.set(socket, flags(wanted)) == errno.EINVAL
    assert world.sockref(socket).flags == before
    assert world.send(Hook.POSTROUTING, of)[0] is Reason.TRANSLATED
