"""Packets that POSTROUTING has nothing to do to, kept from coming to the queue a second time.

Owns: the sets `untouched4` and `untouched6` of the inline table: tuples of connections whose source stage is decided
and leaves them as they are. PREROUTING and OUTPUT still see every packet, so states, timeouts and counts miss nothing.

A tuple is added when it is convenient, many in one transaction; if that fails, packets only take the longer way. It is
removed before its connection is forgotten, at once: a new connection with that tuple may have to be translated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Final

from nfq_engine.core.conntrack import Connection, Direction, Stage
from nfq_engine.core.packet import FlowTuple
from nfq_engine.shell import divert, nftables
from nfq_engine.shell.narrowing import endpoint_key, protocol_key
from nfq_engine.shell.nftables import NftSocket

log: Final = logging.getLogger("tproxyd")


class Untouched:
    """Keeps the sets."""

    def __init__(self) -> None:
        self._nft = NftSocket(divert.TABLE)
        self._waiting: dict[int, Connection] = {}
        self._there: dict[int, dict[str, list[bytes]]] = {}

    def add(self, connection: Connection) -> None:
        """A connection's source stage was decided."""
        self._waiting[connection.identifier] = connection

    def flush(self) -> None:
        """Put the tuples of all that were added into the sets."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, {}
        new = {identifier: keys for identifier, connection in waiting.items() if (keys := _keys(connection))}
        added: dict[str, list[nftables.Element]] = {}
        for keys in new.values():
            for name, members in keys.items():
                added.setdefault(name, []).extend((member, b"") for member in members)
        if not added:
            return
        try:
            self._nft.change(added)
        except OSError as error:
            log.warning("%d connections keep coming to POSTROUTING's queue: %s", len(new), error.strerror)
            return
        self._there.update(new)

    def remove(self, connection: Connection) -> None:
        """A connection is forgotten: its tuples may be another's from now on."""
        self._waiting.pop(connection.identifier, None)
        keys = self._there.pop(connection.identifier, None)
        if keys is None:
            return
        try:
            self._nft.change({}, keys)
        except OSError as error:
            log.warning("cannot take a tuple out of %s, so all are: %s", ", ".join(keys), error.strerror)
            nftables.run("".join(f"flush set inet {divert.TABLE} {name}\n" for name in divert.UNTOUCHED))
            self._there.clear()

    def close(self) -> None:
        """Close the socket."""
        self._nft.close()


def _keys(connection: Connection) -> dict[str, list[bytes]]:
    """The tuples of a connection that the source stage leaves alone, by set."""
    keys: dict[str, list[bytes]] = {}
    for flow in _flows(connection):
        name = divert.UNTOUCHED[0 if len(flow.source.address) == 4 else 1]
        key = protocol_key(flow.protocol) + endpoint_key(flow.source) + endpoint_key(flow.destination)
        keys.setdefault(name, []).append(key)
    return keys


def _flows(connection: Connection) -> Iterator[FlowTuple]:
    for (stage, direction), entry in connection.entries.items():
        if stage is Stage.SOURCE and entry.rewrite is None:
            yield connection.inside if direction is Direction.ORIGINAL else connection.inside.inverse()
