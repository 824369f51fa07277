"""Narrowing: what rules and sockrefs want, as nft conditions and set members."""

from __future__ import annotations

import errno
import random
import shlex
from collections.abc import Iterable, Mapping

import pytest

from nfq_engine.core.nat import PortRange
from nfq_engine.core.one_way import Listener
from nfq_engine.core.packet import Endpoint, Protocol
from nfq_engine.core.pipeline import Engine
from nfq_engine.core.rule_text import parse_command
from nfq_engine.core.sockref import Flag, Sockref
from nfq_engine.core.surroundings import AddressType
from nfq_engine.shell import nftables
from nfq_engine.shell.narrowing import Diversion
from nfq_engine.shell.nftables import Element, NftError, NftSocket


class FakeNft(NftSocket):
    """Sets as Python sets."""

    def __init__(self) -> None:
        self.members: set[tuple[str, bytes]] = set()
        self.fails = False
        self.transactions = 0

    def change(
        self, added: Mapping[str, Iterable[Element]], removed: Mapping[str, Iterable[bytes]] | None = None
    ) -> None:
        self.transactions += 1
        if self.fails:
            raise OSError(errno.ENOMEM, "no memory")
        gone = {(name, key) for name, keys in (removed or {}).items() for key in keys}
        assert gone <= self.members
        new = {(name, key) for name, elements in added.items() for key, _ in elements}
        assert not new & self.members
        self.members = self.members - gone | new

    @property
    def names(self) -> list[str]:
        return sorted(name for name, _ in self.members)


class NoInterfaces:
    def first_address(self, interface: str, size: int) -> bytes | None:
        raise AssertionError(f"nobody asks for {interface}'s addresses of {size} bytes")

    def address_type(self, address: bytes) -> AddressType:
        return AddressType.UNICAST


@pytest.fixture
def table() -> Engine:
    return Engine(NoInterfaces(), random.Random(1), PortRange(1, 2))


@pytest.fixture
def nft() -> FakeNft:
    return FakeNft()


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    run: list[str] = []
    monkeypatch.setattr(nftables, "run", run.append)
    return run


@pytest.fixture
def diversion(table: Engine, nft: FakeNft, texts: list[str]) -> Diversion:
    return Diversion(table, nft)


def add(table: Engine, number: int = 1, foreign: str = "198.51.100.7", flags: Flag = Flag.LISTEN) -> Sockref:
    address = "::1" if ":" in foreign else "10.0.0.1"
    nobody = Endpoint(bytes(16 if ":" in foreign else 4), 0)
    sockref = Sockref(
        Protocol.UDP, Endpoint.of(address, number), Endpoint.of(foreign, 53), nobody, {number}, 0.0, flags
    )
    table.sockrefs.add(sockref)
    return sockref


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ([], []),
        (["-p tcp --dport 80"], ["meta l4proto tcp th dport { 80-80 }"]),
        (["-p tcp --dport 80", "-p tcp --dport 81:90"], ["meta l4proto tcp th dport { 80-90 }"]),
        (["-p tcp --dport 80", "-p tcp --dport 85:90"], ["meta l4proto tcp th dport { 80-80, 85-90 }"]),
        (["-p tcp --dport 85:90", "-p tcp --dport 80:100"], ["meta l4proto tcp th dport { 80-100 }"]),
        (
            ["-p tcp --dport 80", "-p udp --dport 80"],
            [f"meta l4proto {p} th dport {{ 80-80 }}" for p in ("tcp", "udp")],
        ),
        (["-p tcp"], ["meta l4proto tcp"]),
        ([""], ["meta l4proto tcp", "meta l4proto udp"]),
        (["-p tcp ! --dport 80"], ["meta l4proto tcp"]),
        (["-i eth0 -p tcp"], ['iifname "eth0" meta l4proto tcp']),
        (["-i eth+ -p tcp"], ['iifname "eth*" meta l4proto tcp']),
        (["! -i eth0 -p tcp"], ['iifname != "eth0" meta l4proto tcp']),
        (["-i + -p tcp"], ["meta l4proto tcp"]),
        (["-i a*b -p tcp"], ["meta l4proto tcp"]),
    ],
)
def test_what_rules_want(
    table: Engine, diversion: Diversion, texts: list[str], rules: list[str], wanted: list[str]
) -> None:
    for rule in rules:
        table.ruleset.apply(parse_command(["-A", "PREROUTING", *shlex.split(rule), "-j", "ACCEPT"]))
    diversion.adjust()
    prefix = "add rule inet nfq_tproxy wanted_prerouting "
    assert [line.removeprefix(prefix) for line in texts[0].splitlines() if line.startswith(prefix)] == [
        f"{condition} jump to_queue" for condition in wanted
    ]


def test_policy_drop_wants_everything(table: Engine, diversion: Diversion, texts: list[str]) -> None:
    table.ruleset.apply(parse_command(["-P", "OUTPUT", "DROP"]))
    diversion.adjust()
    assert "add rule inet nfq_tproxy wanted_output jump to_queue" in texts[0]


def test_chains_are_changed_only_if_something_else_is_wanted(
    table: Engine, diversion: Diversion, texts: list[str]
) -> None:
    diversion.adjust()
    texts.clear()
    table.ruleset.apply(parse_command(["-N", "own"]))
    diversion.adjust()
    assert texts == []
    table.ruleset.apply(parse_command(["-A", "OUTPUT", "-j", "own"]))
    diversion.adjust()
    assert "wanted_prerouting" not in texts[0]


