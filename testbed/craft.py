"""Crafted packets: Scapy's, sent from a node and answered there.

Owns: raw sockets of a node. The node's kernel routes what is sent, as it does for a program of its own: Scapy's tables
of routes and interfaces are those of the namespace in which it was loaded, and nothing here asks them. A socket belongs
to the namespace in which it was opened, so threads and coroutines may send from several nodes at once.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from testbed.netns import Namespace

if TYPE_CHECKING:
    from scapy.packet import Packet

_ETH_P_ALL: Final = 3
_ETH_P_IP: Final = 0x0800
_ETH_P_IPV6: Final = 0x86DD
_PACKET_OUTGOING: Final = 4
_RECEIVE_BYTES: Final = 4 << 20
_LARGEST: Final = 0x10000
_ANY_PORT: Final = 9  # of a socket that is connected to see where the kernel routes, and sends nothing

SEVERAL: Final = "several packets in one, by a list of values or a net: send each by itself"


class CraftError(ValueError):
    """A packet that cannot be sent as it is; the message says why."""


def send(namespace: Namespace, packet: Packet, interface: str | None = None) -> None:
    """Send an IPv4 or IPv6 packet as it is; what it leaves open (its source, lengths, checksums) is filled in.

    `interface` is where it must leave: link-local destinations and groups are at no other place than the caller says.
    CraftError when the packet does not begin with IP, stands for several, is larger than the way allows, or the node
    has no route for it.
    """
    way = _Way(namespace, interface)
    whole, family, destination = _completed(way, packet)
    _send(way, bytes(whole), family, destination)


def sr1(namespace: Namespace, packet: Packet, timeout: float, interface: str | None = None) -> Packet | None:
    """Send a packet, and return the first that answers it within `timeout` seconds, from its IP header on; else None.

    What is an answer, Scapy says (`Packet.answers`, and see is_answer): the right addresses and ports the other way
    round, the echo's identifier, or an ICMP error about it. `interface` and CraftError as for `send`.
    """
    way = _Way(namespace, interface)
    whole, family, destination = _completed(way, packet)
    data = bytes(whole)  # once: a field that is left to chance has another value each time
    sent = type(whole)(data)
    with _listening(namespace) as listener:
        _send(way, data, family, destination)
        for answer in _received(listener, time.monotonic() + timeout):
            if is_answer(answer, sent):
                return answer
    return None


def is_several(packet: Packet) -> bool:
    """Does a Scapy packet stand for several, as `UDP(dport=[80, 443])` does? Of these, `bytes` makes the first."""
    return len(list(islice(packet, 2))) > 1


def is_answer(packet: Packet, sent: Packet) -> bool:
    """Whether a packet answers another, as Scapy says, but for what it takes too lightly.

    A packet that a node sent to itself is none. A datagram comes from the very port that was asked (Scapy wants only
    the other one to be right), and may be empty.
    """
    from scapy.layers.inet import UDP

    if (packet.src, packet.dst) == (sent.src, sent.dst) and bytes(packet.payload) == bytes(sent.payload):
        return False
    if isinstance(packet.payload, UDP) and isinstance(sent.payload, UDP):
        if (packet.sport, packet.dport) != (sent.dport, sent.sport):
            return False
        if not packet.payload.payload and (packet.src, packet.dst) == (sent.dst, sent.src):
            return True
    return bool(packet.answers(sent))


@dataclass(frozen=True, slots=True)
class _Way:
    """Where packets leave: a node, and one of its interfaces if that is not left to its routes."""

    namespace: Namespace
    interface: str | None

    def socket(self, family: socket.AddressFamily, kind: socket.SocketKind, protocol: int = 0) -> socket.socket:
        """One that may send to broadcast addresses; CraftError when there is no such interface."""
        opened = self.namespace.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if self.interface is not None:
            try:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.interface.encode())
            except OSError as error:
                opened.close()
                raise CraftError(f"there is no interface {self.interface!r}") from error
        return opened


def _completed(way: _Way, packet: Packet) -> tuple[Any, socket.AddressFamily, str]:
    """The packet with its source, its family and its destination."""
    from scapy.layers.inet import IP
    from scapy.layers.inet6 import IPv6

    if not isinstance(packet, IP | IPv6):
        raise CraftError(f"a packet to send begins with IP or IPv6, not with {type(packet).__name__}")
    if is_several(packet):
        raise CraftError(SEVERAL)
    family = socket.AF_INET if isinstance(packet, IP) else socket.AF_INET6
    if "dst" not in packet.fields:
        raise CraftError("the packet has no destination")
    destination = str(packet.dst)
    whole = packet.copy()
    if "src" not in whole.fields:
        whole.src = _source(way, family, destination)
    return whole, family, destination


def _source(way: _Way, family: socket.AddressFamily, destination: str) -> str:
    """The address that the node's kernel would send from."""
    with way.socket(family, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect((destination, _ANY_PORT))
        except OSError as error:
            raise CraftError(f"{destination}: {error.strerror or error}") from error
        source: str = asking.getsockname()[0]
    return source


def _send(way: _Way, data: bytes, family: socket.AddressFamily, destination: str) -> None:
    # IPPROTO_RAW: what is sent has its own IP header, of either family (net/ipv4/raw.c, net/ipv6/raw.c).
    with way.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender:
        try:
            sender.sendto(data, (destination, 0))
        except OSError as error:
            raise CraftError(f"{destination}: {len(data)} bytes cannot be sent: {error.strerror}") from error


@contextlib.contextmanager
def _listening(namespace: Namespace) -> Iterator[socket.socket]:
    """A socket that gets what comes to the node from now on, on whichever interface."""
    with namespace.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        yield listener


def _received(listener: socket.socket, deadline: float) -> Iterator[Any]:
    """The IP packets that come in until a deadline."""
    from scapy.layers.inet import IP
    from scapy.layers.inet6 import IPv6

    layers = {_ETH_P_IP: IP, _ETH_P_IPV6: IPv6}
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            data, (_, protocol, kind, *_) = listener.recvfrom(_LARGEST)
        except TimeoutError:
            return
        if kind != _PACKET_OUTGOING and protocol in layers:
            try:
                packet = layers[protocol](data)
            except Exception:  # Scapy breaks on an IP header that is cut short, which anybody may send
                continue
            yield packet
