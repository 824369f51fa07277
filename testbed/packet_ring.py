"""The kernel's side of a capture: one AF_PACKET socket with a ring of memory that the kernel writes frames into.

Owns: the ring's layout (TPACKET_V3, packet_mmap in the kernel's documentation) and the counters of the socket. Must not
know capture points, files or frames as values.

Why a ring and not recvmsg: its size needs no privilege beyond opening the socket (a socket buffer of 16 MiB needs
CAP_NET_ADMIN outside of any user namespace), and a frame costs no system call, only one copy. The price: frames become
readable when their block is closed, some milliseconds later.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
from dataclasses import dataclass
from struct import Struct, pack, pack_into, unpack
from typing import Final

_SOL_PACKET: Final = 263
_PACKET_RX_RING: Final = 5
_PACKET_STATISTICS: Final = 6
_PACKET_VERSION: Final = 10
_TPACKET_V3: Final = 2
_ETH_P_ALL: Final = 3

# Holds the largest segment that a device is handed, 64 KiB, with room. No larger: a block is closed after a time,
# however little is in it, so it is their number that tells how long the reader may be kept from reading.
_BLOCK: Final = 1 << 17
_FRAME: Final = 1 << 11  # V3 does not cut blocks into frames of this size; the kernel only checks that it divides them

# After this time a block is closed though it is not full. Kernels before 6.18 round it up, and may take it twice.
_RETIRE_MS: Final = 4

_STATUS_USER: Final = 1 << 0
_STATUS_HALF_CHECKSUM: Final = 1 << 3
_STATUS_VLAN: Final = 1 << 4
_STATUS_VLAN_TYPE: Final = 1 << 6

_BLOCK_HEADER: Final = Struct("=8x4I")  # status, frames, offset of the first, length
_FRAME_HEADER: Final = Struct("=6IHH4xIH10x10xB9x")  # tpacket3_hdr, then sockaddr_ll's packet type
_OUTGOING: Final = 4  # PACKET_OUTGOING
_ETHERNET: Final = 1
_LOOPBACK: Final = 772

_libc: Final = ctypes.CDLL(None, use_errno=True)

# Nanoseconds since the epoch, number of the capture point, bytes from the Ethernet header on, is it outgoing, is its
# checksum half done. A plain tuple: one is made for each frame, by the thread that must keep up with the kernel.
Captured = tuple[int, int, bytes, bool, bool]


@dataclass(frozen=True, slots=True)
class RingCounts:
    """What came to the socket since it was opened, and how much of that found no room."""

    arrived: int
    dropped: int


class PacketRing:
    """An armed capture of one interface: every frame, both directions, from the moment it exists."""

    def __init__(self, sock: socket.socket, interface: str, size: int) -> None:
        """Take over an AF_PACKET socket of protocol 0, which hears nothing yet, and arm it.

        `size`: bytes of memory for the ring. OSError: no such interface (ENODEV), the interface is down (ENETDOWN), it
        carries no Ethernet frames (EPROTONOSUPPORT), no memory (ENOMEM).
        """
        self._socket = sock
        self._blocks = max(2, size // _BLOCK)
        self._next = 0
        self._arrived = self._dropped = 0
        sock.setsockopt(_SOL_PACKET, _PACKET_VERSION, pack("I", _TPACKET_V3))
        total = self._blocks * _BLOCK
        _set_option(sock, _PACKET_RX_RING, pack("7I", _BLOCK, self._blocks, _FRAME, total // _FRAME, _RETIRE_MS, 0, 0))
        self._memory = mmap.mmap(sock.fileno(), total)
        try:
            sock.bind((interface, _ETH_P_ALL))
            if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error))
            kind: int = sock.getsockname()[3]
            if kind not in (_ETHERNET, _LOOPBACK):
                raise OSError(errno.EPROTONOSUPPORT, f"frames of hardware type {kind} are no Ethernet frames")
        except OSError:
            self._memory.close()
            raise
        # A packet over loopback is sent and received at the same place: each is seen once, as received.
        self._is_loopback = kind == _LOOPBACK

    def fileno(self) -> int:
        """Readable when a block is."""
        return self._socket.fileno()

    @property
    def inode(self) -> int:
        """What the socket is listed under in /proc/net/packet."""
        return os.fstat(self._socket.fileno()).st_ino

    @property
    def is_loopback(self) -> bool:
        """Does every packet pass twice, once in each direction?"""
        return self._is_loopback

    def take(self, point: int) -> list[Captured]:
        """Copy out the frames of every closed block and give it back to the kernel; `point` goes into each."""
        taken: list[Captured] = []
        for _ in range(self._blocks):  # no more: other rings are waiting, too
            start = self._next * _BLOCK
            status, count, offset, _ = _BLOCK_HEADER.unpack_from(self._memory, start)
            if not status & _STATUS_USER:
                break
            _copy_frames(self._memory, start + offset, count, point, taken)
            pack_into("=I", self._memory, start + 8, 0)
            self._next = (self._next + 1) % self._blocks
        return taken

    def counts(self) -> RingCounts:
        """What came so far. One caller at a time: the kernel's counters start anew with every look."""
        arrived, dropped, _ = unpack("3I", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 12))
        self._arrived += arrived
        self._dropped += dropped
        return RingCounts(self._arrived, self._dropped)

    def clear_error(self) -> None:
        """Take note that the interface went down; when it comes up, the kernel goes on capturing by itself."""
        self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def close(self) -> None:
        """Give socket and memory back."""
        self._memory.close()
        self._socket.close()


def _set_option(sock: socket.socket, option: int, value: bytes) -> None:
    """setsockopt that lets other threads run, as Python's own does not: making a ring waits 10 ms for all CPUs."""
    if _libc.setsockopt(sock.fileno(), _SOL_PACKET, option, value, len(value)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _copy_frames(memory: mmap.mmap, offset: int, count: int, point: int, taken: list[Captured]) -> None:
    """Append the `count` frames of a block, the first of which begins at `offset`."""
    for _ in range(count):
        step, seconds, nanoseconds, size, _, status, start, _, tag, tag_type, kind = _FRAME_HEADER.unpack_from(
            memory, offset
        )
        data = memory[offset + start : offset + start + size]
        if status & _STATUS_VLAN:
            # The kernel takes the tag off what it receives.
            tag_type = tag_type if status & _STATUS_VLAN_TYPE else 0x8100
            data = b"".join((data[:12], pack("!HH", tag_type, tag), data[12:]))
        time_ns = seconds * 1_000_000_000 + nanoseconds
        taken.append((time_ns, point, data, kind == _OUTGOING, bool(status & _STATUS_HALF_CHECKSUM)))
        offset += step
