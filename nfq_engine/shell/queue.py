"""The NFQUEUE: packets in, verdicts out.

Owns: the queue's sockets and limits. Must not know what is decided.

NetfilterQueue 1.1.0 reads into 4096 bytes: a packet above about 4000 bytes never reaches the callback and holds its
place in the queue for ever, unless the kernel is told to copy no more than fits; then it arrives cut. Its other loop,
`run_socket`, takes packets of any size from any object with a `recv`, but a third fewer of them. So there are two
queues. Everything comes to the first, by the fast loop; a packet that arrives cut is sent on to the second (NF_QUEUE is
a verdict like any other) and read from there whole, before the next one is looked at: no packet overtakes another.

The library does not hand over whose socket sent a packet, either. The kernel can say it in the message, as it was when
the packet was queued; so where rules ask for it, the first queue is read by `run_socket` as well.

What is left of the trap: a netlink attribute carries 65531 bytes, so the last bytes of the very largest packets cannot
come. `handle` sees them cut. They pass when nothing is to be rewritten, else they are dropped and counted: oversized.
TCP is kept from sending such segments by divert.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from netfilterqueue import NetfilterQueue

from nfq_engine.core.rule_values import Owner
from nfq_engine.shell.identifiers import IdentifierMap

# Bytes that the library copies at the most: a packet of this size may be longer. 160 bytes of headers and attributes
# may stand before it, for one that is forwarded and carries a mark; a message that does not fit is never answered.
CUT: Final = 4096 - 192
_ATTRIBUTES: Final = 0x1000  # more than all that stands before the packet in a message
_MESSAGE: Final = 0x11000  # a message with 65531 bytes of packet and all other attributes
_SOCKET_BUFFER: Final = 8 << 20
_FIRST_BUFFER: Final = 64 << 10  # until it grows; the library warns of what the system's limit does not allow
_SO_RCVBUFFORCE: Final = 33

# linux/netfilter/nfnetlink_queue.h
_NFQNL_MSG_VERDICT: Final = 3 << 8 | 1
_NFQNL_MSG_CONFIG: Final = 3 << 8 | 2
_NLM_F_REQUEST: Final = 1
_NFQA_VERDICT_HDR: Final = 2
_NF_QUEUE: Final = 3
_NFQA_CFG_PARAMS: Final = 2
_NFQA_CFG_MASK: Final = 4
_NFQA_CFG_FLAGS: Final = 5
_NFQNL_COPY_PACKET: Final = 2
_NFQA_CFG_F_FAIL_OPEN: Final = 1
_NFQA_CFG_F_UID_GID: Final = 1 << 3
_NFQA_PAYLOAD, _NFQA_UID, _NFQA_GID = 10, 16, 17
_ATTRIBUTES_AT: Final = 16 + 4  # behind the netlink header and struct nfgenmsg
_ATTRIBUTE: Final = struct.Struct("=HH")
_NUMBER: Final = struct.Struct("!I")
LARGEST_COPY: Final = 0xFFFF - 4


class QueuedPacket(Protocol):
    """What NetfilterQueue hands to a callback; the parts that are used here."""

    id: int
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
    """The kernel's own counts: packets waiting now, dropped because a queue was full, because a socket was."""

    waiting: int
    dropped_full: int
    dropped_unread: int


class SliceOver(Exception):  # noqa: N818 - no error: the handler's way to end a `drain` that has taken long enough
    """Raised by the handler, after a packet's verdict, to leave the rest for later."""


class _Reader:
    """What `run_socket` reads from: whole messages, until none waits (BlockingIOError ends the library's loop)."""

    def __init__(self, source: socket.socket, size: int) -> None:
        self._receive = source.recv
        self._size = size
        self.message = b""  # the last that was read

    def recv(self, _library_size: int) -> bytes:
        """One message, of as many bytes as there may be in this queue."""
        self.message = self._receive(self._size)
        return self.message


def _owner_in(message: bytes) -> tuple[int, int] | None:
    """User and group that the kernel names in a queue message, which the library keeps for itself."""
    numbers: dict[int, int] = {}
    at = _ATTRIBUTES_AT
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if kind == _NFQA_PAYLOAD or length < _ATTRIBUTE.size:
            break
        if kind in (_NFQA_UID, _NFQA_GID):
            (numbers[kind],) = _NUMBER.unpack_from(message, at + _ATTRIBUTE.size)
        at += length + 3 & ~3
    if len(numbers) < 2:
        return None
    return numbers[_NFQA_UID], numbers[_NFQA_GID]


