"""Conversations: who talked to whom at one point.

Owns: the summary of a point's TCP, UDP and echo traffic, under the addresses that were on the wire there. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from testbed.frames import Frame, endpoint, protocol_name
from testbed.headers import TCP, IpPacket, TcpHeader

_Ends = tuple[int, str, int | None, str, int | None]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Two ends and what they exchanged: packets and bytes of payload, from the initiator and back.

    The initiator sent the SYN, or else the first packet. Ports are None for an echo.
    """

    protocol: str
    initiator: str
    initiator_port: int | None
    responder: str
    responder_port: int | None
    packets: tuple[int, int]
    payload: tuple[int, int]

    def __str__(self) -> str:
        """How expectations name it: `tcp 10.0.0.1 > 10.0.0.2:80`; the initiator's port is chosen by chance."""
        return f"{self.protocol} {self.initiator} > {endpoint(self.responder, self.responder_port)}"


def conversations(frames: Iterable[Frame]) -> list[Conversation]:
    """The conversations among one point's frames, in the order in which they began."""
    found: dict[_Ends, list[IpPacket]] = {}
    for frame in frames:
        packet = frame.ip
        if packet is None or packet.source_port is None:
            continue
        ends = _ends(packet)
        there = ends in found or (_turned(ends) not in found and not _is_answer(packet))
        found.setdefault(ends if there else _turned(ends), []).append(packet)
    return [_summary(ends, packets) for ends, packets in found.items()]


def _ends(packet: IpPacket) -> _Ends:
    return packet.protocol, packet.source, packet.source_port, packet.destination, packet.destination_port


def _turned(ends: _Ends) -> _Ends:
    protocol, source, source_port, destination, destination_port = ends
    return protocol, destination, destination_port, source, source_port


def _is_answer(packet: IpPacket) -> bool:
    """Does it answer a SYN that was not seen here?"""
    both = TcpHeader.SYN | TcpHeader.ACK
    return packet.protocol == TCP and packet.tcp is not None and packet.tcp.flags & both == both


def _summary(ends: _Ends, packets: list[IpPacket]) -> Conversation:
    protocol, initiator, initiator_port, responder, responder_port = ends
    sent = [packet for packet in packets if _ends(packet) == ends]
    answered = [packet for packet in packets if _ends(packet) != ends]
    is_echo = packets[0].icmp is not None
    return Conversation(
        protocol_name(protocol),
        initiator,
        None if is_echo else initiator_port,
        responder,
        None if is_echo else responder_port,
        (len(sent), len(answered)),
        (sum(len(packet.payload) for packet in sent), sum(len(packet.payload) for packet in answered)),
    )
