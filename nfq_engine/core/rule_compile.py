"""From rules to tests.

Owns: the order in which conditions are tested. Must not know chains. Place: a rule is compiled when it comes into a
table; the ruleset runs what comes of it.

Rules that hold here:

* a match that remembers is asked exactly when iptables asks it: after what is before -m and the matches written before
  it, and only if all those hold; everything else may be tested in any order;
* a test belongs to one rule in one chain; nothing else shares its memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile

from nfq_engine.core.packet import Protocol
from nfq_engine.core.rule_matches import LAST_PORT, PortMatch
from nfq_engine.core.rule_rates import REMEMBERING
from nfq_engine.core.rule_values import CompiledRule, Network, Rule, RulePacket, Term, Test
from nfq_engine.core.surroundings import Chance


def service_of(packet: RulePacket) -> int:
    """Protocol and destination port as one number."""
    return packet.flow.protocol << 16 | packet.flow.destination.port


def compile_rule(rule: Rule, chance: Chance | None) -> CompiledRule:
    """Prepare a rule for packets, with a fresh memory where its matches have one; RuleError as `Match.test`."""
    early = takewhile(lambda match: not isinstance(match, REMEMBERING), rule.matches)
    bounded = [match for match in early if isinstance(match, PortMatch) and match.is_one_range]
    asked = (match.test(chance) for match in rule.matches if match not in bounded)
    tests = (*_plain_tests(rule), *(test for test in asked if test is not None))
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
