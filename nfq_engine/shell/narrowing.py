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
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from nfq_engine.core.packet import Endpoint, Protocol
from nfq_engine.core.rule_values import BuiltinChain, Chain, Entry, Jump, Policy, Term, Tproxy
from nfq_engine.core.sockref import Flag, Sockref
from nfq_engine.core.tproxy_table import TproxyTable
from nfq_engine.shell import nftables
from nfq_engine.shell.divert import DECIDED, ONE_WAY, TABLE, TO_QUEUE, UNTRACK, WANTED
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
        # By chain, as they were put in last; in the beginning these are empty.
        self._rules: dict[str, list[str]] = {chain: [] for chain in (*ONE_WAY.values(), *DECIDED.values(), UNTRACK)}
        self._ports: frozenset[int] = frozenset()  # of the one-way listeners, when they were looked at last
        table.sockrefs.on_change = self._note

    def adjust(self) -> None:
        """Bring the kernel up to what changed."""
        if self._changed or self._doubtful:
            self._adjust_sets()
        if self._table.ruleset.chains is not self._chains or self._table.listeners.ports is not self._ports:
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
        """Fill the chains whose rules ask for something else than before."""
        self._chains, self._ports = self._table.ruleset.chains, self._table.listeners.ports
        wanted: dict[str, list[str]] = {}
        for name in BuiltinChain:
            chain = self._chains[name]
            wanted[WANTED[name]] = [f"{condition} jump {TO_QUEUE}".lstrip() for condition in _conditions(chain)]
            one_way = list(_one_way_conditions(chain, self._ports))
            wanted[ONE_WAY[name]] = [f"{condition} jump {TO_QUEUE}" for condition in one_way]
            wanted[DECIDED[name]] = [f"{condition} accept" for condition in one_way]
        try:
            self._fill(wanted)
        except NftError as error:
            log.error("the chains of %s could not be narrowed, so all comes to the queue: %s", TABLE, error)
            self._rules.clear()
            self._fill({chain: [f"jump {TO_QUEUE}"] if chain in WANTED.values() else [] for chain in wanted})
            self._rules.clear()
        try:
            self._fill({UNTRACK: list(_untracked(self._ports))})
        except NftError as error:
            log.error("conntrack will keep state of datagrams that are redirected one-way: %s", error)

    def _fill(self, wanted: dict[str, list[str]]) -> None:
        """Put rules into the chains that have others; NftError, and no change, if nft refuses one."""
        changed = {chain: rules for chain, rules in wanted.items() if rules != self._rules.get(chain)}
        if changed:
            nftables.run("".join(_filled(chain, rules) for chain, rules in changed.items()))
            self._rules |= changed


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


def _filled(chain: str, rules: Iterable[str]) -> str:
    """nft text that gives a chain these rules and no other."""
    name = f"inet {TABLE} {chain}"
    return f"flush chain {name}\n" + "".join(f"add rule {name} {rule}\n" for rule in rules)


def _conditions(chain: Chain) -> Iterator[str]:
    """What packets must fulfil that a built-in chain could want: one nft condition for each way to be wanted.

    What is behind a jump needs no look: it comes only to what the jump itself matches.
    """
    if chain.policy is Policy.DROP:
        yield ""
        return
    yield from _conditions_of(chain, Protocol, lambda _: True)


def _one_way_conditions(chain: Chain, ports: frozenset[int]) -> Iterator[str]:
    """What datagrams must fulfil that a built-in chain could redirect to a one-way listener on one of these ports.

    Of a jump, it is not looked at where it leads.
    """
    if ports:
        yield from _conditions_of(chain, (Protocol.UDP,), lambda entry: _may_lead_to(entry, ports))


def _may_lead_to(entry: Entry, ports: frozenset[int]) -> bool:
    """Could a rule redirect to one of these ports? Port 0 is the datagram's own."""
    match entry.rule.target:
        case Tproxy(on_port):
            return not on_port or on_port in ports
        case Jump():
            return True
        case _:
            return False


def _untracked(ports: frozenset[int]) -> Iterator[str]:
    """The rules that keep from conntrack what was redirected to one-way listeners."""
    if ports:
        yield f"udp dport {{ {', '.join(map(str, sorted(ports)))} }} fib daddr type local notrack"


def _conditions_of(chain: Chain, protocols: Iterable[Protocol], wants: Callable[[Entry], bool]) -> Iterator[str]:
    """What packets of these protocols must fulfil that the wanted rules of a chain could match."""
    ports: dict[str, list[tuple[int, int]]] = {}
    for entry in filter(wants, chain.entries):
        for protocol in protocols:
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
