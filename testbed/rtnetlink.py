"""rtnetlink messages: the few that building a lab takes, packed by hand.

Owns: bytes of requests, their sending in batches, the reading of answers and dumps. pyroute2 makes the same messages at
about 0.5 ms each (its calls run through an event loop); a lab of ten nodes takes 150 of them, and is to be ready in
25 ms. For everything else a node has pyroute2 (lab.py).
"""

from __future__ import annotations

import secrets
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from testbed.topology import Address, Gateway, Network

_HEADER: Final = struct.Struct("=IHHII")
_IFINFO: Final = struct.Struct("=BxHiII")  # linux/rtnetlink.h, struct ifinfomsg
_IFADDR: Final = struct.Struct("=BBBBI")  # linux/if_addr.h, struct ifaddrmsg
_ATTRIBUTE: Final = struct.Struct("=HH")  # linux/rtnetlink.h, struct rtattr

# Whole messages, since a lab has most of these: struct ifaddrmsg, IFA_LOCAL and IFA_ADDRESS; struct rtmsg
# (linux/rtnetlink.h), RTA_DST and RTA_GATEWAY. By IP version, with the address family and the length of an attribute.
_ADDRESSES: Final = {4: struct.Struct("=BBBBIHH4sHH4s"), 6: struct.Struct("=BBBBIHH16sHH16s")}
_ROUTES: Final = {4: struct.Struct("=BBBBBBBBIHH4sHH4s"), 6: struct.Struct("=BBBBBBBBIHH16sHH16s")}
_FAMILIES: Final = {4: (int(socket.AF_INET), 8), 6: (int(socket.AF_INET6), 20)}

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWLINK, _RTM_GETLINK, _RTM_NEWADDR, _RTM_GETADDR, _RTM_NEWROUTE = 16, 18, 20, 22, 24
_RTM_NEWNSID, _RTM_DELNSID, _RTM_GETNSID = 88, 89, 90
_REQUEST: Final = 0x1
_REQUEST_ACK: Final = 0x5
_CREATE_EXCLUSIVE: Final = 0x600
CREATE_REPLACE: Final = 0x500
_DUMP: Final = 0x301

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 4, 10, 18
_IFLA_ALIAS, _IFLA_STATS64, _IFLA_NET_NS_FD, _IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES = 20, 23, 28, 31, 32
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_GATEWAY = 1, 5
_IFF_UP: Final = 1
_IFA_F_TENTATIVE: Final = 0x40
_RT_TABLE_MAIN, _RTPROT_STATIC, _RT_SCOPE_UNIVERSE, _RTN_UNICAST = 254, 4, 0, 1
_LOOPBACK: Final = 1
_NETNSA_NSID, _NETNSA_FD = 1, 3  # linux/net_namespace.h
_RTGENMSG: Final = struct.pack("=Bxxx", socket.AF_UNSPEC)
_MOST_ID: Final = (1 << 31) - 1

_BATCH: Final = 128  # messages a send: their acknowledgements fit into the socket's buffer


class Request:
    """One message without its header: type, flags, body."""

    __slots__ = ("body", "flags", "kind")

    def __init__(self, kind: int, flags: int, body: bytes) -> None:
        self.kind = kind
        self.flags = flags
        self.body = body


def veth(
    name: str, index: int, mac: str, peer: str, peer_index: int, peer_mac: str, peer_namespace: int, mtu: int
) -> Request:
    """A veth pair; the peer is born in the namespace behind a descriptor."""
    far = _IFINFO.pack(0, 0, peer_index, 0, 0) + _named(peer, peer_mac, mtu)
    far += attribute(_IFLA_NET_NS_FD, struct.pack("=I", peer_namespace))
    data = attribute(_IFLA_INFO_DATA, attribute(_VETH_INFO_PEER, far))
    info = attribute(_IFLA_LINKINFO, attribute(_IFLA_INFO_KIND, b"veth") + data)
    return Request(_RTM_NEWLINK, _CREATE_EXCLUSIVE, _IFINFO.pack(0, 0, index, 0, 0) + _named(name, mac, mtu) + info)


