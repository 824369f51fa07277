"""Rules: as people write them, as values, as iptables prints them. One list, read by unit tests and by the lab's."""

from __future__ import annotations

from dataclasses import dataclass

from nfq_engine.core.packet import Protocol
from nfq_engine.core.rule_matches import (
    ALL_BITS,
    AddressTypeMatch,
    Bits,
    Comment,
    Identifiers,
    MarkMatch,
    Multiport,
    OwnerMatch,
    PortMatch,
    Ports,
    PortSide,
)
from nfq_engine.core.rule_rates import CERTAINTY, RATE_UNITS, Limit, NthMatch, RandomMatch
from nfq_engine.core.rule_syntax import networks
from nfq_engine.core.rule_values import Jump, Match, Network, Rule, Target, Term, Tproxy
from nfq_engine.core.surroundings import AddressType


@dataclass(frozen=True, slots=True)
class Case:
    """`printed` is what -S says after -A CHAIN. `is_iptables`: iptables reads and prints the same."""

    name: str
    written: str
    rule: Rule
    printed: str
    chain: str = "PREROUTING"
    is_iptables: bool = True


def net(text: str, is_inverted: bool = False) -> Term[Network]:
    return Term(networks(text)[0], is_inverted)


def tcp(*matches: Match, target: Target | Tproxy | Jump | None = None) -> Rule:
    return Rule(protocol=TCP, matches=matches, target=target)


def matched(match: Match) -> Rule:
    return Rule(matches=(match,))


def ports(low: int, high: int | None = None, is_inverted: bool = False) -> Term[Ports]:
    return Term(Ports(low, low if high is None else high), is_inverted)


def from_ports(term: Term[Ports] | None) -> Rule:
    return tcp(PortMatch(Protocol.TCP, source=term))


def to_ports(term: Term[Ports] | None) -> Rule:
    return tcp(PortMatch(Protocol.TCP, destination=term))


TCP = Term(Protocol.TCP)
PORT_80 = PortMatch(Protocol.TCP, destination=ports(80))
FROM_10 = "-s 10.0.0.0/8"

