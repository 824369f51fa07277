"""What a program hands to recvmsg, as it lies in the program's memory: struct msghdr, and the control messages.

Owns: reading and writing it as a kernel does. Must not know sockets. Place in the path: supervisor_receive.py does the
call in between.

Layouts are those of 64-bit programs; calls of 32-bit ones are not handed over.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from struct import Struct
from typing import Final

from nfq_engine.shell.supervisor_caller import Caller

LARGEST: Final = 65536  # bytes; no datagram is longer
MANY_SIZE: Final = 64  # bytes of a struct mmsghdr, of which recvmmsg gets an array

_MOST_VECTORS: Final = 1024  # UIO_MAXIOV
_LENGTH_AT: Final = 56  # in struct mmsghdr, behind its struct msghdr
_MESSAGE: Final = Struct("=QI4xQQQQi4x")  # struct msghdr
_VECTOR: Final = Struct("=QQ")  # struct iovec
_CONTROL: Final = Struct("=Qii")  # struct cmsghdr
_NAME_SIZE_AT: Final = 8
_CONTROL_SIZE_AT: Final = 40
_FLAGS_AT: Final = 48
_U32: Final = Struct("=I")
_U64: Final = Struct("=Q")
_INT_MAX: Final = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class Message:
    """The program's struct msghdr: where it is, and where it wants what."""

    at: int
    name_at: int
    name_size: int
    vectors: tuple[tuple[int, int], ...]
    control_at: int
    control_size: int

    @property
    def room(self) -> int:
        """Bytes of data that it has room for, as far as they matter."""
        return min(sum(size for _, size in self.vectors), LARGEST)


@dataclass(frozen=True, slots=True)
class Control:
    """A control message; `kind` is level and type."""

    kind: tuple[int, int]
    data: bytes


def read_message(caller: Caller, at: int) -> Message:
    """The program's struct msghdr; OSError as a kernel has it."""
    name_at, name_size, vectors_at, vector_count, control_at, control_size, _ = _MESSAGE.unpack(
        caller.read(at, _MESSAGE.size)
    )
    if vector_count > _MOST_VECTORS:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    if name_at and name_size > _INT_MAX:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    vectors = tuple(_VECTOR.iter_unpack(caller.read(vectors_at, vector_count * _VECTOR.size)))
    return Message(at, name_at, name_size, vectors, control_at, control_size if control_at else 0)


def write_message(caller: Caller, message: Message, data: memoryview, name: bytes, control: bytes, flags: int) -> None:
    """Give the program what its struct msghdr asks for; OSError (EFAULT) when it has no such memory."""
    for address, size in message.vectors:
        if not data:
            break
        caller.write(address, data[:size])
        data = data[size:]
    if message.name_at:
        caller.write(message.name_at, name[: message.name_size])
        caller.write(message.at + _NAME_SIZE_AT, _U32.pack(len(name)))
    caller.write(message.control_at, control)
    caller.write(message.at + _CONTROL_SIZE_AT, _U64.pack(len(control)))
    caller.write(message.at + _FLAGS_AT, _U32.pack(flags))


def write_length(caller: Caller, message: Message, length: int) -> None:
    """Tell a message of recvmmsg how long its datagram is; OSError (EFAULT)."""
    caller.write(message.at + _LENGTH_AT, _U32.pack(length))


def read_controls(data: bytes) -> list[Control]:
    """The kernel's control messages."""
    controls, at = [], 0
    while at + _CONTROL.size <= len(data):
        length, level, kind = _CONTROL.unpack_from(data, at)
        controls.append(Control((level, kind), data[at + _CONTROL.size : at + length]))
        at += _space(max(length, _CONTROL.size))
    return controls


def write_controls(controls: list[Control], room: int) -> tuple[bytes, int]:
    """Control messages, and what they add to the flags; cut as the kernel's put_cmsg cuts what has no room."""
    written, cut = b"", 0
    for one in controls:
        left = room - len(written)
        if left < _CONTROL.size:
            cut = socket.MSG_CTRUNC
            continue
        length = _CONTROL.size + len(one.data)
        if length > left:
            length, cut = left, socket.MSG_CTRUNC
        whole = _CONTROL.pack(length, *one.kind) + one.data
        written += whole.ljust(_space(len(whole)), b"\0")[:left]
    return written, cut


def _space(length: int) -> int:
    """CMSG_ALIGN."""
    return length + 7 & ~7