def bridge(name: str, index: int) -> Request:
    """A bridge."""
    info = attribute(_IFLA_LINKINFO, attribute(_IFLA_INFO_KIND, b"bridge"))
    body = _IFINFO.pack(0, 0, index, 0, 0) + attribute(_IFLA_IFNAME, name.encode() + b"\0") + info
    return Request(_RTM_NEWLINK, _CREATE_EXCLUSIVE, body)


def join(index: int, master: int) -> Request:
    """Make an interface a port of a bridge."""
    body = _IFINFO.pack(0, 0, index, 0, 0) + attribute(_IFLA_MASTER, struct.pack("=I", master))
    return Request(_RTM_NEWLINK, 0, body)


def up(index: int, alias: str = "") -> Request:
    """Set an interface up, and give it an alias."""
    body = _IFINFO.pack(0, 0, index, _IFF_UP, _IFF_UP)
    return Request(_RTM_NEWLINK, 0, body + attribute(_IFLA_ALIAS, alias.encode()) if alias else body)


def address(index: int, value: Address) -> Request:
    """Give an interface an address."""
    version, packed = value.version, value.packed  # not that of `value.ip`, which is made each time
    family, length = _FAMILIES[version]
    header = (family, value.network.prefixlen, 0, 0, index)
    body = _ADDRESSES[version].pack(*header, length, _IFA_LOCAL, packed, length, _IFA_ADDRESS, packed)
    return Request(_RTM_NEWADDR, _CREATE_EXCLUSIVE, body)


def route(to: Network, gateway: Gateway) -> Request:
    """Add a route by a gateway, in the place of one to the same prefix."""
    version = to.version
    family, length = _FAMILIES[version]
    header = (family, to.prefixlen, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, _RT_SCOPE_UNIVERSE, _RTN_UNICAST, 0)
    prefix = to.network_address.packed
    body = _ROUTES[version].pack(*header, length, _RTA_DST, prefix, length, _RTA_GATEWAY, gateway.packed)
    return Request(_RTM_NEWROUTE, CREATE_REPLACE, body)


def name_namespace(descriptor: int) -> Request:
    """Give the namespace behind a descriptor an id in this one; EEXIST when it has one.

    The kernel would give the lowest that is free, which is soon another's when this namespace is gone.
    """
    number = struct.pack("=i", secrets.randbelow(_MOST_ID))
    body = attribute(_NETNSA_NSID, number) + attribute(_NETNSA_FD, struct.pack("=I", descriptor))
    return Request(_RTM_NEWNSID, 0, _RTGENMSG + body)


def namespace_id(netlink: socket.socket, descriptor: int) -> int:
    """The id that the namespace behind a descriptor has in this one; -1 without one."""
    body = _RTGENMSG + attribute(_NETNSA_FD, struct.pack("=I", descriptor))
    netlink.send(_HEADER.pack(_HEADER.size + len(body), _RTM_GETNSID, _REQUEST, 0, 0) + body)
    ((_, _, answer),) = _messages(netlink.recv(1 << 16))
    return _namespace_id(answer)


def ask_namespace(number: int) -> Request:
    """Ask for the namespace with an id; ENOENT when there is none."""
    return Request(_RTM_GETNSID, 0, _RTGENMSG + attribute(_NETNSA_NSID, struct.pack("=i", number)))


def ended_namespaces(news: socket.socket) -> list[int]:
    """The ids in the next piece of news from the group RTNLGRP_NSID whose namespaces are no more."""
    return [_namespace_id(body) for kind, _, body in _messages(news.recv(1 << 16)) if kind == _RTM_DELNSID]


def _namespace_id(body: bytes) -> int:
    (number,) = struct.unpack("=i", attributes(body[len(_RTGENMSG) :])[_NETNSA_NSID])
    return int(number)


