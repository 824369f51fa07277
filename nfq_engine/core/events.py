"""What happens to sockrefs and connections, for whoever wants to be told.

Owns: the closed list of events. Must not know who listens: a table calls its `observe`, which by itself does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from nfq_engine.core.conntrack import Connection
from nfq_engine.core.sockref import Sockref
from nfq_engine.core.tracked import Tracked


class Event(StrEnum):
    """What happened: the first two to a sockref, the others to a connection."""

    ASSIGN = "assign"  # a socket has got a foreign address, or shares a mark-only entry now
    UNASSIGN = "unassign"  # it gave it back, or was closed
    NEW = "new"  # its first packet was let in
    MAPPED = "mapped"  # one of its addresses is translated from now on
    DELETED = "deleted"  # it has ended, timed out, or was deleted with its sockref's flags


Subject = Sockref | Connection | Tracked
Observer = Callable[[Event, Subject], None]


def unobserved(_event: Event, _subject: Subject) -> None:
    """Nobody listens."""