PLAIN = (
    Case("nothing", "", Rule(), ""),
    Case("accept", "-j ACCEPT", Rule(target=Target.ACCEPT), "-j ACCEPT"),
    Case("drop", "--jump DROP", Rule(target=Target.DROP), "-j DROP"),
    Case("return", "-j RETURN", Rule(target=Target.RETURN), "-j RETURN"),
    Case("jump", "-j user", Rule(target=Jump("user")), "-j user"),
    Case("goto", "--goto user", Rule(target=Jump("user", is_goto=True)), "-g user"),
    Case("host", "-s 10.0.0.1", Rule(source=net("10.0.0.1")), "-s 10.0.0.1/32"),
    Case("network", "--src 10.1.2.3/8", Rule(source=net("10.0.0.0/8")), FROM_10),
    Case("netmask", "-s 10.0.0.0/255.0.0.0", Rule(source=net("10.0.0.0/8")), FROM_10),
    Case("short-network", "-s 10/8", Rule(source=net("10.0.0.0/8")), FROM_10),
    Case("octal-and-hexadecimal", "-s 012.0.0.0/0x8", Rule(source=net("10.0.0.0/8")), FROM_10),
    Case(
        "mask-with-holes",
        "-d 10.1.2.3/255.0.255.0",
        Rule(destination=net("10.1.2.3/255.0.255.0")),
        "-d 10.0.2.0/255.0.255.0",
    ),
    Case("not-a-network", "! --source 10/8", Rule(source=net("10.0.0.0/8", True)), f"! {FROM_10}"),
    Case("old-inversion", "-s ! 10/8", Rule(source=net("10/8", True)), f"! {FROM_10}", is_iptables=False),
    Case("every-ipv4", "-s 0/0", Rule(source=net("0.0.0.0/0")), "-s 0.0.0.0/0", is_iptables=False),
    Case("every-ipv6", "-d ::/0", Rule(destination=net("::/0")), "-d ::/0", is_iptables=False),
    Case("ipv6-host", "-s FE80::0:1", Rule(source=net("fe80::1")), "-s fe80::1/128", is_iptables=False),
    Case("ipv6-network", "-d fd00::1/ffff::", Rule(destination=net("fd00::/16")), "-d fd00::/16", is_iptables=False),
    Case(
        "ipv6-mask-with-holes",
        "-d fd00::1/ffff:0:ffff::",
        Rule(destination=net("fd00::/ffff:0:ffff::")),
        "-d fd00::/ffff:0:ffff::",
        is_iptables=False,
    ),
    Case(
        "mapped-ipv4",
        "-s ::ffff:1.2.3.4",
        Rule(source=net("::ffff:1.2.3.4")),
        "-s ::ffff:1.2.3.4/128",
        is_iptables=False,
    ),
    Case("interface", "-i eth0", Rule(in_interface=Term("eth0")), "-i eth0"),
    Case("interfaces", "--in-interface eth+", Rule(in_interface=Term("eth+")), "-i eth+"),
    Case("not-an-interface", "! -i eth0", Rule(in_interface=Term("eth0", True)), "! -i eth0"),
    Case("any-interface", "-i +", Rule(), ""),
    Case("out-interface", "! -o eth0", Rule(out_interface=Term("eth0", True)), "! -o eth0", chain="OUTPUT"),
    Case("plus-inside-a-name", "-i et+h", Rule(in_interface=Term("et+h")), "-i et+h"),
    Case("tcp", "-p tcp", tcp(), "-p tcp"),
    Case("protocol-number", "--proto 0x11", Rule(protocol=Term(Protocol.UDP)), "-p udp"),
    Case("capitals", "-p TCP", tcp(), "-p tcp"),
    Case("not-tcp", "! -p tcp", Rule(protocol=Term(Protocol.TCP, True)), "! -p tcp"),
    Case("old-not-tcp", "-p ! tcp", Rule(protocol=Term(Protocol.TCP, True)), "! -p tcp", is_iptables=False),
    Case("any-protocol", "-p all", Rule(), ""),
    Case(
        "attached-values",
        "-s10.0.0.1 -jACCEPT",
        Rule(net("10.0.0.1"), target=Target.ACCEPT),
        "-s 10.0.0.1/32 -j ACCEPT",
        is_iptables=False,  # it takes the option's letters for the beginning of the value
    ),
    Case(
        "order-of-options",
        "-j ACCEPT -p tcp --dport 80 -o eth1 -d 10.0.0.2 -s 10.0.0.1",
        Rule(net("10.0.0.1"), net("10.0.0.2"), None, Term("eth1"), TCP, (PORT_80,), Target.ACCEPT),
        "-s 10.0.0.1/32 -d 10.0.0.2/32 -o eth1 -p tcp -m tcp --dport 80 -j ACCEPT",
        chain="OUTPUT",
    ),
    Case(
        "tproxy",
        "-p tcp --dport 80 -j TPROXY --on-port 50080",
        tcp(PORT_80, target=Tproxy(50080)),
        "-p tcp -m tcp --dport 80 -j TPROXY --on-port 50080",
        is_iptables=False,
    ),
    Case(
        "tproxy-on-ip",
        "-j TPROXY --on-ip 10.0.0.1 --on-port 0 -p udp",
        Rule(protocol=Term(Protocol.UDP), target=Tproxy(0, bytes((10, 0, 0, 1)))),
        "-p udp -j TPROXY --on-port 0 --on-ip 10.0.0.1",
        is_iptables=False,
    ),
    Case(
        "tproxy-of-2003",
        "-p tcp -j TPROXY --on-port 80 --on-ip 0.0.0.0",
        tcp(target=Tproxy(80)),
        "-p tcp -j TPROXY --on-port 80",
        is_iptables=False,
    ),
    Case(
        "tproxy-on-ipv6",
        "-p tcp -j TPROXY --on-port 80 --on-ip ::1",
        tcp(target=Tproxy(80, bytes(15) + b"\1")),
        "-p tcp -j TPROXY --on-port 80 --on-ip ::1",
        is_iptables=False,
    ),
    Case(
        "the-spec's-example",
        "-i eth0 -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080 --on-ip 10.0.0.1",
        Rule(None, None, Term("eth0"), None, TCP, (PORT_80,), Tproxy(50080, bytes((10, 0, 0, 1)))),
        "-i eth0 -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080 --on-ip 10.0.0.1",
        is_iptables=False,
    ),
)

