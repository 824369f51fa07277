"""Connections: which journeys belong together.

Owns: the grouping of journeys. Pure: journeys in, connections out.

A leg is what two programs share: all packets between two sockets, under whatever addresses each point saw them. A relay
makes two legs of one connection: the second leaves the node where the first one ends, and they have something in
common: the destination, the source, or the first bytes that were sent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from testbed.frames import Frame, destination_of, ip_of, protocol_name, source_of
from testbed.headers import IpPacket, TcpHeader
from testbed.trace import Journey

_Flow = tuple[int, frozenset[tuple[str, int | None]]]
_Place = tuple[str, object]  # a point and a flow there; a node, and the ends of a socket's: its own first


@dataclass(frozen=True)  # not slotted: what is asked often is kept
class Leg:
    """The packets between two sockets, in both directions, in the order of time."""

    journeys: tuple[Journey, ...]

    @cached_property
    def opening(self) -> Journey:
        """The packet that opened it: the SYN, or the first there is; of its like, the one that got furthest."""
        first = next((journey for journey in self.journeys if _is_syn(journey.packet)), self.journeys[0]).packet
        ends, is_syn = first.ends, _is_syn(first)
        alike = (
            journey for journey in self.journeys if _is_syn(journey.packet) == is_syn and journey.packet.ends == ends
        )
        return max(alike, key=lambda journey: len(journey.hops))

    @property
    def began(self) -> int:
        """When its first packet was seen, nanoseconds since the epoch."""
        return self.journeys[0].first.time_ns

    @cached_property
    def ended(self) -> int:
        """When its last packet was seen last."""
        return max(journey.hops[-1].frame.time_ns for journey in self.journeys)

    @cached_property
    def first_payload(self) -> bytes:
        """The first data that the initiator sent."""
        payloads = (journey.packet.payload for journey in self.journeys if self.is_forward(journey))
        return next(filter(None, payloads), b"")

    @property
    def protocol(self) -> str:
        """Its transport's name."""
        return protocol_name(self.opening.packet.protocol)

    @property
    def initiator(self) -> str:
        """Who opened it, as seen where the opening packet was seen first: address and port."""
        return source_of(self.opening.packet)

    @property
    def responder(self) -> str:
        """Whom it was opened to, as seen where the opening packet was seen first."""
        return destination_of(self.opening.packet)

    @cached_property
    def _initiators(self) -> dict[str, tuple[str, int | None]]:
        """What the initiator is called at each point."""
        packets = {hop.point: ip_of(hop.frame) for hop in self.opening.hops}
        return {point: (packet.source, packet.source_port) for point, packet in packets.items()}

    def is_forward(self, journey: Journey) -> bool:
        """Does the packet go from the initiator to the responder?"""
        known = [hop for hop in journey.hops if hop.point in self._initiators]
        for hop in known or journey.hops:
            packet = ip_of(hop.frame)
            sender, port = packet.source, packet.source_port
            if packet.icmp is not None and packet.icmp.embedded is not None:
                # An error goes to the sender of the packet that it is about.
                sender, port = packet.icmp.embedded.destination, packet.icmp.embedded.destination_port
            initiators = [self._initiators[hop.point]] if known else self._initiators.values()
            if any(sender == address and port in (None, its_port) for address, its_port in initiators):
                return True
        return False


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection as its users see it: one leg, or several when something between them relays it."""

    legs: tuple[Leg, ...]

    @property
    def journeys(self) -> list[tuple[Leg, Journey]]:
        """Every packet with its leg, in the order of time."""
        pairs = [(leg, journey) for leg in self.legs for journey in leg.journeys]
        return sorted(pairs, key=lambda pair: pair[1].first.time_ns)

    def has(self, frame: Frame) -> bool:
        """Is the frame one of its packets, at any hop?"""
        return any(frame is seen for _, journey in self.journeys for hop in journey.hops for seen in hop.frames)


def connections(journeys: Iterable[Journey]) -> list[Connection]:
    """Group journeys to connections, in the order in which these began.

    What belongs to no conversation, neighbour discovery for example, is left out.
    """
    legs = [Leg(part) for group in _grouped(list(journeys)) for part in _split(group)]
    groups: list[list[Leg]] = []
    # By the node that their last leg ends in: only there it can be relayed, and there may be thousands.
    ending: defaultdict[str, list[list[Leg]]] = defaultdict(list)
    for leg in sorted(legs, key=lambda leg: leg.began):
        begin, end = leg.opening.hops[0], leg.opening.hops[-1]
        nearby = ending[begin.frame.node] if begin.frame.outgoing else []
        # Of equally close ones the first: connections are relayed in the order in which they came.
        closest = max(nearby, key=lambda group: _kinship(group[-1], leg), default=None)
        if closest is not None and _kinship(closest[-1], leg):
            nearby.remove(closest)
            closest.append(leg)
        else:
            closest = [leg]
            groups.append(closest)
        if not end.frame.outgoing:
            ending[end.frame.node].append(closest)
    return [Connection(tuple(group)) for group in groups]


def _grouped(journeys: Sequence[Journey]) -> Iterator[tuple[Journey, ...]]:
    """Journeys that share addresses at a point or a socket, directly or by way of others, belong together."""
    roots: dict[_Place, _Place] = {}

    def root(place: _Place) -> _Place:
        while (above := roots.setdefault(place, place)) != place:
            roots[place] = roots[above]
            place = above
        return place

    fragments = _ports_of_fragments(journeys)
    placed = [(journey, list(_places(journey, fragments))) for journey in journeys]
    for _, places in placed:
        for place in places[1:]:
            roots[root(place)] = root(places[0])
    groups: defaultdict[_Place, list[Journey]] = defaultdict(list)
    for journey, places in placed:
        if places:
            groups[root(places[0])].append(journey)
    return (tuple(group) for group in groups.values())


def _ports_of_fragments(journeys: Sequence[Journey]) -> dict[object, _Flow]:
    """The flows of fragmented packets, by what their fragments have in common; first fragments tell them."""
    return {
        _fragment_key(hop.point, packet): _flow(packet)
        for journey in journeys
        for hop in journey.hops
        if (packet := ip_of(hop.frame)).layout.is_fragment and packet.source_port is not None
    }


def _fragment_key(point: str, packet: IpPacket) -> object:
    return point, packet.source, packet.destination, packet.protocol, packet.layout.identification


def _places(journey: Journey, fragments: dict[object, _Flow]) -> Iterator[_Place]:
    """Point and flow of each hop, and the sockets at both ends; none when the packet belongs to no flow.

    Only at its sockets does a connection meet itself whose answers take another way.
    """
    first, last = journey.first, journey.hops[-1].frame
    sent, received = journey.packet, ip_of(last)
    if first.outgoing and sent.source_port is not None:
        yield first.node, (sent.protocol, sent.ends)
    if not last.outgoing and received.source_port is not None:
        yield last.node, (received.protocol, received.ends[::-1])
    for hop in journey.hops:
        packet = ip_of(hop.frame)
        if packet.icmp is not None and packet.icmp.embedded is not None:
            packet = packet.icmp.embedded
        if packet.source_port is not None:
            yield hop.point, _flow(packet)
        elif packet.layout.fragment_offset and (flow := fragments.get(_fragment_key(hop.point, packet))) is not None:
            yield hop.point, flow


def _flow(packet: IpPacket) -> _Flow:
    return packet.protocol, frozenset(packet.ends)


def _split(journeys: Sequence[Journey]) -> Iterator[tuple[Journey, ...]]:
    """Part TCP connections that used the same ports one after the other: another SYN of the same sender begins one."""
    part: list[Journey] = []
    syns: dict[tuple[str, int | None], int] = {}
    for journey in journeys:
        packet = journey.packet
        if packet.tcp is not None and _is_syn(packet):
            sender = (packet.source, packet.source_port)
            if syns.setdefault(sender, packet.tcp.seq) != packet.tcp.seq:
                yield tuple(part)
                part, syns = [], {sender: packet.tcp.seq}
        part.append(journey)
    yield tuple(part)


def _kinship(first: Leg, second: Leg) -> int:
    """How much the second leg looks like the first one, which ends where it begins, relayed; 0: not at all."""
    if first.protocol != second.protocol or not first.began <= second.began <= first.ended:
        return 0
    same_payload = first.first_payload == second.first_payload != b""
    same_responder = first.responder == second.responder
    same_initiator = first.opening.packet.source == second.opening.packet.source
    return 4 * same_payload + 2 * same_responder + same_initiator


def _is_syn(packet: IpPacket) -> bool:
    return packet.tcp is not None and packet.tcp.flags & (TcpHeader.SYN | TcpHeader.ACK) == TcpHeader.SYN
