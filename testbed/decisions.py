"""Decisions: what engines told of packets, matched to the frames that captures saw.

Owns: which frame an engine's word is about. Pure: events and frames in, values out. Must not know how events are had
(recorder.py) or shown.

At PREROUTING a packet still is what its node's interface received; what POSTROUTING lets go is what leaves. So the word
is known by node, interface, addresses, ports, length and flags, and of equals the first in time is for the first frame.
What a packet was between two hooks links the words about it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from testbed.frames import Frame, endpoint
from testbed.headers import IpPacket

_IN: Final = "PREROUTING"
_OUT: Final = "POSTROUTING"

# The engine's clock and the capture's are one, but a queue may hold a packet for a while.
_LONGEST_WAIT_NS: Final = 1_000_000_000
_EARLY_NS: Final = 1_000_000  # how much sooner a word may be told than the tap behind it sees the packet

_FLAGS: Final = 0x3F  # those of RFC 9293; the congestion bits above are no part of what a packet is

_Ends = tuple[tuple[str, int], tuple[str, int]]
_Looks = tuple[str, _Ends | None, int, int, bool]  # node, addresses, length, TCP flags, an ICMP error?


@dataclass(frozen=True, slots=True)
class Decision:
    """An engine's word about one packet at one hook. `by`: on whose word; `place`: the interface's label."""

    node: str
    time_ns: int
    hook: str
    place: str
    protocol: str
    before: _Ends | None
    after: _Ends | None
    length: int
    tcp_flags: int | None
    is_error: bool
    is_dropped: bool
    reason: str
    detail: str
    by: str

    @property
    def is_news(self) -> bool:
        """Is it more than that the packet went the way of those before it?"""
        return self.is_dropped or self.reason not in _USUAL

    @property
    def why(self) -> str:
        """The rule or sockref that it goes by, or what was wrong with the packet."""
        return self.detail if self.is_dropped else self.by

    @property
    def flows(self) -> tuple[str, str]:
        """The packet's ends before and after; after is empty when they stayed."""
        return _text(self.before), _text(self.after) if self.after != self.before else ""


_USUAL: Final = frozenset({"translated", "established", "no-mapping", "unrelated"})


def decision_of(node: str, event: dict[str, Any]) -> Decision:
    """An event of `tproxyctl trace --json` as a value."""
    interface = event["in_interface"] if event["hook"] == _IN else event["out_interface"]
    return Decision(
        node=node,
        time_ns=int(event["time"] * 1e9),
        hook=event["hook"],
        place=f"{node}:{interface}",
        protocol=event["protocol"] or "",
        before=_ends(event["before"]),
        after=_ends(event["after"]),
        length=event["length"],
        tcp_flags=event["tcp_flags"],
        is_error=event["is_error"],
        is_dropped=event["verdict"] == "drop",
        reason=event["reason"],
        detail=event["detail"],
        by=event["by"],
    )


@dataclass(slots=True)
class _Passage:
    """The words about one packet on its way through a node."""

    words: list[Decision]

    @property
    def received(self) -> Decision | None:
        """The word at PREROUTING."""
        return self.words[0] if self.words[0].hook == _IN else None

    @property
    def sent(self) -> Decision | None:
        """The last word, of a packet that leaves."""
        last = self.words[-1]
        return last if last.hook != _IN and not last.is_dropped else None


def decided(frames: Iterable[Frame], decisions: Sequence[Decision]) -> dict[int, tuple[Decision, ...]]:
    """The words about each frame, by its number; a packet that passes a node has them at both of its frames."""
    waiting: defaultdict[tuple[str, bool, _Looks], deque[tuple[int, _Passage]]] = defaultdict(deque)
    for passage in _passages(decisions):
        if (word := passage.received) is not None:
            waiting[word.place, False, _looks(word, word.before)].append((word.time_ns, passage))
        if (word := passage.sent) is not None:
            waiting[word.place, True, _looks(word, word.after)].append((word.time_ns, passage))
    found: dict[int, tuple[Decision, ...]] = {}
    for frame in sorted(frames, key=lambda frame: frame.time_ns):
        if frame.ip is None:
            continue
        queue = waiting.get((frame.point, frame.outgoing, _looks_of(frame, frame.ip)), ())
        while queue and queue[0][0] < _earliest(frame):
            queue.popleft()
        if queue and queue[0][0] < _earliest(frame) + _LONGEST_WAIT_NS:
            found[frame.number] = tuple(queue.popleft()[1].words)
    return found


def _earliest(frame: Frame) -> int:
    """When the first word about a frame can have been told: before the tap if it was leaving, after it if it came."""
    return frame.time_ns - (_LONGEST_WAIT_NS if frame.outgoing else _EARLY_NS)


def _passages(decisions: Sequence[Decision]) -> Iterator[_Passage]:
    """Link the words about one packet: what one hook made of it is what the next one meets."""
    open_: defaultdict[_Looks, deque[_Passage]] = defaultdict(deque)
    passages = []
    for word in decisions:
        earlier = open_[_looks(word, word.before)] if word.hook == _OUT else ()
        while earlier and word.time_ns - earlier[0].words[-1].time_ns > _LONGEST_WAIT_NS:
            earlier.popleft()
        if earlier:
            earlier.popleft().words.append(word)
            continue
        passage = _Passage([word])
        passages.append(passage)
        if word.hook != _OUT and not word.is_dropped:
            open_[_looks(word, word.after)].append(passage)
    return iter(passages)


def _looks(word: Decision, ends: _Ends | None) -> _Looks:
    return word.node, ends, word.length, (word.tcp_flags or 0) & _FLAGS, word.is_error


def _looks_of(frame: Frame, packet: IpPacket) -> _Looks:
    about = packet.icmp.embedded if packet.icmp is not None else None
    named = about or packet
    ends = (
        (named.source, named.source_port or 0),
        (named.destination, named.destination_port or 0),
    )
    layout = packet.layout
    flags = packet.tcp.flags & _FLAGS if packet.tcp is not None else 0
    return frame.node, ends, layout.end - layout.start, flags, about is not None


def _ends(flow: dict[str, Any] | None) -> _Ends | None:
    if flow is None:
        return None
    source, destination = flow["source"], flow["destination"]
    return (source["address"], source["port"]), (destination["address"], destination["port"])


def _text(ends: _Ends | None) -> str:
    return " → ".join(endpoint(*end) for end in ends) if ends is not None else ""
