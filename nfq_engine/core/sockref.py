"""Sockrefs: the sockets that own a foreign address, and the two hashes that find them.

Owns: the sockref, its flags, the look-up order. Must not know packets, rules, or which calls of the socket API are
allowed (sockopt.py). Place in the path: asked for every new connection, before the ruleset.

Look-up order (tproxy.md section 3): an entry whose remote address equals the one asked for beats an entry without one;
an entry with another remote address never matches; a caller that does not care (`remote` is None) gets the first.
An entry that the caller does not accept never hides one that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntFlag
from typing import TYPE_CHECKING, Final

from nfq_engine.core.packet import Endpoint, Protocol

if TYPE_CHECKING:
    from nfq_engine.core.conntrack import Connection


class Flag(IntFlag):
    """Flags of a sockref; the numbers of the socket API (tproxy.md section 4) where it has them."""

    CONNECT = 0x1
    LISTEN = 0x2
    ESTABLISHED = 0x4
    ONCE = 0x10000
    MARK_ONLY = 0x20000
    APPLIED = 0x40000
    UNIDIR = 0x80000
    # State flags that the API does not show.
    CONNECT_ONLY = 0x1000000
    ORPHAN = 0x2000000


NO_FLAGS: Final = Flag(0)


@dataclass(eq=False, slots=True)
class Sockref:
    """One socket (or several that share a mark-only entry) with a foreign address.

    `cookies` are the kernel's numbers of the sockets (SO_COOKIE); their count is the socket count. `related` are the
    connections that a mapping of this sockref created.
    """

    protocol: Protocol
    local: Endpoint
    foreign: Endpoint
    remote: Endpoint
    cookies: set[int]
    hashed: float
    flags: Flag = NO_FLAGS
    owner: int = 0  # user id
    related: set[Connection] = field(default_factory=set)

    def has(self, flags: Flag) -> bool:
        """Is one of these flags set?"""
        return bool(self.flags & flags)

    @property
    def has_remote(self) -> bool:
        """Is it narrowed to a peer?"""
        return not self.remote.is_unspecified

    def is_narrowed_to(self, peer: Endpoint) -> bool:
        """Is its remote this peer? A remote port of 0 stands for any."""
        return self.remote.address == peer.address and self.remote.port in (0, peer.port)

    @property
    def is_one_way(self) -> bool:
        """Is every datagram for it translated by itself? There are no such streams: of TCP, UNIDIR says nothing."""
        return self.protocol is Protocol.UDP and self.has(Flag.UNIDIR)

    @property
    def is_spent(self) -> bool:
        """Has it served the one connection that ONCE allows?"""
        return self.flags & (Flag.ONCE | Flag.APPLIED) == Flag.ONCE | Flag.APPLIED


_Key = tuple[Protocol, Endpoint]
_Hash = dict[_Key, dict[Sockref, None]]  # the inner dict is a set that keeps its order


class SockrefTable:
    """Every sockref, in a hash by local and a hash by foreign endpoint.

    `on_change` is told of every sockref that was added or removed, or has got another foreign endpoint or other flags.
    """

    def __init__(self) -> None:
        self.on_change: Callable[[Sockref], None] = lambda _: None
        self._by_local: _Hash = {}
        self._by_foreign: _Hash = {}
        self._by_cookie: dict[int, Sockref] = {}

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._by_local.values())

    def __bool__(self) -> bool:
        return bool(self._by_local)

    def __iter__(self) -> Iterator[Sockref]:
        for entries in self._by_local.values():
            yield from entries

    def __contains__(self, sockref: Sockref) -> bool:
        return sockref in self._by_local.get((sockref.protocol, sockref.local), ())

    def of_socket(self, cookie: int) -> Sockref | None:
        """The sockref of a socket."""
        return self._by_cookie.get(cookie)

    def at_local(self, protocol: Protocol, local: Endpoint) -> list[Sockref]:
        """All sockrefs with a local endpoint, oldest first."""
        return list(self._by_local.get((protocol, local), ()))

    def at_foreign(self, protocol: Protocol, foreign: Endpoint) -> list[Sockref]:
        """All sockrefs with a foreign endpoint, oldest first."""
        return list(self._by_foreign.get((protocol, foreign), ()))

    def has_foreign(self, protocol: Protocol, foreign: Endpoint) -> bool:
        """Is there a sockref with a foreign endpoint?"""
        return (protocol, foreign) in self._by_foreign

    def find_local(
        self, protocol: Protocol, local: Endpoint, remote: Endpoint | None, accept: Callable[[Sockref], bool]
    ) -> Sockref | None:
        """The best accepted sockref with a local endpoint, for a peer."""
        return _best(self._by_local.get((protocol, local), ()), remote, accept)

    def find_foreign(
        self, protocol: Protocol, foreign: Endpoint, remote: Endpoint | None, accept: Callable[[Sockref], bool]
    ) -> Sockref | None:
        """The best accepted sockref with a foreign endpoint, for a peer."""
        return _best(self._by_foreign.get((protocol, foreign), ()), remote, accept)

    def add(self, sockref: Sockref) -> None:
        """Hash a new sockref."""
        self._by_local.setdefault((sockref.protocol, sockref.local), {})[sockref] = None
        self._by_foreign.setdefault((sockref.protocol, sockref.foreign), {})[sockref] = None
        for cookie in sockref.cookies:
            self._by_cookie[cookie] = sockref
        self.on_change(sockref)

    def share(self, sockref: Sockref, cookie: int) -> None:
        """Let one more socket use a mark-only sockref."""
        sockref.cookies.add(cookie)
        self._by_cookie[cookie] = sockref

    def leave(self, cookie: int) -> Sockref | None:
        """Take a socket off its sockref, which stays hashed; None when it had none."""
        sockref = self._by_cookie.pop(cookie, None)
        if sockref is not None:
            sockref.cookies.discard(cookie)
        return sockref

    def remove(self, sockref: Sockref) -> None:
        """Unhash a sockref and all its sockets."""
        _discard(self._by_local, (sockref.protocol, sockref.local), sockref)
        _discard(self._by_foreign, (sockref.protocol, sockref.foreign), sockref)
        for cookie in sockref.cookies:
            self._by_cookie.pop(cookie, None)
        self.on_change(sockref)

    def set_flags(self, sockref: Sockref, flags: Flag) -> None:
        """Say what a sockref is for."""
        sockref.flags = flags
        self.on_change(sockref)

    def set_foreign(self, sockref: Sockref, foreign: Endpoint) -> None:
        """Give a sockref another foreign endpoint (a port that was picked)."""
        _discard(self._by_foreign, (sockref.protocol, sockref.foreign), sockref)
        sockref.foreign = foreign
        self._by_foreign.setdefault((sockref.protocol, foreign), {})[sockref] = None
        self.on_change(sockref)


def _best(entries: Iterable[Sockref], remote: Endpoint | None, accept: Callable[[Sockref], bool]) -> Sockref | None:
    """The first of the best class among the accepted entries."""
    general = None
    for entry in entries:
        if not accept(entry):
            continue
        if remote is None or (entry.has_remote and entry.is_narrowed_to(remote)):
            return entry
        if general is None and not entry.has_remote:
            general = entry
    return general


def _discard(entries: _Hash, key: _Key, sockref: Sockref) -> None:
    """Take a sockref out of one hash."""
    bucket = entries[key]
    del bucket[sockref]
    if not bucket:
        del entries[key]
