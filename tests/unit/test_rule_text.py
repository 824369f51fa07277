"""iptables' language: what is written becomes a value, and the value is written as iptables writes it."""

from __future__ import annotations

import string
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_cases import CASES, Case

from nfq_engine.core.packet import Protocol
from nfq_engine.core.rule_commands import (
    Append,
    Check,
    Command,
    Delete,
    DeleteChain,
    DeleteNumber,
    Flush,
    Insert,
    NewChain,
    Rename,
    Replace,
    SetPolicy,
    Show,
    Specify,
    Zero,
)
from nfq_engine.core.rule_listing import specification
from nfq_engine.core.rule_matches import (
    ALL_BITS,
    AddressTypeMatch,
    Bits,
    Comment,
    MarkMatch,
    Multiport,
    PortMatch,
    Ports,
    PortSide,
)
from nfq_engine.core.rule_rates import CERTAINTY, RATE_UNITS, Limit, NthMatch, RandomMatch
from nfq_engine.core.rule_text import parse_command, split_words
from nfq_engine.core.rule_values import (
    AnyTarget,
    Counts,
    Jump,
    Match,
    Network,
    Policy,
    Rule,
    Target,
    Term,
    Tproxy,
)
from nfq_engine.core.surroundings import AddressType

by_name = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def parse_rule(text: str, chain: str = "PREROUTING") -> Rule:
    command = parse_command(["-A", chain, *split_words(text)])
    assert isinstance(command, Append)
    [rule] = command.rules
    return rule


@by_name
def test_what_is_written_becomes_the_rule(case: Case) -> None:
    assert parse_rule(case.written, case.chain) == case.rule


@by_name
def test_the_rule_is_printed_as_iptables_prints_it(case: Case) -> None:
    assert specification(case.chain, case.rule) == f"-A {case.chain} {case.printed}".strip()


@by_name
def test_what_is_printed_is_read_as_the_same_rule(case: Case) -> None:
    assert parse_rule(case.printed, case.chain) == case.rule


ANY = Rule()
ACCEPT = Rule(target=Target.ACCEPT)

COMMANDS: list[tuple[str, Command]] = [
    ("-A PREROUTING -j ACCEPT", Append("PREROUTING", (ACCEPT,))),
    ("--append PREROUTING --jump ACCEPT", Append("PREROUTING", (ACCEPT,))),
    ("-t tproxy -A PREROUTING", Append("PREROUTING", (ANY,))),
    ("-A PREROUTING -c 5 60", Append("PREROUTING", (ANY,), Counts(5, 60))),
    ("-A PREROUTING --set-counters 5,60", Append("PREROUTING", (ANY,), Counts(5, 60))),
    ("-I PREROUTING -j ACCEPT", Insert("PREROUTING", 1, (ACCEPT,))),
    ("-I PREROUTING 3 -j ACCEPT", Insert("PREROUTING", 3, (ACCEPT,))),
    ("-j ACCEPT -I PREROUTING 3", Insert("PREROUTING", 3, (ACCEPT,))),
    ("-R PREROUTING 3 -j ACCEPT -c 1 2", Replace("PREROUTING", 3, ACCEPT, Counts(1, 2))),
    ("-D PREROUTING -j ACCEPT", Delete("PREROUTING", (ACCEPT,))),
    ("-D PREROUTING 2", DeleteNumber("PREROUTING", 2)),
    ("-C PREROUTING -j ACCEPT", Check("PREROUTING", (ACCEPT,))),
    ("-F", Flush(None)),
    ("--flush user", Flush("user")),
    ("-Z", Zero(None)),
    ("-Z user", Zero("user")),
    ("-Z user 4", Zero("user", 4)),
    ("-N user", NewChain("user")),
    ("--new-chain=user", NewChain("user")),
    ("-X", DeleteChain(None)),
    ("-X user", DeleteChain("user")),
    ("-E user other", Rename("user", "other")),
    ("-P OUTPUT DROP", SetPolicy("OUTPUT", Policy.DROP)),
    ("-P OUTPUT ACCEPT -c 1 2", SetPolicy("OUTPUT", Policy.ACCEPT, Counts(1, 2))),
    ("-S", Specify(None)),
    ("-S user 2 -v", Specify("user", 2, with_counts=True)),
    ("-L", Show(None)),
    ("-vL user", Show("user", is_verbose=True)),
    ("-Luser", Show("user")),
    ("-L user 2 -n", Show("user", 2, is_numeric=True)),
    ("-nvxL --line-numbers", Show(None, None, True, True, True, True)),
    ("-L --line", Show(None, has_numbers=True)),
    ("-L user -Z", Show("user", then_zero=True)),
    ("-L -Z user", Show("user", then_zero=True)),
    ("-Z -S -v", Specify(None, with_counts=True, then_zero=True)),
]


