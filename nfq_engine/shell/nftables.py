"""nft: whole tables as text by the command, set elements and the one rule that it cannot say by netlink.

Owns: how nf_tables is talked to (linux/netfilter/nf_tables.h, nf_tables_compat.h, xt_NFQUEUE.h). Must not know what the
table is for. An element by netlink takes some 10 µs, by the command some 5 ms.
"""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

from nfq_engine.shell.netlink import (
    ACK,
    APPEND,
    BODY_AT,
    CREATE,
    DONE,
    DUMP,
    ECHO,
    ERROR,
    LARGEST_READ,
    REQUEST,
    attribute,
    attribute_list,
    attributes,
    error_of,
    message,
    messages,
    nested,
    open_socket,
    refused,
)

_SUBSYSTEM: Final = 10
_BATCH_BEGIN: Final = message(16, REQUEST, socket.AF_UNSPEC, _SUBSYSTEM)
_BATCH_END: Final = message(17, REQUEST, socket.AF_UNSPEC, _SUBSYSTEM)
_NEW_RULE: Final = _SUBSYSTEM << 8 | 6
_DELETE_RULE: Final = _SUBSYSTEM << 8 | 8
_NEW_ELEMENTS: Final = _SUBSYSTEM << 8 | 12
_GET_ELEMENTS: Final = _SUBSYSTEM << 8 | 13
_DELETE_ELEMENTS: Final = _SUBSYSTEM << 8 | 14
# NFTA_SET_ELEM_LIST_SET and _ELEMENTS; NFTA_SET_ELEM_KEY and _EXPR; NFTA_DATA_VALUE; NFTA_EXPR_DATA; NFTA_COUNTER_*
_NAME, _ELEMENTS = 2, 3
_KEY, _EXPRESSION = 1, 7
_VALUE = 1
_EXPRESSION_DATA = 2
_BYTES, _PACKETS = 1, 2
_INET: Final = 1  # NFPROTO_INET
_NFQUEUE_REVISION: Final = 3
_NFQUEUE_BYPASS: Final = 1

# An attribute has at most 65535 bytes, and an element at most some 90.
_ELEMENTS_OF_A_MESSAGE: Final = 512
# A transaction is one datagram. With the system's own limits, 212992 bytes, the elements of a full map would not fit.
_SOCKET_BUFFER: Final = 8 << 20
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33

Element = tuple[bytes, bytes]  # key, and data (empty in a set); each part padded to four bytes


@dataclass(frozen=True, slots=True)
class ElementCounts:
    """What the counter of a set's element has counted."""

    packets: int = 0
    bytes: int = 0


class NftError(Exception):
    """nft refused something, or is not there; the message says what."""


