"""What a scenario is, and the list that they enter by being defined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stage import Stage, Way

Play = Callable[[Stage], None]
ALL_WAYS = (Way.PLAIN, Way.KERNEL, Way.INLINE)
ENGINES = (Way.KERNEL, Way.INLINE)
# What the user's nat rules translate, the engine of `inline` sees as two connections: as it comes, and as it goes.
UNMANAGED = (Way.PLAIN, Way.KERNEL)
ADDRESSES = {"client": ("10.1.0.2", "fd01::2"), "far": ("10.2.0.1", "fd02::1")}


@dataclass(frozen=True, slots=True)
class Scenario:
    """Something that happens the same, whoever translates.

    `ways`: without PLAIN, what nft's nat statements cannot express. `chosen_at`: where NAT may choose ports. `views`:
    the ways whose view of conntrack is compared. `stays_inside`: nothing is to be seen at the far ends.
    """

    name: str
    play: Play
    versions: tuple[int, ...] = (4, 6)
    ways: tuple[Way, ...] = ALL_WAYS
    chosen_at: frozenset[str] = frozenset()
    views: tuple[Way, ...] = ALL_WAYS
    stays_inside: bool = False


def scenario(
    into: list[Scenario],
    *,
    versions: tuple[int, ...] = (4, 6),
    ways: tuple[Way, ...] = ALL_WAYS,
    chosen_at: tuple[str, ...] = (),
    views: tuple[Way, ...] = ALL_WAYS,
    stays_inside: bool = False,
) -> Callable[[Play], Play]:
    """Enter a function into a list of scenarios; `chosen_at` by the names of ADDRESSES."""
    addresses = frozenset(address for name in chosen_at for address in ADDRESSES[name])

    def enter(play: Play) -> Play:
        into.append(Scenario(play.__name__.replace("_", "-"), play, versions, ways, addresses, views, stays_inside))
        return play

    return enter