PORTS = (
    Case("one-port", "-p tcp --dport 80", to_ports(ports(80)), "-p tcp -m tcp --dport 80"),
    Case("long-name", "-p tcp --destination-port=80", to_ports(ports(80)), "-p tcp -m tcp --dport 80"),
    Case("abbreviated", "-p tcp --dpo 80", to_ports(ports(80)), "-p tcp -m tcp --dport 80"),
    Case("hexadecimal-port", "-p tcp --sport 0x50", from_ports(ports(80)), "-p tcp -m tcp --sport 80"),
    Case("octal-port", "-p tcp --dport 010", to_ports(ports(8)), "-p tcp -m tcp --dport 8"),
    Case("range", "-p tcp --sport 1:1023", from_ports(ports(1, 1023)), "-p tcp -m tcp --sport 1:1023"),
    Case("range-from", "-p tcp --dport 80:", to_ports(ports(80, 65535)), "-p tcp -m tcp --dport 80:65535"),
    Case("range-to", "-p tcp --dport :80", to_ports(ports(0, 80)), "-p tcp -m tcp --dport 0:80"),
    Case("range-of-one", "-p tcp --dport 80:80", to_ports(ports(80)), "-p tcp -m tcp --dport 80"),
    Case("port-zero", "-p tcp --dport 0", to_ports(ports(0)), "-p tcp -m tcp --dport 0"),
    Case("every-port", "-p tcp --dport :", to_ports(None), "-p tcp -m tcp"),
    Case(
        "no-port",
        "-p tcp ! --dport :",
        to_ports(ports(0, 65535, True)),
        "-p tcp -m tcp ! --dport 0:65535",
        is_iptables=False,
    ),
    Case("not-a-port", "-p tcp ! --dport 80", to_ports(ports(80, 80, True)), "-p tcp -m tcp ! --dport 80"),
    Case(
        "old-not-a-port",
        "-p tcp --dport ! 80",
        to_ports(ports(80, 80, True)),
        "-p tcp -m tcp ! --dport 80",
        is_iptables=False,
    ),
    Case(
        "both-ports",
        "-p udp --dport 2 ! --sport 1",
        Rule(protocol=Term(Protocol.UDP), matches=(PortMatch(Protocol.UDP, ports(1, 1, True), ports(2)),)),
        "-p udp -m udp ! --sport 1 --dport 2",
    ),
    Case("match-without-ports", "-p tcp -m tcp", to_ports(None), "-p tcp -m tcp"),
    Case("match-before-protocol", "-m tcp --dport 80 -p tcp", to_ports(ports(80)), "-p tcp -m tcp --dport 80"),
    Case(
        "protocol-match-loaded-late",
        "-p tcp -m mark --mark 1 --dport 80",
        tcp(MarkMatch(Term(Bits(1, ALL_BITS))), PORT_80),
        "-p tcp -m mark --mark 0x1 -m tcp --dport 80",
    ),
)

