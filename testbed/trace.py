"""Traces: which frames at several points are one and the same packet.

Owns: the correlation of frames, although addresses and ports change on the way. Pure: frames in, journeys out. Must not
know connections (connections.py) or how a journey is drawn (ladder.py). What was cut on the way, pieces.py knows.

What stays the same under translation makes a packet's fingerprint: sequence numbers, flags and payload of TCP, payload
of UDP, sequence and payload of an echo, what an ICMP error says. Among packets with one fingerprint (a retransmission,
the same datagram twice) the IP identification decides, else the order in time. A program that relays makes new
packets: they are journeys of their own.

A packet never travels back in time, never comes by the same place twice in one direction, and its hop limit never
grows: a reply with the payload of the request is not taken for the request. It passes a node routed, with a smaller
hop limit, or bridged, from the same link address.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Final

from testbed.changes import Change
from testbed.frames import Frame, ip_of
from testbed.headers import Ends, IpPacket, TcpHeader
from testbed.pieces import changes_of, cutting_keys, is_piece_of

# Seconds. A packet that was not seen for so long is lost; the next with its fingerprint is another.
LONGEST_HOP: Final = 1.0

# Thousands of equal datagrams may be under way at once.
_MOST_COMPARED: Final = 64

_LINK_SOURCE: Final = slice(6, 12)  # of an Ethernet frame

_URG_AND_BELOW: Final = 0x3F  # the congestion bits above may be set on the way


@dataclass(frozen=True, slots=True)
class Hop:
    """A packet at a point: one frame, or all the pieces it was cut into. `changes`: against the hop before."""

    point: str
    frames: tuple[Frame, ...]
    changes: tuple[Change, ...] = ()

    @property
    def frame(self) -> Frame:
        """The frame, or the first piece."""
        return self.frames[0]


@dataclass(frozen=True, slots=True)
class Journey:
    """One packet's way, hop by hop."""

    hops: tuple[Hop, ...]

    @property
    def first(self) -> Frame:
        """How the packet was seen first."""
        return self.hops[0].frame

    @property
    def packet(self) -> IpPacket:
        """What it was then."""
        return ip_of(self.first)

    @property
    def points(self) -> tuple[str, ...]:
        """Where it was seen, in order."""
        return tuple(hop.point for hop in self.hops)

    def at(self, point: str) -> Hop | None:
        """The hop at a point; None when the packet was not seen there."""
        return next((hop for hop in self.hops if hop.point == point), None)


_Place = tuple[str, bool]  # point and direction
_Looks = tuple[int | None, Ends]  # identification and ends


@dataclass(slots=True)
class _Draft:
    """A journey while it is put together: at each place the frame, or the pieces it was cut into."""

    last: Frame
    hops: dict[_Place, list[Frame]] = field(default_factory=dict)
    ends: set[Ends] = field(default_factory=set)  # what its ends were called on the way

    def add(self, frame: Frame) -> None:
        self.ends.add(ip_of(frame).ends)
        self.hops.setdefault(_place(frame), []).append(frame)
        self.last = frame

    @property
    def first(self) -> Frame:
        return next(iter(self.hops.values()))[0]


@dataclass(slots=True)
class _Expected:
    """The journeys that may yet come by a place under certain names, of the first `known` with their fingerprint."""

    known: int
    drafts: list[_Draft] = field(default_factory=list)


@dataclass(slots=True)
class _Siblings:
    """The journeys with one fingerprint, and for each place the first that may still come by there.

    `alike` are those that were seen with certain looks; `first_alike`, for a place, the first of them that may still
    come by there like that.
    """

    drafts: list[_Draft] = field(default_factory=list)
    begin: dict[_Place, int] = field(default_factory=dict)
    expected: dict[tuple[_Place, Ends], _Expected] = field(default_factory=dict)
    alike: defaultdict[_Looks, list[_Draft]] = field(default_factory=lambda: defaultdict(list))
    first_alike: dict[tuple[_Place, _Looks], int] = field(default_factory=dict)


def trace(frames: Iterable[Frame], longest_hop: float = LONGEST_HOP) -> list[Journey]:
    """Put frames together to journeys, in the order in which these began. Frames without an IP packet are left out.

    `longest_hop`: seconds after which a packet that was not seen again is lost.
    """
    drafts: list[_Draft] = []
    longest = int(longest_hop * 1e9)
    by_fingerprint: defaultdict[object, _Siblings] = defaultdict(_Siblings)
    for frame in sorted(frames, key=lambda frame: frame.time_ns):
        if frame.ip is None:
            continue
        siblings = by_fingerprint[_fingerprint(frame.ip)]
        looks = _looks(frame)
        draft = _unchanged(frame, looks, siblings, longest) or _continued_by(frame, siblings, longest)
        if draft is None:
            draft = _Draft(frame)
            drafts.append(draft)
            siblings.drafts.append(draft)
        if not draft.hops or _looks(draft.last) != looks:
            siblings.alike[looks].append(draft)
        draft.add(frame)
    return [_finished(draft) for draft in _with_pieces_joined(drafts, longest)]


