"""The pcapng file of a capture.

Owns: the blocks of a file that Wireshark, tshark and tcpdump open: one interface block a capture point, nanosecond
timestamps, direction and unfinished checksums as packet flags, drops as interface statistics, comments on packets.

Why not a library: Scapy's writer has microseconds, no statistics and no checksum flag; python-pcapng builds an object a
block, too slow to stream 50,000 packets/s.

Frames are written as they were captured. One whose checksum was left to the device has flag bit 9, 'checksum not
ready', set: tools that ignore it, tcpdump among them, call its checksum incorrect, as in any capture at the sender.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from struct import Struct, pack, unpack
from types import TracebackType
from typing import BinaryIO, Final, Self

from testbed.packet_ring import Captured

_SECTION: Final = 0x0A0D0D0A
_INTERFACE: Final = 1
_STATISTICS: Final = 5
_PACKET: Final = 6

_BYTE_ORDER: Final = 0x1A2B3C4D
_LINK_ETHERNET: Final = 1
_SNAP_LENGTH: Final = 1 << 18

_LONGEST_OPTION: Final = 0xFFFF
_END: Final = pack("<HH", 0, 0)
_COMMENT: Final = 1
_INTERFACE_NAME: Final = 2
_TIME_RESOLUTION: Final = 9
_RECEIVED: Final = 4
_DROPPED: Final = 5

_INBOUND: Final = 1
_OUTBOUND: Final = 2
_CHECKSUM_NOT_READY: Final = 1 << 9

_FRAME: Final = Struct("<7I")  # type, length, interface, time high, time low, captured, on the wire
# By the number of bytes that fill up to four: those, the flags option, the end of options, length again.
_TAILS: Final = tuple(Struct(f"<{padding}xHHIHHI") for padding in range(4))


class PcapngWriter:
    """Writes frames as they come; it is a whole file at any time."""

    def __init__(self, path: Path, interfaces: Sequence[str]) -> None:
        """Make the file, with one interface block for each name. OSError when it cannot be made."""
        self._file: BinaryIO = path.open("wb")
        self._file.write(_block(_SECTION, pack("<IHHq", _BYTE_ORDER, 1, 0, -1)))
        for name in interfaces:
            options = _option(_INTERFACE_NAME, name.encode()) + _option(_TIME_RESOLUTION, b"\x09") + _END
            self._file.write(_block(_INTERFACE, pack("<HHI", _LINK_ETHERNET, 0, _SNAP_LENGTH) + options))

    def add(self, frames: Iterable[Captured]) -> None:
        """Append frames; the numbers of their points are the interfaces'. Readers see them at once.

        One write for all: the bytes are copied once on their way to the kernel.
        """
        parts: list[bytes] = []
        for time_ns, interface, data, outgoing, half_checksum in frames:
            size = len(data)
            tail = _TAILS[-size % 4]
            length = _FRAME.size + size + tail.size
            flags = (_OUTBOUND if outgoing else _INBOUND) | (_CHECKSUM_NOT_READY if half_checksum else 0)
            parts += (
                _FRAME.pack(_PACKET, length, interface, time_ns >> 32, time_ns & 0xFFFFFFFF, size, size),
                data,
                tail.pack(2, 4, flags, 0, 0, length),
            )
        self._file.write(b"".join(parts))
        self._file.flush()

    def add_statistics(self, interface: int, time_ns: int, received: int, dropped: int) -> None:
        """Append how many frames reached the interface's capture, and how many of them it lost."""
        options = _option(_RECEIVED, pack("<Q", received)) + _option(_DROPPED, pack("<Q", dropped)) + _END
        self._file.write(_block(_STATISTICS, pack("<III", interface, time_ns >> 32, time_ns & 0xFFFFFFFF) + options))
        self._file.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def add_comments(path: Path, comments: Mapping[int, Sequence[str]]) -> None:
    """Put comments on the packets with these numbers, counted from 1; the file is replaced whole or not at all."""
    draft = path.with_name(f".{path.name}.commented")
    try:
        with path.open("rb") as source, draft.open("wb") as target:
            number = 0
            for kind, body in _blocks(source):
                number += kind == _PACKET
                if kind == _PACKET and number in comments:
                    options = b"".join(_option(_COMMENT, _fitting(text)) for text in comments[number])
                    size = unpack("<I", body[12:16])[0]
                    behind_data = 20 + size + -size % 4
                    body = body[:behind_data] + options + body[behind_data:]
                target.write(_block(kind, body))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _blocks(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The blocks of a file of ours, type and body; one that was cut off by a crash ends it."""
    while len(head := file.read(8)) == 8:
        kind, length = unpack("<II", head)
        rest = file.read(length - 8)
        if len(rest) < length - 8:
            return
        yield kind, rest[:-4]


def _block(kind: int, body: bytes) -> bytes:
    length = len(body) + 12
    return pack("<II", kind, length) + body + pack("<I", length)


def _fitting(text: str) -> bytes:
    """A text of as many bytes as an option can hold, whole characters."""
    return text.encode()[:_LONGEST_OPTION].decode(errors="ignore").encode()


def _option(code: int, value: bytes) -> bytes:
    return pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)
