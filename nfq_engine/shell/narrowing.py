"""Which first packets come to the queue at all: those that a rule or a sockref could want.

Owns: the sets of the table that follow the sockrefs, and the chains that follow the ruleset (divert.KERNEL tells their
names). Must not know packets. Place: beside the queue; the daemon calls `adjust` before anybody is told that a change
is done. Only datapath `kernel` has this: the inline one must see replies and every connection's packets.

What is diverted is never less than what could be wanted: a sockref's endpoints count whatever its flags are, and of a
rule only protocol, destination ports and interfaces are looked at. A policy DROP wants everything.
"""

from __future__ import annotations

import logging
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from nfq_engine.core.packet import Endpoint, Protocol
from nfq_engine.core.rule_values import BuiltinChain, Chain, Entry, Policy, Term
from nfq_engine.core.sockref import Flag, Sockref
from nfq_engine.core.tproxy_table import TproxyTable
from nfq_engine.shell import nftables
from nfq_engine.shell.divert import TABLE, TO_QUEUE, WANTED
from nfq_engine.shell.nftables import Element, NftError, NftSocket

log: Final = logging.getLogger("tproxyd")

_Member = tuple[str, bytes]  # a set and a key in it
_LAST_PORT: Final = 0xFFFF
_PLAIN: Final = frozenset(string.ascii_letters + string.digits + "-_.@")  # what interface names are made of


def endpoint_key(endpoint: Endpoint) -> bytes:
    """Address and port as nft has them in keys and data: each padded to four bytes."""
    return endpoint.address + endpoint.port.to_bytes(2, "big") + b"\0\0"


def protocol_key(protocol: Protocol) -> bytes:
    """A protocol as nft has it in keys."""
    return bytes((protocol, 0, 0, 0))


class Diversion:
    """Keeps the table's sets and chains up to a tproxy table's sockrefs and rules."""

    def __init__(self, table: TproxyTable, nft: NftSocket) -> None:
        self._table = table
        self._nft = nft
        self._changed: dict[Sockref, None] = {}
        self._members: dict[Sockref, tuple[_Member, ...]] = {}
        self._wanted: Counter[_Member] = Counter()  # how many sockrefs want a member
        self._present: set[_Member] = set()  # what is in the kernel
        self._doubtful: set[_Member] = set()  # what may have to be added or removed
        self._chains: object = None  # of the ruleset, when it was looked at last
        self._rules: dict[BuiltinChain, list[str]] = {}
        table.sockrefs.on_change = self._note

    def adjust(self) -> None:
        """Bring the kernel up to what changed."""
        if self._changed or self._doubtful:
            self._adjust_sets()
        if self._table.ruleset.chains is not self._chains:
            self._adjust_chains()

    def is_one_way(self, endpoint: Endpoint) -> bool:
        """Has a UNIDIR sockref this foreign endpoint, so that its datagrams come before conntrack sees them?"""
        return self._wanted[_versioned("one_way", endpoint), endpoint_key(endpoint)] > 0

    def _note(self, sockref: Sockref) -> None:
        self._changed[sockref] = None

    def _adjust_sets(self) -> None:
        """Add the members that sockrefs came to want, and remove those that none wants any more."""
        for sockref in self._changed:
            for member in self._members.pop(sockref, ()):
                self._wanted[member] -= 1
                self._doubtful.add(member)
            if sockref in self._table.sockrefs:
                members = tuple(_members(sockref))
                self._members[sockref] = members
                self._wanted.update(members)
                self._doubtful.update(members)
        self._changed.clear()
        added = {member for member in self._doubtful if self._wanted[member] > 0} - self._present
        removed = {member for member in self._doubtful if self._wanted[member] <= 0} & self._present
        try:
            self._nft.change(_elements(added), _keys(removed))
        except OSError as error:
            log.error("the sets of %s could not be changed, so connections may be missed: %s", TABLE, error.strerror)
            return  # what is doubtful is tried again
        self._present |= added
        self._present -= removed
        for member in self._doubtful:
            if self._wanted[member] <= 0:
                del self._wanted[member]
        self._doubtful.clear()

    def _adjust_chains(self) -> None:
        """Fill the chains for the built-in chains whose rules ask for something else than before."""
        chains = self._table.ruleset.chains
        text = ""
        for name in BuiltinChain:
            rules = list(_rules(chains[name]))
            if rules != self._rules.get(name):
                text += _filled(name, rules)
                self._rules[name] = rules
        if text:
            try:
                nftables.run(text)
            except NftError as error:
                log.error("the chains of %s could not be narrowed, so all comes to the queue: %s", TABLE, error)
                nftables.run("".join(_filled(name, [""]) for name in BuiltinChain))
                self._rules.clear()
        self._chains = chains


