"""The ruleset: what packets meet, what is counted, and what commands do to chains."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from nfq_engine.core.packet import Endpoint, FlowTuple, Protocol
from nfq_engine.core.rule_text import RuleError, parse_command, restore, split_words
from nfq_engine.core.rule_values import Owner
from nfq_engine.core.ruleset import Accept, BuiltinChain, Drop, Redirect, RulePacket, Ruleset, Verdict
from nfq_engine.core.surroundings import AddressType

PREROUTING, OUTPUT = BuiltinChain


def packet(
    source: str = "10.0.0.1",
    destination: str = "192.168.0.1",
    sport: int = 40000,
    dport: int = 80,
    protocol: Protocol = Protocol.TCP,
    in_interface: str = "eth0",
    out_interface: str = "",
) -> RulePacket:
    flow = FlowTuple(protocol, Endpoint.of(source, sport), Endpoint.of(destination, dport))
    return RulePacket(flow, in_interface, out_interface, length=60)


def run(ruleset: Ruleset, *lines: str) -> list[str]:
    output: list[str] = []
    for line in lines:
        output += ruleset.apply(parse_command(split_words(line)))
    return output


def ruleset_of(*lines: str, chance: Sequence[float] = ()) -> Ruleset:
    ruleset = Ruleset(Chances(chance))
    run(ruleset, *lines)
    return ruleset


class Chances:
    """The random numbers that a test wants."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self._numbers = iter(numbers)

    def random(self) -> float:
        return next(self._numbers)


def matches(rule: str, given: RulePacket, chain: BuiltinChain = PREROUTING) -> bool:
    ruleset = ruleset_of(f"-A {chain} {rule} -j DROP")
    return isinstance(ruleset.evaluate(chain, given, now=0), Drop)


PACKET = packet()
IPV6 = packet("fd00::1", "fd00::2")
UDP = packet(protocol=Protocol.UDP)
MARKED = replace(PACKET, mark=0x1FF)
LEAVING = packet(in_interface="", out_interface="ppp0")
TO_LOCAL = replace(PACKET, destination_type=AddressType.LOCAL)
OWNED = replace(LEAVING, owner=Owner(uid=5, gid=7))

