"""What the maps `redirect` have: endpoints that rules redirect to, by interface, protocol and destination port.

Owns: which of their elements are there, which are about to be. Must not know packets or decide anything. Place: beside
kernel_nat.py, which asks for each packet that a rule redirects whether the map leads it there already: then it needs no
element of its own.

An element stays, renewed again and again, until rules change, or until it is in the way: another endpoint is wanted for
its key, or a packet that carries the mark is to keep its destination. A key that the kernel would not take is left
alone from then on. Before an element goes, the kernel stops to answer by itself (answered.py): it would lead packets to
what is no longer there.
"""

from __future__ import annotations

import errno
import logging
import sys
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from nfq_engine.core.packet import Endpoint, Protocol
from nfq_engine.shell.answered import Answered
from nfq_engine.shell.divert import REDIRECT_LIFE, REDIRECTS
from nfq_engine.shell.narrowing import endpoint_key, protocol_key
from nfq_engine.shell.nftables import Element, NftSocket

log: Final = logging.getLogger("tproxyd")

_MAPS: Final = ("redirect4", "redirect6")
_RENEWAL: Final = REDIRECT_LIFE / 6  # seconds between two renewals

Key = tuple[str, bytes]  # the map, and the key in it


def key_of(interface: int, protocol: Protocol, destination: Endpoint) -> Key:
    """Where a packet that comes in on an interface finds its endpoint."""
    return _key_of(interface, protocol, len(destination.address), destination.port)


@lru_cache
def _key_of(interface: int, protocol: Protocol, size: int, port: int) -> Key:
    inside = interface.to_bytes(4, sys.byteorder) + protocol_key(protocol) + port.to_bytes(2, "big") + b"\0\0"
    return f"redirect{4 if size == 4 else 6}", inside


class Redirects:
    """The elements of the maps `redirect`."""

    def __init__(self, nft: NftSocket, answered: Answered) -> None:
        self._nft = nft
        self._answered = answered
        self._present: dict[Key, Endpoint] = {}
        self._claimed: dict[Key, Endpoint] = {}  # by packets that are held back
        self._renewal = 0.0  # when the elements are to be put in again
        self._until = 0.0  # until then they are all there: an engine may have been stopped for long
        self._doubtful: set[Key] = set()  # the kernel refused them, or has not said that it took them

    def lead(self, key: Key, to: Endpoint) -> bool:
        """Does the map lead there, and will it when the packets that are held back are let go?"""
        return self._present.get(key) == to and key not in self._claimed and time.monotonic() < self._until

    def claim(self, key: Key, to: Endpoint) -> bool:
        """May the map be made to lead there for a packet that is held back?"""
        if key in self._doubtful or self._claimed.get(key, to) != to:
            return False
        if len(self._present) + len(self._claimed) >= REDIRECTS:
            return False
        self._claimed[key] = to
        return True

    def release(self) -> None:
        """No packet is held back any more."""
        self._claimed.clear()

    def in_the_way(self, wanted: dict[Key, Endpoint]) -> dict[str, list[bytes]]:
        """The elements to take out before these are put in, by map; and before that, what the kernel answers."""
        return _by_map(key for key, to in wanted.items() if self._present.get(key, to) != to)

    def are_put(self, wanted: dict[Key, Endpoint]) -> None:
        """These are in the maps."""
        if not self._present:
            self._set_times(time.monotonic())
        self._present |= wanted

    def adjust(self, now: float) -> None:
        """Let the elements go on living."""
        if self._present and now >= self._renewal:
            try:
                self._nft.refill(_MAPS, elements(self._present))
            except OSError as error:
                log.error("the maps `redirect` could not be renewed: %s", error.strerror)
                self._renewal, self._until = now + _RENEWAL, 0.0
                self._answered.outdate()
            else:
                self._set_times(now)

    def are_refused(self, wanted: dict[Key, Endpoint]) -> None:
        """The kernel did not take these."""
        for key in wanted:
            if self._present.pop(key, None) is not None:
                self._answered.outdate()
            self._doubtful.add(key)

    def keep_away(self, key: Key) -> bool:
        """Take out what would lead a packet elsewhere that is to keep its destination; False: that failed."""
        if key not in self._present and key not in self._doubtful:
            return True
        if not self._answered.withdraw():
            return False
        name, inside = key
        try:
            self._nft.change({}, {name: [inside]})
        except OSError as error:
            if error.errno != errno.ENOENT:
                return False
        self._present.pop(key, None)
        return True

    def clear(self) -> None:
        """Take all elements out: other rules may want something else."""
        if not self._answered.withdraw() or not self._present:
            return
        try:
            self._nft.refill(_MAPS, {})
        except OSError as error:
            log.error("the maps `redirect` could not be emptied: %s", error.strerror)
            return  # they are still known, so they lead nobody astray
        self._present.clear()

    def _set_times(self, now: float) -> None:
        self._renewal, self._until = now + _RENEWAL, now + REDIRECT_LIFE - 1


def elements(wanted: dict[Key, Endpoint]) -> dict[str, list[Element]]:
    """Keys and endpoints as elements, by map."""
    found: dict[str, list[Element]] = {}
    for (name, key), to in wanted.items():
        found.setdefault(name, []).append((key, endpoint_key(to)))
    return found


def _by_map(keys: Iterable[Key]) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for name, key in keys:
        found.setdefault(name, []).append(key)
    return found
