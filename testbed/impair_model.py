"""What becomes of the frames of one impaired direction: pure.

Owns: the choices and the times. Must not know sockets or clocks: `now` comes in, and each direction has generators of
its own, seeded by the impairment's seed and the sending interface. Every frame takes the same number of draws, whatever
becomes of it, so the k-th frame meets the same fate each time. What kernels send by themselves, at random times (ARP,
neighbour discovery, who listens to which group), draws from a generator apart: it moves no other frame's place.

A frame's way: loss, corruption, the queue in front of the rate, the delay, and a second copy.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Final

from testbed.topology import Impairment

_ETHERNET: Final = 14  # bytes of header; bits are flipped behind it, so that the frame still arrives
_ARP, _IPV4, _IPV6 = b"\x08\x06", b"\x08\x00", b"\x86\xdd"
_IGMP: Final = 2
_HOP_BY_HOP: Final = 0
_ICMPV6: Final = 58
_OF_KERNELS: Final = frozenset((*range(130, 138), 143))  # ICMPv6 types: group membership, neighbour discovery, MLDv2
QUEUE: Final = 256 * 1024  # bytes that may wait in front of a limited rate


@dataclass(slots=True)
class Counts:
    """What became of the frames of one direction so far."""

    seen: int = 0
    lost: int = 0
    overflowed: int = 0  # the queue in front of the rate was full, or the stage too slow
    duplicated: int = 0
    reordered: int = 0  # sent without the delay
    corrupted: int = 0


COUNTERS: Final = tuple(field.name for field in fields(Counts))


@dataclass(frozen=True, slots=True)
class Departure:
    """A frame that leaves at a time."""

    when: float  # seconds, of the clock that `now` came from
    frame: bytes
    sent: float  # when its last bit is past the rate: `when` without the delay


def longest_way(impairment: Impairment) -> float:
    """How many seconds a frame may be on its way, in front of the rate and behind it."""
    waits = 0.0 if impairment.rate is None else QUEUE * 8 / impairment.rate
    return waits + impairment.delay + impairment.jitter


class Direction:
    """One direction of a link."""

    def __init__(self, impairment: Impairment, label: str) -> None:
        """`label`: the sending interface."""
        self.counts = Counts()
        self.label: Final = label
        self._free_at = 0.0  # when the last bit that waits in front of the rate will have been sent
        self._impairment = impairment
        self._begin(impairment.seed or 0)

    def change(self, impairment: Impairment, now: float) -> Callable[[Departure], Departure]:
        """Do something else to the frames from now on; the choices go on as they were, unless there is a new seed.

        What waits in front of the rate passes it at the new one: returns what that makes of a departure.
        """
        before, after = self._impairment.rate, impairment.rate
        stretch = 0.0 if before is None or after is None else before / after
        self._impairment = impairment
        if impairment.seed is not None:
            self._begin(impairment.seed)

        def at_new_rate(departure: Departure) -> Departure:
            shift = max(0.0, departure.sent - now) * (stretch - 1)
            return Departure(departure.when + shift, departure.frame, departure.sent + shift)

        self._free_at = now + max(0.0, self._free_at - now) * stretch
        return at_new_rate

    def _begin(self, seed: int) -> None:
        self._random = random.Random(f"{seed} {self.label}")
        self._apart = random.Random(f"{seed} {self.label} apart")

    def departures(self, now: float, frame: bytes) -> list[Departure]:
        """What leaves for a frame that came at `now`: nothing, itself, or two."""
        impairment, counts = self._impairment, self.counts
        generator = self._apart if _is_of_kernels(frame) else self._random
        lost, twice, early, corrupt, where, far = (generator.random() for _ in range(6))
        counts.seen += 1
        if lost < impairment.loss:
            counts.lost += 1
            return []
        sent = self._sent(now, len(frame))
        if sent is None:
            counts.overflowed += 1
            return []
        if corrupt < impairment.corrupt and len(frame) > _ETHERNET:
            counts.corrupted += 1
            frame = _flipped(frame, where)
        delay = impairment.delay + impairment.jitter * (2 * far - 1)
        if early < impairment.reorder:
            counts.reordered += 1
            delay = 0.0
        copies = 1
        if twice < impairment.duplicate:
            counts.duplicated += 1
            copies = 2
        return [Departure(sent + delay, frame, sent)] * copies

    def _sent(self, now: float, length: int) -> float | None:
        """When the last bit of a frame is on the wire; None when too much waits already."""
        rate = self._impairment.rate
        if rate is None:
            return now
        start = max(now, self._free_at)
        if (start - now) * rate / 8 + length > QUEUE:
            return None
        self._free_at = start + length * 8 / rate
        return self._free_at


def _is_of_kernels(frame: bytes) -> bool:
    """Whether a kernel sent a frame by itself, to keep neighbours and groups in mind."""
    kind, content = frame[12:_ETHERNET], frame[_ETHERNET:]
    if kind == _IPV6 and len(content) >= 48:
        protocol, at = content[6], 40
        if protocol == _HOP_BY_HOP:
            protocol, at = content[40], 48 + 8 * content[41]
        return protocol == _ICMPV6 and len(content) > at and content[at] in _OF_KERNELS
    return kind == _ARP or (kind == _IPV4 and content[9:10] == bytes([_IGMP]))


def _flipped(frame: bytes, where: float) -> bytes:
    """A frame with one bit flipped; `where` from 0 to 1 tells which."""
    at, bit = divmod(_ETHERNET * 8 + int(where * (len(frame) - _ETHERNET) * 8), 8)
    return frame[:at] + bytes([frame[at] ^ 1 << bit]) + frame[at + 1 :]