# rule, a packet that it matches, a packet that it does not match
CONDITIONS: list[tuple[str, RulePacket, RulePacket]] = [
    ("-p tcp", PACKET, UDP),
    ("! -p tcp", UDP, PACKET),
    ("-s 10.0.0.1", PACKET, packet("10.0.0.2")),
    ("-s 10.0.0.0/8", PACKET, packet("11.0.0.1")),
    ("-s 10.0.0.0/8", PACKET, IPV6),
    ("! -s 10.0.0.0/8", packet("11.0.0.1"), PACKET),
    ("! -s 10.0.0.0/8", packet("11.0.0.1"), IPV6),
    ("! -s 10.0.0.1", packet("10.0.0.2"), IPV6),
    ("-s 10.1.0.1/255.0.255.255", packet("10.9.0.1"), packet("10.9.1.1")),
    ("-s 10.1.2.3/31", packet("10.1.2.2"), packet("10.1.2.4")),
    ("-d 192.168.0.0/16", PACKET, packet(destination="192.169.0.1")),
    ("-d 192.168.0.1", PACKET, packet("192.168.0.1", "10.0.0.1")),
    ("-s 0/0", PACKET, IPV6),
    ("-s ::/0", IPV6, PACKET),
    ("-s fd00::/16", IPV6, packet("fd01::1", "fd00::2")),
    ("! -d fd00::2", packet("fd00::1", "fd00::3"), IPV6),
    ("! -d fd00::2", packet("fd00::1", "fd00::3"), PACKET),
    ("-i eth0", PACKET, packet(in_interface="eth1")),
    ("-i eth0", PACKET, packet(in_interface="eth01")),
    ("-i eth+", packet(in_interface="eth1"), packet(in_interface="ppp0")),
    ("! -i eth+", packet(in_interface="ppp0"), PACKET),
    ("-p tcp --dport 80", PACKET, packet(dport=81)),
    ("-p tcp --dport 80", PACKET, UDP),
    ("-p tcp --dport 80:90", packet(dport=90), packet(dport=91)),
    ("-p tcp --dport 80:90", packet(dport=80), packet(dport=79)),
    ("-p tcp ! --dport 80", packet(dport=81), PACKET),
    ("-p tcp ! --dport 80", packet(dport=81), packet(dport=81, protocol=Protocol.UDP)),
    ("-p udp --sport 1:1023", packet(sport=1023, protocol=Protocol.UDP), UDP),
    ("-p tcp ! --sport 40000", packet(sport=1), PACKET),
    ("-p tcp --sport 40000 --dport 80", PACKET, packet(sport=1)),
    ("-p tcp --sport 40000 --dport 80", PACKET, packet(dport=1)),
    ("-p tcp -m tcp --dport 1:80 -m tcp --dport 80:90", PACKET, packet(dport=79)),
    ("-p tcp -m multiport --dports 22,80,8000:8080", packet(dport=8001), packet(dport=23)),
    ("-p tcp -m multiport ! --dports 22,80", packet(dport=23), PACKET),
    ("-p tcp -m multiport --sports 40000", PACKET, packet(sport=80)),
    ("-p tcp -m multiport --dports 40000", packet(dport=40000), PACKET),
    ("-p tcp -m multiport --ports 40000", PACKET, packet(sport=5)),
    ("-p tcp -m multiport --ports 80", PACKET, packet(dport=5)),
    ("-p tcp -m multiport ! --ports 80", packet(dport=5), packet(sport=80, dport=5)),
    ("-m mark --mark 0x1ff", MARKED, PACKET),
    ("-m mark --mark 0x100/0x100", MARKED, PACKET),
    ("-m mark ! --mark 0x1/0xf", PACKET, replace(PACKET, mark=0x11)),
    ("-m comment --comment x -s 10.0.0.1", PACKET, packet("10.0.0.2")),
    ("-m addrtype --dst-type LOCAL", TO_LOCAL, PACKET),
    ("-m addrtype --dst-type UNICAST,MULTICAST", PACKET, TO_LOCAL),
    ("-m addrtype ! --dst-type LOCAL", PACKET, TO_LOCAL),
    ("-m addrtype --src-type UNICAST ! --dst-type UNICAST", TO_LOCAL, PACKET),
]


@pytest.mark.parametrize(("rule", "matching", "other"), CONDITIONS, ids=[rule for rule, _, _ in CONDITIONS])
def test_a_rule_matches_what_it_says(rule: str, matching: RulePacket, other: RulePacket) -> None:
    assert matches(rule, matching)
    assert not matches(rule, other)


# rule at OUTPUT, the packet, does it match?
AT_OUTPUT: list[tuple[str, RulePacket, bool]] = [
    ("-o ppp0", LEAVING, True),
    ("-o ppp+", LEAVING, True),
    ("! -o ppp0", LEAVING, False),
    ("-m owner --uid-owner 5", OWNED, True),
    ("-m owner --uid-owner 6-9", OWNED, False),
    ("-m owner --uid-owner 1-5 --gid-owner 7", OWNED, True),
    ("-m owner --uid-owner 5 ! --gid-owner 7", OWNED, False),
    ("-m owner --uid-owner 5", LEAVING, False),
    ("-m owner ! --uid-owner 5", LEAVING, True),
    ("-m owner ! --uid-owner 5 --gid-owner 7", LEAVING, False),
]


@pytest.mark.parametrize(("rule", "given", "is_match"), AT_OUTPUT)
def test_a_rule_at_output_matches_what_it_says(rule: str, given: RulePacket, is_match: bool) -> None:
    assert matches(rule, given, OUTPUT) is is_match


