"""Sockets of other processes: what the kernel says of them, and when they are closed.

Owns: the facts behind a descriptor that somebody handed over, the privileges of its owner, and the news of destroyed
sockets (sock_diag). Must not trust anything that the owner says.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nfq_engine.core.packet import Endpoint, Protocol
from nfq_engine.core.sockopt import Socket
from nfq_engine.shell import netlink

SO_COOKIE: Final = 57
_SIOCGSKNS: Final = 0x894C
_CAP_NET_ADMIN: Final = 1 << 12

_NETLINK_SOCK_DIAG: Final = 4
_DESTROY_GROUPS: Final = (
    1,
    2,
    3,
    4,
)  # TCP, UDP, TCP over IPv6, UDP over IPv6 (linux/sock_diag.h, enum sknetlink_groups)
_SOCK_DIAG_BY_FAMILY: Final = 20
_DUMP: Final = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_HEADER: Final = struct.Struct("=IHHII")
_TIMER_AT: Final = 2  # in struct inet_diag_msg (linux/inet_diag.h)
_TIME_WAIT: Final = 3  # the timer of what TIME_WAIT, or FIN_WAIT2, has kept of a destroyed socket: number and cookie
_COOKIE_AT: Final = 4 + 2 + 2 + 16 + 16 + 4
_COOKIE: Final = struct.Struct("=II")
_ALL: Final = 0x10000


def own_namespace() -> tuple[int, int]:
    """Device and inode of this thread's network namespace: its identity."""
    status = Path("/proc/thread-self/ns/net").stat()
    return status.st_dev, status.st_ino


def describe(descriptor: int, namespace: tuple[int, int], *, is_privileged: bool) -> Socket:
    """What the kernel says of a socket that was handed over.

    OSError: ENOTSOCK for no socket, EINVAL for one that is neither TCP nor UDP or belongs to another network namespace.
    """
    with _borrowed(descriptor) as handed:
        if _namespace_of(handed) != namespace:
            raise OSError(errno.EINVAL, "the socket belongs to another network namespace")
        if handed.family not in (socket.AF_INET, socket.AF_INET6) or handed.proto not in (Protocol.TCP, Protocol.UDP):
            raise OSError(errno.EINVAL, "only TCP and UDP sockets can have a foreign address")
        return Socket(
            cookie=_cookie(handed),
            protocol=Protocol(handed.proto),
            local=endpoint_of(handed.getsockname()),
            is_connected=_is_connected(handed),
            has_reuse_address=bool(handed.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)),
            is_privileged=is_privileged,
            owner=os.fstat(descriptor).st_uid,
            takes_ipv4=handed.family == socket.AF_INET6
            and not handed.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
        )


def cookie_of(descriptor: int) -> int:
    """The kernel's number of a socket, which no other socket ever has; OSError (ENOTSOCK) when it is none."""
    with _borrowed(descriptor) as handed:
        return _cookie(handed)


