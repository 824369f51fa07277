"""Rules as text: -S and -L.

Owns: the words and columns that iptables uses for them. Must not know how a table changes. Place: beside `rule_table`.

It differs from iptables 1.8.9 only here: protocols are shown by name with -n too, as every other release does; ports
never become service names, nor addresses host names, as the core resolves nothing; `0.0.0.0/0` in -L stands for every
address of either family unless the rule names another address. -S is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, assert_never

from nfq_engine.core.packet import Endpoint
from nfq_engine.core.rule_commands import (
    Show,
    Specify,
)
from nfq_engine.core.rule_values import (
    AnyTarget,
    BuiltinChain,
    Chain,
    Entry,
    Jump,
    Network,
    Rule,
    Tally,
    Target,
    Term,
    Tproxy,
    format_address,
)

_FULL: Final = 99_999  # the largest number that is shown in full without -x


def specify(chains: Mapping[str, Chain], command: Specify) -> list[str]:
    """What -S prints."""
    heads: list[str] = []
    rules: list[str] = []
    for name in _chosen(chains, command.chain):
        chain = chains[name]
        if command.number is None:
            heads.append(_declaration(name, chain, command.with_counts))
        for _, entry in _numbered(chain, command.number):
            rules.append(specification(name, entry.rule, entry.tally if command.with_counts else None))
    return heads + rules


def _declaration(name: str, chain: Chain, with_counts: bool) -> str:
    if chain.policy is None:
        return f"-N {name}"
    return f"-P {name} {chain.policy}" + (_counts(chain.tally) if with_counts else "")


def specification(chain: str, rule: Rule, tally: Tally | None = None) -> str:
    """The command that appends a rule, with its counts if they are given."""
    counts = "" if tally is None else _counts(tally)
    return f"-A {chain}" + "".join(f" {words}" for words in _conditions(rule)) + counts + _target(rule.target)


def _counts(tally: Tally) -> str:
    return f" -c {tally.packets} {tally.bytes}"


def _conditions(rule: Rule) -> Iterator[str]:
    """What a rule asks, in iptables' order."""
    for option, address in (("-s", rule.source), ("-d", rule.destination)):
        if address is not None:
            yield f"{address.sign}{option} {address.value}"
    for option, interface in (("-i", rule.in_interface), ("-o", rule.out_interface)):
        if interface is not None:
            yield f"{interface.sign}{option} {interface.value}"
    if rule.protocol is not None:
        yield f"{rule.protocol.sign}-p {rule.protocol.value.name.lower()}"
    for match in rule.matches:
        yield match.arguments()


def _target(target: AnyTarget | None) -> str:
    match target:
        case None:
            return ""
        case Target():
            return f" -j {target}"
        case Jump(chain, is_goto):
            return f" {'-g' if is_goto else '-j'} {chain}"
        case Tproxy(on_port, on_ip):
            address = "" if on_ip is None else f" --on-ip {format_address(on_ip)}"
            return f" -j TPROXY --on-port {on_port}{address}"
        case _:
            assert_never(target)


def show(chains: Mapping[str, Chain], command: Show) -> list[str]:
    """What -L prints: chains with an empty line between them, or one rule alone."""
    lines: list[str] = []
    for name in _chosen(chains, command.chain):
        chain = chains[name]
        if command.number is None:
            lines += [""] if lines else []
            lines += [_title(name, chain, chains, command), _columns(command)]
        lines += [_row(number, entry, command) for number, entry in _numbered(chain, command.number)]
    return lines


def references(chains: Mapping[str, Chain], name: str) -> int:
    """How many rules lead to a chain."""
    targets = (entry.rule.target for chain in chains.values() for entry in chain.entries)
    return sum(isinstance(target, Jump) and target.chain == name for target in targets)


def in_order(chains: Mapping[str, Chain]) -> list[str]:
    """The names of all chains as iptables orders them: the built-in ones first, the others by name."""
    return [*BuiltinChain, *sorted(name for name in chains if name not in set(BuiltinChain))]


