"""The NFQUEUE: packets in, verdicts out.

Owns: the queue's socket, its limits, and how many packets are taken in one go. Must not know what is decided.

NetfilterQueue 1.1.0 reads into 4096 bytes, so that a packet above about 4000 bytes never reaches the callback and holds
its place in the queue for ever. Its `run_socket`, though, takes packets of any size from any object with a `recv`: our
`_Reader` reads as much as a netlink attribute can hold from the library's own descriptor, and the kernel is told to
copy as much. It also stops after a number of packets, so that a flood cannot keep the control socket waiting.

What is left of the trap: an attribute carries 65531 bytes, so the last bytes of the very largest packets cannot come.
`handle` sees them cut. They pass when nothing is to be rewritten, else they are dropped and counted: oversized. TCP is
kept from sending such segments by divert.py.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from netfilterqueue import NetfilterQueue

_MESSAGE: Final = 0x11000  # a message with 65531 bytes of packet and all other attributes
_SOCKET_BUFFER: Final = 8 << 20
_SO_RCVBUFFORCE: Final = 33

# linux/netfilter/nfnetlink_queue.h
_NFQNL_MSG_CONFIG: Final = 3 << 8 | 2
_NLM_F_REQUEST: Final = 1
_NFQA_CFG_PARAMS: Final = 2
_NFQA_CFG_MASK: Final = 4
_NFQA_CFG_FLAGS: Final = 5
_NFQNL_COPY_PACKET: Final = 2
_NFQA_CFG_F_FAIL_OPEN: Final = 1
LARGEST_COPY: Final = 0xFFFF - 4


class QueuedPacket(Protocol):
    """What NetfilterQueue hands to a callback; the parts that are used here."""

    hook: int
    indev: int
    outdev: int

    def get_payload(self) -> bytes:
        """The packet from its IP header on, at most as much of it as could be copied."""
        ...

    def set_payload(self, payload: bytes) -> None:
        """Replace the whole packet."""
        ...

    def get_mark(self) -> int:
        """The packet's mark."""
        ...

    def set_mark(self, mark: int) -> None:
        """Set the packet's mark."""
        ...

    def accept(self) -> None:
        """Let it go on."""
        ...

    def drop(self) -> None:
        """Drop it."""
        ...


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """The kernel's own counts for a queue: waiting now, dropped because the queue was full, because the socket was."""

    waiting: int
    dropped_full: int
    dropped_unread: int


class PacketQueue:
    """One bound NFQUEUE of the current network namespace."""

    def __init__(self, number: int, handle: Callable[[QueuedPacket], None], *, length: int, fail_open: bool) -> None:
        """Bind queue `number`, which holds `length` packets; `handle` must give each its verdict.

        `fail_open`: the kernel lets packets pass untouched when the queue is full, instead of dropping them.
        OSError when the queue cannot be bound: no CAP_NET_ADMIN, or somebody listens already.
        """
        self.number = number
        self._queue = NetfilterQueue()
        self._queue.bind(number, handle, max_len=length, sock_len=_SOCKET_BUFFER // 2)
        self._socket = socket.socket(fileno=os.dup(self._queue.get_fd()))
        self._socket.setblocking(False)
        _grow_buffer(self._socket)
        self._configure(fail_open)
        self._reader = _Reader(self._socket)

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    def drain(self, most: int) -> None:
        """Handle the packets that wait, `most` at the most."""
        self._reader.left = most
        self._queue.run_socket(self._reader)

    def close(self) -> None:
        """Unbind; the kernel drops what still waits."""
        self._queue.unbind()
        self._socket.close()

    def status(self) -> QueueStatus:
        """The kernel's counts of this queue."""
        for line in Path("/proc/thread-self/net/netfilter/nfnetlink_queue").read_text().splitlines():
            fields = [int(field) for field in line.split()]
            if fields[0] == self.number:
                return QueueStatus(waiting=fields[2], dropped_full=fields[5], dropped_unread=fields[6])
        raise ProcessLookupError(f"queue {self.number} is not bound any more")

    def _configure(self, fail_open: bool) -> None:
        """Ask for whole packets, and set the queue's flags: NetfilterQueue can do neither."""
        flags = _NFQA_CFG_F_FAIL_OPEN if fail_open else 0
        body = struct.pack("!BBH", socket.AF_UNSPEC, 0, self.number)
        body += _attribute(_NFQA_CFG_PARAMS, struct.pack("!IB", LARGEST_COPY, _NFQNL_COPY_PACKET))
        body += _attribute(_NFQA_CFG_FLAGS, struct.pack("!I", flags))
        body += _attribute(_NFQA_CFG_MASK, struct.pack("!I", _NFQA_CFG_F_FAIL_OPEN))
        header = struct.pack("=IHHII", 16 + len(body), _NFQNL_MSG_CONFIG, _NLM_F_REQUEST, 0, 0)
        self._socket.send(header + body)


class _Reader:
    """What `run_socket` reads from: the queue's socket, for so many messages."""

    __slots__ = ("_receive", "left")

    def __init__(self, source: socket.socket) -> None:
        self._receive = source.recv
        self.left = 0

    def recv(self, _library_size: int) -> bytes:
        """One message, whole. BlockingIOError ends the library's loop: nothing waits, or it is enough for now."""
        if not self.left:
            raise BlockingIOError(11, "enough for now")
        self.left -= 1
        return self._receive(_MESSAGE)


def _grow_buffer(target: socket.socket) -> None:
    """Give a socket a large receive buffer, past the system's limit where that is allowed."""
    try:
        target.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _SOCKET_BUFFER)
    except PermissionError:  # a user namespace may not
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)


def _attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)
