"""Frames as captures of a lab would have seen them: packets that pass points, one after the other."""

from __future__ import annotations

from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from testbed.frames import Frame

CLIENT, GATEWAY_IN, GATEWAY_OUT, SERVER = POINTS = ("client:eth0", "gateway:eth0", "gateway:eth1", "server:eth0")

# What a packet is sent with, and what is left when the gateway has routed it.
SENT, ROUTED = 64, 63

_STEP_NS = 10_000


class Scene:
    """Collects frames; its clock goes on with each."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.now = 1_000_000_000_000

    def see(self, point: str, packet: Packet, *, outgoing: bool, half: bool = False, sender: int = 1) -> Frame:
        """One frame at one point; `sender` is the last byte of its link address."""
        self.now += _STEP_NS
        data = bytes(Ether(src=f"02:00:00:00:00:{sender:02x}", dst="02:00:00:00:01:00") / packet)
        frame = Frame(point, self.now, data, outgoing, half, len(self.frames) + 1)
        self.frames.append(frame)
        return frame

    def go(self, *way: tuple[str, Packet], sender: int = 1) -> list[Frame]:
        """A packet passes points: out of a node, into the next, out of it, and so on."""
        return [
            self.see(point, packet, outgoing=index % 2 == 0, sender=sender) for index, (point, packet) in enumerate(way)
        ]

    def open(self, *way: tuple[str, int, int], port: int = 4000, seq: int = 0) -> None:
        """SYN and SYN ACK; the way has at each point the last bytes of source and destination there."""
        self._send(way, TCP(sport=port, dport=80, flags="S", seq=seq))
        self._answer(way, TCP(sport=80, dport=port, flags="SA", seq=seq + 500, ack=seq + 1))

    def send(self, *way: tuple[str, int, int], port: int = 4000, seq: int, payload: bytes) -> None:
        """Data from the initiator."""
        self._send(way, TCP(sport=port, dport=80, flags="PA", seq=seq, ack=501) / payload)

    def acknowledge(self, *way: tuple[str, int, int], port: int = 4000, ack: int) -> None:
        """A bare acknowledgement from the responder."""
        self._answer(way, TCP(sport=80, dport=port, flags="A", seq=501, ack=ack))

    def reset(self, *way: tuple[str, int, int], port: int = 4000, seq: int = 0) -> None:
        """The responder ends it."""
        self._answer(way, TCP(sport=80, dport=port, flags="R", seq=seq + 501))

    def _send(self, way: tuple[tuple[str, int, int], ...], transport: Packet) -> None:
        self.go(*((point, ip(source, target, SENT) / transport) for point, source, target in way))

    def _answer(self, way: tuple[tuple[str, int, int], ...], transport: Packet) -> None:
        self.go(*((point, ip(target, source, SENT) / transport) for point, source, target in reversed(way)))

    def wait(self, milliseconds: float) -> None:
        """Let time pass."""
        self.now += int(milliseconds * 1e6)


def ip(source: int, destination: int, hops: int) -> Packet:
    """An IPv4 header from 10.0.0.source to 10.0.0.destination."""
    return IP(src=f"10.0.0.{source}", dst=f"10.0.0.{destination}", ttl=hops, id=7)


def talk(scene: Scene, *way: tuple[str, int, int], port: int = 4000, seq: int = 0) -> None:
    """A handshake, a request and a reset."""
    scene.open(*way, port=port, seq=seq)
    scene.send(*way, port=port, seq=seq + 1, payload=b"GET /")
    scene.reset(*way, port=port, seq=seq)
