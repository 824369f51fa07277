"""What -m and -j load: the options of each match and target, and the value they make.

Owns: one `Syntax` a match or target. Must not know the order of arguments (`rule_arguments`). Place: between that and
the values of `rule_matches` and `rule_rates`. Whatever iptables offers beyond these is refused as unknown, by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from nfq_engine.core.packet import Protocol
from nfq_engine.core.rule_matches import (
    ALL_BITS,
    LAST_PORT,
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
from nfq_engine.core.rule_rates import (
    CERTAINTY,
    DEFAULT_BURST,
    DEFAULT_PERIOD,
    RATE_UNITS,
    Limit,
    NthMatch,
    RandomMatch,
)
from nfq_engine.core.rule_syntax import address, integer, port, ports
from nfq_engine.core.rule_values import TPROXY, Match, RuleError, Term, Tproxy, shown
from nfq_engine.core.surroundings import AddressType

T_co = TypeVar("T_co", covariant=True)

_DECIMAL: Final = re.compile(r"[0-9]{1,10}", re.ASCII)
_FRACTION: Final = re.compile(r"\+?(?:[0-9]{1,20}\.?|[0-9]{0,20}\.[0-9]{1,20})(?:e[-+]?[0-9]{1,3})?", re.ASCII | re.I)
_RATE: Final = re.compile(r"([0-9]{1,10})(?:/([a-z]+))?", re.ASCII | re.IGNORECASE)
_MOST_PORTS: Final = 15  # XT_MULTI_PORTS; a range counts twice
_LONGEST_COMMENT: Final = 255  # bytes: XT_MAX_COMMENT_LEN, less the one that ends it
_LARGEST_BURST: Final = 10_000
_LARGEST_ID: Final = 0xFFFFFFFE  # the last number means 'none'

_UNITS: Final = {
    "second": RATE_UNITS["sec"],
    "minute": RATE_UNITS["min"],
    "hour": RATE_UNITS["hour"],
    "day": RATE_UNITS["day"],
}

# What was given to a match or target: its options by their own names, with the argument as it was written.
Given = Mapping[str, Term[str]]


@dataclass(frozen=True, slots=True)
class Syntax(Generic[T_co]):
    """A match or target as it is written.

    `options` leads from every spelling, without the dashes, to the option's own name. `build` makes the value, and
    raises RuleError for what cannot be one.
    """

    name: str
    options: Mapping[str, str]
    build: Callable[[Given], T_co]
    invertible: frozenset[str] = frozenset()


def _same(*names: str) -> dict[str, str]:
    """Options that have one spelling."""
    return {name: name for name in names}


# -m tcp, -m udp.

_SOURCE_PORT: Final = "source-port"
_DESTINATION_PORT: Final = "destination-port"


def _port_match(protocol: Protocol) -> Syntax[PortMatch]:
    def build(given: Given) -> PortMatch:
        return PortMatch(protocol, _port_term(given.get(_SOURCE_PORT)), _port_term(given.get(_DESTINATION_PORT)))

    spellings = {"sport": _SOURCE_PORT, "dport": _DESTINATION_PORT} | _same(_SOURCE_PORT, _DESTINATION_PORT)
    return Syntax(protocol.name.lower(), spellings, build, frozenset(spellings.values()))


def _port_term(term: Term[str] | None) -> Term[Ports] | None:
    """What an option says; None for nothing, and for what every port fulfils."""
    if term is None:
        return None
    value = ports(term.value)
    return None if value == Ports(0, LAST_PORT) and not term.is_inverted else Term(value, term.is_inverted)


# -m multiport.

_MULTIPORT_SPELLINGS: Final = {
    **dict.fromkeys(("sports", "sport", "source-ports", "source-port"), PortSide.SOURCE),
    **dict.fromkeys(("dports", "dport", "destination-ports", "destination-port"), PortSide.DESTINATION),
    **dict.fromkeys(("ports", "port"), PortSide.EITHER),
}


def _multiport(given: Given) -> Multiport:
    if len(given) != 1:
        raise RuleError("multiport: exactly one of --sports, --dports and --ports must be specified")
    [(side, term)] = given.items()
    listed = tuple(_listed_ports(each) for each in term.value.split(","))
    if sum(1 if each.low == each.high else 2 for each in listed) > _MOST_PORTS:
        raise RuleError(f"multiport: too many ports specified, more than {_MOST_PORTS}: `{shown(term.value)}'")
    return Multiport(PortSide(side), Term(listed, term.is_inverted))


def _listed_ports(text: str) -> Ports:
    """One port or range of a list; unlike --dport's, a range names both ends, and they differ."""
    low, colon, high = text.partition(":")
    if not colon:
        return Ports(port(text), port(text))
    if port(low) >= port(high):
        raise RuleError(f"invalid portrange specified: `{shown(text)}'")
    return Ports(port(low), port(high))


