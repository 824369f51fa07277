"""Redirects that are given again without asking the rules: when they are, and that they are the rules' own answers."""

from __future__ import annotations

import random
import shlex
from dataclasses import dataclass, field

import pytest
from builders import endpoint, flow, packet
from hypothesis import given
from hypothesis import strategies as st

from nfq_engine.core.known_redirects import KnownRedirects
from nfq_engine.core.packet import Endpoint, Protocol, Segment, parse
from nfq_engine.core.rule_text import parse_command
from nfq_engine.core.ruleset import BuiltinChain, Redirect, RulePacket, Ruleset
from nfq_engine.core.sockref import Flag, Sockref, SockrefTable

TO = Endpoint.of("10.0.0.2", 50080)
RULE = "-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080"


def syn(port: int = 1234, to: int = 80, version: int = 4, flags: str = "S") -> bytes:
    return packet(flow(endpoint("client", port, version), endpoint("server", to, version)), flags=flags)


@dataclass
class Table:
    """Rules that are asked, and what is known of their answers."""

    ruleset: Ruleset = field(default_factory=lambda: Ruleset(random.Random(1)))
    sockrefs: SockrefTable = field(default_factory=SockrefTable)

    def __post_init__(self) -> None:
        self.known = KnownRedirects(self.ruleset, self.sockrefs)

    def rule(self, text: str) -> None:
        self.ruleset.apply(parse_command(shlex.split(text)))

    def ask(self, data: bytes, interface: str = "eth0") -> None:
        """Have the rules decide, and remember a redirect."""
        segment = parse(data)
        assert isinstance(segment, Segment)
        asked = RulePacket(flow=segment.flow, in_interface=interface, out_interface="", length=len(data))
        if isinstance(self.ruleset.evaluate(BuiltinChain.PREROUTING, asked, 0.0), Redirect):
            self.known.remember(interface, data, segment.flow.destination, TO)

    def counts(self) -> list[tuple[int, int]]:
        chains = self.ruleset.chains.values()
        return [(entry.tally.packets, entry.tally.bytes) for chain in chains for entry in chain.entries]


@pytest.fixture
def table() -> Table:
    made = Table()
    made.rule(RULE)
    return made


@pytest.mark.parametrize("version", [4, 6])
def test_another_source_port_gets_the_same_answer(table: Table, version: int) -> None:
    table.ask(syn(1, version=version))
    known = table.known.find("eth0", syn(2, version=version))
    assert known is not None
    assert known.to == TO
    assert known.destination == endpoint("server", 80, version)


@pytest.mark.parametrize(
    ("data", "interface"),
    [
        pytest.param(syn(to=81), "eth0", id="another port"),
        pytest.param(syn(), "eth1", id="another interface"),
        pytest.param(syn(version=6), "eth0", id="another family"),
        pytest.param(syn(flags="SA"), "eth0", id="no SYN"),
        pytest.param(packet(flow(endpoint("client", 1), endpoint("server", 80), Protocol.UDP)), "eth0", id="UDP"),
        pytest.param(packet(flow(endpoint("server", 1), endpoint("server", 80))), "eth0", id="another source"),
        pytest.param(b"", "eth0", id="nothing"),
    ],
)
def test_what_differs_in_more_is_asked_again(table: Table, data: bytes, interface: str) -> None:
    table.ask(syn())
    assert table.known.find(interface, data) is None


def test_it_counts_where_the_rules_have_counted(table: Table) -> None:
    table.rule("-N user")
    table.rule("-I PREROUTING -p tcp -j user")
    table.rule("-A user -m comment --comment counts")
    data = syn()
    table.ask(data)
    known = table.known.find("eth0", data)
    assert known is not None
    once = table.counts()
    known.count(len(data))
    assert table.counts() == [(2 * packets, 2 * size) for packets, size in once]
    assert once == [(1, len(data))] * 3


@pytest.mark.parametrize(
    "match",
    [
        "-p tcp -m tcp --sport 1:1000",
        "-p tcp -m multiport --ports 80,443",
        "-m mark --mark 1",
        "-m limit --limit 1/s",
        "-m statistic --mode random --probability 0.5",
        "-m addrtype --src-type LOCAL",
    ],
)
def test_rules_that_ask_for_more_are_asked_every_time(table: Table, match: str) -> None:
    table.rule(f"-A PREROUTING {match} -j ACCEPT")
    table.ask(syn())
    assert table.known.find("eth0", syn()) is None
    table.rule(f"-D PREROUTING {match} -j ACCEPT")
    table.ask(syn())
    assert table.known.find("eth0", syn()) is not None


def test_other_rules_are_asked_anew(table: Table) -> None:
    table.ask(syn())
    table.rule("-A PREROUTING -p udp -j ACCEPT")
    assert table.known.find("eth0", syn()) is None


def test_other_addresses_of_interfaces_are_asked_for_anew(table: Table) -> None:
    table.ask(syn())
    table.known.clear()
    assert table.known.find("eth0", syn()) is None


def test_a_sockref_with_the_destination_comes_first(table: Table) -> None:
    table.ask(syn())
    sockref = Sockref(Protocol.TCP, TO, endpoint("server", 80), Endpoint(bytes(4), 0), {1}, 0.0, Flag.LISTEN)
    table.sockrefs.add(sockref)
    assert table.known.find("eth0", syn()) is None
    table.sockrefs.remove(sockref)
    assert table.known.find("eth0", syn()) is not None


@given(st.sampled_from([4, 6]), st.lists(st.tuples(st.integers(0, 79), st.integers(0, 255)), max_size=3), st.data())
def test_only_what_parses_as_the_same_question_is_known(
    version: int, changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    table = Table()
    table.rule(RULE)
    asked = syn(version=version)
    table.ask(asked)
    changed = bytearray(asked)
    for at, value in changes:
        changed[at % len(changed)] = value
    cut = bytes(changed[: data.draw(st.integers(len(changed) - 1, len(changed)))])
    if table.known.find("eth0", cut) is not None:
        parsed, before = parse(cut), parse(asked)
        assert isinstance(parsed, Segment)
        assert isinstance(before, Segment)
        assert parsed.is_syn
        assert parsed.flow.destination == before.flow.destination
        assert parsed.flow.source.address == before.flow.source.address
