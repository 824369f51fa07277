"""Netlink messages, those of the netfilter subsystems above all, as bytes.

Owns: headers, attributes, and how both are taken apart. Must not know what a message means (`ctnetlink`, `nftables`).
Native byte order in the headers, network order in netfilter's numbers (linux/netlink.h, linux/netfilter/nfnetlink.h).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final

NETLINK_NETFILTER: Final = 12

# linux/socket.h, linux/netlink.h
_SOL_NETLINK: Final = 270
_ADD_MEMBERSHIP: Final = 1
_DROP_MEMBERSHIP: Final = 2

REQUEST: Final = 0x1
ACK: Final = 0x4
ECHO: Final = 0x8
DUMP: Final = 0x300
CREATE: Final = 0x400
APPEND: Final = 0x800

ERROR: Final = 2
DONE: Final = 3
LARGEST_READ: Final = 0x10000

_HEADER: Final = struct.Struct("=IHHII")
HEADER_SIZE: Final = _HEADER.size
_ATTRIBUTE: Final = struct.Struct("=HH")
_ERROR: Final = struct.Struct("=i")
_NESTED: Final = 0x8000
_KIND: Final = 0x3FFF
BODY_AT: Final = _HEADER.size + 4  # behind struct nfgenmsg


def open_socket(groups: int = 0) -> socket.socket:
    """A netfilter netlink socket of the current network namespace, bound, a member of these multicast groups."""
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    opened.bind((0, groups))
    return opened


def listen(opened: socket.socket, groups: Iterable[int], *, wanted: bool) -> None:
    """Make a socket a member of multicast groups, or let it leave them; what has come to it stays."""
    for group in groups:
        opened.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP if wanted else _DROP_MEMBERSHIP, group)


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    """One attribute made of attributes."""
    return attribute(kind | _NESTED, b"".join(inner))


def message(kind: int, flags: int, family: int, resource: int, body: bytes = b"", sequence: int = 0) -> bytes:
    """One message; `kind` has the subsystem in its upper byte."""
    return plain_message(kind, flags, struct.pack("!BBH", family, 0, resource) + body, sequence)


def plain_message(kind: int, flags: int, content: bytes, sequence: int = 0) -> bytes:
    """One message of any netlink family."""
    return _HEADER.pack(HEADER_SIZE + len(content), kind, flags, sequence, 0) + content


def messages(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """The messages of a datagram: kind, sequence number, where the message begins, where it ends."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        yield kind, sequence, at, min(at + length, len(data))
        at += length + 3 & ~3


def error_of(data: bytes, at: int) -> int:
    """The errno of an error message that begins at an offset; 0: it is an acknowledgement."""
    return -int(_ERROR.unpack_from(data, at + _HEADER.size)[0])


def attributes(data: bytes, at: int, end: int) -> dict[int, tuple[int, int]]:
    """The attributes between two offsets: kind to where its value begins and ends."""
    return dict(attribute_list(data, at, end))


def attribute_list(data: bytes, at: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """The attributes between two offsets, in order, which may be of one kind: kind, where its value begins and ends."""
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _KIND, (at + _ATTRIBUTE.size, min(at + length, end))
        at += length + 3 & ~3


def refused(number: int) -> OSError:
    """The error for an errno that the kernel answered with."""
    return OSError(number, os.strerror(number))