def run(text: str) -> None:
    """Run one nft transaction; NftError with what nft complained of."""
    try:
        result = subprocess.run(["nft", "-f", "-"], input=text, text=True, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise NftError("the command nft is missing: install the package nftables") from error
    if result.returncode:
        raise NftError(result.stderr.strip() or f"exit status {result.returncode}")


class NftSocket:
    """Transactions on one table of this network namespace."""

    def __init__(self, table: str) -> None:
        self._table = attribute(1, table.encode() + b"\0")
        self._socket = open_socket()
        self._socket.setblocking(False)
        _grow_buffers(self._socket)
        self._sequence = 1

    def change(
        self, added: Mapping[str, Iterable[Element]], removed: Mapping[str, Iterable[bytes]] | None = None
    ) -> None:
        """Remove elements, by their keys, then add others, by set; all or nothing.

        OSError as the kernel says: ENFILE, the set is full; EEXIST or EBUSY, the key is there with other data; ENOENT,
        one to remove is not there; ETIMEDOUT, no acknowledgement came, so nobody knows.
        """
        removals = {name: [(key, b"") for key in keys] for name, keys in (removed or {}).items()}
        self._transact([*self._requests(_DELETE_ELEMENTS, 0, removals), *self._requests(_NEW_ELEMENTS, CREATE, added)])

    def refill(self, names: Iterable[str], added: Mapping[str, Iterable[Element]]) -> None:
        """Replace all elements of sets. All or nothing; OSError as `change` raises it."""
        self._refill(names, added, 0)

    def refill_counted(
        self, names: Iterable[str], added: Mapping[str, Iterable[Element]]
    ) -> dict[tuple[str, bytes], ElementCounts]:
        """`refill` sets whose elements have counters; what each had counted when it went, by set and key.

        The kernel tells each element of its own, so OSError (ENOBUFS), with the sets refilled, when there are too many
        for the socket's buffer: some 600 of them, where that cannot be grown past the system's limit.
        """
        return _counted(self._refill(names, added, ECHO))

    def counts(self, name: str) -> dict[bytes, ElementCounts]:
        """What the elements of a set have counted so far, by key; OSError when the kernel cannot tell."""
        sequence = self._sequence
        self._sequence += 1
        self._socket.send(message(_GET_ELEMENTS, REQUEST | DUMP, _INET, 0, self._set(name), sequence))
        told: list[bytes] = []
        while True:
            try:
                data = self._socket.recv(LARGEST_READ)
            except BlockingIOError:
                raise refused(errno.ETIMEDOUT) from None
            for kind, number, at, end in messages(data):
                if number != sequence:
                    continue
                if kind == DONE:
                    return {key: counts for (_, key), counts in _counted(told).items()}
                if kind == ERROR:
                    raise refused(error_of(data, at))
                told.append(data[at:end])

    def replace_by_target(self, chain: str, queue: int, *, bypass: bool) -> None:
        """Make the xtables target NFQUEUE, revision 3, the one rule of a chain; OSError as the kernel says."""
        info = struct.pack("=HHH2x", queue, 1, _NFQUEUE_BYPASS if bypass else 0)
        target = nested(
            2,  # NFTA_EXPR_DATA
            attribute(1, b"NFQUEUE\0"),  # NFTA_TARGET_NAME
            attribute(2, struct.pack("!I", _NFQUEUE_REVISION)),  # NFTA_TARGET_REV
            attribute(3, info),  # NFTA_TARGET_INFO
        )
        where = self._table + attribute(2, chain.encode() + b"\0")  # NFTA_RULE_TABLE, NFTA_RULE_CHAIN
        expressions = nested(4, nested(1, attribute(1, b"target\0"), target))  # NFTA_RULE_EXPRESSIONS, NFTA_LIST_ELEM
        self._transact([(_DELETE_RULE, 0, where), (_NEW_RULE, CREATE | APPEND, where + expressions)])

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _refill(self, names: Iterable[str], added: Mapping[str, Iterable[Element]], flags: int) -> list[bytes]:
        removals = [(_DELETE_ELEMENTS, flags, self._set(name)) for name in names]
        return self._transact([*removals, *self._requests(_NEW_ELEMENTS, CREATE, added)])

    def _requests(
        self, kind: int, flags: int, wanted: Mapping[str, Iterable[Element]]
    ) -> Iterator[tuple[int, int, bytes]]:
        """Requests about elements, by set: as many as it needs."""
        for name, elements in wanted.items():
            rest = iter(elements)
            while some := list(islice(rest, _ELEMENTS_OF_A_MESSAGE)):
                yield kind, flags, self._elements(name, some)

    def _elements(self, name: str, elements: Iterable[Element]) -> bytes:
        """Elements of a set: what names it, and NFTA_SET_ELEM_LIST_ELEMENTS."""
        items = b"".join(
            nested(1, nested(1, attribute(1, key)), nested(2, attribute(1, data)) if data else b"")
            for key, data in elements
        )
        return self._set(name) + nested(3, items)

    def _set(self, name: str) -> bytes:
        """NFTA_SET_ELEM_LIST_TABLE and _SET; with no elements behind them, all are meant."""
        return self._table + attribute(2, name.encode() + b"\0")

    def _transact(self, requests: list[tuple[int, int, bytes]]) -> list[bytes]:
        """Send one batch and read what the kernel says to it; the answers are there when `send` returns.

        Returned is what removals with ECHO have told, as messages.
        """
        if not requests:
            return []
        parts = [_BATCH_BEGIN]
        first, last = self._sequence, self._sequence + len(requests) - 1
        self._sequence += len(requests)
        for sequence, (kind, flags, body) in enumerate(requests, first):
            # What is refused is answered in any case; the one acknowledgement tells that all went well.
            wanted = REQUEST | ACK if sequence == last else REQUEST
            parts.append(message(kind, wanted | flags, _INET, 0, body, sequence))
        self._socket.send(b"".join((*parts, _BATCH_END)))
        return self._read_answers(first, last)

    def _read_answers(self, first: int, last: int) -> list[bytes]:
        """Read the answers up to that of the last request; raise the first error there is."""
        failure = 0
        told: list[bytes] = []
        while True:
            try:
                data = self._socket.recv(LARGEST_READ)
            except BlockingIOError:
                raise refused(failure or errno.ETIMEDOUT) from None
            except OSError as error:
                # Some were lost. The rest is read all the same: what is told of removals has no sequence number, so it
                # would be taken for what the next transaction tells.
                failure = failure or error.errno or errno.EIO
                continue
            for kind, sequence, at, end in messages(data):
                if kind == _DELETE_ELEMENTS:
                    told.append(data[at:end])
                elif kind == ERROR and sequence >= first:
                    failure = failure or error_of(data, at)
                    if sequence == last:
                        if failure:
                            raise refused(failure)
                        return told


def _grow_buffers(target: socket.socket) -> None:
    """Give a socket large buffers, past the system's limit where that is allowed."""
    for forced, usual in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            target.setsockopt(socket.SOL_SOCKET, forced, _SOCKET_BUFFER)
        except PermissionError:  # a user namespace may not
            target.setsockopt(socket.SOL_SOCKET, usual, _SOCKET_BUFFER)


def _counted(told: Iterable[bytes]) -> dict[tuple[str, bytes], ElementCounts]:
    """The counters in messages about elements, by set and key."""
    found: dict[tuple[str, bytes], ElementCounts] = {}
    for data in told:
        about = attributes(data, BODY_AT, len(data))
        name = _value(data, about[_NAME]).rstrip(b"\0").decode()
        for _, element in attribute_list(data, *about[_ELEMENTS]):
            parts = attributes(data, *element)
            if _EXPRESSION not in parts:
                continue
            key = _value(data, attributes(data, *parts[_KEY])[_VALUE])
            counter = attributes(data, *attributes(data, *parts[_EXPRESSION])[_EXPRESSION_DATA])
            packets, size = (int.from_bytes(_value(data, counter[kind]), "big") for kind in (_PACKETS, _BYTES))
            found[name, key] = ElementCounts(packets, size)
    return found


def _value(data: bytes, place: tuple[int, int]) -> bytes:
    return data[slice(*place)]
