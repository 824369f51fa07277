"""iptables' language: what is written becomes a value, and the value is written as iptables writes it."""

from __future__ import annotations

import random
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
from nfq_engine.core.rule_text import RuleError, parse_command, restore, save, split_words
from nfq_engine.core.rule_values import (
    AddressType,
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
from nfq_engine.core.ruleset import Ruleset

by_name = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def parse_rule(text: str, chain: str = "PREROUTING") -> Rule:
    command = parse_command(["-A", chain, *split_words(text)])
    assert isinstance(command, Append)
    [rule] = command.rules
    return rule


def ruleset_of(text: str) -> Ruleset:
    ruleset = Ruleset(random.Random(0))
    restore(f"*tproxy\n{text}\nCOMMIT\n", ruleset)
    return ruleset


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


REFUSED = {
    "": "no command specified",
    "-j ACCEPT": "no command specified",
    "-A": 'option "-A" requires an argument',
    "-A PREROUTING -L": "cannot use -L with -A",
    "-A PREROUTING -A PREROUTING": "cannot use -A with -A",
    "! -A PREROUTING": "cannot have ! before -A",
    "-A PREROUTING foo": "Bad argument `foo'",
    "-A PREROUTING -": "Bad argument `-'",
    "-A PREROUTING -y": 'unknown option "-y"',
    "-A PREROUTING -0": 'unknown option "-0"',
    "-A PREROUTING --": 'unknown option "--"',
    "-A PREROUTING --frob 1": 'unknown option "--frob"',
    "-A PREROUTING --d 80": 'unknown option "--d"',
    "-A PREROUTING --syn": 'unknown option "--syn"',
    "-A PREROUTING -p tcp --tcp-flags SYN SYN": 'unknown option "--tcp-flags"',
    "-A PREROUTING -f": 'unknown option "-f"',
    "-A PREROUTING -4": 'unknown option "-4"',
    "-A PREROUTING -n": "illegal option `-n' with this command: -A",
    "-A PREROUTING --line-numbers": "illegal option `--line-numbers' with this command: -A",
    "-L -j ACCEPT": "illegal option `-j' with this command: -L",
    "-S -n": "illegal option `-n' with this command: -S",
    "-D PREROUTING -c 1 2": "illegal option `-c' with this command: -D",
    "-D PREROUTING 1 -j ACCEPT": "illegal option `-j' with a rule number",
    "-t nat -L": "table `nat' does not exist: there is only `tproxy'",
    # Numbers and names of rules and chains.
    "-D PREROUTING x": "invalid rule number `x'",
    "-D PREROUTING 0": "invalid rule number `0'",
    "-I PREROUTING 0": "invalid rule number `0'",
    "-I PREROUTING 99999999999999999999999": "invalid rule number `99999999999999999999999'",
    "-R PREROUTING -j ACCEPT": "-R requires a chain and a rule number",
    "-R PREROUTING 1 -s 1.1.1.1,2.2.2.2": "replacement rule does not specify a unique address",
    "-P OUTPUT": "-P requires a chain and a policy",
    "-P OUTPUT RETURN": "bad policy name `RETURN': there are ACCEPT, DROP",
    "-E user": "-E requires old-chain-name and new-chain-name",
    "-E user TPROXY": "chain name `TPROXY' may not clash with target name",
    "-N ACCEPT": "chain name `ACCEPT' may not clash with target name",
    "-N -a": "chain name `-a' not allowed to start with `-'",
    "-N !a": "chain name `!a' not allowed to start with `!'",
    '-N ""': "invalid chain name `'",
    '-N "a b"': "invalid chain name `a b'",
    "-N a\\b": "invalid chain name `a\\b'",
    f"-N {'a' * 29}": f"chain name `{'a' * 29}' too long (must be under 29 chars)",
    # Counts.
    "-A PREROUTING -c 5": "-c requires packet and byte counter",
    "-A PREROUTING -c x 5": "-c packet counter not numeric: `x'",
    "-A PREROUTING -c 5 x": "-c byte counter not numeric: `x'",
    "-A PREROUTING -c 5,": "-c byte counter not numeric: `'",
    "-A PREROUTING -c 1 2 -c 1 2": "multiple -c flags not allowed",
    # Protocols.
    "-A PREROUTING -p icmp": 'unknown protocol "icmp" specified: the table knows tcp, udp and all',
    "-A PREROUTING -p 1": 'protocol "1" is not supported: the table sees tcp and udp',
    "-A PREROUTING -p 300": 'unknown protocol "300" specified: the table knows tcp, udp and all',
    "-A PREROUTING ! -p all": "rule would never match protocol",
    "-A PREROUTING -p tcp -p udp": "multiple -p flags not allowed",
    "-A PREROUTING ! ! -p tcp": "multiple consecutive ! not allowed",
    "-A PREROUTING ! -p ! tcp": "multiple consecutive ! not allowed",
    "-A PREROUTING -p tcp !": "nothing appropriate following !",
    # Addresses and interfaces.
    "-A PREROUTING -s": 'option "-s" requires an argument',
    "-A PREROUTING -s !": 'option "-s" requires an argument',
    "-A PREROUTING -s example.org": "host/network `example.org' not found: names are not resolved",
    "-A PREROUTING -s 10.0.0.256": "host/network `10.0.0.256' not found: names are not resolved",
    "-A PREROUTING -s 10.0.0.0.1": "host/network `10.0.0.0.1' not found: names are not resolved",
    "-A PREROUTING -s 10./8": "host/network `10.' not found: names are not resolved",
    "-A PREROUTING -s 10.0.0.1/8/9": "host/network `10.0.0.1/8' not found: names are not resolved",
    "-A PREROUTING -s 10.0.0.1,": "host/network `' not found: names are not resolved",
    "-A PREROUTING -s fe80::1%lo": "host/network `fe80::1%lo' not found: names are not resolved",
    "-A PREROUTING -s ::1::": "host/network `::1::' not found: names are not resolved",
    "-A PREROUTING -d 10.0.0.1/33": "invalid mask `33' specified",
    "-A PREROUTING -d 10.0.0.1/": "invalid mask `' specified",
    "-A PREROUTING -d 10.0.0.1/255.255": "invalid mask `255.255' specified",
    "-A PREROUTING -d 10.0.0.1/ffff::": "invalid mask `ffff::' specified",
    "-A PREROUTING -d ::1/129": "invalid mask `129' specified",
    "-A PREROUTING -d ::1/255.0.0.0": "invalid mask `255.0.0.0' specified",
    "-A PREROUTING ! -s 1.1.1.1,2.2.2.2": (
        "! not allowed with multiple source or destination IP addresses `1.1.1.1,2.2.2.2'"
    ),
    "-A PREROUTING -s 10.0.0.1 -d ::1": "addresses of both families in one rule: 10.0.0.1, ::1",
    "-A PREROUTING -s ::1 -p tcp -j TPROXY --on-port 1 --on-ip 1.2.3.4": (
        "addresses of both families in one rule: ::1, 1.2.3.4"
    ),
    '-A PREROUTING -i ""': "empty interface is likely to be undesired",
    "-A PREROUTING -i a123456789012345": "interface name `a123456789012345' is longer than 15 characters",
    "-A PREROUTING -i a/b": "interface name `a/b' has a character that the kernel does not allow",
    "-A PREROUTING -o eth0": "can't use -o with PREROUTING",
    "-A OUTPUT -i eth0": "can't use -i with OUTPUT",
    # Ports.
    "-A PREROUTING --dport 80": 'unknown option "--dport"',
    "-A PREROUTING ! -p tcp --dport 80": 'unknown option "--dport"',
    "-A PREROUTING -m tcp --dport 80": "match `tcp' needs `-p tcp'",
    "-A PREROUTING -p udp -m tcp": "match `tcp' needs `-p tcp'",
    "-A PREROUTING ! -p udp -m udp": "match `udp' needs `-p udp'",
    "-A PREROUTING -p tcp --dport": 'option "--dport" requires an argument',
    "-A PREROUTING -p tcp --dport 80x": "invalid port/service `80x' specified",
    "-A PREROUTING -p tcp --dport http": "invalid port/service `http' specified",
    "-A PREROUTING -p tcp --dport 65536": "invalid port/service `65536' specified",
    "-A PREROUTING -p tcp --dport -1": "invalid port/service `-1' specified",
    "-A PREROUTING -p tcp --dport=": "invalid port/service `' specified",
    "-A PREROUTING -p tcp --dport 80:90:100": "invalid port/service `90:100' specified",
    "-A PREROUTING -p tcp --dport 90:80": "invalid portrange (min > max) `90:80'",
    "-A PREROUTING -p tcp --dport 80 --destination-port 81": (
        'tcp: option "--destination-port" can only be used once.'
    ),
    # Targets.
    "-A PREROUTING -j ACCEPT -j DROP": "multiple -j flags not allowed",
    "-A PREROUTING -j ACCEPT -g user": "cannot use -g with -j",
    "-A PREROUTING ! -j ACCEPT": "cannot have ! before -j",
    "-A PREROUTING --jump=": "invalid target name (too short)",
    "-A PREROUTING -p tcp -j TPROXY": 'TPROXY: option "--on-port" must be specified',
    "-A PREROUTING -p tcp -j TPROXY --on-port 65536": 'TPROXY: bad port for option "--on-port": `65536\'',
    "-A PREROUTING -p tcp -j TPROXY --on-port 0x50": 'TPROXY: bad port for option "--on-port": `0x50\'',
    "-A PREROUTING -p tcp -j TPROXY --on-port 1 --on-port 2": 'TPROXY: option "--on-port" can only be used once.',
    "-A PREROUTING -p tcp -j TPROXY ! --on-port 1": 'TPROXY: option "--on-port" cannot be inverted.',
    "-A PREROUTING -p tcp -j TPROXY --on-port 1 --on-ip x": 'TPROXY: bad address for option "--on-ip": `x\'',
    "-A PREROUTING -p tcp -j TPROXY --on-port 1 --on-ip 10.0.0.0/8": (
        'TPROXY: bad address for option "--on-ip": `10.0.0.0/8\''
    ),
    "-A PREROUTING -p tcp -j TPROXY --on-port 1 --tproxy-mark 1": 'unknown option "--tproxy-mark"',
    "-A PREROUTING -j TPROXY --on-port 1": "TPROXY needs `-p tcp' or `-p udp'",
    "-A PREROUTING ! -p tcp -j TPROXY --on-port 1": "TPROXY needs `-p tcp' or `-p udp'",
    "-A PREROUTING -p tcp --on-port 1 -j TPROXY": 'unknown option "--on-port"',
    # Other matches.
    "-A PREROUTING -m": 'option "-m" requires an argument',
    "-A PREROUTING ! -m mark --mark 1": "cannot have ! before -m",
    "-A PREROUTING -m state --state NEW": (
        "match `state' is not supported: there are addrtype, comment, limit, mark, multiport, owner, statistic, "
        "tcp, udp"
    ),
    "-A PREROUTING -m multiport --dports 80": "multiport needs `-p tcp' or `-p udp'",
    "-A PREROUTING ! -p tcp -m multiport --dports 80": "multiport needs `-p tcp' or `-p udp'",
    "-A PREROUTING -p tcp -m multiport": "multiport: exactly one of --sports, --dports and --ports must be specified",
    "-A PREROUTING -p tcp -m multiport --sports 1 --dports 2": (
        "multiport: exactly one of --sports, --dports and --ports must be specified"
    ),
    "-A PREROUTING -p tcp -m multiport --dports 80,,81": "invalid port/service `' specified",
    "-A PREROUTING -p tcp -m multiport --dports 80:": "invalid port/service `' specified",
    "-A PREROUTING -p tcp -m multiport --dports 80:80": "invalid portrange specified: `80:80'",
    "-A PREROUTING -p tcp -m multiport --dports 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15:16": (
        "multiport: too many ports specified, more than 15: `1,2,3,4,5,6,7,8,9,10,11,12,13,14,15:16'"
    ),
    "-A PREROUTING -m mark": 'mark: option "--mark" must be specified',
    "-A PREROUTING -m mark -m mark --mark 1": 'mark: option "--mark" must be specified',
    "-A PREROUTING -m mark --mark x": 'mark: bad integer value for option "--mark", or out of range: `x\'',
    "-A PREROUTING -m mark --mark 1/": 'mark: bad integer value for option "--mark", or out of range: `1/\'',
    "-A PREROUTING -m mark --mark 0x100000000": (
        'mark: bad integer value for option "--mark", or out of range: `0x100000000\''
    ),
    "-A PREROUTING -m comment": 'comment: option "--comment" must be specified',
    "-A PREROUTING -m comment ! --comment x": 'comment: option "--comment" cannot be inverted.',
    "-A PREROUTING -m comment --comment a\x1bb": "comment: unprintable character in `a\\x1bb'",
    f"-A PREROUTING -m comment --comment {'x' * 256}": f"comment: longer than 255 bytes: `{'x' * 80}...'",
    "-A PREROUTING -m addrtype": "addrtype: you must specify --src-type or --dst-type",
    "-A PREROUTING -m addrtype --dst-type foo": 'addrtype: bad type "foo"',
    "-A PREROUTING -m addrtype --dst-type LOCAL,": 'addrtype: bad type ""',
    "-A PREROUTING -m addrtype --dst-type anycast": (
        'addrtype: type "ANYCAST" is not supported: there are UNICAST, LOCAL, BROADCAST, MULTICAST'
    ),
    "-A PREROUTING -m addrtype --limit-iface-in": 'unknown option "--limit-iface-in"',
    "-A OUTPUT -m owner": "owner: at least one of --uid-owner, --gid-owner is required",
    "-A OUTPUT -m owner --uid-owner root": (
        'owner: bad value for "--uid-owner" option: "root": names are not resolved'
    ),
    "-A OUTPUT -m owner --gid-owner 6-5": ('owner: bad value for "--gid-owner" option: "6-5": names are not resolved'),
    "-A OUTPUT -m owner --uid-owner 4294967295": (
        'owner: bad value for "--uid-owner" option: "4294967295": names are not resolved'
    ),
    "-A OUTPUT -m owner --socket-exists": 'unknown option "--socket-exists"',
    "-A PREROUTING -m limit --limit x": 'bad rate "x"',
    "-A PREROUTING -m limit --limit 0": 'bad rate "0"',
    "-A PREROUTING -m limit --limit 5/": 'bad rate "5/"',
    "-A PREROUTING -m limit --limit 5/seconds": 'bad rate "5/seconds"',
    "-A PREROUTING -m limit --limit 10001/s": 'Rate too fast "10001/s"',
    "-A PREROUTING -m limit ! --limit 5/s": 'limit: option "--limit" cannot be inverted.',
    "-A PREROUTING -m limit --limit-burst 0": (
        'limit: bad value for option "--limit-burst", or out of range (1-10000): `0\''
    ),
    "-A PREROUTING -m limit --limit-burst 10001": (
        'limit: bad value for option "--limit-burst", or out of range (1-10000): `10001\''
    ),
    "-A PREROUTING -m statistic": 'statistic: option "--mode" must be specified',
    "-A PREROUTING -m statistic --mode foo": 'statistic: bad mode "foo"',
    "-A PREROUTING -m statistic --mode random": "statistic: --probability must be specified when using random mode",
    "-A PREROUTING -m statistic --mode nth --every 3": "statistic: --packet must be specified when using nth mode",
    "-A PREROUTING -m statistic --mode nth --every 3 --packet 0 --probability 1": (
        "statistic: --probability cannot be used with nth mode"
    ),
    "-A PREROUTING -m statistic --mode random --probability 1.1": (
        'statistic: bad value for option "--probability", or out of range (0-1): `1.1\''
    ),
    "-A PREROUTING -m statistic --mode random --probability nan": (
        'statistic: bad value for option "--probability", or out of range (0-1): `nan\''
    ),
    "-A PREROUTING -m statistic --mode nth --every 0 --packet 0": (
        'statistic: bad value for option "--every", or out of range (1-4294967295): `0\''
    ),
    "-A PREROUTING -m statistic --mode nth --every 3 --packet 3": (
        "statistic: the --packet p must be 0 <= p <= n-1: `3'"
    ),
}


@pytest.mark.parametrize(("line", "message"), REFUSED.items(), ids=list(REFUSED))
def test_a_bad_command_is_refused_by_name(line: str, message: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_command(split_words(line))
    assert str(caught.value) == message


# Whatever may come.


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


def _known_words() -> list[str]:
    """Everything that means something, so that garbage gets deep into the parser."""
    return sorted({word for line in [*REFUSED, *(case.written for case in CASES)] for word in line.split()})


def refusal_of(ruleset: Ruleset, arguments: list[str]) -> str | None:
    try:
        ruleset.apply(parse_command(arguments))
    except RuleError as error:
        return str(error)
    return None


@given(st.lists(st.sampled_from(_known_words()) | st.text(max_size=12), max_size=12))
def test_garbage_is_refused_or_done_and_never_anything_else(arguments: list[str]) -> None:
    ruleset = ruleset_of("-N user\n-A PREROUTING -j user -c 1 2")
    before = save(ruleset, counters=True)
    refusal = refusal_of(ruleset, arguments)
    if refusal is not None:
        assert refusal.isprintable()
        assert save(ruleset, counters=True) == before
    saved = save(ruleset, counters=True)
    again = Ruleset(random.Random(0))
    restore(saved, again, counters=True)
    assert save(again, counters=True) == saved
