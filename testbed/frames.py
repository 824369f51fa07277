"""Frames: what a capture saw.

Owns: the value that every capture, expectation and trace is about, and how one is named in a line of text. Must not
know where frames come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from testbed.headers import PROTOCOL_NAMES, IpPacket, TcpHeader, locate, read_ethernet, read_packet

if TYPE_CHECKING:
    from scapy.packet import Packet


@dataclass(frozen=True)  # not slotted: what is read off the bytes is kept
class Frame:
    """One frame at one capture point.

    `point`: "node:interface". `time_ns`: since the epoch, the kernel's clock at the tap. `data`: from the Ethernet
    header on, with the VLAN tag where it was on the wire. `outgoing`: it left the node here. `half_checksum`: its
    sender left the rest of the transport checksum to the device; the field holds the pseudo-header's. `number`: its
    place in the pcapng file, from 1, as Wireshark counts; 0 when it is in none.
    """

    point: str
    time_ns: int
    data: bytes
    outgoing: bool
    half_checksum: bool = False
    number: int = 0

    @property
    def node(self) -> str:
        """The node that the point is at."""
        return self.point.partition(":")[0]

    @cached_property
    def ip(self) -> IpPacket | None:
        """The IP packet in it; None when there is none that can be read."""
        ethernet = read_ethernet(self.data)
        layout = None if ethernet is None else locate(self.data, ethernet)
        return None if layout is None else read_packet(self.data, layout)

    @cached_property
    def vlans(self) -> tuple[int, ...]:
        """The VLAN ids, outermost first."""
        ethernet = read_ethernet(self.data)
        return () if ethernet is None else ethernet.vlans

    @property
    def packet(self) -> Packet:
        """The same, dissected by Scapy."""
        # Imported here: Scapy takes a third of a second to load, and most runs never ask. inet6 brings inet along; both
        # tell Ether what it can carry.
        from scapy.config import conf
        from scapy.layers.inet6 import IPv6  # noqa: F401
        from scapy.layers.l2 import Ether

        # Kept until Scapy knows more layers: somebody may import one after the frame was looked at.
        known = len(conf.layers)
        if (kept := self.__dict__.get("_dissected")) is None or kept[0] != known:
            kept = self.__dict__["_dissected"] = known, Ether(self.data)
        packet: Packet = kept[1]
        return packet

    def __str__(self) -> str:
        """Number, direction and content, in one line."""
        number = f"#{self.number} " if self.number else ""
        return f"{number}{self.point} {'out' if self.outgoing else 'in'}: {describe(self)}"


def ip_of(frame: Frame) -> IpPacket:
    """The IP packet in a frame; ValueError when there is none."""
    if frame.ip is None:
        raise ValueError(f"no IP packet: {frame}")
    return frame.ip


def describe(frame: Frame) -> str:
    """What a frame carries, in one line: `10.0.0.1:4000 > 10.0.0.2:80 tcp SYN seq 7`."""
    packet = frame.ip
    if packet is None:
        ethernet = read_ethernet(frame.data)
        kind = "cut short" if ethernet is None else _ETHERTYPES.get(ethernet.ethertype, f"{ethernet.ethertype:#06x}")
        return f"{_mac(frame.data[6:12])} > {_mac(frame.data[:6])} {kind}, {len(frame.data)} bytes"
    ends = f"{source_of(packet)} > {destination_of(packet)}"
    tag = "".join(f"vlan {vlan} " for vlan in frame.vlans)
    return f"{tag}{ends} {protocol_name(packet.protocol)} {describe_content(packet)}"


def describe_content(packet: IpPacket) -> str:
    """What a packet says apart from its addresses: `SYN seq 7`, `12 bytes`, `time exceeded`."""
    if packet.layout.fragment_offset:
        return f"fragment at {packet.layout.fragment_offset}, {len(packet.payload)} bytes"
    if packet.tcp is not None:
        acknowledged = f" ack {packet.tcp.ack}" if packet.tcp.flags & TcpHeader.ACK else ""
        size = f", {len(packet.payload)} bytes" if packet.payload else ""
        return f"{flag_names(packet.tcp.flags)} seq {packet.tcp.seq}{acknowledged}{size}"
    if packet.icmp is not None:
        about = f", about {packet.icmp.embedded.source}" if packet.icmp.embedded is not None else ""
        return f"{icmp_name(packet)}{about}"
    return f"{len(packet.payload)} bytes"


def source_of(packet: IpPacket) -> str:
    """Source address, with the port where there is one."""
    return endpoint(packet.source, None if packet.icmp else packet.source_port)


def destination_of(packet: IpPacket) -> str:
    """Destination address, with the port where there is one."""
    return endpoint(packet.destination, None if packet.icmp else packet.destination_port)


def endpoint(address: str, port: int | None) -> str:
    """`10.0.0.1:80`, `[2001:db8::1]:80`, or the address alone."""
    if port is None:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def protocol_name(protocol: int) -> str:
    """`tcp`, or `protocol 47` for one without a name here."""
    return PROTOCOL_NAMES.get(protocol, f"protocol {protocol}")


def flag_names(flags: int) -> str:
    """`SYN ACK`; `no flags` for none."""
    return " ".join(name for bit, name in _FLAGS if flags & bit) or "no flags"


def icmp_name(packet: IpPacket) -> str:
    """What an ICMP message is called: `echo request`, or its numbers when it has no name here."""
    assert packet.icmp is not None
    kind = (packet.protocol, packet.icmp.type)
    code = packet.icmp.code
    return _ICMP_CODES.get((*kind, code)) or _ICMP_TYPES.get(kind) or f"type {packet.icmp.type} code {code}"


def _mac(data: bytes) -> str:
    return data.hex(":")


_ETHERTYPES = {0x0806: "arp", 0x0800: "broken ip", 0x86DD: "broken ipv6"}

_FLAGS = (
    (TcpHeader.SYN, "SYN"),
    (TcpHeader.FIN, "FIN"),
    (TcpHeader.RST, "RST"),
    (TcpHeader.PSH, "PSH"),
    (TcpHeader.ACK, "ACK"),
    (TcpHeader.URG, "URG"),
    (TcpHeader.ECE, "ECE"),
    (TcpHeader.CWR, "CWR"),
    (TcpHeader.AE, "AE"),
    (TcpHeader.RESERVED, "reserved"),
)

_ICMP_TYPES = {
    (1, 0): "echo reply",
    (1, 3): "unreachable",
    (1, 5): "redirect",
    (1, 8): "echo request",
    (1, 11): "time exceeded",
    (58, 1): "unreachable",
    (58, 2): "packet too big",
    (58, 3): "time exceeded",
    (58, 128): "echo request",
    (58, 129): "echo reply",
    (58, 133): "router solicitation",
    (58, 134): "router advertisement",
    (58, 135): "neighbour solicitation",
    (58, 136): "neighbour advertisement",
    (58, 143): "multicast listener report",
}

_ICMP_CODES = {
    (1, 3, 0): "net unreachable",
    (1, 3, 1): "host unreachable",
    (1, 3, 3): "port unreachable",
    (1, 3, 4): "fragmentation needed",
    (58, 1, 0): "no route",
    (58, 1, 3): "address unreachable",
    (58, 1, 4): "port unreachable",
}
