"""IP_TPROXY: the socket option's numbers and the layout of its argument (tproxy.md section 4).

Owns: bytes <-> operation, address, number. Must not know what an operation does (sockopt.py).

The argument is `op` (u32, native order), then `faddr` (4 or 16 bytes, network order) and `fport` (u16, network order),
or a u32 in native order; padded to a multiple of four: 12 bytes for IPv4, as the original had it, 24 for IPv6.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

from nfq_engine.core.packet import Endpoint

IP_TPROXY: Final = 11274
IP_RECVORIGADDRS: Final = 11273

SHORTEST: Final = 8  # bytes of an argument

_OPERATION: Final = Struct("=I")
_NUMBER: Final = Struct("=II")
_ADDRESS_AT: Final = 4
_IPV6_ARGUMENT: Final = 24
_MAPPED: Final = bytes(10) + b"\xff\xff"  # what stands before an IPv4 address in IPv6 (RFC 4291 section 2.5.5.2)


class Operation(IntEnum):
    """The `op` of the argument."""

    VERSION = 0
    ASSIGN = 1
    UNASSIGN = 2
    QUERY = 3
    FLAGS = 4
    ALLOC = 5
    CONNECT = 6


def pack_address(operation: Operation, endpoint: Endpoint) -> bytes:
    """The argument of ASSIGN and CONNECT, and QUERY's reply: op, address, port; 12 bytes for IPv4, 24 for IPv6."""
    return b"".join(
        (_OPERATION.pack(operation), endpoint.address, endpoint.port.to_bytes(2, "big"), b"\0\0"),
    )


def pack_number(operation: Operation, number: int = 0) -> bytes:
    """The argument and the reply of VERSION and FLAGS; the argument of what has none."""
    return _NUMBER.pack(operation, number) + b"\0" * 4


def unpack_operation(argument: bytes) -> int:
    """The op, known or not."""
    return int(_OPERATION.unpack_from(argument)[0])


def unpack_number(argument: bytes) -> int:
    """The u32 behind the op."""
    return int(_NUMBER.unpack_from(argument)[1])


def unpack_address(argument: bytes, size: int) -> Endpoint | None:
    """The address and the port behind the op, for a socket whose own address has `size` bytes (4 or 16).

    None when the argument is too short or the address is of the other family. An IPv4 address may come mapped into
    IPv6, as programs give it whose IPv6 socket is bound to one.
    """
    width = len(_MAPPED) + 4 if len(argument) == _IPV6_ARGUMENT else size
    end = _ADDRESS_AT + width
    if len(argument) < end + 2:
        return None
    address = argument[_ADDRESS_AT:end]
    if width > size and (address.startswith(_MAPPED) or not any(address)):
        address = address[-size:]
    if len(address) != size or address.startswith(_MAPPED):
        return None
    return Endpoint(address, int.from_bytes(argument[end : end + 2], "big"))