def _fingerprint(packet: IpPacket) -> object:
    """What translation leaves as it is."""
    layout, common = packet.layout, (packet.layout.version, packet.protocol)
    if layout.is_fragment:
        return (*common, layout.identification, layout.fragment_offset, packet.payload)
    if (tcp := packet.tcp) is not None:
        # Options tell a retransmission by its timestamp; those of a SYN may be rewritten on the way (MSS clamping).
        options = b"" if tcp.flags & TcpHeader.SYN else tcp.options
        return (*common, tcp.seq, tcp.ack, tcp.flags & _URG_AND_BELOW, options, packet.payload)
    if (icmp := packet.icmp) is not None:
        if icmp.embedded is None:
            return (*common, icmp.type, icmp.code, icmp.rest[2:], packet.payload)
        about = icmp.embedded
        return (*common, icmp.type, icmp.code, about.protocol, about.tcp.seq if about.tcp else None, about.payload)
    return (*common, packet.payload)


def _unchanged(frame: Frame, looks: _Looks, siblings: _Siblings, longest: int) -> _Draft | None:
    """The first journey that a frame is the next hop of with the looks that it had, of some that were seen so."""
    place, alike = _place(frame), siblings.alike[looks]
    begin = siblings.first_alike.get((place, looks), 0)
    while begin < len(alike) and (_is_past(alike[begin], frame, longest) or _looks(alike[begin].last) != looks):
        begin += 1
    siblings.first_alike[place, looks] = begin
    return next(
        (
            draft
            for draft in alike[begin : begin + _MOST_COMPARED]
            if _looks(draft.last) == looks and not _is_past(draft, frame, longest) and _may_continue(draft, frame)
        ),
        None,
    )


def _continued_by(frame: Frame, siblings: _Siblings, longest: int) -> _Draft | None:
    """The journey that a frame is the next hop of, whatever changed on the way."""
    place, drafts = _place(frame), siblings.drafts
    begin = siblings.begin.get(place, 0)
    while begin < len(drafts) and _is_past(drafts[begin], frame, longest):
        begin += 1
    siblings.begin[place] = begin
    ends = ip_of(frame).ends
    expected = siblings.expected.setdefault((place, ends), _Expected(begin))
    expected.drafts += drafts[max(begin, expected.known) :]
    expected.known = len(drafts)
    # Those behind one that does not come are looked at again and again, if what will never come is not left out.
    kept: list[_Draft] = []
    possible: list[_Draft] = []
    looked = 0
    for draft in expected.drafts:
        looked += 1
        if _is_past(draft, frame, longest) or ends[::-1] in draft.ends:
            continue
        kept.append(draft)
        if _may_continue(draft, frame):
            possible.append(draft)
            if len(possible) == _MOST_COMPARED:
                break
    expected.drafts[:looked] = kept
    # min keeps the first of equals, and that is the one which began first.
    return min(possible, key=lambda draft: _strangeness(draft, frame), default=None)


def _is_past(draft: _Draft, frame: Frame, longest: int) -> bool:
    """Was it at the frame's place before, or is it lost?"""
    return _place(frame) in draft.hops or _is_lost(draft, frame, longest)


def _is_lost(draft: _Draft, frame: Frame, longest: int) -> bool:
    return frame.time_ns - draft.last.time_ns > longest


def _may_continue(draft: _Draft, frame: Frame) -> bool:
    last, packet = ip_of(draft.last), ip_of(frame)
    if draft.last.point == frame.point:
        # In and out by the same door: routed, or it is not the same packet.
        return frame.outgoing and packet.layout.hop_limit < last.layout.hop_limit
    if packet.layout.hop_limit == last.layout.hop_limit and draft.last.node == frame.node:
        # Through a node without being routed: bridged, which leaves the link's addresses, or a program sent it on.
        return draft.last.data[_LINK_SOURCE] == frame.data[_LINK_SOURCE]
    return packet.layout.hop_limit <= last.layout.hop_limit


def _strangeness(draft: _Draft, frame: Frame) -> tuple[bool, bool]:
    """How little a frame looks like a journey's last; smaller is better."""
    last, packet = ip_of(draft.last), ip_of(frame)
    return last.layout.identification != packet.layout.identification, last.ends != packet.ends


def _looks(frame: Frame) -> _Looks:
    packet = ip_of(frame)
    return packet.layout.identification, packet.ends


def _place(frame: Frame) -> _Place:
    return frame.point, frame.outgoing


def _with_pieces_joined(drafts: list[_Draft], longest: int) -> list[_Draft]:
    """Put the pieces of what was cut on the way behind the whole's last hop."""
    kept = []
    wholes: defaultdict[object, list[_Draft]] = defaultdict(list)
    for draft in drafts:
        piece = draft.first
        own, searched = cutting_keys(piece)
        near = chain.from_iterable(wholes[key] for key in searched)
        whole = next(
            (whole for whole in near if is_piece_of(piece, whole.first) and _lacks(whole, piece, longest)), None
        )
        if whole is None:
            kept.append(draft)
            for key in own:
                wholes[key].append(draft)
        else:
            for frames in draft.hops.values():
                for frame in frames:
                    whole.add(frame)
    return kept


def _lacks(whole: _Draft, piece: Frame, longest: int) -> bool:
    """May the piece be of this one: was neither such a piece of it seen there, nor is it lost?"""
    fingerprint = _fingerprint(ip_of(piece))
    has_it = any(_fingerprint(ip_of(frame)) == fingerprint for frame in whole.hops.get(_place(piece), ()))
    return not has_it and not _is_lost(whole, piece, longest)


def _finished(draft: _Draft) -> Journey:
    hops: list[Hop] = []
    for frames in draft.hops.values():
        hop = Hop(frames[0].point, tuple(frames))
        if hops:
            changes = dict.fromkeys(chain.from_iterable(changes_of(hops[-1].frames, hop.frames)))
            hop = replace(hop, changes=tuple(changes))
        hops.append(hop)
    return Journey(tuple(hops))