def _members(sockref: Sockref) -> Iterator[_Member]:
    """The members that a sockref wants."""
    protocol = protocol_key(sockref.protocol)
    yield _versioned("local", sockref.local), protocol + endpoint_key(sockref.local)
    if not sockref.foreign.port:
        return  # nobody can ask for it
    yield _versioned("foreign", sockref.foreign), protocol + endpoint_key(sockref.foreign)
    if sockref.protocol is Protocol.UDP and sockref.has(Flag.UNIDIR):
        yield _versioned("one_way", sockref.foreign), endpoint_key(sockref.foreign)
        yield _versioned("one_way_local", sockref.local), endpoint_key(sockref.local)


def _versioned(name: str, endpoint: Endpoint) -> str:
    """The name of the set for an endpoint's family."""
    return f"{name}{4 if len(endpoint.address) == 4 else 6}"


def _keys(members: Iterable[_Member]) -> dict[str, list[bytes]]:
    """Members by set."""
    keys: dict[str, list[bytes]] = {}
    for name, key in members:
        keys.setdefault(name, []).append(key)
    return keys


def _elements(members: Iterable[_Member]) -> dict[str, list[Element]]:
    """Members by set, as elements without data."""
    return {name: [(key, b"") for key in keys] for name, keys in _keys(members).items()}


# From rules to nft's.


def _filled(name: BuiltinChain, rules: Iterable[str]) -> str:
    """nft text that sends to the queue what fulfils one of these conditions."""
    chain = f"inet {TABLE} {WANTED[name]}"
    return f"flush chain {chain}\n" + "".join(f"add rule {chain} {rule} jump {TO_QUEUE}\n" for rule in rules)


def _rules(chain: Chain) -> Iterator[str]:
    """What packets must fulfil that a built-in chain could want: one nft condition for each way to be wanted.

    What is behind a jump needs no look: it comes only to what the jump itself matches.
    """
    if chain.policy is Policy.DROP:
        yield ""
        return
    ports: dict[str, list[tuple[int, int]]] = {}
    for entry in chain.entries:
        for protocol in Protocol:
            first = max(entry.compiled.first, protocol << 16)
            last = min(entry.compiled.last, protocol << 16 | _LAST_PORT)
            if first <= last:
                where = f"{_interfaces(entry)}meta l4proto {protocol.name.lower()}"
                ports.setdefault(where, []).append((first & _LAST_PORT, last & _LAST_PORT))
    for where, ranges in ports.items():
        merged = list(_merged(ranges))
        if merged == [(0, _LAST_PORT)]:
            yield where
        else:
            yield f"{where} th dport {{ {', '.join(f'{low}-{high}' for low, high in merged)} }}"


def _interfaces(entry: Entry) -> str:
    """The conditions on interfaces of a rule, each with a blank behind it."""
    terms = (("iifname", entry.rule.in_interface), ("oifname", entry.rule.out_interface))
    return "".join(_interface(word, term) for word, term in terms if term is not None)


def _interface(word: str, term: Term[str]) -> str:
    """One condition on an interface, none for a name that nft could not read; iptables writes `eth+`, nft `eth*`."""
    name, is_prefix = term.value.removesuffix("+"), term.value.endswith("+")
    if not name or not set(name) <= _PLAIN:
        return ""
    return f'{word} {"!= " if term.is_inverted else ""}"{name}{"*" if is_prefix else ""}" '


def _merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same ports in the fewest ranges, in order."""
    low, high = None, -1
    for first, last in sorted(ranges):
        if low is None:
            low, high = first, last
        elif first <= high + 1:
            high = max(high, last)
        else:
            yield low, high
            low, high = first, last
    if low is not None:
        yield low, high
