"""What the core must be told, because it may not look: interface addresses and chance.

Owns nothing; the shell supplies both, tests supply fakes.
"""

from __future__ import annotations

from typing import Protocol


class Chance(Protocol):
    """A source of random numbers, `random.Random` for one."""

    def random(self) -> float:
        """A float in [0, 1)."""
        ...


class Interfaces(Protocol):
    """The addresses of this host's interfaces."""

    def first_address(self, interface: str, size: int) -> bytes | None:
        """The first address of `size` bytes (4 or 16) of an interface; None when it has none."""
        ...
