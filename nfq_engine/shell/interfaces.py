"""This host's interfaces and addresses: names by index, first addresses, and what an address is to this host.

Owns: a cache of all, thrown away whenever the kernel reports a change. Must not know what they are for.

By hand and not by pyroute2: these are two dumps, and to import it takes longer than all else that an engine does until
it is ready.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from nfq_engine.core.surroundings import AddressType
from nfq_engine.shell import netlink

_RTMGRP_LINK: Final = 0x1
_RTMGRP_IPV4_IFADDR: Final = 0x10
_RTMGRP_IPV6_IFADDR: Final = 0x100
_RTMGRP_IPV4_ROUTE: Final = 0x40
_RTMGRP_IPV6_ROUTE: Final = 0x400
_CHANGES: Final = _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR | _RTMGRP_IPV4_ROUTE | _RTMGRP_IPV6_ROUTE

# linux/rtnetlink.h
_RTM_NEWADDR, _RTM_GETADDR, _RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 20, 22, 24, 25, 26
_ROUTE_MESSAGES: Final = (_RTM_NEWROUTE, _RTM_DELROUTE)
_IFADDR: Final = struct.Struct("=BBBBI")  # linux/if_addr.h, struct ifaddrmsg: family, prefix, flags, scope, index
_RTMSG: Final = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type
_IFA_ADDRESS, _IFA_LOCAL, _RTA_DST = 1, 2, 1
_TABLE_AT: Final = 16 + 4  # of struct rtmsg, behind the header
_TABLE_LOCAL: Final = 255
_ROUTE_TYPES: Final = {2: AddressType.LOCAL, 3: AddressType.BROADCAST, 5: AddressType.MULTICAST}
_MOST_TYPES: Final = 4096  # addresses whose type is remembered

_FAMILY: Final = {4: socket.AF_INET, 16: socket.AF_INET6}
_IFA_F_TENTATIVE: Final = 0x40
_ALL: Final = 0x10000
_EVERYBODY: Final = b"\xff" * 4

_Route = tuple[int, int, AddressType]  # first and last address


class HostInterfaces:
    """The interfaces of the network namespace that this was made in; a `core.surroundings.Interfaces`."""

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = lambda: None  # what was asked before may be answered otherwise now
        self._changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._changes.setblocking(False)
        self._changes.bind((0, _CHANGES))
        self._names: dict[int, str] = {0: ""}
        self._addresses: dict[tuple[str, int], bytes | None] = {}
        self._types: dict[bytes, AddressType] = {}
        self._routes: dict[int, list[_Route]] = {}  # of the table `local`, by bytes of an address

    def fileno(self) -> int:
        """The descriptor that becomes readable when something changed."""
        return self._changes.fileno()

    def forget(self) -> None:
        """Read the reported changes and drop what is cached; a report that was lost (ENOBUFS) is a change as well."""
        while True:
            try:
                report = self._changes.recv(_ALL)
            except BlockingIOError:
                return
            except OSError:
                report = b""
            if _is_about_another_table(report):
                continue  # there may be many of these
            self._types.clear()
            self._routes.clear()
            self._names = {0: ""}
            self._addresses.clear()
            self.on_change()

    def name(self, index: int) -> str:
        """The name of an interface; its number when it has gone."""
        name = self._names.get(index)
        if name is None:
            try:
                name = socket.if_indextoname(index)
            except OSError:
                return str(index)
            self._names[index] = name
        return name

    def first_address(self, interface: str, size: int) -> bytes | None:
        """The first usable address of `size` bytes, in the kernel's order, link-local ones last."""
        key = (interface, size)
        if key not in self._addresses:
            self._addresses[key] = _ask(interface, size)
        return self._addresses[key]

    def address_type(self, address: bytes) -> AddressType:
        """What an address is to this host, as the kernel's inet_addr_type tells it (net/ipv4/fib_frontend.c)."""
        if address not in self._types:
            if len(self._types) >= _MOST_TYPES:
                self._types.clear()
            self._types[address] = self._look_up_type(address)
        return self._types[address]

    def _look_up_type(self, address: bytes) -> AddressType:
        value = ipaddress.ip_address(address)
        if value.is_multicast:
            return AddressType.MULTICAST
        if len(address) == 4 and (not address[0] or address == _EVERYBODY):
            return AddressType.BROADCAST
        if len(address) not in self._routes:
            self._routes[len(address)] = _local_routes(len(address))
        number = int(value)
        for first, last, type_ in self._routes[len(address)]:
            if first <= number <= last:
                return type_
        return AddressType.UNICAST

    def close(self) -> None:
        """Stop listening for changes."""
        self._changes.close()


def _ask(interface: str, size: int) -> bytes | None:
    """Ask the kernel for an interface's first address."""
    with contextlib.suppress(OSError):
        index = socket.if_nametoindex(interface)
        found = []
        for body in _dump(_RTM_GETADDR, _RTM_NEWADDR, _IFADDR.pack(_FAMILY[size], 0, 0, 0, 0)):
            _, _, flags, _, owner = _IFADDR.unpack_from(body)
            values = netlink.attributes(body, _IFADDR.size, len(body))
            if owner == index and not flags & _IFA_F_TENTATIVE:
                begin, end = values.get(_IFA_LOCAL) or values[_IFA_ADDRESS]
                found.append(ipaddress.ip_address(body[begin:end]))
        if found:
            return min(found, key=lambda address: address.is_link_local).packed
    return None


def _dump(ask: int, answer: int, header: bytes) -> Iterator[bytes]:
    """The bodies of a dump of this namespace's; OSError when the kernel refuses it."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as asking:
        asking.send(netlink.plain_message(ask, netlink.REQUEST | netlink.DUMP, header))
        while True:
            data = asking.recv(netlink.LARGEST_READ)
            for kind, _, at, end in netlink.messages(data):
                if kind == netlink.ERROR:
                    raise netlink.refused(netlink.error_of(data, at))
                if kind == netlink.DONE:
                    return
                if kind == answer:
                    yield data[at + netlink.HEADER_SIZE : end]


def _is_about_another_table(report: bytes) -> bool:
    """Does a report only tell of a route in another table than `local`?"""
    kind = int.from_bytes(report[4:6], sys.byteorder)
    return kind in _ROUTE_MESSAGES and report[_TABLE_AT] != _TABLE_LOCAL


def _local_routes(size: int) -> list[_Route]:
    """The kernel's table `local` for addresses of `size` bytes, the longest prefixes first."""
    found = []
    for body in _dump(_RTM_GETROUTE, _RTM_NEWROUTE, _RTMSG.pack(_FAMILY[size], 0, 0, 0, _TABLE_LOCAL, 0, 0, 0, 0)):
        _, length, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(body)
        if table == _TABLE_LOCAL:
            begin, end = netlink.attributes(body, _RTMSG.size, len(body)).get(_RTA_DST, (0, 0))
            bits, first = size * 8 - length, int.from_bytes(body[begin:end], "big")
            found.append((bits, first, _ROUTE_TYPES.get(kind, AddressType.UNICAST)))
    return [(first, first | (1 << bits) - 1, type_) for bits, first, type_ in sorted(found, key=lambda each: each[0])]


def local_port_range() -> tuple[int, int]:
    """The namespace's range of ephemeral ports, both ends included."""
    first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return int(first), int(last)
