"""The matches that -m loads: how each is written, listed and tested.

Owns: one class a match. Must not know how options are read (`rule_syntax`). Place: inside a `Rule`;
`compile_rule` makes of a rule what the ruleset runs.

Rules that hold here:

* conditions are tested in the order in which iptables tests them: what is before -m first, then the matches as written,
  and none after the first that fails, because some remember that they were asked;
* a test belongs to one rule in one chain; nothing else shares its memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from nfq_engine.core.packet import Protocol
from nfq_engine.core.rule_values import CompiledRule, Network, Rule, RulePacket, Term, Test
from nfq_engine.core.surroundings import Chance

LAST_PORT: Final = 0xFFFF


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports from `low` to `high`, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True)
class PortMatch:
    """-m tcp, -m udp: source and destination port."""

    protocol: Protocol
    source: Term[Ports] | None = None
    destination: Term[Ports] | None = None

    @property
    def is_one_range(self) -> bool:
        """Does it ask for nothing but one range of destination ports?"""
        return self.source is None and (self.destination is None or not self.destination.is_inverted)

    def arguments(self) -> str:
        """As the command line says it."""
        words = [f"-m {self.protocol.name.lower()}"]
        for option, term in (("--sport", self.source), ("--dport", self.destination)):
            if term is not None:
                words.append(f"{term.sign}{option} {term.value}")
        return " ".join(words)

    def description(self) -> str:
        """As -L says it."""
        words = [self.protocol.name.lower()]
        for option, term in (("spt", self.source), ("dpt", self.destination)):
            if term is not None:
                plural = "s" if term.value.low != term.value.high else ""
                words.append(f"{option}{plural}:{'!' if term.is_inverted else ''}{term.value}")
        return " ".join(words)

    def refusal(self, rule: Rule) -> str | None:
        """Only with the protocol whose ports they are."""
        if rule.exact_protocol is self.protocol:
            return None
        name = self.protocol.name.lower()
        return f"match `{name}' needs `-p {name}'"

    def test(self, _: Chance | None) -> Test:
        """Test the ports."""
        source_low, source_high, source_inverted = _bounds(self.source)
        low, high, inverted = _bounds(self.destination)

        def has_ports(packet: RulePacket, _: float) -> bool:
            flow = packet.flow
            return (low <= flow.destination.port <= high) is not inverted and (
                source_low <= flow.source.port <= source_high
            ) is not source_inverted

        return has_ports


def _bounds(term: Term[Ports] | None) -> tuple[int, int, bool]:
    """First port, last port, inverted or not."""
    return (0, LAST_PORT, False) if term is None else (term.value.low, term.value.high, term.is_inverted)


# From rules to tests.


def service_of(packet: RulePacket) -> int:
    """Protocol and destination port as one number."""
    return packet.flow.protocol << 16 | packet.flow.destination.port


def compile_rule(rule: Rule, chance: Chance | None) -> CompiledRule:
    """Prepare a rule for packets, with a fresh memory where its matches have one; RuleError as `Match.test`."""
    bounded = [match for match in rule.matches if isinstance(match, PortMatch) and match.is_one_range]
    tests = (*_plain_tests(rule), *(match.test(chance) for match in rule.matches if match not in bounded))
    return CompiledRule(*_services(rule, bounded), _all_of(tests))


def _services(rule: Rule, matches: Iterable[PortMatch]) -> tuple[int, int]:
    """The first and the last service of the packets that fulfil these matches and have the rule's protocol."""
    protocol = rule.exact_protocol
    if protocol is None:
        return 0, max(Protocol) << 16 | LAST_PORT
    ports = [match.destination.value for match in matches if match.destination is not None]
    low = max((each.low for each in ports), default=0)
    high = min((each.high for each in ports), default=LAST_PORT)
    return protocol << 16 | low, protocol << 16 | high


def _all_of(tests: tuple[Test, ...]) -> Test:
    """One test for several, as cheap as their number allows."""
    if not tests:
        return lambda _packet, _now: True
    if len(tests) == 1:
        return tests[0]

    def holds(packet: RulePacket, now: float) -> bool:
        for test in tests:  # noqa: SIM110 - all() with a generator costs three times as much
            if not test(packet, now):
                return False
        return True

    return holds


def _plain_tests(rule: Rule) -> Iterator[Test]:
    """What is asked before any -m, but for a protocol that the bounds ask for."""
    if rule.source is not None:
        yield _address_test(rule.source, of_source=True)
    if rule.destination is not None:
        yield _address_test(rule.destination, of_source=False)
    if rule.addresses and rule.source is None and rule.destination is None:
        size = len(rule.addresses[0])
        yield lambda packet, _now: len(packet.flow.source.address) == size
    if rule.in_interface is not None:
        name, is_prefix, inverted = _interface(rule.in_interface)
        yield lambda packet, _now: _is_named(packet.in_interface, name, is_prefix) is not inverted
    if rule.out_interface is not None:
        out_name, is_out_prefix, out_inverted = _interface(rule.out_interface)
        yield lambda packet, _now: _is_named(packet.out_interface, out_name, is_out_prefix) is not out_inverted
    if rule.protocol is not None and rule.protocol.is_inverted:
        unwanted = rule.protocol.value
        yield lambda packet, _now: packet.flow.protocol != unwanted


def _address_test(term: Term[Network], of_source: bool) -> Test:
    """Test the source's address, or the destination's."""
    network, inverted = term.value, term.is_inverted
    if network.is_host and not inverted:
        host = network.address
        if of_source:
            return lambda packet, _now: packet.flow.source.address == host
        return lambda packet, _now: packet.flow.destination.address == host
    size = len(network.mask)
    mask, wanted = int.from_bytes(network.mask, "big"), int.from_bytes(network.address, "big")

    def is_within(packet: RulePacket, _: float) -> bool:
        address = packet.flow.source.address if of_source else packet.flow.destination.address
        return len(address) == size and (int.from_bytes(address, "big") & mask == wanted) is not inverted

    return is_within


def _interface(term: Term[str]) -> tuple[str, bool, bool]:
    """Name or its beginning, whether it is only that, inverted or not."""
    return term.value.removesuffix("+"), term.value.endswith("+"), term.is_inverted


def _is_named(interface: str, name: str, is_prefix: bool) -> bool:
    return interface.startswith(name) if is_prefix else interface == name
