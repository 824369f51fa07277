"""Rules as values: what a rule says, what it may look at, what is done with rules.

Owns: the vocabulary of the tproxy table. Must not know how a rule is written (`rule_syntax`, `rule_text`), listed
(`rule_listing`), stored (`rule_table`) or evaluated (`ruleset`). Place in the path: beside it; `RulePacket` goes into
the ruleset for every new connection, a `Verdict` comes out.

Rules that hold here:

* two rules are equal when iptables would say so (-C, -D): what they count or remember is no part of them;
* one table serves IPv4 and IPv6: a rule that names an address matches only packets of that address' family, a rule that
  names none matches both.
"""

from __future__ import annotations

import ipaddress
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Generic, TypeVar

from nfq_engine.core import packet
from nfq_engine.core.surroundings import AddressType, Chance

TABLE: Final = "tproxy"

_MAPPED: Final = bytes(10) + b"\xff\xff"  # RFC 4291 section 2.5.5.2

T = TypeVar("T")


class RuleError(ValueError):
    """A command or a rule that is refused; the text names the option and the value."""


def shown(value: str) -> str:
    """A value as it may stand in a message: unprintable characters escaped, the end of an endless one left out."""
    text = value if value.isprintable() else ascii(value)[1:-1]
    return text if len(text) <= 80 else f"{text[:80]}..."


class BuiltinChain(StrEnum):
    """The chains that packets come to by themselves, in the order in which they are listed."""

    PREROUTING = "PREROUTING"
    OUTPUT = "OUTPUT"


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose socket sent a packet."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class RulePacket:
    """What a rule can see of a packet.

    `length` is that of the IP packet, in bytes. Interfaces are names, empty where the hook has none. No `owner`: nobody
    knows it, or no socket of this host sent the packet. Types and owner are looked up if some rule asks for them.
    """

    flow: packet.FlowTuple
    in_interface: str
    out_interface: str
    length: int
    mark: int = 0
    source_type: AddressType = AddressType.UNICAST
    destination_type: AddressType = AddressType.UNICAST
    owner: Owner | None = None


@dataclass(frozen=True, slots=True)
class Accept:
    """The connection goes on untouched. `rule` is who says so: `PREROUTING 3`, or `PREROUTING policy`."""

    rule: str


@dataclass(frozen=True, slots=True)
class Drop:
    """The packet is dropped."""

    rule: str


@dataclass(frozen=True, slots=True)
class Redirect:
    """The destination becomes `on_ip` (None: an address of the interface) and `on_port` (0: the packet's own port)."""

    on_port: int
    on_ip: bytes | None
    rule: str


Verdict = Accept | Drop | Redirect

# Does a packet, seen at `now` (seconds), fulfil a condition?
Test = Callable[[RulePacket, float], bool]


@dataclass(frozen=True, slots=True)
class Term(Generic[T]):
    """One condition: the packet has this value, or with `!` it has another."""

    value: T
    is_inverted: bool = False

    @property
    def sign(self) -> str:
        """What stands before the option."""
        return "! " if self.is_inverted else ""


@dataclass(frozen=True, slots=True)
class Network:
    """The addresses that equal `address` wherever `mask` has a one; both 4 or both 16 bytes, `address` masked."""

    address: bytes
    mask: bytes

    def __str__(self) -> str:
        return f"{format_address(self.address)}/{self._mask_text()}"

    @property
    def is_host(self) -> bool:
        """Is it one address?"""
        return self.mask == b"\xff" * len(self.mask)

    @property
    def is_everything(self) -> bool:
        """Is it every address of its family?"""
        return not any(self.mask)

    def _mask_text(self) -> str:
        """The number of leading ones; of a mask with holes, the mask as an address."""
        bits = f"{int.from_bytes(self.mask, 'big'):0{len(self.mask) * 8}b}".rstrip("0")
        return format_address(self.mask) if "0" in bits else str(len(bits))


def format_address(address: bytes) -> str:
    """The text of an address as inet_ntop writes it, mapped IPv4 addresses included, on every Python."""
    if address.startswith(_MAPPED):
        return f"::ffff:{ipaddress.IPv4Address(address[12:])}"
    return packet.format_address(address)


