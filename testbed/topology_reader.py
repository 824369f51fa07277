"""From a document that keeps to the schema to a topology.

Owns: what the words of a topology file mean. A value of the right type that means nothing is reported with its place,
and reading goes on, so that all such values are found.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from testbed.addressing import FAMILIES
from testbed.documents import Problem, Where
from testbed.topology import (
    Address,
    Capture,
    End,
    EngineSpec,
    Gateway,
    Impairment,
    Kind,
    Link,
    Network,
    Node,
    Readiness,
    Route,
    Service,
    Topology,
    TproxyCalls,
)

_AUTOMATIC: Final = {"auto": FAMILIES, "auto4": (4,), "auto6": (6,)}
_DEFAULT: Final[dict[int, Network]] = {4: ipaddress.IPv4Network("0.0.0.0/0"), 6: ipaddress.IPv6Network("::/0")}

_TPROXY_CALLS: Final = {
    False: TproxyCalls.NONE,
    True: TproxyCalls.SOCKOPTS,
    "recvorigaddrs": TproxyCalls.SOCKOPTS_AND_RECVMSG,
}
_DURATIONS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_RATES: Final = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_LONGEST: Final = 24 * 60 * 60.0  # seconds
_FASTEST: Final = 10**12  # bits per second
_QUANTITY: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+|%)")

_Given = TypeVar("_Given")
_Value = TypeVar("_Value")


def read(document: Mapping[str, Any]) -> tuple[Topology, list[Problem]]:
    """The topology, without what could not be read, and the problems of that."""
    reader = _Reader()
    return reader.topology(document), reader.problems


class _Reader:
    """Reads the parts of one document."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._interfaces: dict[str, int] = {}  # by node: how many ends it has so far

    def topology(self, document: Mapping[str, Any]) -> Topology:
        capture = document.get("capture", Capture.ALL)
        return Topology(
            name=document["name"],
            description=document.get("description", ""),
            nodes=tuple(self._node(name, value or {}) for name, value in document["nodes"].items()),
            links=tuple(self._link(("links", at), link) for at, link in enumerate(document.get("links", ()))),
            capture=Capture(capture) if isinstance(capture, str) else tuple(capture),
            offload=document.get("offload", False),
        )

    def _node(self, name: str, value: Mapping[str, Any]) -> Node:
        where = ("nodes", name)
        routes = [self._route((*where, "routes", at), route) for at, route in enumerate(value.get("routes", ()))]
        setup = [self._try((*where, "setup", at), _words, command) for at, command in enumerate(value.get("setup", ()))]
        engine = value.get("engine")
        return Node(
            name=name,
            kind=Kind(value.get("kind", "host")),
            routes=tuple(route for route in routes if route is not None),
            sysctls=tuple((key, str(setting)) for key, setting in value.get("sysctls", {}).items()),
            setup=tuple(tuple(words) for words in setup if words is not None),
            services=tuple(service(key, each) for key, each in value.get("services", {}).items()),
            engine=self._engine((*where, "engine"), engine) if engine is not None else None,
            nft=value.get("nft", ""),
            iptables=value.get("iptables", ""),
            ip6tables=value.get("ip6tables", ""),
        )

    def _route(self, where: Where, value: Mapping[str, str]) -> Route | None:
        via: Gateway | None = self._try((*where, "via"), ipaddress.ip_address, value["via"])
        if via is None:
            return None
        if value["to"] == "default":
            return Route(_DEFAULT[via.version], via)
        to: Network | None = self._try((*where, "to"), ipaddress.ip_network, value["to"])
        if to is not None and to.version != via.version:
            self.problems.append((where, f"{to} and {via} are of two families"))
            return None
        return Route(to, via) if to is not None else None

    def _engine(self, where: Where, value: Mapping[str, Any]) -> EngineSpec:
        rules = tuple(value.get("rules", ()))
        for at, rule in enumerate(rules):
            self._try((*where, "rules", at), _check_rule, rule)
        options = tuple(str(option) for option in value.get("options", ()))
        if options:
            self._try((*where, "options"), _check_options, options)
        return EngineSpec(value.get("datapath", "inline"), rules, options)

    def _link(self, where: Where, value: Mapping[str, Any]) -> Link:
        both = value.get("impair")
        left, right = (
            self._end((*where, "ends", side), end, None if both is None else ((*where, "impair"), both))
            for side, end in enumerate(value["ends"])
        )
        return Link(left, right, int(value.get("mtu", 1500)))

    def _end(self, where: Where, value: Mapping[str, Any], of_link: tuple[Where, Any] | None) -> End:
        """One end; its interface follows from the link's place in the file where it is not given."""
        node = value["node"]
        place = self._interfaces.get(node, 0)
        self._interfaces[node] = place + 1
        written = value.get("addresses", "auto")
        is_automatic = isinstance(written, str)
        impaired = ((*where, "impair"), value["impair"]) if "impair" in value else of_link
        return End(
            node=node,
            interface=value.get("interface", f"eth{place}"),
            addresses=() if is_automatic else self._addresses((*where, "addresses"), written),
            auto=_AUTOMATIC[written] if is_automatic else (),
            mac=value.get("mac"),
            impair=self._impairment(*impaired) if impaired else None,
        )

    def _addresses(self, where: Where, written: Sequence[str]) -> tuple[Address, ...]:
        found = [self._try((*where, at), _interface_address, text) for at, text in enumerate(written)]
        return tuple(address for address in found if address is not None)

    def _impairment(self, where: Where, value: Mapping[str, Any]) -> Impairment:
        found, problems = impairment(value)
        self.problems += [((*where, *inner), what) for inner, what in problems]
        return found

    def _try(self, where: Where, read_text: Callable[[_Given], _Value], text: _Given) -> _Value | None:
        """A value read from text; None, and a problem more, when it cannot be."""
        try:
            return read_text(text)
        except ValueError as error:
            self.problems.append((where, str(error)))
            return None