def test_refused_chains_want_everything(
    table: Engine, diversion: Diversion, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_conditions(text: str) -> None:
        if "tcp" in text:
            raise NftError("no")
        texts.append(text)

    monkeypatch.setattr(nftables, "run", refuse_conditions)
    table.ruleset.apply(parse_command(shlex.split("-A PREROUTING -p tcp -j ACCEPT")))
    diversion.adjust()
    assert "add rule inet nfq_tproxy wanted_prerouting jump to_queue" in texts[0]


@pytest.mark.parametrize(
    ("foreign", "flags", "names"),
    [
        ("198.51.100.7", Flag.LISTEN, ["foreign4", "local4"]),
        ("2001:db8::7", Flag.LISTEN, ["foreign6", "local6"]),
        ("198.51.100.7", Flag.LISTEN | Flag.UNIDIR, ["foreign4", "local4", "one_way4", "one_way_local4"]),
    ],
)
def test_sockref_is_wanted_until_it_goes(
    table: Engine, diversion: Diversion, nft: FakeNft, foreign: str, flags: Flag, names: list[str]
) -> None:
    sockref = add(table, foreign=foreign, flags=flags)
    diversion.adjust()
    assert nft.names == names
    assert diversion.is_one_way(sockref.foreign) is bool(flags & Flag.UNIDIR)
    table.sockrefs.remove(sockref)
    diversion.adjust()
    assert nft.names == []


def test_shared_foreign_endpoint_stays_until_the_last(table: Engine, diversion: Diversion, nft: FakeNft) -> None:
    sockrefs = [add(table, number) for number in (1, 2)]
    diversion.adjust()
    table.sockrefs.remove(sockrefs[0])
    diversion.adjust()
    assert nft.names == ["foreign4", "local4"]
    assert nft.transactions == 2


def test_other_flags_and_another_foreign_endpoint_are_noticed(
    table: Engine, diversion: Diversion, nft: FakeNft
) -> None:
    sockref = add(table)
    diversion.adjust()
    before = nft.members
    table.sockrefs.set_flags(sockref, Flag.LISTEN | Flag.UNIDIR)
    diversion.adjust()
    assert nft.names == ["foreign4", "local4", "one_way4", "one_way_local4"]
    table.sockrefs.set_flags(sockref, Flag.LISTEN)
    table.sockrefs.set_foreign(sockref, Endpoint.of("198.51.100.7", 54))
    diversion.adjust()
    assert nft.names == ["foreign4", "local4"]
    assert nft.members != before


def test_sockref_without_a_foreign_port_cannot_be_asked_for(table: Engine, diversion: Diversion, nft: FakeNft) -> None:
    sockref = add(table)
    table.sockrefs.set_foreign(sockref, Endpoint(sockref.foreign.address, 0))
    diversion.adjust()
    assert nft.names == ["local4"]


def test_refused_change_is_tried_again(table: Engine, diversion: Diversion, nft: FakeNft) -> None:
    sockref = add(table)
    nft.fails = True
    diversion.adjust()
    nft.fails = False
    diversion.adjust()
    assert nft.names == ["foreign4", "local4"]
    nft.fails = True
    table.sockrefs.remove(sockref)
    diversion.adjust()
    nft.fails = False
    diversion.adjust()
    assert nft.names == []
    diversion.adjust()
    assert nft.transactions == 4


ONE_WAY = [
    ([], []),
    (["-p udp --dport 53 -j TPROXY --on-port 5000"], ["meta l4proto udp th dport { 53-53 }"]),
    (["-p udp --dport 53 -j TPROXY --on-port 5001"], []),
    (["-p udp --dport 53 -j TPROXY --on-port 0"], ["meta l4proto udp th dport { 53-53 }"]),
    (["-p tcp --dport 53 -j TPROXY --on-port 5000"], []),
    (["-i eth0 -j own", "-p udp -j ACCEPT", "-p tcp -j own"], ['iifname "eth0" meta l4proto udp']),
]


@pytest.mark.parametrize(("rules", "conditions"), ONE_WAY)
def test_what_could_go_to_a_one_way_listener_comes_before_conntrack_and_once(
    table: Engine, diversion: Diversion, texts: list[str], rules: list[str], conditions: list[str]
) -> None:
    table.ruleset.apply(parse_command(["-N", "own"]))
    for rule in rules:
        table.ruleset.apply(parse_command(["-A", "PREROUTING", *shlex.split(rule)]))
    diversion.adjust()
    texts.clear()
    table.listeners.add(Listener(1, Endpoint.of("0.0.0.0", 5000), takes_ipv4=False, owner=0, since=0.0))
    diversion.adjust()
    lines = [line.removeprefix("add rule inet nfq_tproxy ") for text in texts for line in text.splitlines()]
    assert [line for line in lines if line.startswith("one_way_prerouting ")] == [
        f"one_way_prerouting {condition} jump to_queue" for condition in conditions
    ]
    assert [line for line in lines if line.startswith("decided_prerouting ")] == [
        f"decided_prerouting {condition} accept" for condition in conditions
    ]
    assert "untrack_listeners udp dport { 5000 } fib daddr type local notrack" in lines
    texts.clear()
    table.listeners.discard(1)
    diversion.adjust()
    assert "add rule" not in "".join(texts)
    assert "flush chain inet nfq_tproxy untrack_listeners" in "".join(texts)