class PacketQueue:
    """The two bound NFQUEUEs of the current network namespace: `number`, which is diverted to, and the next one."""

    def __init__(self, number: int, handle: Callable[[QueuedPacket], None], *, length: int, fail_open: bool) -> None:
        """Bind the queues, which hold `length` packets each; `handle` must give each packet its verdict.

        `fail_open`: the kernel lets packets pass untouched when a queue is full, instead of dropping them.
        OSError when a queue cannot be bound: no CAP_NET_ADMIN, or somebody listens already.
        """
        self.number = number
        self._first = _BoundQueue(number, handle, CUT, length, fail_open=fail_open)
        try:
            self._whole = _BoundQueue(number + 1, handle, LARGEST_COPY, length, fail_open=fail_open)
        except OSError:
            self._first.close()
            raise
        self._whole_reader = _Reader(self._whole.socket, _MESSAGE)
        self._first_reader = _Reader(self._first.socket, CUT + _ATTRIBUTES)
        self._names_owners = False
        self._users, self._groups = (
            IdentifierMap.read(Path(f"/proc/self/{each}_map").read_text()) for each in ("uid", "gid")
        )

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._first.socket.fileno()

    def drain(self) -> None:
        """Handle the packets that wait, until there are none or the handler raises SliceOver."""
        with contextlib.suppress(SliceOver):
            if self._names_owners:
                self._first.library.run_socket(self._first_reader)
            else:
                self._first.library.run(block=False)

    def name_owners(self) -> None:
        """From now on, know whose sockets the packets come from, for good: what is queued must be read that way."""
        if not self._names_owners:
            self._names_owners = True
            self._first.set_flag(_NFQA_CFG_F_UID_GID, is_on=True)

    def owner(self) -> Owner | None:
        """Of the socket that sent the packet which is being handled; None: no socket of this host did, or no name."""
        numbers = _owner_in(self._first_reader.message)
        return Owner(self._users.inside(numbers[0]), self._groups.inside(numbers[1])) if numbers else None

    def handle_whole(self, packet: QueuedPacket) -> None:
        """Have a packet that arrived cut, of the first queue, handled again: whole, and now."""
        verdict = _attribute(_NFQA_VERDICT_HDR, struct.pack("!II", _NF_QUEUE | (self.number + 1) << 16, packet.id))
        self._first.send(_NFQNL_MSG_VERDICT, verdict)
        self._whole.library.run_socket(self._whole_reader)

    def close(self) -> None:
        """Unbind; the kernel drops what still waits."""
        self._first.close()
        self._whole.close()

    def status(self) -> QueueStatus:
        """The kernel's counts of both queues."""
        numbers = (self.number, self.number + 1)
        lines = Path("/proc/thread-self/net/netfilter/nfnetlink_queue").read_text().splitlines()
        rows = [fields for line in lines if (fields := [int(field) for field in line.split()])[0] in numbers]
        waiting, full, unread = (sum(row[column] for row in rows) for column in (2, 5, 6))
        return QueueStatus(waiting=waiting, dropped_full=full, dropped_unread=unread)


class _BoundQueue:
    """One queue of the library, and a socket on its descriptor for what the library cannot do."""

    def __init__(
        self, number: int, handle: Callable[[QueuedPacket], None], copied: int, length: int, *, fail_open: bool
    ) -> None:
        self._number = number
        self.library = NetfilterQueue()
        self.library.bind(number, handle, max_len=length, sock_len=_FIRST_BUFFER)
        self.socket = socket.socket(fileno=os.dup(self.library.get_fd()))
        self.socket.setblocking(False)
        _grow_buffer(self.socket)
        self.send(_NFQNL_MSG_CONFIG, _attribute(_NFQA_CFG_PARAMS, struct.pack("!IB", copied, _NFQNL_COPY_PACKET)))
        self.set_flag(_NFQA_CFG_F_FAIL_OPEN, is_on=fail_open)

    def set_flag(self, flag: int, *, is_on: bool) -> None:
        """Set or clear one of the queue's flags."""
        self.send(
            _NFQNL_MSG_CONFIG,
            _attribute(_NFQA_CFG_FLAGS, struct.pack("!I", flag if is_on else 0))
            + _attribute(_NFQA_CFG_MASK, struct.pack("!I", flag)),
        )

    def send(self, kind: int, attributes: bytes) -> None:
        """Send one message about the queue."""
        body = struct.pack("!BBH", socket.AF_UNSPEC, 0, self._number) + attributes
        self.socket.send(struct.pack("=IHHII", 16 + len(body), kind, _NLM_F_REQUEST, 0, 0) + body)

    def close(self) -> None:
        self.library.unbind()
        self.socket.close()


def _grow_buffer(target: socket.socket) -> None:
    """Give a socket a large receive buffer, past the system's limit where that is allowed."""
    try:
        target.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _SOCKET_BUFFER)
    except PermissionError:  # a user namespace may not
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)


def _attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)
