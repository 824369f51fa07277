"""The sockref hashes: the order of look-ups, and that what is taken out is gone, at once and at any size."""

from __future__ import annotations

import time

import pytest
from builders import endpoint
from hypothesis import given
from hypothesis import strategies as st

from nfq_engine.core.packet import Endpoint, Protocol
from nfq_engine.core.sockref import Flag, Sockref, SockrefTable

NOBODY = Endpoint(bytes(4), 0)
LOCAL, FOREIGN, PEER = endpoint("gateway", 7007), endpoint("foreign", 7), endpoint("client", 4000)
PEER_ANY_PORT = Endpoint(PEER.address, 0)
STRANGER = endpoint("server", 4000)


def sockref(
    local: Endpoint = LOCAL,
    foreign: Endpoint = FOREIGN,
    remote: Endpoint = NOBODY,
    *,
    protocol: Protocol = Protocol.TCP,
    flags: Flag = Flag.LISTEN,
    cookie: int = 1,
) -> Sockref:
    return Sockref(protocol, local, foreign, remote, {cookie}, hashed=0.0, flags=flags)


def is_listening(entry: Sockref) -> bool:
    return entry.has(Flag.LISTEN)


# Remotes of the entries in the order of their assignment, an asterisk for one that is not accepted; who is asked for;
# which entry is found.
LOOKUPS: dict[str, tuple[list[Endpoint | str], Endpoint | None, int | None]] = {
    "nobody there": ([], PEER, None),
    "without a remote": ([NOBODY], PEER, 0),
    "the first without a remote": ([NOBODY, NOBODY], PEER, 0),
    "with the remote asked for": ([PEER], PEER, 0),
    "the remote asked for beats none": ([NOBODY, PEER], PEER, 1),
    "whichever comes first": ([PEER, NOBODY], PEER, 0),
    "another remote never matches": ([STRANGER], PEER, None),
    "another remote hides nothing": ([STRANGER, NOBODY], PEER, 1),
    "another port is another remote": ([endpoint("client", 4001)], PEER, None),
    "a remote with any port": ([NOBODY, PEER_ANY_PORT], PEER, 1),
    "nobody in particular asked for: the first": ([STRANGER, NOBODY, PEER], None, 0),
    "from nobody's address": ([STRANGER, NOBODY, PEER], NOBODY, 1),
    "not accepted": (["*"], PEER, None),
    "not accepted hides nothing": (["*", NOBODY], PEER, 1),
    "not accepted hides nothing from those who do not care": (["*", STRANGER], None, 1),
}


@pytest.mark.parametrize(("remotes", "asked", "expected"), LOOKUPS.values(), ids=LOOKUPS.keys())
@pytest.mark.parametrize("hash_", ["local", "foreign"])
def test_lookup_order(hash_: str, remotes: list[Endpoint | str], asked: Endpoint | None, expected: int | None) -> None:
    table = SockrefTable()
    entries = [
        sockref(remote=NOBODY, flags=Flag.CONNECT) if isinstance(remote, str) else sockref(remote=remote)
        for remote in remotes
    ]
    for entry in entries:
        table.add(entry)
    if hash_ == "local":
        found = table.find_local(Protocol.TCP, LOCAL, asked, is_listening)
    else:
        found = table.find_foreign(Protocol.TCP, FOREIGN, asked, is_listening)
    assert found is (None if expected is None else entries[expected])


ELSEWHERE = [
    pytest.param(Protocol.UDP, FOREIGN, id="another-protocol"),
    pytest.param(Protocol.TCP, endpoint("foreign", 8), id="another-port"),
    pytest.param(Protocol.TCP, endpoint("server", 7), id="another-address"),
    pytest.param(Protocol.TCP, Endpoint(bytes(12) + FOREIGN.address, 7), id="another-family"),
    pytest.param(Protocol.TCP, Endpoint(FOREIGN.address, 0), id="no-port"),
]


@pytest.mark.parametrize(("protocol", "asked"), ELSEWHERE)
def test_nothing_is_found_elsewhere(protocol: Protocol, asked: Endpoint) -> None:
    table = SockrefTable()
    table.add(sockref())
    assert table.find_foreign(protocol, asked, PEER, is_listening) is None
    assert not table.has_foreign(protocol, asked)
    assert table.at_foreign(protocol, asked) == []


