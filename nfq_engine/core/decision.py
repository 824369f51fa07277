"""Decisions: what is to be done with a packet, and why.

Owns: the verdicts, the closed list of reasons, the counters. Place in the path: what the pipeline hands to the shell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from nfq_engine.core.packet import Hook


class Verdict(Enum):
    """What the kernel is told."""

    ACCEPT = auto()
    DROP = auto()


class Reason(StrEnum):
    """Why a packet got its verdict; a counter each, per hook."""

    # The packet goes on, and this is what made it so.
    TRANSLATED = "translated"  # of a known connection, rewritten here
    ESTABLISHED = "established"  # of a known connection, nothing to rewrite here
    SOCKREF = "sockref"  # first of a connection, mapped by a sockref
    MARK_ONLY = "mark-only"  # first of a connection that a mark-only sockref lets through
    REDIRECT = "redirect"  # first of a connection, mapped by a TPROXY rule
    NO_MAPPING = "no-mapping"  # first of a connection that neither sockref nor rule wants
    UNIDIR = "unidir"  # a datagram for a one-way listener
    ICMP_TRANSLATED = "icmp-translated"  # an error about a connection, rewritten here
    ICMP_PASSED = "icmp-passed"  # an error about a connection that needs no rewriting here, or about none
    NO_CONNECTION = "no-connection"  # TCP, neither of a connection nor one that could begin it
    UNRELATED = "unrelated"  # not TCP, UDP or an ICMP error
    # The packet is dropped.
    RULE_DROP = "rule-drop"  # a DROP rule, or the policy
    MALFORMED = "malformed"  # the header cannot be read
    ICMP_REDIRECT = "icmp-redirect"  # it would lead packets of a mapped connection past us
    CLASH = "clash"  # the mapping's addresses belong to a living connection
    NO_FREE_PORT = "no-free-port"  # every port of the range is taken
    NO_INTERFACE_ADDRESS = "no-interface-address"  # a TPROXY rule without --on-ip, an interface without an address
    MAP_FULL = "map-full"  # datapath kernel: no room for the mapping's element
    MAP_REFUSED = "map-refused"  # datapath kernel: nft refused the element, or did not answer
    OVERSIZED = "oversized"  # too large to come whole from the queue, and to be rewritten
    FAULT = "fault"  # an error of the engine's own


@dataclass(frozen=True, slots=True)
class Decision:
    """One packet's fate: the verdict, the reason, and the packet's new bytes where they change.

    `is_marked`: the packet's connection is to carry the tproxy mark. `detail` says which sockref, rule, malformation or
    addresses, for people.
    """

    verdict: Verdict
    reason: Reason
    payload: bytes | None = None
    is_marked: bool = False
    detail: str = ""


class Counters:
    """Packets by hook and reason."""

    def __init__(self) -> None:
        self._packets: Counter[tuple[Hook, Reason]] = Counter()
        self._malformed: Counter[str] = Counter()

    def count(self, hook: Hook, reason: Reason, packets: int = 1) -> None:
        """Count packets."""
        self._packets[hook, reason] += packets

    def count_malformed(self, why: str) -> None:
        """Count what was wrong with a packet that could not be read."""
        self._malformed[why] += 1

    @property
    def packets(self) -> Mapping[tuple[Hook, Reason], int]:
        """Packets by hook and reason, as counted so far."""
        return self._packets

    @property
    def malformed(self) -> Mapping[str, int]:
        """Unreadable packets by what was wrong."""
        return self._malformed
