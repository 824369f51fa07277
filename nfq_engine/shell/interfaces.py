"""This host's interfaces and addresses: names by index, first addresses, and what an address is to this host.

Owns: a cache of all, thrown away whenever the kernel reports a change. Must not know what they are for.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute

from nfq_engine.core.surroundings import AddressType

_RTMGRP_LINK: Final = 0x1
_RTMGRP_IPV4_IFADDR: Final = 0x10
_RTMGRP_IPV6_IFADDR: Final = 0x100
_RTMGRP_IPV4_ROUTE: Final = 0x40
_RTMGRP_IPV6_ROUTE: Final = 0x400
_CHANGES: Final = _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR | _RTMGRP_IPV4_ROUTE | _RTMGRP_IPV6_ROUTE

# linux/rtnetlink.h
_ROUTE_MESSAGES: Final = (24, 25)  # RTM_NEWROUTE, RTM_DELROUTE
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
        with IPRoute() as route:
            found = [
                ipaddress.ip_address(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
                for message in route.get_addr(index=index, family=_FAMILY[size])
                if not message["flags"] & _IFA_F_TENTATIVE
            ]
        if found:
            return min(found, key=lambda address: address.is_link_local).packed
    return None


def _is_about_another_table(report: bytes) -> bool:
    """Does a report only tell of a route in another table than `local`?"""
    kind = int.from_bytes(report[4:6], sys.byteorder)
    return kind in _ROUTE_MESSAGES and report[_TABLE_AT] != _TABLE_LOCAL


def _local_routes(size: int) -> list[_Route]:
    """The kernel's table `local` for addresses of `size` bytes, the longest prefixes first."""
    found = []
    with IPRoute() as route:
        for message in route.get_routes(family=_FAMILY[size], table=_TABLE_LOCAL):
            bits = size * 8 - message["dst_len"]
            destination = message.get_attr("RTA_DST")
            first = int(ipaddress.ip_address(destination)) if destination else 0
            found.append((bits, first, _ROUTE_TYPES.get(message["type"], AddressType.UNICAST)))
    return [(first, first | (1 << bits) - 1, type_) for bits, first, type_ in sorted(found, key=lambda each: each[0])]


def local_port_range() -> tuple[int, int]:
    """The namespace's range of ephemeral ports, both ends included."""
    first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return int(first), int(last)