def test_picked_port_moves_an_entry_in_the_foreign_hash_only() -> None:
    table = SockrefTable()
    entry = sockref(foreign=Endpoint(FOREIGN.address, 0))
    table.add(entry)
    table.set_foreign(entry, FOREIGN)
    assert table.at_foreign(Protocol.TCP, FOREIGN) == table.at_local(Protocol.TCP, LOCAL) == [entry]
    assert not table.has_foreign(Protocol.TCP, Endpoint(FOREIGN.address, 0))
    table.remove(entry)
    assert len(table) == 0
    assert not table.has_foreign(Protocol.TCP, FOREIGN)


def test_shared_entry_is_every_sockets_until_each_has_left() -> None:
    table = SockrefTable()
    entry = sockref(foreign=LOCAL, flags=Flag.MARK_ONLY, cookie=1)
    table.add(entry)
    table.share(entry, 2)
    assert table.of_socket(1) is table.of_socket(2) is entry
    assert table.leave(1) is entry
    assert table.of_socket(1) is None
    assert table.leave(1) is None
    assert entry.cookies == {2}
    table.remove(entry)
    assert table.of_socket(2) is None
    assert entry not in table


def test_every_change_is_told() -> None:
    table, told = SockrefTable(), list[tuple[Endpoint, Flag, bool]]()
    table.on_change = lambda changed: told.append((changed.foreign, changed.flags, changed in table))
    entry = sockref(foreign=Endpoint(FOREIGN.address, 0))
    table.add(entry)
    table.set_foreign(entry, FOREIGN)
    table.set_flags(entry, Flag.CONNECT)
    table.remove(entry)
    assert told == [
        (Endpoint(FOREIGN.address, 0), Flag.LISTEN, True),
        (FOREIGN, Flag.LISTEN, True),
        (FOREIGN, Flag.CONNECT, True),
        (FOREIGN, Flag.CONNECT, False),
    ]


ends = st.builds(Endpoint, st.sampled_from([LOCAL.address, FOREIGN.address]), st.integers(0, 2))
remotes = st.one_of(st.just(NOBODY), ends)
sockrefs = st.builds(sockref, ends, ends, remotes, flags=st.sampled_from([Flag.LISTEN, Flag.CONNECT]))


@given(
    st.lists(st.tuples(st.sampled_from(["add", "remove", "move"]), sockrefs, ends), max_size=30), st.none() | remotes
)
def test_tables_agree_with_a_walk_over_all(steps: list[tuple[str, Sockref, Endpoint]], remote: Endpoint | None) -> None:
    """Whatever is done, each look-up finds what a search through all entries in their order finds."""
    table, model = SockrefTable(), list[Sockref]()
    moved: dict[Sockref, int] = {}  # a rehashed entry is the youngest of its new place
    for number, (what, entry, to) in enumerate(steps):
        if what == "add":
            table.add(entry)
            model.append(entry)
            moved[entry] = number
        elif what == "remove" and model:
            table.remove(model.pop(0))
        elif what == "move" and model:
            table.set_foreign(model[0], to)
            moved[model[0]] = number
    assert sorted(map(id, table)) == sorted(map(id, model))
    for end in (Endpoint(address, port) for address in (LOCAL.address, FOREIGN.address) for port in range(3)):
        at_local = [entry for entry in model if entry.local == end]
        at_foreign = sorted((entry for entry in model if entry.foreign == end), key=lambda entry: moved[entry])
        assert table.at_local(Protocol.TCP, end) == at_local
        assert table.at_foreign(Protocol.TCP, end) == at_foreign
        assert table.find_local(Protocol.TCP, end, remote, is_listening) is walk(at_local, remote)
        assert table.find_foreign(Protocol.TCP, end, remote, is_listening) is walk(at_foreign, remote)


def walk(entries: list[Sockref], remote: Endpoint | None) -> Sockref | None:
    """The look-up order of tproxy.md, said plainly."""
    entries = [entry for entry in entries if is_listening(entry)]
    if remote is None:
        return entries[0] if entries else None
    exact = [
        entry
        for entry in entries
        if any(entry.remote.address)
        and entry.remote.address == remote.address
        and entry.remote.port in (0, remote.port)
    ]
    general = [entry for entry in entries if not any(entry.remote.address)]
    return next(iter(exact + general), None)


def test_removal_costs_the_same_among_many_as_among_few() -> None:
    """All of them share one foreign address, and one local one; the last goes first."""

    def cost(others: int) -> float:
        table = SockrefTable()
        for _ in range(others):
            table.add(sockref())
        mine = [sockref(cookie=2) for _ in range(200)]
        start = time.perf_counter()
        for entry in mine:
            table.add(entry)
        for entry in reversed(mine):
            table.remove(entry)
        return time.perf_counter() - start

    few, many = (min(cost(others) for _ in range(3)) for others in (10, 20_000))
    assert many < 20 * few, "a walk would cost a thousand times as much"
