"""What the core must be told, because it may not look: this host's addresses, and chance.

Owns nothing; the shell supplies both, tests supply fakes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol


class AddressType(StrEnum):
    """What an address is to this host, as its routing tells: the types that can be told apart here."""

    UNICAST = "UNICAST"  # somebody else's
    LOCAL = "LOCAL"
    BROADCAST = "BROADCAST"
    MULTICAST = "MULTICAST"


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

    def address_type(self, address: bytes) -> AddressType:
        """What an address of 4 or 16 bytes is to this host."""
        ...
