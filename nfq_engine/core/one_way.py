"""Datagrams that are translated by themselves: who asked for it, and where each was going.

Owns: the one-way listeners, sockets without a foreign address whose redirects by rules are to keep no state (UNIDIR,
tproxy.md sections 2 and 4); and the record of where one-way datagrams were going, which no connection tells. Must not
know rules or sockrefs. Place in the path: asked when a rule has redirected a datagram, told when one was rewritten.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from nfq_engine.core.packet import UDP_HEADER, Endpoint, FlowTuple, Segment

_MOST_RECORDS: Final = 16384
_MOST_ALIKE: Final = 64  # datagrams with the same sender, receiver and bytes that wait to be asked for
_LIFETIME: Final = 30.0  # seconds that a datagram may wait in its socket


@dataclass(frozen=True, slots=True)
class Listener:
    """A UDP socket that takes what is redirected to it datagram by datagram.

    `local` may be unspecified: every address of its family; `takes_ipv4`: an IPv6 socket that hears IPv4 as well.
    """

    cookie: int
    local: Endpoint
    takes_ipv4: bool
    owner: int  # user id
    since: float

    def hears(self, endpoint: Endpoint) -> bool:
        """Do datagrams for a local endpoint come to it?"""
        if not self.local.is_unspecified:
            return self.local == endpoint
        is_of_family = len(self.local.address) == len(endpoint.address) or self.takes_ipv4
        return is_of_family and self.local.port == endpoint.port


class Listeners:
    """The one-way listeners. `ports`, all their ports, is another object after every change."""

    def __init__(self) -> None:
        self.ports: frozenset[int] = frozenset()
        self._by_cookie: dict[int, Listener] = {}
        self._by_port: dict[int, dict[int, Listener]] = {}

    def __len__(self) -> int:
        return len(self._by_cookie)

    def __iter__(self) -> Iterator[Listener]:
        return iter(self._by_cookie.values())

    def __contains__(self, cookie: int) -> bool:
        return cookie in self._by_cookie

    def add(self, listener: Listener) -> None:
        """Take in a socket that is not among them."""
        self._by_cookie[listener.cookie] = listener
        self._by_port.setdefault(listener.local.port, {})[listener.cookie] = listener
        self.ports = frozenset(self._by_port)

    def discard(self, cookie: int) -> None:
        """Forget a socket, if it is among them."""
        listener = self._by_cookie.pop(cookie, None)
        if listener is None:
            return
        alike = self._by_port[listener.local.port]
        del alike[cookie]
        if not alike:
            del self._by_port[listener.local.port]
        self.ports = frozenset(self._by_port)

    def hear(self, endpoint: Endpoint) -> bool:
        """Does one of them hear a local endpoint?"""
        return any(listener.hears(endpoint) for listener in self._by_port.get(endpoint.port, {}).values())


class Redirected:
    """The local endpoints to which rules have sent UDP connections.

    Anybody may become a one-way listener, again and again, and a walk through all connections takes its time: so there
    is one only where a rule has sent connections since the last.
    """

    def __init__(self) -> None:
        self._by_port: dict[int, set[Endpoint]] = {}

    def add(self, endpoint: Endpoint) -> None:
        """A connection was sent there."""
        self._by_port.setdefault(endpoint.port, set()).add(endpoint)

    def take(self, listener: Listener) -> bool:
        """Were connections sent to what a listener hears? They are no longer known afterwards."""
        there = self._by_port.get(listener.local.port, set())
        heard = {endpoint for endpoint in there if listener.hears(endpoint)}
        there -= heard
        return bool(heard)


def digest_of(payload: bytes) -> int:
    """What tells the datagrams apart that one socket got from one peer."""
    return zlib.crc32(payload)


def payload_of(data: bytes, segment: Segment) -> bytes:
    """What a UDP datagram carries, by its own length field."""
    at = segment.transport
    return data[at + UDP_HEADER : at + (data[at + 4] << 8 | data[at + 5])]


@dataclass(slots=True)
class _Record:
    """Datagrams that look alike to whoever gets them, and that nobody has asked for yet."""

    expires: float = 0.0
    originals: deque[FlowTuple] = field(default_factory=lambda: deque(maxlen=_MOST_ALIKE))


class Origins:
    """Where one-way datagrams were going, for as long as they may wait in a socket: bounded, the oldest go first.

    Their receiver knows sender, local address and bytes. Where these are the same, and only the original destination
    was another, the order in which they came decides; so each is told once.
    """

    def __init__(self) -> None:
        self._records: OrderedDict[bytes, _Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def note(self, original: FlowTuple, inside: FlowTuple, digest: int, now: float) -> None:
        """A datagram has been rewritten."""
        key = _key(inside, digest)
        record = self._records.pop(key, None) or _Record()
        record.originals.append(original)
        record.expires = now + _LIFETIME
        self._records[key] = record
        while len(self._records) > _MOST_RECORDS or next(iter(self._records.values())).expires <= now:
            self._records.popitem(last=False)

    def ask(self, inside: FlowTuple, digest: int, now: float, *, is_peeked: bool) -> FlowTuple | None:
        """The original tuple of a datagram that a socket got; None when nothing is known of it.

        `is_peeked`: the datagram is still in the socket, so it will be asked for again.
        """
        key = _key(inside, digest)
        record = self._records.get(key)
        if record is None or record.expires <= now:
            return None
        if is_peeked:
            return record.originals[0]
        original = record.originals.popleft()
        if not record.originals:
            del self._records[key]
        return original


def _key(inside: FlowTuple, digest: int) -> bytes:
    return inside.key + digest.to_bytes(4, "big")