def test_no_port_is_outside_all_ports() -> None:
    assert not matches("-p tcp ! --dport :", PACKET)


def test_a_redirect_to_an_address_matches_only_its_family() -> None:
    ruleset = ruleset_of("-A PREROUTING -p tcp -j TPROXY --on-port 1 --on-ip ::1")
    assert ruleset.evaluate(PREROUTING, PACKET, now=0) == Accept("PREROUTING policy")
    assert ruleset.evaluate(PREROUTING, IPV6, now=0) == Redirect(1, bytes(15) + b"\1", "PREROUTING 1")


# commands, the verdict on PACKET at PREROUTING
WAYS: dict[str, tuple[list[str], Verdict]] = {
    "empty": ([], Accept("PREROUTING policy")),
    "policy": (["-P PREROUTING DROP"], Drop("PREROUTING policy")),
    "first-match-decides": (
        ["-A PREROUTING -p udp", "-A PREROUTING -j DROP", "-A PREROUTING -j ACCEPT"],
        Drop("PREROUTING 2"),
    ),
    "no-target-goes-on": (["-A PREROUTING", "-A PREROUTING -j ACCEPT"], Accept("PREROUTING 2")),
    "redirect": (
        ["-A PREROUTING -p tcp --dport 80 -j TPROXY --on-port 50080"],
        Redirect(50080, None, "PREROUTING 1"),
    ),
    "redirect-to-an-address": (
        ["-A PREROUTING -p tcp -j TPROXY --on-port 0 --on-ip 10.0.0.9"],
        Redirect(0, bytes((10, 0, 0, 9)), "PREROUTING 1"),
    ),
    "return-goes-to-the-policy": (
        ["-P PREROUTING DROP", "-A PREROUTING -j RETURN", "-A PREROUTING -j ACCEPT"],
        Drop("PREROUTING policy"),
    ),
    "user-chain-decides": (["-N a", "-A PREROUTING -j a", "-A a -j DROP"], Drop("a 1")),
    "user-chain-ends": (["-N a", "-A PREROUTING -j a", "-A a -p udp", "-A PREROUTING -j DROP"], Drop("PREROUTING 2")),
    "user-chain-returns": (
        ["-N a", "-A PREROUTING -j a", "-A a -j RETURN", "-A a -j ACCEPT", "-A PREROUTING -j DROP"],
        Drop("PREROUTING 2"),
    ),
    "two-chains-deep": (
        ["-N a", "-N b", "-A PREROUTING -j a", "-A a -j b", "-A a -j DROP", "-A b -j RETURN"],
        Drop("a 2"),
    ),
    "the-same-chain-twice": (
        ["-N a", "-A PREROUTING -j a", "-A PREROUTING -j a", "-A PREROUTING -j DROP"],
        Drop("PREROUTING 3"),
    ),
    "goto-does-not-come-back": (
        ["-N a", "-P PREROUTING DROP", "-A PREROUTING -g a", "-A PREROUTING -j ACCEPT"],
        Drop("PREROUTING policy"),
    ),
    "goto-comes-back-one-chain-higher": (
        ["-N a", "-N b", "-A PREROUTING -j a", "-A a -g b", "-A a -j ACCEPT", "-A PREROUTING -j DROP"],
        Drop("PREROUTING 2"),
    ),
    "other-chains-do-not-count": (["-A OUTPUT -j DROP", "-P OUTPUT DROP"], Accept("PREROUTING policy")),
    "renamed-chain": (["-N a", "-A a -j DROP", "-A PREROUTING -j a", "-E a b"], Drop("b 1")),
    "inserted-before": (["-A PREROUTING -j ACCEPT", "-I PREROUTING -j DROP"], Drop("PREROUTING 1")),
    "replaced": (["-A PREROUTING -j ACCEPT", "-R PREROUTING 1 -j DROP"], Drop("PREROUTING 1")),
    "deleted": (["-A PREROUTING -j DROP", "-D PREROUTING 1"], Accept("PREROUTING policy")),
}


