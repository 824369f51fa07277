"""This host's interfaces: names by index, and first addresses.

Owns: a cache of both, thrown away whenever the kernel reports a change. Must not know what they are for.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute

_RTMGRP_LINK: Final = 0x1
_RTMGRP_IPV4_IFADDR: Final = 0x10
_RTMGRP_IPV6_IFADDR: Final = 0x100
_CHANGES: Final = _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR

_FAMILY: Final = {4: socket.AF_INET, 16: socket.AF_INET6}
_IFA_F_TENTATIVE: Final = 0x40
_ALL: Final = 0x10000


class HostInterfaces:
    """The interfaces of the network namespace that this was made in; a `core.surroundings.Interfaces`."""

    def __init__(self) -> None:
        self._changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._changes.setblocking(False)
        self._changes.bind((0, _CHANGES))
        self._names: dict[int, str] = {0: ""}
        self._addresses: dict[tuple[str, int], bytes | None] = {}

    def fileno(self) -> int:
        """The descriptor that becomes readable when something changed."""
        return self._changes.fileno()

    def forget(self) -> None:
        """Read the reported changes and drop what is cached; a report that was lost (ENOBUFS) is a change as well."""
        while True:
            try:
                self._changes.recv(_ALL)
            except BlockingIOError:
                break
            except OSError:
                continue
        self._names = {0: ""}
        self._addresses.clear()

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


def local_port_range() -> tuple[int, int]:
    """The namespace's range of ephemeral ports, both ends included."""
    first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return int(first), int(last)
