"""The socket API: setsockopt and getsockopt of IP_TPROXY, from argument bytes to reply or errno.

Owns: the operations, who may call what, the errnos (tproxy.md section 4). Must not know how a call got here: by the
Python client, or from an unmodified program. Place in the path: none; it feeds the sockrefs.

Rule that holds here: a call that fails has changed nothing, so every check comes before the first change.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from nfq_engine.core.events import Event
from nfq_engine.core.one_way import Listener
from nfq_engine.core.option import (
    SHORTEST,
    Operation,
    pack_address,
    pack_number,
    unpack_address,
    unpack_number,
    unpack_operation,
)
from nfq_engine.core.packet import Endpoint, Protocol
from nfq_engine.core.sockref import Flag, Sockref
from nfq_engine.core.tproxy_table import TproxyTable

VERSION: Final = (2, 0, 0)

_KINDS: Final = Flag.CONNECT | Flag.LISTEN | Flag.ESTABLISHED
_SETTABLE: Final = _KINDS | Flag.ONCE | Flag.UNIDIR
_ONE_WAY: Final = Flag.LISTEN | Flag.UNIDIR
_SHOWN: Final = _SETTABLE | Flag.MARK_ONLY | Flag.APPLIED


@dataclass(frozen=True, slots=True)
class Socket:
    """What the engine must know of the calling socket: the kernel's facts, none of the caller's claims.

    `local` has port 0 or an unspecified address while the socket is not bound to something definite; `is_privileged`
    says that the caller has CAP_NET_ADMIN over the network namespace; `takes_ipv4`, that an IPv6 socket is no IPv6-only
    one.
    """

    cookie: int
    protocol: Protocol
    local: Endpoint
    is_connected: bool
    has_reuse_address: bool
    is_privileged: bool
    owner: int
    takes_ipv4: bool = False

    @staticmethod
    def known_by(sockref: Sockref, cookie: int) -> Socket:
        """A socket of which nothing but its sockref need be known: enough for every call but ASSIGN."""
        return Socket(
            cookie,
            sockref.protocol,
            sockref.local,
            is_connected=False,
            has_reuse_address=False,
            is_privileged=False,
            owner=sockref.owner,
        )


class SocketApi:
    """The calls, on a table's sockrefs and their connections."""

    def __init__(self, table: TproxyTable) -> None:
        self._table = table
        self._sockrefs = table.sockrefs

    def set(self, socket: Socket, argument: bytes, now: float) -> int:
        """setsockopt(IP_TPROXY): 0 or an errno."""
        if len(argument) < SHORTEST:
            return errno.EINVAL
        match unpack_operation(argument):
            case Operation.VERSION:
                return self._check_version(unpack_number(argument))
            case Operation.ASSIGN:
                return self._assign(socket, unpack_address(argument, len(socket.local.address)), now)
            case Operation.UNASSIGN:
                return self._unassign(socket.cookie)
            case Operation.FLAGS:
                return self._set_flags(socket, unpack_number(argument), now)
            case Operation.ALLOC:
                return self._allocate(socket)
            case Operation.CONNECT:
                return self._connect(socket, unpack_address(argument, len(socket.local.address)))
            case _:
                return errno.ENOPROTOOPT

    def get(self, socket: Socket, argument: bytes) -> bytes | int:
        """getsockopt(IP_TPROXY), whose value tells the op on the way in: the value, or an errno."""
        if len(argument) < SHORTEST:
            return errno.EINVAL
        operation = unpack_operation(argument)
        if operation == Operation.VERSION:
            major, minor, patch = VERSION
            return pack_number(Operation.VERSION, major << 24 | minor << 16 | patch)
        if operation not in (Operation.QUERY, Operation.FLAGS):
            return errno.ENOPROTOOPT
        sockref = self._sockrefs.of_socket(socket.cookie)
        if sockref is None:
            return errno.ENOENT
        if operation == Operation.QUERY:
            return pack_address(Operation.QUERY, sockref.foreign)
        return pack_number(Operation.FLAGS, sockref.flags & _SHOWN)

    def closed(self, cookie: int) -> None:
        """A socket was closed."""
        self._table.listeners.discard(cookie)
        self._unassign(cookie)

    def _unassign(self, cookie: int) -> int:
        """A socket gives its assignment back, or was closed."""
        sockref = self._sockrefs.leave(cookie)
        if sockref is None:
            return errno.ENOENT
        self._table.observe(Event.UNASSIGN, sockref)
        if sockref.cookies:
            return 0  # others still share the mark-only entry
        is_listener = sockref.has(Flag.LISTEN | Flag.ESTABLISHED)
        if sockref.protocol is Protocol.TCP and is_listener and sockref.related:
            sockref.flags |= Flag.ORPHAN  # it goes with its last connection (Engine.forget)
            return 0
        if sockref.protocol is Protocol.UDP:
            self._table.delete_related(sockref)
        self._sockrefs.remove(sockref)
        return 0

    @staticmethod
    def _check_version(asked: int) -> int:
        """Is the API version that a program was made for supported: the same major, no newer minor?"""
        major, minor = asked >> 24, asked >> 16 & 0xFF
        return 0 if major == VERSION[0] and minor <= VERSION[1] else errno.EINVAL

    def _assign(self, socket: Socket, foreign: Endpoint | None, now: float) -> int:
        """Bind a socket to a foreign address; address 0 makes it, or shares, a mark-only entry."""
        if not socket.is_privileged:
            return errno.EPERM
        if foreign is None or socket.is_connected or socket.local.is_unspecified or not socket.local.port:
            return errno.EINVAL
        own = self._sockrefs.of_socket(socket.cookie)
        if own is not None:
            return 0 if foreign.is_unspecified and own.has(Flag.MARK_ONLY) else errno.EEXIST
        present = [
            entry for entry in self._sockrefs.at_local(socket.protocol, socket.local) if not entry.has(Flag.ORPHAN)
        ]
        if foreign.is_unspecified:
            return self._assign_mark_only(socket, present, now)
        if present:
            return errno.EEXIST
        flags = Flag(0)
        if foreign.port:
            at_foreign = self._sockrefs.at_foreign(socket.protocol, foreign)
            holders = [entry for entry in at_foreign if not entry.has(Flag.ORPHAN)]
            if holders and not socket.has_reuse_address:
                return errno.EADDRINUSE
            if any(not entry.has(Flag.MARK_ONLY) and not entry.has_remote for entry in holders):
                flags = Flag.CONNECT_ONLY
        self._add(socket, foreign, flags, now)
        return 0

    def _assign_mark_only(self, socket: Socket, present: list[Sockref], now: float) -> int:
        """Make the socket's own address count as tproxied; sockets with one local address share an entry."""
        shared = next((entry for entry in present if entry.has(Flag.MARK_ONLY)), None)
        if shared is not None:
            self._sockrefs.share(shared, socket.cookie)
            self._table.observe(Event.ASSIGN, shared)
        elif present:
            return errno.EEXIST
        else:
            self._add(socket, socket.local, Flag.MARK_ONLY, now)
        return 0

    def _add(self, socket: Socket, foreign: Endpoint, flags: Flag, now: float) -> None:
        """Hash a new sockref of a socket."""
        nobody = Endpoint(bytes(len(socket.local.address)), 0)
        sockref = Sockref(
            protocol=socket.protocol,
            local=socket.local,
            foreign=foreign,
            remote=nobody,
            cookies={socket.cookie},
            hashed=now,
            flags=flags,
            owner=socket.owner,
        )
        self._sockrefs.add(sockref)
        self._table.observe(Event.ASSIGN, sockref)

    def _set_flags(self, socket: Socket, wanted: int, now: float) -> int:
        """Say what the sockref is for; connections it made so far are looked up afresh."""
        sockref = self._sockrefs.of_socket(socket.cookie)
        if sockref is None:
            return self._listen_one_way(socket, now) if wanted == _ONE_WAY else errno.ENOENT
        kind = wanted & _KINDS
        if wanted & ~_SETTABLE or kind not in (Flag.CONNECT, Flag.LISTEN, Flag.ESTABLISHED):
            return errno.EINVAL
        if sockref.has(Flag.MARK_ONLY):
            return 0
        if kind == Flag.LISTEN and sockref.has(Flag.CONNECT_ONLY):
            return errno.EINVAL
        if kind == Flag.ESTABLISHED and not sockref.has_remote:
            return errno.EINVAL
        self._table.delete_related(sockref)
        self._sockrefs.set_flags(sockref, Flag(wanted) | sockref.flags & Flag.CONNECT_ONLY)
        return 0

    def _listen_one_way(self, socket: Socket, now: float) -> int:
        """Have what rules redirect to a bound UDP socket without a sockref translated datagram by datagram."""
        if socket.protocol is not Protocol.UDP or not socket.local.port:
            return errno.ENOENT
        if socket.cookie not in self._table.listeners:
            listener = Listener(socket.cookie, socket.local, socket.takes_ipv4, socket.owner, now)
            if self._table.redirected.take(listener):
                self._table.delete_redirects(listener)
            self._table.listeners.add(listener)
        return 0

    def _allocate(self, socket: Socket) -> int:
        """Pick a free foreign port now."""
        sockref = self._sockrefs.of_socket(socket.cookie)
        if sockref is None:
            return errno.ENOENT
        if sockref.has(Flag.MARK_ONLY):
            return 0
        if sockref.foreign.port:
            return errno.EINVAL
        for port in self._table.ports.from_random(self._table.chance):
            foreign = Endpoint(sockref.foreign.address, port)
            if not self._sockrefs.has_foreign(sockref.protocol, foreign):
                self._sockrefs.set_foreign(sockref, foreign)
                return 0
        return errno.EFAULT

    def _connect(self, socket: Socket, remote: Endpoint | None) -> int:
        """Narrow a sockref to a peer."""
        sockref = self._sockrefs.of_socket(socket.cookie)
        if sockref is None:
            return errno.ENOENT
        if remote is None:
            return errno.EINVAL
        if not sockref.has(Flag.MARK_ONLY):
            sockref.remote = remote
        return 0
