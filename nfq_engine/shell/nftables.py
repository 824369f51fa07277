"""nft: whole tables as text by the command, set elements and the one rule that it cannot say by netlink.

Owns: how nf_tables is talked to (linux/netfilter/nf_tables.h, nf_tables_compat.h, xt_NFQUEUE.h). Must not know what the
table is for. An element by netlink takes some 10 µs, by the command some 5 ms.
"""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
from collections.abc import Iterable, Mapping
from typing import Final

from nfq_engine.shell.netlink import (
    ACK,
    APPEND,
    CREATE,
    ERROR,
    LARGEST_READ,
    REQUEST,
    attribute,
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
_DELETE_ELEMENTS: Final = _SUBSYSTEM << 8 | 14
_INET: Final = 1  # NFPROTO_INET
_NFQUEUE_REVISION: Final = 3
_NFQUEUE_BYPASS: Final = 1

Element = tuple[bytes, bytes]  # key, and data (empty in a set); each part padded to four bytes


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
        self._sequence = 1

    def change(
        self, added: Mapping[str, Iterable[Element]], removed: Mapping[str, Iterable[bytes]] | None = None
    ) -> None:
        """Remove elements, by their keys, then add others, by set; all or nothing.

        OSError as the kernel says: ENFILE, the set is full; EEXIST or EBUSY, the key is there with other data; ENOENT,
        one to remove is not there; ETIMEDOUT, no acknowledgement came, so nobody knows.
        """
        requests = [
            (_DELETE_ELEMENTS, 0, self._elements(name, ((key, b"") for key in keys)))
            for name, keys in (removed or {}).items()
        ]
        requests += [(_NEW_ELEMENTS, CREATE, self._elements(name, elements)) for name, elements in added.items()]
        self._transact(requests)

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

    def _elements(self, name: str, elements: Iterable[Element]) -> bytes:
        """NFTA_SET_ELEM_LIST_TABLE, _SET and _ELEMENTS."""
        items = b"".join(
            nested(1, nested(1, attribute(1, key)), nested(2, attribute(1, data)) if data else b"")
            for key, data in elements
        )
        return self._table + attribute(2, name.encode() + b"\0") + nested(3, items)

    def _transact(self, requests: list[tuple[int, int, bytes]]) -> None:
        """Send one batch and read what the kernel says to it; the answers are there when `send` returns."""
        if not requests:
            return
        parts = [_BATCH_BEGIN]
        first, last = self._sequence, self._sequence + len(requests) - 1
        self._sequence += len(requests)
        for sequence, (kind, flags, body) in enumerate(requests, first):
            # What is refused is answered in any case; the one acknowledgement tells that all went well.
            wanted = REQUEST | ACK if sequence == last else REQUEST
            parts.append(message(kind, wanted | flags, _INET, 0, body, sequence))
        self._socket.send(b"".join((*parts, _BATCH_END)))
        self._read_answers(first, last)

    def _read_answers(self, first: int, last: int) -> None:
        """Read the answers up to that of the last request; raise the first error there is."""
        failure = 0
        while True:
            try:
                data = self._socket.recv(LARGEST_READ)
            except BlockingIOError:
                raise refused(failure or errno.ETIMEDOUT) from None
            for kind, sequence, at, _ in messages(data):
                if kind == ERROR and sequence >= first:
                    failure = failure or error_of(data, at)
                    if sequence == last:
                        if failure:
                            raise refused(failure)
                        return
