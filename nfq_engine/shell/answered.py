"""What the sets `answered` have: first packets of TCP that the kernel itself sends where rules said, without the queue.

Owns: which of their elements are there, and what the kernel has counted at them. Must not know packets or decide
anything. Place: beside redirects.py; kernel_nat.py tells what was answered, and when answers hold no more.

There are few at a time, as the engine asks for all counters whenever somebody looks at its own: where rules redirect
every port, what comes after is asked about each time.

An element stands for an interface, a family and a destination port. It is put in when the rules have said the same of
two connections and ask for nothing else (`Known.is_for_all`), and its redirect is in the map `redirect`. Behind the
sockrefs' own sets, it marks a packet like an engine that was asked. The kernel counts at each element; what it counted
is added to the rules' tallies and the engine's counters before anybody looks at those. Elements time out when no engine
renews them.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable
from typing import Final

from nfq_engine.core.known_redirects import Known
from nfq_engine.shell.divert import ANSWER_LIFE, ANSWERED
from nfq_engine.shell.nftables import Element, ElementCounts, NftSocket

log: Final = logging.getLogger("tproxyd")

_MOST: Final = 256  # a look at their counters takes some 3 ms then

Answer = tuple[str, bytes]  # the set, and the key in it


class Answered:
    """The elements of the sets `answered`. `count` is told of each redirect that the kernel made: how many packets."""

    def __init__(self, nft: NftSocket, count: Callable[[int], None]) -> None:
        self._nft = nft
        self._count = count
        self._proposed: dict[Answer, Known] = {}
        self._present: dict[Answer, Known] = {}
        self._collected: dict[Answer, ElementCounts] = {}  # what has been added to the tallies already
        self._is_outdated = False
        self._renewal = math.inf  # when the elements are to be put in again

    def __bool__(self) -> bool:
        return bool(self._present)

    def propose(self, interface: int, known: Known) -> None:
        """The rules say of all packets that come in on an interface what they said of the last."""
        if len(self._present) + len(self._proposed) < _MOST:
            name = ANSWERED[0] if len(known.to.address) == 4 else ANSWERED[1]
            port = known.destination.port.to_bytes(2, "big") + b"\0\0"
            self._proposed[name, interface.to_bytes(4, sys.byteorder) + port] = known

    def outdate(self) -> None:
        """What was proposed or answered may hold no more: `adjust` is to take it out."""
        self._is_outdated = True

    def adjust(self, now: float) -> None:
        """Have the kernel answer what was proposed, and go on to answer, or nothing more if answers are out of date."""
        if self._is_outdated:
            self.withdraw()
        elif now >= self._renewal:
            self._renewal = now + ANSWER_LIFE / 3
            self._refill(self._present | self._proposed)
        elif self._proposed:
            self._put(now)

    def withdraw(self) -> bool:
        """Have the kernel answer nothing; False: it refused, and still answers."""
        if not self._present:
            self._proposed.clear()
            self._is_outdated = False
            return True
        self._renewal = math.inf
        return self._refill({})

    def collect(self) -> None:
        """Add what the kernel has counted since the last time."""
        for name in {name for name, _ in self._present}:
            try:
                self._add({(name, key): counts for key, counts in self._nft.counts(name).items()})
            except OSError as error:
                log.error("what the kernel redirected could not be counted: %s", error.strerror)

    def _put(self, now: float) -> None:
        """Have the kernel answer what was proposed, too."""
        proposed, self._proposed = self._proposed, {}
        if not self._present:
            self._renewal = now + ANSWER_LIFE / 3
        try:
            self._nft.change(_by_set(proposed))
        except OSError as error:
            self._doubt(proposed, error)
        else:
            self._present |= proposed

    def _refill(self, wanted: dict[Answer, Known]) -> bool:
        """Have the kernel answer this and nothing else; False: it does not say that it does."""
        self._proposed = {}
        try:
            counted = self._nft.refill_counted(ANSWERED, _by_set(wanted))
        except OSError as error:
            self._doubt(wanted, error)
            return False
        self._add(counted)
        self._present, self._collected = wanted, {}
        self._is_outdated = False
        return True

    def _doubt(self, wanted: dict[Answer, Known], error: OSError) -> None:
        """The kernel did not say that it answers this now."""
        log.error("the sets `answered` could not be changed: %s", error.strerror)
        self._present |= wanted
        self._is_outdated = True

    def _add(self, counted: dict[Answer, ElementCounts]) -> None:
        for answer, counts in counted.items():
            before = self._collected.get(answer, ElementCounts())
            if counts.packets < before.packets:
                before = ElementCounts()  # it was put in anew, and the kernel's word on that was lost
            packets = counts.packets - before.packets
            if packets and answer in self._present:
                self._present[answer].count(counts.bytes - before.bytes, packets)
                self._count(packets)
                self._collected[answer] = counts


def _by_set(answers: Iterable[Answer]) -> dict[str, list[Element]]:
    """Elements by set."""
    found: dict[str, list[Element]] = {}
    for name, key in answers:
        found.setdefault(name, []).append((key, b""))
    return found