MORE = (
    Case(
        "multiport",
        "-p tcp -m multiport --dports 80,443,8000:8080",
        tcp(Multiport(PortSide.DESTINATION, Term((Ports(80, 80), Ports(443, 443), Ports(8000, 8080))))),
        "-p tcp -m multiport --dports 80,443,8000:8080",
    ),
    Case(
        "multiport-inverted",
        "-p udp -m multiport ! --source-ports 5,4",
        Rule(
            protocol=Term(Protocol.UDP),
            matches=(Multiport(PortSide.SOURCE, Term((Ports(5, 5), Ports(4, 4)), True)),),
        ),
        "-p udp -m multiport ! --sports 5,4",
    ),
    Case(
        "multiport-either",
        "-m multiport -p tcp --port 1:2",
        tcp(Multiport(PortSide.EITHER, Term((Ports(1, 2),)))),
        "-p tcp -m multiport --ports 1:2",
    ),
    Case("mark", "-m mark --mark 1", matched(MarkMatch(Term(Bits(1, ALL_BITS)))), "-m mark --mark 0x1"),
    Case(
        "mark-and-mask",
        "-m mark ! --mark 0x1FF/0xff",
        matched(MarkMatch(Term(Bits(0x1FF, 0xFF), True))),
        "-m mark ! --mark 0x1ff/0xff",
    ),
    Case(
        "two-marks",
        "-m mark --mark 1 -m mark --mark 2",
        Rule(matches=(MarkMatch(Term(Bits(1, ALL_BITS))), MarkMatch(Term(Bits(2, ALL_BITS))))),
        "-m mark --mark 0x1 -m mark --mark 0x2",
    ),
    Case("comment", "-m comment --comment abc_-1", matched(Comment("abc_-1")), "-m comment --comment abc_-1"),
    Case("comment-of-two-words", '-m comment --comment "a b"', matched(Comment("a b")), '-m comment --comment "a b"'),
    Case("empty-comment", '-m comment --comment ""', matched(Comment("")), '-m comment --comment ""'),
    Case("comment-with-a-slash", "-m comment --comment a/b", matched(Comment("a/b")), '-m comment --comment "a/b"'),
    Case(
        "comment-with-quotes",
        '-m comment --comment "it\'s \\"q\\" b\\\\s"',
        matched(Comment('it\'s "q" b\\s')),
        '-m comment --comment "it\\\'s \\"q\\" b\\\\s"',
    ),
    Case("comment-like-an-option", '-m comment --comment "-j"', matched(Comment("-j")), "-m comment --comment -j"),
    Case("comment-like-an-inversion", "-m comment --comment !", matched(Comment("!")), '-m comment --comment "!"'),
    Case(
        "address-types",
        "-m addrtype --dst-type multicast,loc",
        matched(AddressTypeMatch(None, Term(frozenset({AddressType.LOCAL, AddressType.MULTICAST})))),
        "-m addrtype --dst-type LOCAL,MULTICAST",
    ),
    Case(
        "address-types-inverted",
        "-m addrtype --dst-type UNICAST ! --src-type LOCAL",
        matched(AddressTypeMatch(Term(frozenset({AddressType.LOCAL}), True), Term(frozenset({AddressType.UNICAST})))),
        "-m addrtype ! --src-type LOCAL --dst-type UNICAST",
    ),
    Case(
        "owner",
        "-m owner ! --gid-owner 7 --uid-owner 0x10",
        matched(OwnerMatch(Term(Identifiers(16, 16)), Term(Identifiers(7, 7), True))),
        "-m owner --uid-owner 16 ! --gid-owner 7",
        chain="OUTPUT",
    ),
    Case(
        "owners",
        "-m owner ! --uid-owner 5-10",
        matched(OwnerMatch(Term(Identifiers(5, 10), True))),
        "-m owner ! --uid-owner 5-10",
        chain="OUTPUT",
    ),
    Case("limit", "-m limit", matched(Limit()), "-m limit --limit 3/hour"),
    Case(
        "limit-by-a-shorter-unit",
        "-m limit --limit 60/minute --limit-burst 100",
        matched(Limit(RATE_UNITS["sec"], 100)),
        "-m limit --limit 1/sec --limit-burst 100",
    ),
    Case("limit-a-second", "-m limit --limit 5", matched(Limit(2000)), "-m limit --limit 5/sec"),
    Case("limit-abbreviated", "-m limit --limit 90/M", matched(Limit(6666)), "-m limit --limit 90/min"),
    Case("limit-by-a-longer-unit", "-m limit --limit 24/day", matched(Limit(36_000_000)), "-m limit --limit 1/hour"),
    Case("limit-odd", "-m limit --limit 25/day", matched(Limit(34_560_000)), "-m limit --limit 25/day"),
    Case(
        "limit-nearly-a-second",
        "-m limit --limit 86408/day",
        matched(Limit(9999)),
        "-m limit --limit 86408/day",
        is_iptables=False,
    ),
    Case("limit-rounded", "-m limit --limit 7000/s", matched(Limit(1)), "-m limit --limit 10000/sec"),
    Case(
        "limit-slow",
        "-m limit --limit 1/day",
        matched(Limit(RATE_UNITS["day"])),
        "-m limit --limit 1/day",
        is_iptables=False,
    ),
    Case(
        "random",
        "-m statistic --mode random --probability 0.5",
        matched(RandomMatch(Term(CERTAINTY // 2))),
        "-m statistic --mode random --probability 0.50000000000",
    ),
    Case(
        "random-rounded",
        "-m statistic --probability .33333 --mode random",
        matched(RandomMatch(Term(715_820_724))),
        "-m statistic --mode random --probability 0.33332999982",
    ),
    Case(
        "random-inverted",
        "-m statistic --mode random ! --probability 1e-3",
        matched(RandomMatch(Term(2_147_484, True))),
        "-m statistic --mode random ! --probability 0.00100000016",
    ),
    Case(
        "nth",
        "-m statistic --mode nth --every 3 --packet 2",
        matched(NthMatch(Term(3), 2)),
        "-m statistic --mode nth --every 3 --packet 2",
    ),
    Case(
        "nth-inverted",
        "-m statistic --mode nth --packet 0 ! --every 3",
        matched(NthMatch(Term(3, True), 0)),
        "-m statistic --mode nth ! --every 3 --packet 0",
    ),
    Case(
        "matches-keep-their-order",
        '-p tcp -m comment --comment "a b" -m limit --limit 5/min -m multiport --dports 80',
        tcp(Comment("a b"), Limit(120_000), Multiport(PortSide.DESTINATION, Term((Ports(80, 80),)))),
        '-p tcp -m comment --comment "a b" -m limit --limit 5/min -m multiport --dports 80',
    ),
    Case(
        "options-of-matches-mixed",
        "-m mark -m comment --mark 2 --comment x",
        Rule(matches=(MarkMatch(Term(Bits(2, ALL_BITS))), Comment("x"))),
        "-m mark --mark 0x2 -m comment --comment x",
    ),
)

CASES = PLAIN + PORTS + MORE
