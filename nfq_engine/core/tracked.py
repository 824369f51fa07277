"""Connections as the kernel's conntrack has them.

Owns: the value of one entry, and the question whose mapping it shows. Must not know how entries are asked for
(`shell/ctnetlink.py`). Place in the path: what the kernel datapath sees of connections that it does not carry itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nfq_engine.core.conntrack import State
from nfq_engine.core.packet import FlowTuple
from nfq_engine.core.sockref import Sockref


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one direction of an entry has carried."""

    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Tracked:
    """One entry. `identifier` tells it from a later one with the same tuples; `expires_in` is in seconds; `is_replied`:
    a packet of the reply direction has been seen.

    Both traffics are None while the kernel does not account (net.netfilter.nf_conntrack_acct).
    """

    original: FlowTuple
    reply: FlowTuple
    identifier: int
    mark: int
    state: State
    expires_in: int
    is_replied: bool = False
    original_traffic: Traffic | None = None
    reply_traffic: Traffic | None = None

    @property
    def inside(self) -> FlowTuple:
        """The original direction between the two stages: with the destination that NAT gave it, its own source."""
        return FlowTuple(self.original.protocol, self.original.source, self.reply.source)

    @property
    def final(self) -> FlowTuple:
        """The original direction as it ends: at the wire, or at a local socket."""
        return self.reply.inverse()

    @property
    def is_mapped(self) -> bool:
        """Is anything translated?"""
        return self.original != self.final

    @property
    def is_replaceable(self) -> bool:
        """May a new SYN take its place?"""
        return self.state in (State.TIME_WAIT, State.CLOSE)

    def shows(self, sockref: Sockref) -> bool:
        """Do the tuples look as a mapping of this sockref makes them?"""
        if self.original.protocol is not sockref.protocol:
            return False
        if self.original.destination == sockref.foreign and self.reply.source == sockref.local:
            return not sockref.has_remote or sockref.is_narrowed_to(self.original.source)
        if self.original.source == sockref.local and self.reply.destination == sockref.foreign:
            return not sockref.has_remote or sockref.is_narrowed_to(self.reply.source)
        return False


class Conntrack(Protocol):
    """The kernel's conntrack of this network namespace."""

    def find(self, flow: FlowTuple) -> Tracked | None:
        """The entry that packets with this tuple belong to, whichever direction of it they are."""
        ...

    def delete(self, doomed: Iterable[Tracked]) -> None:
        """Delete entries; those that have gone by themselves are none of its errors."""
        ...

    def ours(self, naming: bytes = b"") -> Sequence[Tracked]:
        """The entries that carry the tproxy mark; with `naming`, only those with these address bytes in them."""
        ...