def send(netlink: socket.socket, requests: Sequence[Request]) -> Iterator[tuple[int, int]]:
    """Send requests in batches; yields (place, errno) of each that was refused.

    Only the last of a batch is asked to be acknowledged: the kernel takes messages in order, and tells of a refused one
    unasked (net/netlink/af_netlink.c, netlink_rcv_skb).
    """
    for first in range(0, len(requests), _BATCH):
        batch = requests[first : first + _BATCH]
        last = first + len(batch) - 1
        netlink.send(
            b"".join(
                _HEADER.pack(
                    _HEADER.size + len(request.body),
                    request.kind,
                    request.flags | (_REQUEST_ACK if number == last else _REQUEST),
                    number,
                    0,
                )
                + request.body
                for number, request in enumerate(batch, start=first)
            )
        )
        answered = None
        while answered != last:
            for kind, number, body in _messages(netlink.recv(1 << 16)):
                if kind == _NLMSG_ERROR:
                    answered = number
                    (code,) = struct.unpack_from("=i", body)
                    if code:
                        yield number, -code


def tentative(netlink: socket.socket) -> list[str]:
    """The IPv6 addresses of a namespace that it cannot use yet."""
    return [
        socket.inet_ntop(socket.AF_INET6, attributes(body[_IFADDR.size :])[_IFA_ADDRESS])
        for body in dump(netlink, _RTM_GETADDR, _RTM_NEWADDR, _IFADDR.pack(socket.AF_INET6, 0, 0, 0, 0))
        if _IFADDR.unpack_from(body)[2] & _IFA_F_TENTATIVE
    ]


def marked(netlink: socket.socket) -> str:
    """The alias of the lo of a namespace; empty if it has none."""
    for body in dump(netlink, _RTM_GETLINK, _RTM_NEWLINK, _IFINFO.pack(0, 0, 0, 0, 0)):
        if _IFINFO.unpack_from(body)[2] == _LOOPBACK:
            return attributes(body[_IFINFO.size :]).get(_IFLA_ALIAS, b"").rstrip(b"\0").decode(errors="replace")
    return ""


def received(netlink: socket.socket) -> dict[str, tuple[int, int]]:
    """The interfaces of a namespace by name: index, and packets received so far."""
    found = {}
    for body in dump(netlink, _RTM_GETLINK, _RTM_NEWLINK, _IFINFO.pack(0, 0, 0, 0, 0)):
        values = attributes(body[_IFINFO.size :])
        (packets,) = struct.unpack_from("=Q", values[_IFLA_STATS64])
        found[values[_IFLA_IFNAME].rstrip(bytes(1)).decode()] = (_IFINFO.unpack_from(body)[2], packets)
    return found


def dump(netlink: socket.socket, ask: int, answer: int, body: bytes) -> list[bytes]:
    """The bodies of a dump: of the messages of type `answer` that come for one of type `ask`."""
    netlink.send(_HEADER.pack(_HEADER.size + len(body), ask, _DUMP, 0, 0) + body)
    found: list[bytes] = []
    while True:
        for kind, _, content in _messages(netlink.recv(1 << 16)):
            if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                return found
            if kind == answer:
                found.append(content)


def _named(name: str, mac: str, mtu: int) -> bytes:
    """The attributes that both ends of a link have."""
    return (
        attribute(_IFLA_IFNAME, name.encode() + b"\0")
        + attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
        + attribute(_IFLA_MTU, struct.pack("=I", mtu))
        + _ONE_QUEUE
    )


def attribute(kind: int, value: bytes) -> bytes:
    """An attribute, padded."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


# The kernel would make one for each processor (drivers/net/veth.c), which takes its time.
_ONE_QUEUE: Final = b"".join(
    attribute(kind, struct.pack("=I", 1)) for kind in (_IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES)
)


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, sequence number and body of each message in a datagram."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, number, _ = _HEADER.unpack_from(data, at)
        yield kind, number, data[at + _HEADER.size : at + length]
        at += length + 3 & ~3


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes of a message."""
    found, at = {}, 0
    while at + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        found[kind & 0x3FFF] = data[at + 4 : at + length]
        at += max(length + 3 & ~3, 4)
    return found