def _cookie(handed: socket.socket) -> int:
    return int.from_bytes(handed.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A socket object on a descriptor that somebody else closes; OSError (ENOTSOCK) when it is none."""
    borrowed = socket.socket(fileno=descriptor)
    try:
        yield borrowed
    finally:
        borrowed.detach()


def endpoint_of(name: tuple[str, int] | tuple[str, int, int, int]) -> Endpoint:
    """The endpoint that getsockname or getpeername tells; an IPv4 address mapped into IPv6 is the IPv4 address."""
    text, port = name[0].partition("%")[0], name[1]
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    return Endpoint(socket.inet_pton(family, text), port).unmapped


def peer_of(descriptor: int) -> tuple[Endpoint, Endpoint]:
    """Local and peer endpoint of a connected socket; OSError when it is none."""
    with _borrowed(descriptor) as handed:
        return endpoint_of(handed.getsockname()), endpoint_of(handed.getpeername())


class _CapabilityHeader(ctypes.Structure):
    """struct __user_cap_header_struct (capget(2))."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


_Capabilities = ctypes.c_uint32 * 6  # twice (32 capabilities each): effective, permitted, inheritable
_CAPABILITY_VERSION: Final = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


def may_administer(pid: int, administrators: frozenset[int]) -> bool:
    """Has a process CAP_NET_ADMIN in one of these user namespaces (`supervisor_caller.user_namespaces_over_network`)?

    A capability counts in the user namespace that owns the network namespace, and in every ancestor of that one
    (user_namespaces(7)). It is asked anew each time: a process may give its privileges up.
    """
    if pid <= 0:  # whoever cannot be seen from here; to capget(2), 0 is the engine itself
        return False
    header, found = _CapabilityHeader(_CAPABILITY_VERSION, pid), _Capabilities()
    if _libc.capget(ctypes.byref(header), found) or not found[0] & _CAP_NET_ADMIN:
        return False
    try:
        return os.stat(f"/proc/{pid}/ns/user").st_ino in administrators  # noqa: PTH116 - a Path costs more than the call
    except OSError:
        return False


def _namespace_of(handed: socket.socket) -> tuple[int, int]:
    """The network namespace of a socket."""
    try:
        descriptor = fcntl.ioctl(handed.fileno(), _SIOCGSKNS)
    except OSError as error:
        raise OSError(errno.EINVAL, f"the socket's network namespace cannot be told: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        return status.st_dev, status.st_ino
    finally:
        os.close(descriptor)


def _is_connected(handed: socket.socket) -> bool:
    """Has the socket a peer?"""
    try:
        handed.getpeername()
    except OSError:
        return False
    return True


class DestroyedSockets:
    """The news of closed sockets: the kernel multicasts every destroyed TCP and UDP socket of the namespace.

    Nothing is heard until somebody wants to, as each costs the kernel and us some 20 µs.
    """

    def __init__(self) -> None:
        self._news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
        self._news.setblocking(False)
        self._news.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._news.bind((0, 0))  # what has no port is never told anything (af_netlink.c, do_one_broadcast)
        self._is_listening = False

    def fileno(self) -> int:
        """The descriptor that becomes readable when a socket was destroyed."""
        return self._news.fileno()

    def listen(self, *, wanted: bool) -> None:
        """Hear of the sockets that are destroyed from now on, or of none any more."""
        if wanted is not self._is_listening:
            netlink.listen(self._news, _DESTROY_GROUPS, wanted=wanted)
            self._is_listening = wanted

    def read(self) -> set[int] | None:
        """The cookies of the sockets destroyed since the last call; None when news was lost: ask `living`."""
        cookies: set[int] = set()
        is_complete = True
        while True:
            try:
                data = self._news.recv(_ALL)
            except BlockingIOError:
                return cookies if is_complete else None
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                is_complete = False
                continue
            cookies.update(_cookies(data))

    def close(self) -> None:
        """Stop listening."""
        self._news.close()


def living() -> set[int]:
    """The cookies of all TCP and UDP sockets of this namespace whose end the kernel has still to tell."""
    cookies: set[int] = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as asking:
        asking.bind((0, 0))
        for family in (socket.AF_INET, socket.AF_INET6):
            for protocol in Protocol:
                # struct inet_diag_req_v2: family, protocol, extensions, padding, states, id
                request = struct.pack("=BBBxI48x", family, protocol, 0, 0xFFFFFFFF)
                asking.send(_HEADER.pack(16 + len(request), _SOCK_DIAG_BY_FAMILY, _DUMP, 0, 0) + request)
                while not _is_last(data := asking.recv(_ALL)):
                    cookies.update(_cookies(data))
                cookies.update(_cookies(data))
    return cookies


def _messages(data: bytes) -> list[tuple[int, bytes]]:
    """The netlink messages of one datagram: type and body."""
    found, at = [], 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        found.append((kind, data[at + _HEADER.size : at + length]))
        at += max(length + 3 & ~3, _HEADER.size)
    return found


def _is_last(data: bytes) -> bool:
    """Does a dump end in this datagram?"""
    return any(kind in (_NLMSG_DONE, _NLMSG_ERROR) for kind, _ in _messages(data))


def _cookies(data: bytes) -> list[int]:
    """The cookies in a datagram of inet_diag messages: of sockets, and not of what is left of them in TIME_WAIT."""
    found = []
    for kind, body in _messages(data):
        if kind != _SOCK_DIAG_BY_FAMILY or len(body) < _COOKIE_AT + _COOKIE.size:
            continue
        if body[_TIMER_AT] != _TIME_WAIT:
            low, high = _COOKIE.unpack_from(body, _COOKIE_AT)
            found.append(high << 32 | low)
    return found