# -m mark.


def _mark(given: Given) -> MarkMatch:
    if "mark" not in given:
        raise RuleError('mark: option "--mark" must be specified')
    term = given["mark"]
    value_text, slash, mask_text = term.value.partition("/")
    value, mask = integer(value_text, 0, ALL_BITS), integer(mask_text, 0, ALL_BITS) if slash else ALL_BITS
    if value is None or mask is None:
        raise RuleError(f'mark: bad integer value for option "--mark", or out of range: `{shown(term.value)}\'')
    return MarkMatch(Term(Bits(value, mask), term.is_inverted))


# -m comment.


def _comment(given: Given) -> Comment:
    if "comment" not in given:
        raise RuleError('comment: option "--comment" must be specified')
    text = given["comment"].value
    if not text.isprintable():
        raise RuleError(f"comment: unprintable character in `{shown(text)}'")
    if len(text.encode()) > _LONGEST_COMMENT:
        raise RuleError(f"comment: longer than {_LONGEST_COMMENT} bytes: `{shown(text)}'")
    return Comment(text)


# -m addrtype.

# The order counts: an abbreviation means the first that begins so.
_ADDRESS_TYPES: Final = (
    "UNSPEC",
    "UNICAST",
    "LOCAL",
    "BROADCAST",
    "ANYCAST",
    "MULTICAST",
    "BLACKHOLE",
    "UNREACHABLE",
    "PROHIBIT",
    "THROW",
    "NAT",
    "XRESOLVE",
)


def _address_type_match(given: Given) -> AddressTypeMatch:
    if not given:
        raise RuleError("addrtype: you must specify --src-type or --dst-type")
    return AddressTypeMatch(_types(given.get("src-type")), _types(given.get("dst-type")))


def _types(term: Term[str] | None) -> Term[frozenset[AddressType]] | None:
    if term is None:
        return None
    return Term(frozenset(_address_type(each) for each in term.value.split(",")), term.is_inverted)


def _address_type(text: str) -> AddressType:
    name = next((each for each in _ADDRESS_TYPES if text and each.startswith(text.upper())), None)
    if name is None:
        raise RuleError(f'addrtype: bad type "{shown(text)}"')
    if name not in set(AddressType):
        raise RuleError(f'addrtype: type "{name}" is not supported: there are {", ".join(AddressType)}')
    return AddressType(name)


# -m owner.


def _owner(given: Given) -> OwnerMatch:
    if not given:
        raise RuleError("owner: at least one of --uid-owner, --gid-owner is required")
    return OwnerMatch(_identifiers(given, "uid-owner"), _identifiers(given, "gid-owner"))


def _identifiers(given: Given, option: str) -> Term[Identifiers] | None:
    if option not in given:
        return None
    term = given[option]
    low_text, dash, high_text = term.value.partition("-")
    low = integer(low_text, 0, _LARGEST_ID)
    high = integer(high_text, 0, _LARGEST_ID) if dash else low
    if low is None or high is None or low > high:
        raise RuleError(f'owner: bad value for "--{option}" option: "{shown(term.value)}": names are not resolved')
    return Term(Identifiers(low, high), term.is_inverted)


# -m limit.


def _limit(given: Given) -> Limit:
    period = _period(given["limit"].value) if "limit" in given else DEFAULT_PERIOD
    burst: int | None = DEFAULT_BURST
    if "limit-burst" in given:
        burst = integer(given["limit-burst"].value, 1, _LARGEST_BURST)
    if burst is None:
        text = shown(given["limit-burst"].value)
        raise RuleError(f'limit: bad value for option "--limit-burst", or out of range (1-{_LARGEST_BURST}): `{text}\'')
    return Limit(period, burst)


