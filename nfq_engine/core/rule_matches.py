"""The matches that -m loads and that look at one packet only: how each is written, listed and tested.

Owns: one class a match. Must not know how options are read (`rule_modules`). Place: inside a `Rule`; `rule_rates` has
the matches that remember.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from nfq_engine.core.packet import Protocol
from nfq_engine.core.rule_values import Match, Rule, RulePacket, Term, Test
from nfq_engine.core.surroundings import AddressType, Chance

LAST_PORT: Final = 0xFFFF
ALL_BITS: Final = 0xFFFFFFFF

# What iptables writes without quotes, and what it puts a backslash before between them.
_UNQUOTED: Final = frozenset(string.ascii_letters + string.digits + "_-")
_ESCAPED: Final = frozenset("\"\\'")


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports from `low` to `high`, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True)
class PortMatch(Match):
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


class PortSide(StrEnum):
    """Which port of a packet -m multiport looks at; the option's name."""

    SOURCE = "sports"
    DESTINATION = "dports"
    EITHER = "ports"


@dataclass(frozen=True, slots=True)
class Multiport(Match):
    """-m multiport: a port that is one of several."""

    side: PortSide
    ports: Term[tuple[Ports, ...]]

    def arguments(self) -> str:
        """As the command line says it."""
        return f"-m multiport {self.ports.sign}--{self.side} {self._list()}"

    def description(self) -> str:
        """As -L says it."""
        return f"multiport {self.side} {' !' if self.ports.is_inverted else ''}{self._list()}"

    def _list(self) -> str:
        return ",".join(str(each) for each in self.ports.value)

    def refusal(self, rule: Rule) -> str | None:
        """Only with a protocol that is known to have ports."""
        return None if rule.exact_protocol is not None else "multiport needs `-p tcp' or `-p udp'"

    def test(self, _: Chance | None) -> Test:
        """Test one port, or both."""
        ranges = tuple((each.low, each.high) for each in self.ports.value)
        inverted = self.ports.is_inverted
        wants_source, wants_destination = self.side is not PortSide.DESTINATION, self.side is not PortSide.SOURCE

        def has_port(packet: RulePacket, _: float) -> bool:
            source, destination = packet.flow.source.port, packet.flow.destination.port
            for low, high in ranges:
                if (wants_destination and low <= destination <= high) or (wants_source and low <= source <= high):
                    return not inverted
            return inverted

        return has_port


@dataclass(frozen=True, slots=True)
class Bits:
    """Some bits of a 32-bit number: those where `mask` has ones are to be as in `value`."""

    value: int
    mask: int

    def __str__(self) -> str:
        return f"{self.value:#x}" if self.mask == ALL_BITS else f"{self.value:#x}/{self.mask:#x}"


@dataclass(frozen=True, slots=True)
class MarkMatch(Match):
    """-m mark: the packet's mark."""

    mark: Term[Bits]

    def arguments(self) -> str:
        """As the command line says it."""
        return f"-m mark {self.mark.sign}--mark {self.mark.value}"

    def description(self) -> str:
        """As -L says it."""
        return f"mark match {self.mark.sign}{self.mark.value}"

    def test(self, _: Chance | None) -> Test:
        """Test the mark."""
        value, mask, inverted = self.mark.value.value, self.mark.value.mask, self.mark.is_inverted
        return lambda packet, _now: (packet.mark & mask == value) is not inverted


@dataclass(frozen=True, slots=True)
class Comment(Match):
    """-m comment: words for people."""

    text: str

    def arguments(self) -> str:
        """As the command line says it, quoted where it must be."""
        if self.text and all(character in _UNQUOTED for character in self.text):
            return f"-m comment --comment {self.text}"
        escaped = "".join(f"\\{character}" if character in _ESCAPED else character for character in self.text)
        return f'-m comment --comment "{escaped}"'

    def description(self) -> str:
        """As -L says it."""
        return f"/* {self.text} */"

    def test(self, _: Chance | None) -> None:
        """Every packet matches."""


@dataclass(frozen=True, slots=True)
class AddressTypeMatch(Match):
    """-m addrtype: what the packet's addresses are to this host."""

    source: Term[frozenset[AddressType]] | None = None
    destination: Term[frozenset[AddressType]] | None = None

    def arguments(self) -> str:
        """As the command line says it."""
        words = ["-m addrtype"]
        for option, term in (("--src-type", self.source), ("--dst-type", self.destination)):
            if term is not None:
                words.append(f"{term.sign}{option} {_type_names(term.value)}")
        return " ".join(words)

    def description(self) -> str:
        """As -L says it."""
        words = ["ADDRTYPE match"]
        for option, term in (("src-type", self.source), ("dst-type", self.destination)):
            if term is not None:
                words.append(f"{option} {term.sign.strip()}{_type_names(term.value)}")
        return " ".join(words)

    def test(self, _: Chance | None) -> Test:
        """Test the types that the packet came with."""
        source, destination = self.source, self.destination

        def has_types(packet: RulePacket, _: float) -> bool:
            return (source is None or (packet.source_type in source.value) is not source.is_inverted) and (
                destination is None or (packet.destination_type in destination.value) is not destination.is_inverted
            )

        return has_types


def _type_names(types: frozenset[AddressType]) -> str:
    return ",".join(each for each in AddressType if each in types)


@dataclass(frozen=True, slots=True)
class Identifiers:
    """The user or group numbers from `low` to `high`, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class OwnerMatch(Match):
    """-m owner: whose socket sent the packet; only where it is known, at OUTPUT."""

    uid: Term[Identifiers] | None = None
    gid: Term[Identifiers] | None = None

    def arguments(self) -> str:
        """As the command line says it."""
        words = ["-m owner"]
        for option, term in (("--uid-owner", self.uid), ("--gid-owner", self.gid)):
            if term is not None:
                words.append(f"{term.sign}{option} {term.value}")
        return " ".join(words)

    def description(self) -> str:
        """As -L says it."""
        terms = (("UID", self.uid), ("GID", self.gid))
        return " ".join(f"{term.sign}owner {name} match {term.value}" for name, term in terms if term is not None)

    def test(self, _: Chance | None) -> Test:
        """Test the owner; a packet without one matches what only says who it is not."""
        uid, gid = self.uid, self.gid
        matches_nobody = all(term is None or term.is_inverted for term in (uid, gid))

        def is_owned(packet: RulePacket, _: float) -> bool:
            owner = packet.owner
            if owner is None:
                return matches_nobody
            return _is_within(uid, owner.uid) and _is_within(gid, owner.gid)

        return is_owned


def _is_within(term: Term[Identifiers] | None, number: int) -> bool:
    return term is None or (term.value.low <= number <= term.value.high) is not term.is_inverted