class Target(StrEnum):
    """The targets that need no options. RETURN goes back to where the chain was jumped to."""

    ACCEPT = "ACCEPT"
    DROP = "DROP"
    RETURN = "RETURN"


class Policy(StrEnum):
    """What becomes of a packet that comes to the end of a built-in chain."""

    ACCEPT = "ACCEPT"
    DROP = "DROP"


TPROXY: Final = "TPROXY"
TARGET_NAMES: Final = frozenset({*Target, TPROXY})


@dataclass(frozen=True, slots=True)
class Tproxy:
    """The TPROXY target: a `Redirect`. `on_ip` None stands for none given, or an all-zero one."""

    on_port: int
    on_ip: bytes | None = None


@dataclass(frozen=True, slots=True)
class Jump:
    """A user chain as the target; `is_goto`: what comes back from it goes on where this chain would have."""

    chain: str
    is_goto: bool = False


AnyTarget = Target | Tproxy | Jump


class Match(ABC):
    """What -m adds to a rule. Equal values mean equal matches."""

    __slots__ = ()

    @abstractmethod
    def arguments(self) -> str:
        """It as the command line says it, from -m on."""

    @abstractmethod
    def description(self) -> str:
        """It as -L says it."""

    @abstractmethod
    def test(self, chance: Chance | None) -> Test | None:
        """A fresh test, with a memory of its own if it needs one; None when every packet matches.

        RuleError if it needs chance and there is none.
        """

    def refusal(self, _: Rule) -> str | None:
        """Why it may not stand in this rule; None when it may."""
        return None


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: everything it asks of a packet, and what is to be done then. No target: it only counts."""

    source: Term[Network] | None = None
    destination: Term[Network] | None = None
    in_interface: Term[str] | None = None  # with a + at its end: every name that begins so
    out_interface: Term[str] | None = None
    protocol: Term[packet.Protocol] | None = None
    matches: tuple[Match, ...] = ()
    target: AnyTarget | None = None

    @property
    def addresses(self) -> tuple[bytes, ...]:
        """Every address that the rule names; packets of another family do not match it."""
        networks = tuple(term.value.address for term in (self.source, self.destination) if term is not None)
        on_ip = self.target.on_ip if isinstance(self.target, Tproxy) else None
        return networks if on_ip is None else (*networks, on_ip)

    @property
    def exact_protocol(self) -> packet.Protocol | None:
        """The one protocol that the rule matches; None when it may match another."""
        return None if self.protocol is None or self.protocol.is_inverted else self.protocol.value

    def check(self) -> None:
        """RuleError for a rule whose parts do not go together."""
        if len({len(address) for address in self.addresses}) > 1:
            families = ", ".join(format_address(address) for address in self.addresses)
            raise RuleError(f"addresses of both families in one rule: {families}")
        if isinstance(self.target, Tproxy) and self.exact_protocol is None:
            raise RuleError("TPROXY needs `-p tcp' or `-p udp'")
        for match in self.matches:
            refusal = match.refusal(self)
            if refusal is not None:
                raise RuleError(refusal)


@dataclass(frozen=True, slots=True)
class Counts:
    """So many packets, so many bytes."""

    packets: int = 0
    bytes: int = 0


NOTHING_COUNTED: Final = Counts()


@dataclass(slots=True)
class Tally:
    """What a rule or a policy has counted so far."""

    packets: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, counts: Counts) -> Tally:
        """A tally that begins with these counts."""
        return cls(counts.packets, counts.bytes)


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule as the ruleset runs it.

    `first` and `last` bound the services (`rule_compile.service_of`) of the packets that match, so that one comparison
    is enough to pass over most rules; `test` asks for everything that the bounds do not.
    """

    first: int
    last: int
    test: Test


@dataclass(frozen=True, slots=True)
class Entry:
    """A rule in its place in a chain."""

    rule: Rule
    compiled: CompiledRule
    tally: Tally


@dataclass(frozen=True, slots=True)
class Chain:
    """The rules of a chain, in order; a built-in one has a policy, and counts what comes to it."""

    entries: tuple[Entry, ...] = ()
    policy: Policy | None = None
    tally: Tally = field(default_factory=Tally)