def _period(text: str) -> int:
    """The time between two packets of a rate: packets, or packets/unit, a unit being abbreviated as one likes."""
    rate = _RATE.fullmatch(text)
    packets = int(rate[1]) if rate is not None else 0
    written = (rate[2] if rate is not None else None) or "second"
    unit = next((name for name in _UNITS if name.startswith(written.lower())), None)
    if unit is None or not packets:
        raise RuleError(f'bad rate "{shown(text)}"')
    period = _UNITS[unit] // packets
    if not period:
        raise RuleError(f'Rate too fast "{shown(text)}"')
    return period


# -m statistic.


def _statistic(given: Given) -> RandomMatch | NthMatch:
    if "mode" not in given:
        raise RuleError('statistic: option "--mode" must be specified')
    mode = given["mode"].value
    wanted = {"random": {"probability"}, "nth": {"every", "packet"}}.get(mode)
    if wanted is None:
        raise RuleError(f'statistic: bad mode "{shown(mode)}"')
    for option in wanted:
        if option not in given:
            raise RuleError(f"statistic: --{option} must be specified when using {mode} mode")
    for option in given.keys() - wanted - {"mode"}:
        raise RuleError(f"statistic: --{option} cannot be used with {mode} mode")
    return _random(given["probability"]) if mode == "random" else _nth(given["every"], given["packet"])


def _random(term: Term[str]) -> RandomMatch:
    value = float(term.value) if _FRACTION.fullmatch(term.value) else 2.0
    if value > 1:
        text = shown(term.value)
        raise RuleError(f'statistic: bad value for option "--probability", or out of range (0-1): `{text}\'')
    return RandomMatch(Term(int(value * CERTAINTY + 0.5), term.is_inverted))


def _nth(every: Term[str], packet: Term[str]) -> NthMatch:
    count = integer(every.value, 1, 0xFFFFFFFF)
    if count is None:
        text = shown(every.value)
        raise RuleError(f'statistic: bad value for option "--every", or out of range (1-4294967295): `{text}\'')
    first = integer(packet.value, 0, count - 1)
    if first is None:
        raise RuleError(f"statistic: the --packet p must be 0 <= p <= n-1: `{shown(packet.value)}'")
    return NthMatch(Term(count, every.is_inverted), first)


_EVERY_MATCH: Final[tuple[Syntax[Match], ...]] = (
    _port_match(Protocol.TCP),
    _port_match(Protocol.UDP),
    Syntax("multiport", _MULTIPORT_SPELLINGS, _multiport, frozenset(PortSide)),
    Syntax("mark", _same("mark"), _mark, frozenset({"mark"})),
    Syntax("comment", _same("comment"), _comment),
    Syntax("addrtype", _same("src-type", "dst-type"), _address_type_match, frozenset({"src-type", "dst-type"})),
    Syntax("owner", _same("uid-owner", "gid-owner"), _owner, frozenset({"uid-owner", "gid-owner"})),
    Syntax("limit", _same("limit", "limit-burst"), _limit),
    Syntax(
        "statistic",
        _same("mode", "probability", "every", "packet"),
        _statistic,
        frozenset({"probability", "every"}),
    ),
)
MATCHES: Final[Mapping[str, Syntax[Match]]] = {each.name: each for each in _EVERY_MATCH}


# -j TPROXY.


def _tproxy(given: Given) -> Tproxy:
    if "on-port" not in given:
        raise RuleError('TPROXY: option "--on-port" must be specified')
    number = _DECIMAL.fullmatch(given["on-port"].value)
    if number is None or int(number[0]) > LAST_PORT:
        raise RuleError(f'TPROXY: bad port for option "--on-port": `{shown(given["on-port"].value)}\'')
    on_ip = address(given["on-ip"].value) if "on-ip" in given else b""
    if on_ip is None:
        raise RuleError(f'TPROXY: bad address for option "--on-ip": `{shown(given["on-ip"].value)}\'')
    return Tproxy(int(number[0]), on_ip if any(on_ip) else None)


TPROXY_SYNTAX: Final = Syntax(TPROXY, _same("on-port", "on-ip"), _tproxy)
