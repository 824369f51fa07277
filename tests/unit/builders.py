"""Packets as bytes, with keyword defaults; built by Scapy, whose checksums are the oracle."""

from __future__ import annotations

from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6TimeExceeded, IPv6
from scapy.packet import Packet, Raw

from nfq_engine.core.packet import Endpoint, FlowTuple, Protocol

NAMES = ("client", "gateway", "outside", "server", "foreign")
ADDRESSES = {
    4: dict(zip(NAMES, ("10.0.0.1", "10.0.0.2", "10.0.1.1", "10.0.1.2", "192.0.2.7"), strict=True)),
    6: dict(zip(NAMES, ("fd00::1", "fd00::2", "fd01::1", "fd01::2", "2001:db8::7"), strict=True)),
}

ICMP_ERRORS = {
    4: {
        "unreachable": ICMP(type=3, code=3),
        "too-big": ICMP(type=3, code=4, nexthopmtu=1280),
        "time-exceeded": ICMP(type=11),
        "redirect": ICMP(type=5, code=1, gw="10.0.0.3"),
    },
    6: {
        "unreachable": ICMPv6DestUnreach(code=4),
        "too-big": ICMPv6PacketTooBig(mtu=1280),
        "time-exceeded": ICMPv6TimeExceeded(),
    },
}
EMBEDDED = {4: 28, 6: 1232}  # bytes of the packet in question


def endpoint(who: str, port: int, version: int = 4) -> Endpoint:
    """An endpoint by the name of a node."""
    return Endpoint.of(ADDRESSES[version][who], port)


def flow(source: Endpoint, destination: Endpoint, protocol: Protocol = Protocol.TCP) -> FlowTuple:
    """A flow tuple."""
    return FlowTuple(protocol, source, destination)


def packet(of: FlowTuple, *, flags: str = "S", payload: bytes = b"", ip: dict[str, Any] | None = None) -> bytes:
    """A TCP segment or UDP datagram of a flow, with right checksums."""
    return bytes(layers(of, flags=flags, payload=payload, ip=ip))


def layers(of: FlowTuple, *, flags: str = "S", payload: bytes = b"", ip: dict[str, Any] | None = None) -> Packet:
    """The same, as Scapy layers."""
    ports = {"sport": of.source.port, "dport": of.destination.port}
    transport = UDP(**ports) if of.protocol is Protocol.UDP else TCP(**ports, flags=flags, seq=1000, ack=2000)
    return network(of.source.address, of.destination.address, **(ip or {})) / transport / Raw(payload)


def network(source: bytes, destination: bytes, **fields: Any) -> Packet:
    """An IP header between two packed addresses."""
    names = [str(Endpoint(address, 0)).rpartition(":")[0].strip("[]") for address in (source, destination)]
    return (IP if len(source) == 4 else IPv6)(src=names[0], dst=names[1], **fields)


def icmp_error(about: bytes, source: bytes, destination: bytes, *, kind: str = "unreachable") -> bytes:
    """An ICMP error from `source` to `destination` about a packet."""
    version = about[0] >> 4
    return bytes(network(source, destination) / ICMP_ERRORS[version][kind] / Raw(about[: EMBEDDED[version]]))


def dissect(data: bytes) -> Packet:
    """Bytes as Scapy layers."""
    return (IP if data[0] >> 4 == 4 else IPv6)(data)


def with_right_checksums(data: bytes) -> bytes:
    """The packet with every checksum computed anew by Scapy; a UDP checksum of 0 over IPv4 stays."""
    parsed = dissect(data)
    if IP in parsed:
        del parsed[IP].chksum
    if TCP in parsed:
        del parsed[TCP].chksum
    if UDP in parsed and parsed[UDP].chksum:
        del parsed[UDP].chksum
    return bytes(parsed)