@pytest.mark.parametrize(("lines", "verdict"), WAYS.values(), ids=list(WAYS))
def test_a_packet_goes_its_way_to_a_verdict_that_names_its_rule(lines: list[str], verdict: Verdict) -> None:
    assert ruleset_of(*lines).evaluate(PREROUTING, PACKET, now=0) == verdict


def test_packets_and_bytes_are_counted_at_each_match_and_at_the_policy() -> None:
    ruleset = ruleset_of("-N a", "-A PREROUTING -p udp", "-A PREROUTING -j a", "-A a -p tcp", "-A a -j RETURN")
    for _ in range(2):
        ruleset.evaluate(PREROUTING, PACKET, now=0)
    ruleset.evaluate(PREROUTING, UDP, now=0)
    assert run(ruleset, "-S -v") == [
        "-P PREROUTING ACCEPT -c 3 180",
        "-P OUTPUT ACCEPT -c 0 0",
        "-N a",
        "-A PREROUTING -p udp -c 1 60",
        "-A PREROUTING -c 3 180 -j a",
        "-A a -p tcp -c 2 120",
        "-A a -c 3 180 -j RETURN",
    ]


def test_a_decided_packet_is_not_counted_further() -> None:
    ruleset = ruleset_of("-A PREROUTING -j ACCEPT", "-A PREROUTING -j DROP")
    ruleset.evaluate(PREROUTING, PACKET, now=0)
    assert run(ruleset, "-S PREROUTING -v") == [
        "-P PREROUTING ACCEPT -c 0 0",
        "-A PREROUTING -c 1 60 -j ACCEPT",
        "-A PREROUTING -c 0 0 -j DROP",
    ]


# Matches that remember: rule, when packets come and whether they match.
LIMITS: list[tuple[str, list[tuple[float, bool]]]] = [
    (
        "--limit 1/sec --limit-burst 2",
        [(100, True), (100, True), (100, False), (100.5, False), (101, True), (101, False)],
    ),
    ("--limit 10/sec --limit-burst 1", [(0.1 * step, True) for step in range(50)]),
    ("--limit 1/min --limit-burst 1", [(5, True), (64.9, False), (65, True), (70, False), (1000, True), (1001, False)]),
    ("--limit 1/day --limit-burst 1", [(0, True), (86_399, False), (86_400, True)]),
]


@pytest.mark.parametrize(("options", "packets"), LIMITS, ids=[options for options, _ in LIMITS])
def test_a_limit_lets_its_rate_pass_and_its_burst_at_once(options: str, packets: list[tuple[float, bool]]) -> None:
    ruleset = ruleset_of(f"-A PREROUTING -m limit {options} -j DROP")
    passed = [isinstance(ruleset.evaluate(PREROUTING, PACKET, now), Drop) for now, _ in packets]
    assert passed == [is_match for _, is_match in packets]


def test_a_limit_is_asked_only_if_what_stands_before_it_matches() -> None:
    ruleset = ruleset_of("-A PREROUTING -p tcp -m limit --limit 1/day --limit-burst 1 -m mark --mark 1 -j DROP")
    ruleset.evaluate(PREROUTING, UDP, now=0)
    assert isinstance(ruleset.evaluate(PREROUTING, replace(PACKET, mark=1), now=0), Drop)
    ruleset = ruleset_of("-A PREROUTING -p tcp -m limit --limit 1/day --limit-burst 1 -m tcp --dport 80 -j DROP")
    ruleset.evaluate(PREROUTING, packet(dport=81), now=0)
    assert isinstance(ruleset.evaluate(PREROUTING, PACKET, now=0), Accept), "the port stands behind the limit"


