"""User and group numbers, as the kernel tells them and as this user namespace has them (user_namespaces(7)).

Owns: the map between the two. Must not know what the numbers are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

_NOBODY: Final = (
    65534  # whom the kernel names instead of somebody who has no number here (/proc/sys/kernel/overflowuid)
)


@dataclass(frozen=True, slots=True)
class IdentifierMap:
    """Ranges of numbers: the first here, the first in the initial user namespace, how many.

    In a user namespace below another one the kernel tells only the way to that one, so there these are the parent's.
    """

    ranges: tuple[tuple[int, int, int], ...]

    @classmethod
    def read(cls, text: str) -> Self:
        """The map in the text of /proc/self/uid_map or gid_map."""
        lines = (line.split() for line in text.splitlines())
        return cls(tuple((int(inside), int(outside), int(count)) for inside, outside, count in lines))

    def inside(self, number: int) -> int:
        """The number here of somebody who has this one in the initial user namespace."""
        for inside, outside, count in self.ranges:
            if outside <= number < outside + count:
                return inside + number - outside
        return _NOBODY