def _chosen(chains: Mapping[str, Chain], name: str | None) -> list[str]:
    return in_order(chains) if name is None else [name]


def _numbered(chain: Chain, wanted: int | None) -> Iterator[tuple[int, Entry]]:
    """The rules with their numbers: all, or the one that is wanted, if there is one."""
    for number, entry in enumerate(chain.entries, start=1):
        if wanted in (None, number):
            yield number, entry


def _title(name: str, chain: Chain, chains: Mapping[str, Chain], style: Show) -> str:
    if chain.policy is None:
        return f"Chain {name} ({references(chains, name)} references)"
    counts = ""
    if style.is_verbose:
        packets, size = (_number(count, style.is_exact) for count in (chain.tally.packets, chain.tally.bytes))
        counts = f" {packets} packets, {size} bytes"
    return f"Chain {name} (policy {chain.policy}{counts})"


def _columns(style: Show) -> str:
    number = "num  " if style.has_numbers else ""
    counts = "    pkts      bytes " if style.is_exact else " pkts bytes "
    interfaces = " in     out    " if style.is_verbose else ""
    return (
        f"{number}{counts if style.is_verbose else ''}target     prot opt{interfaces} source               destination"
        "         "
    )


def _row(number: int, entry: Entry, style: Show) -> str:
    """One rule as a line."""
    rule = entry.rule
    line = f"{number:<4} " if style.has_numbers else ""
    if style.is_verbose:
        width = 8 if style.is_exact else 5
        counts = (_number(count, style.is_exact) for count in (entry.tally.packets, entry.tally.bytes))
        line += "".join(f"{count:>{width}} " for count in counts)
    protocol = "all" if rule.protocol is None else rule.protocol.value.name.lower()
    line += f"{_target_name(rule.target):<9} {_sign(rule.protocol)}{protocol:<4} -- "
    if style.is_verbose:
        entering, leaving = (_interface(term, style) for term in (rule.in_interface, rule.out_interface))
        line += f" {entering:<6} {leaving:<6} "
    for address in (rule.source, rule.destination):
        line += f"{_sign(address)}{_address(address, rule, style):<19} "
    return line + _details(rule)


def _number(count: int, is_exact: bool) -> str:
    """A count; without -x one that is too long is rounded to thousands, millions and so on."""
    if is_exact or count <= _FULL:
        return str(count)
    for suffix in "KMGT":
        count = (count + 500) // 1000
        if count <= 9999 or suffix == "T":
            return f"{count}{suffix}"
    raise AssertionError("unreachable")


def _sign(term: Term[Any] | None) -> str:
    return "!" if term is not None and term.is_inverted else " "


def _interface(term: Term[str] | None, style: Show) -> str:
    if term is None:
        return "*" if style.is_numeric else "any"
    return _sign(term).strip() + term.value


def _address(term: Term[Network] | None, rule: Rule, style: Show) -> str:
    if (term is None or term.value.is_everything) and not style.is_numeric:
        return "anywhere"
    if term is None:
        return "::/0" if _is_ipv6(rule) else "0.0.0.0/0"
    return format_address(term.value.address) if term.value.is_host else str(term.value)


def _is_ipv6(rule: Rule) -> bool:
    return any(len(address) == 16 for address in rule.addresses)


def _target_name(target: AnyTarget | None) -> str:
    match target:
        case None:
            return ""
        case Target():
            return target.value
        case Jump(chain, _):
            return chain
        case Tproxy():
            return "TPROXY"
        case _:
            assert_never(target)


def _details(rule: Rule) -> str:
    """What the columns have no room for."""
    words = [match.description() for match in rule.matches]
    if isinstance(rule.target, Tproxy):
        on_ip = rule.target.on_ip or bytes(16 if _is_ipv6(rule) else 4)
        words.append(f"TPROXY redirect {Endpoint(on_ip, rule.target.on_port)}")
    goto = "[goto] " if isinstance(rule.target, Jump) and rule.target.is_goto else ""
    return goto + "".join(f" {word}" for word in words)