def test_a_rule_keeps_its_memory_and_its_counts_while_others_come_and_go() -> None:
    ruleset = ruleset_of("-N a", "-A PREROUTING -j a", "-A a -m limit --limit 1/day --limit-burst 1 -j DROP")
    assert isinstance(ruleset.evaluate(PREROUTING, PACKET, now=0), Drop)
    run(ruleset, "-I a -p udp", "-A a -p udp", "-E a b")
    assert isinstance(ruleset.evaluate(PREROUTING, PACKET, now=1), Accept)
    assert run(ruleset, "-S b 2 -v") == ["-A b -m limit --limit 1/day --limit-burst 1 -c 1 60 -j DROP"]


NTHS = {
    "--every 3 --packet 0": "..x..x..x",
    "--every 3 --packet 2": "x..x..x..",
    "--every 1 --packet 0": "xxxxxxxxx",
    "! --every 3 --packet 0": "xx.xx.xx.",
}


@pytest.mark.parametrize(("options", "pattern"), NTHS.items(), ids=list(NTHS))
def test_every_nth_packet_matches(options: str, pattern: str) -> None:
    ruleset = ruleset_of(f"-A PREROUTING -m statistic --mode nth {options} -j DROP")
    verdicts = [ruleset.evaluate(PREROUTING, PACKET, now=0) for _ in pattern]
    assert "".join("x" if isinstance(verdict, Drop) else "." for verdict in verdicts) == pattern


RANDOMS = {
    "--probability 0.5": "x.x.",
    "! --probability 0.5": ".x.x",
    "--probability 1": "xxxx",
    "--probability 0": "....",
}


@pytest.mark.parametrize(("options", "pattern"), RANDOMS.items(), ids=list(RANDOMS))
def test_chance_decides_by_its_probability(options: str, pattern: str) -> None:
    ruleset = ruleset_of(
        f"-A PREROUTING -m statistic --mode random {options} -j DROP", chance=[0.0, 0.5, 0.4999, 0.9999]
    )
    verdicts = [ruleset.evaluate(PREROUTING, PACKET, now=0) for _ in pattern]
    assert "".join("x" if isinstance(verdict, Drop) else "." for verdict in verdicts) == pattern


def test_without_chance_a_rule_that_needs_it_is_refused() -> None:
    with pytest.raises(RuleError, match="needs a source of chance"):
        run(Ruleset(), "-A PREROUTING -m statistic --mode random --probability 0.5")


def test_two_rulesets_share_nothing() -> None:
    one, other = Ruleset(), Ruleset()
    one.evaluate(PREROUTING, PACKET, now=0)
    assert run(other, "-S PREROUTING -v") == ["-P PREROUTING ACCEPT -c 0 0"]


def test_a_thousand_chains_deep_is_not_too_deep() -> None:
    lines = [f":c{number} - [0:0]" for number in range(1000)]
    lines += [f"-A c{number} -j c{number + 1}" for number in range(999)]
    ruleset = Ruleset(random.Random(0))
    restore("\n".join(["*tproxy", *lines, "-A c999 -j DROP", "-A PREROUTING -j c0", "COMMIT"]), ruleset)
    assert ruleset.evaluate(PREROUTING, PACKET, now=0) == Drop("c999 1")


@pytest.mark.parametrize(
    ("rule", "types", "owners"),
    [
        ("-A PREROUTING -p tcp -j ACCEPT", False, False),
        ("-A PREROUTING -m addrtype --dst-type LOCAL -j ACCEPT", True, False),
        ("-A OUTPUT -m owner --uid-owner 1 -j ACCEPT", False, True),
        ("-A own -m owner --uid-owner 1 -m addrtype --dst-type LOCAL", True, True),
    ],
)
def test_what_costs_a_look_up_is_known(rule: str, types: bool, owners: bool) -> None:
    ruleset = Ruleset()
    ruleset.apply(parse_command(["-N", "own"]))
    ruleset.apply(parse_command(split_words(rule)))
    assert (ruleset.looks_at_types, ruleset.looks_at_owners) == (types, owners)
    ruleset.apply(parse_command(["-F"]))
    assert (ruleset.looks_at_types, ruleset.looks_at_owners) == (False, False)
