"""What rules said of TCP connections like this one: redirects by interface, addresses and destination port.

Owns: those answers, and the question whether one may be given again. Must not know who redirects. Place in the path:
before `parse` at the kernel datapath, where a connection's first packet is its only one.

An answer holds for every source port while the ruleset is the same and asks for nothing that another packet of the same
interface, addresses and destination port could have otherwise (`Ruleset.is_plain`), while no sockref has the
destination as its foreign endpoint, and until the interfaces change. Only a plain SYN is recognised, all else parsed.
Where rules do not ask for addresses either, it holds for all of them (`Known.is_for_all`), and the kernel can be told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nfq_engine.core.packet import TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, Endpoint, Protocol
from nfq_engine.core.rule_values import Tally
from nfq_engine.core.ruleset import Ruleset
from nfq_engine.core.sockref import SockrefTable

_MOST: Final = 65536
_PLAIN_IPV4: Final = 0x45  # version 4, no options
_FRAGMENT: Final = 0xBF  # of the byte with the flags, all but DF
_FLAGS: Final = TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN


@dataclass(frozen=True, slots=True)
class Known:
    """Where the rules redirect to, from where, and at which of them such a packet counts."""

    to: Endpoint
    destination: Endpoint
    tallies: tuple[Tally, ...]
    is_for_all: bool  # of this interface, family and destination port, if no sockref has the destination

    def count(self, length: int, packets: int = 1) -> None:
        """Count packets of so many bytes altogether."""
        for tally in self.tallies:
            tally.packets += packets
            tally.bytes += length


class KnownRedirects:
    """The answers of a ruleset's chain PREROUTING."""

    def __init__(self, ruleset: Ruleset, sockrefs: SockrefTable) -> None:
        self._ruleset = ruleset
        self._sockrefs = sockrefs
        self._chains: object = None  # whose answers these are
        self._answers: dict[tuple[str, bytes], Known] = {}

    def find(self, interface: str, data: bytes) -> Known | None:
        """The answer for a packet that came in on an interface; it is yet to be counted."""
        known = self._answers.get((interface, _question(data)))
        if known is None or self._ruleset.chains is not self._chains:
            return None
        if self._sockrefs and self._sockrefs.has_foreign(Protocol.TCP, known.destination):
            return None
        return known

    def remember(self, interface: str, data: bytes, destination: Endpoint, to: Endpoint) -> None:
        """The rules have just redirected a packet."""
        question = _question(data)
        if not question or not self._ruleset.is_plain:
            return
        if self._ruleset.chains is not self._chains or len(self._answers) >= _MOST:
            self._answers.clear()
            self._chains = self._ruleset.chains
        is_for_all = not self._ruleset.looks_at_addresses
        self._answers[interface, question] = Known(to, destination, tuple(self._ruleset.passed), is_for_all)

    def clear(self) -> None:
        """Addresses or names of interfaces may have changed."""
        self._answers.clear()


def _question(data: bytes) -> bytes:
    """Addresses and destination port of a packet that is nothing but a whole, sound SYN; else nothing.

    Every such packet is one that `packet.parse` reads without a complaint.
    """
    length = len(data)
    if length >= 40 and data[0] == _PLAIN_IPV4:
        is_whole = data[2] << 8 | data[3] == length and not data[6] & _FRAGMENT and not data[7]
        at = 20
        if is_whole and data[9] == Protocol.TCP and data[33] & _FLAGS == TCP_SYN and _has_header(data, at, length):
            return data[12:20] + data[22:24]
    elif length >= 60 and data[0] >> 4 == 6:
        is_whole = (data[4] << 8 | data[5]) + 40 == length
        at = 40
        if is_whole and data[6] == Protocol.TCP and data[53] & _FLAGS == TCP_SYN and _has_header(data, at, length):
            return data[8:40] + data[42:44]
    return b""


def _has_header(data: bytes, at: int, length: int) -> bool:
    """Does the TCP header that begins there fit?"""
    return 20 <= (data[at + 12] >> 4) * 4 <= length - at