def service(name: str, value: Mapping[str, Any]) -> Service:
    """A service, from a mapping that keeps to the schema's `service`."""
    ready = value.get("ready", {})
    if ready == "notify":
        ready = {"notify": True}
    readiness = Readiness(
        port=ready.get("port"),
        log=ready.get("log"),
        notify=ready.get("notify", False),
        within=float(ready.get("within", Readiness().within)),
    )
    command = tuple(str(part) for part in value["command"])
    return Service(name, command, readiness, _TPROXY_CALLS[value.get("tproxy", False)])


def impairment(value: Mapping[str, Any]) -> tuple[Impairment, list[Problem]]:
    """An impairment, from a mapping that keeps to the schema's `impairment`, without what could not be read."""
    problems: list[Problem] = []

    def quantity(key: str, read_text: Callable[[str], float]) -> float:
        try:
            return read_text(value[key]) if key in value else 0.0
        except ValueError as error:
            problems.append(((key,), str(error)))
            return 0.0

    found = Impairment(
        delay=quantity("delay", duration),
        jitter=quantity("jitter", duration),
        loss=quantity("loss", _share),
        duplicate=quantity("duplicate", _share),
        reorder=quantity("reorder", _share),
        corrupt=quantity("corrupt", _share),
        rate=round(quantity("rate", _rate)) or None,
        seed=value.get("seed"),
    )
    return found, problems + [((key,), what) for key, what in _contradictions(found)]


def duration(text: str) -> float:
    """Seconds, from a number with its unit; ValueError when it is none."""
    seconds = _quantity(text, _DURATIONS)
    if seconds > _LONGEST:
        raise ValueError(f"{text!r} is more than a day")
    return seconds


def _words(command: str) -> list[str]:
    words = shlex.split(command)
    if not words:
        raise ValueError(f"there is no command in {command!r}")
    return words


def _share(text: str) -> float:
    return _quantity(text, {"%": 0.01})


def _rate(text: str) -> float:
    rate = _quantity(text, _RATES)
    if not 1 <= rate <= _FASTEST:
        raise ValueError(f"{text!r} is not between 1bit and {_FASTEST // 10**9}gbit")
    return rate


def _check_rule(rule: str) -> None:
    """ValueError, in the engine's own words, when the engine would not start with a rule."""
    # Only topologies with engines need the engine's parser.
    import random

    from nfq_engine.core.rule_text import parse_command, split_words
    from nfq_engine.core.ruleset import Ruleset

    if "\n" in rule.strip():
        raise ValueError("a rule is one line")
    words = split_words(rule.strip())
    if words[:1] != ["-A"]:
        raise ValueError(f"a rule begins with -A: {rule!r}")
    draft = Ruleset(random.Random(0)).draft()
    draft.execute(parse_command(words))
    draft.check()


def _check_options(options: Sequence[str]) -> None:
    """ValueError, in tproxyd's own words, when it would not start with these options."""
    # Few topologies need tproxyd's parser.
    import click
    from click.core import ParameterSource

    from nfq_engine.daemon import main as tproxyd

    if "--help" in options:
        raise ValueError("with --help no engine starts")
    try:
        given = tproxyd.make_context("tproxyd", list(options))
    except click.UsageError as error:
        raise ValueError(error.format_message()) from error
    for name in ("datapath", "ruleset", "notify_fd"):
        if given.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise ValueError(
                f"--{name.replace('_', '-')} is given by the lab: datapath and rules have keys of their own"
            )


def _interface_address(text: str) -> Address:
    if "/" not in text:
        raise ValueError(f"{text} has no prefix length")
    return ipaddress.ip_interface(text)


def _quantity(text: str, units: Mapping[str, float]) -> float:
    """A number with its unit."""
    match = _QUANTITY.fullmatch(str(text))
    if match is None or match[2] not in units:
        raise ValueError(f"{text!r} is no number followed by {' or '.join(units)}")
    return float(match[1]) * units[match[2]]


def _contradictions(made: Impairment) -> list[tuple[str, str]]:
    found = [(key, "more than 100 %") for key in ("loss", "duplicate", "reorder", "corrupt") if getattr(made, key) > 1]
    if made.jitter > made.delay:
        found.append(("jitter", "more than the delay: a packet cannot arrive before it was sent"))
    if made.reorder and not made.delay:
        found.append(("reorder", "a packet can only overtake others when there is a delay"))
    return found
