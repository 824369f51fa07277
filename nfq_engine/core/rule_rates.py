"""The matches that remember: not every packet that asks the same gets the same answer.

Owns: one class a match. Must not read a clock or make chance: both are passed in. Place: as `rule_matches`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nfq_engine.core.rule_values import Match, RuleError, RulePacket, Term, Test
from nfq_engine.core.surroundings import Chance

# A rate is kept as the time between two packets, in these units a second, as the kernel keeps it (XT_LIMIT_SCALE).
PERIODS_PER_SECOND: Final = 10_000
RATE_UNITS: Final = {
    "day": PERIODS_PER_SECOND * 86_400,
    "hour": PERIODS_PER_SECOND * 3_600,
    "min": PERIODS_PER_SECOND * 60,
    "sec": PERIODS_PER_SECOND,
}
DEFAULT_PERIOD: Final = RATE_UNITS["hour"] // 3
DEFAULT_BURST: Final = 5

# Probabilities are kept as the kernel keeps them, as so many of this.
CERTAINTY: Final = 1 << 31

_NANOSECONDS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Limit(Match):
    """-m limit: no more packets than a rate allows, with `burst` of them at once. `period`: see PERIODS_PER_SECOND."""

    period: int = DEFAULT_PERIOD
    burst: int = DEFAULT_BURST

    @property
    def rate(self) -> str:
        """The rate as iptables writes it: by the shortest time for which it is a whole number.

        iptables lets a remainder equal to the rate pass, and then writes a rate that it reads as another.
        """
        name, unit = next(iter(RATE_UNITS.items()))
        for shorter_name, shorter in RATE_UNITS.items():
            if self.period > shorter or shorter % self.period >= shorter // self.period:
                break
            name, unit = shorter_name, shorter
        return f"{unit // self.period}/{name}"

    def arguments(self) -> str:
        """As the command line says it."""
        burst = f" --limit-burst {self.burst}" if self.burst != DEFAULT_BURST else ""
        return f"-m limit --limit {self.rate}{burst}"

    def description(self) -> str:
        """As -L says it."""
        return f"limit: avg {self.rate} burst {self.burst}"

    def test(self, _: Chance | None) -> Test:
        """A token bucket, full at first. Whole nanoseconds, so that n periods are n tokens, without rounding."""
        cost = self.period * _NANOSECONDS // PERIODS_PER_SECOND
        capacity = credit = cost * self.burst
        last: int | None = None

        def is_within_rate(_: RulePacket, now: float) -> bool:
            nonlocal credit, last
            time = round(now * _NANOSECONDS)
            if last is not None:
                credit = min(capacity, credit + time - last)
            last = time
            if credit < cost:
                return False
            credit -= cost
            return True

        return is_within_rate


@dataclass(frozen=True, slots=True)
class RandomMatch(Match):
    """-m statistic --mode random: each packet with a probability, given in parts of CERTAINTY."""

    probability: Term[int]

    def arguments(self) -> str:
        """As the command line says it."""
        return f"-m statistic --mode random {self.probability.sign}--probability {self._share()}"

    def description(self) -> str:
        """As -L says it."""
        return f"statistic mode random {self.probability.sign}probability {self._share()}"

    def _share(self) -> str:
        return f"{self.probability.value / CERTAINTY:.11f}"

    def test(self, chance: Chance | None) -> Test:
        """Ask chance."""
        if chance is None:
            raise RuleError("statistic: mode random needs a source of chance, and there is none here")
        share, inverted = self.probability.value / CERTAINTY, self.probability.is_inverted
        return lambda _packet, _now: (chance.random() < share) is not inverted


@dataclass(frozen=True, slots=True)
class NthMatch(Match):
    """-m statistic --mode nth: one packet of every `every`; `packet` is what the count begins with."""

    every: Term[int]
    packet: int

    def arguments(self) -> str:
        """As the command line says it."""
        return f"-m statistic --mode nth {self.every.sign}--every {self.every.value} --packet {self.packet}"

    def description(self) -> str:
        """As -L says it."""
        packet = f" packet {self.packet}" if self.packet else ""
        return f"statistic mode nth {self.every.sign}every {self.every.value}{packet}"

    def test(self, _: Chance | None) -> Test:
        """Count; the packet with which the count is full matches."""
        every, inverted = self.every.value, self.every.is_inverted
        count = self.packet

        def is_nth(_: RulePacket, __: float) -> bool:
            nonlocal count
            count = (count + 1) % every
            return (count == 0) is not inverted

        return is_nth


# Whether these are asked, and when, changes what they answer next.
REMEMBERING: Final = (Limit, RandomMatch, NthMatch)