@pytest.mark.parametrize(("line", "command"), COMMANDS, ids=[line for line, _ in COMMANDS])
def test_arguments_become_a_command(line: str, command: Command) -> None:
    assert parse_command(line.split()) == command


def test_several_addresses_make_a_rule_for_each_pair() -> None:
    command = parse_command(["-A", "PREROUTING", "-s", "10.0.0.1,10.0.0.2", "-d", "10.1.0.1,10.1.0.2"])
    assert isinstance(command, Append)
    assert [specification("c", rule) for rule in command.rules] == [
        "-A c -s 10.0.0.1/32 -d 10.1.0.1/32",
        "-A c -s 10.0.0.1/32 -d 10.1.0.2/32",
        "-A c -s 10.0.0.2/32 -d 10.1.0.1/32",
        "-A c -s 10.0.0.2/32 -d 10.1.0.2/32",
    ]


# Any rule.


T = TypeVar("T")


def terms(values: st.SearchStrategy[T]) -> st.SearchStrategy[Term[T]]:
    return st.builds(Term, values, st.booleans())


def _network(address: bytes, bits: int) -> Network:
    mask = ((1 << 128) - (1 << (128 - bits))).to_bytes(16, "big")[: len(address)]
    return Network(bytes(a & m for a, m in zip(address, mask, strict=True)), mask)


def _ports(low: int, high: int) -> Ports:
    return Ports(min(low, high), max(low, high))


port = st.integers(0, 65535)
port_ranges = st.builds(_ports, port, port).filter(lambda ports: ports != Ports(0, 65535))
names = st.text(string.ascii_letters + string.digits + ".+_:", min_size=1, max_size=15).filter(lambda name: name != "+")
protocols = st.sampled_from(Protocol)
types = st.frozensets(st.sampled_from(AddressType), min_size=1)
rates = st.builds(lambda unit, count: unit // count, st.sampled_from(list(RATE_UNITS.values())), st.integers(1, 10_000))
matches: st.SearchStrategy[Match] = st.one_of(
    st.builds(Comment, st.text(max_size=60).filter(str.isprintable)),
    st.builds(MarkMatch, terms(st.builds(Bits, st.integers(0, ALL_BITS), st.integers(0, ALL_BITS)))),
    st.builds(AddressTypeMatch, terms(types), st.none() | terms(types)),
    st.builds(Limit, rates, st.integers(1, 10_000)),
    st.builds(RandomMatch, terms(st.integers(0, CERTAINTY))),
    st.integers(1, 0xFFFFFFFF).flatmap(lambda n: st.builds(NthMatch, terms(st.just(n)), st.integers(0, n - 1))),
)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    """Any rule that may stand in PREROUTING."""
    protocol = draw(st.none() | terms(protocols))
    size = draw(st.sampled_from([4, 16]))
    address = st.binary(min_size=size, max_size=size)
    network = st.none() | terms(st.builds(_network, address, st.integers(0, size * 8)))
    plain = st.none() | st.sampled_from(Target) | st.builds(Jump, st.just("user"), st.booleans())
    targets: st.SearchStrategy[AnyTarget | None] = plain
    wanted = matches
    if protocol is not None and not protocol.is_inverted:
        on_ip = st.none() | address.filter(any)
        targets = plain | st.builds(Tproxy, port, on_ip)
        port_terms = st.none() | terms(port_ranges)
        listed = st.lists(st.builds(_ports, port, port), min_size=1, max_size=7).map(tuple)
        wanted = (
            matches
            | st.builds(PortMatch, st.just(protocol.value), port_terms, port_terms)
            | st.builds(Multiport, st.sampled_from(PortSide), terms(listed))
        )
    return Rule(
        source=draw(network),
        destination=draw(network),
        in_interface=draw(st.none() | terms(names)),
        protocol=protocol,
        matches=tuple(draw(st.lists(wanted, max_size=3))),
        target=draw(targets),
    )


@given(rules())
def test_every_rule_is_read_as_it_is_printed(rule: Rule) -> None:
    line = specification("PREROUTING", rule)
    command = parse_command(split_words(line))
    assert isinstance(command, Append)
    assert command.rules == (rule,)
