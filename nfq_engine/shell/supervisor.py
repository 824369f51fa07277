"""setsockopt(IP_TPROXY) of unmodified programs: takes their calls and answers them, one supervisor for one run.

Owns: what a call was (socket, option, argument), and giving its result back as a kernel would. Must not know what the
options do: a `Handler` answers. Place in the path: seccomp.py hands the calls over, supervisor_caller.py opens the
caller, supervisor_launch.py starts program and supervisor.

Rules that hold here:
- Every call gets an answer: an error in the handler is an errno for the program.
- The argument is read once; what was read is what is acted on.
- Calls of one run are answered one after another. Another run has another supervisor, and is not delayed by this one.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from struct import Struct
from typing import Final

from nfq_engine.shell.seccomp import (
    IP_RECVORIGADDRS,
    IP_TPROXY,
    SOCKETCALLS,
    Direction,
    Listener,
    Notification,
    SocketOption,
)
from nfq_engine.shell.supervisor_caller import BadAddressError, Caller, Identity, user_namespaces_over_network

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SocketCall:
    """One getsockopt or setsockopt of a program.

    `length` is the program's own; `value` is what the option takes of that many bytes (getsockopt: what lay in the
    buffer, where IP_TPROXY has its op), so it may be shorter. `socket_fd` is a copy of the program's socket, open as
    long as the handler runs. `pid` is the process, `uid` its effective user; `is_privileged`: it has CAP_NET_ADMIN over
    the supervisor's network namespace.
    """

    direction: Direction
    level: int
    option: int
    value: bytes
    length: int
    socket_fd: int
    pid: int
    uid: int
    is_privileged: bool


@dataclass(frozen=True, slots=True)
class SocketReply:
    """An errno, or 0; and for a getsockopt the value, of which the program gets as much as it has room for."""

    error: int = 0
    value: bytes = b""


Handler = Callable[[SocketCall], SocketReply]


@dataclass(frozen=True, slots=True)
class _ValueSize:
    """How much of a value is read: `enough` bytes must be there (if the program claims as many), `most` are of use."""

    enough: int
    most: int


# IP_TPROXY takes 12 bytes, 24 with an IPv6 address; IP_RECVORIGADDRS an int; getsockopt of anything else takes none.
_TPROXY_SIZE: Final = _ValueSize(12, 24)
_INT_SIZE: Final = _ValueSize(4, 4)
_NOTHING: Final = _ValueSize(0, 0)
_VALUE_SIZES: Final = {
    (Direction.SET, IP_TPROXY): _TPROXY_SIZE,
    (Direction.GET, IP_TPROXY): _TPROXY_SIZE,
    (Direction.SET, IP_RECVORIGADDRS): _INT_SIZE,
}

_INT: Final = Struct("=i")
_SOCKETCALL: Final = Struct("=5I")  # what an i386 program's one pointer points to


@dataclass(frozen=True, slots=True)
class _Call:
    """A call's arguments; `length` is the length itself for setsockopt, a pointer to it for getsockopt."""

    option: SocketOption
    descriptor: int
    value_at: int
    length: int


class Supervisor:
    """Answers the calls of all programs under one filter. Owns the listener and closes it in the end."""

    def __init__(self, listener: Listener, options: Iterable[SocketOption], handler: Handler) -> None:
        self._listener = listener
        self._options = frozenset(options)
        self._handler = handler
        self._administrators = user_namespaces_over_network()

    def serve(self) -> None:
        """Answer calls until the last program is gone."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        try:
            while poll.poll()[0][1] & select.POLLIN:
                notification = self._listener.receive()
                if notification is not None:
                    self._settle(notification)
        finally:
            self._listener.close()

    def _settle(self, notification: Notification) -> None:
        """Give one call its answer, whatever happens on the way to it."""
        try:
            with Caller(notification.thread, self._administrators) as caller:
                if not self._listener.is_waiting(notification):
                    return
                call = _decode(notification, caller)
                if call.option not in self._options:  # a socketcall that is none of ours
                    self._listener.let_go_on(notification)
                    return
                error = self._perform(notification, call, caller)
        except BadAddressError:
            error = errno.EFAULT
        except OSError as problem:
            error = problem.errno or errno.EIO
        self._listener.answer(notification, error)

    def _perform(self, notification: Notification, call: _Call, caller: Caller) -> int:
        """Do a call, with a kernel's checks in a kernel's order: 0 or an errno."""
        is_get = call.option.direction is Direction.GET
        with _take_socket(caller, call.descriptor) as taken:
            length = _INT.unpack(caller.read(call.length, _INT.size))[0] if is_get else call.length
            if length < 0:
                return errno.EINVAL
            size = _VALUE_SIZES.get((call.option.direction, call.option.option), _NOTHING)
            value = caller.read(call.value_at, min(length, size.most), at_least=size.enough)
            reply = self._ask(call.option, value, length, taken.fileno(), caller.identity)
        if is_get and not reply.error and self._listener.is_waiting(notification):
            value = reply.value[:length]
            caller.write(call.value_at, value)
            caller.write(call.length, _INT.pack(len(value)))
        return reply.error

    def _ask(self, option: SocketOption, value: bytes, length: int, socket_fd: int, who: Identity) -> SocketReply:
        """The handler's reply; EIO when it fails."""
        try:
            return self._handler(
                SocketCall(
                    direction=option.direction,
                    level=option.level,
                    option=option.option,
                    value=value,
                    length=length,
                    socket_fd=socket_fd,
                    pid=who.pid,
                    uid=who.uid,
                    is_privileged=who.is_privileged,
                )
            )
        except Exception:
            _log.exception("a call of process %d fails with EIO", who.pid)
            return SocketReply(errno.EIO)


def _take_socket(caller: Caller, descriptor: int) -> socket.socket:
    """A copy of the program's socket; OSError as the kernel has it: EBADF, ENOTSOCK."""
    copy = caller.take_descriptor(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _decode(notification: Notification, caller: Caller) -> _Call:
    """Which option of which socket a call is about."""
    table, arguments = notification.table, notification.arguments
    if notification.number == table.socketcall:
        direction = SOCKETCALLS[arguments[0]]
        arguments = _SOCKETCALL.unpack(caller.read(arguments[1], _SOCKETCALL.size))
    else:
        direction = Direction.SET if notification.number == table.setsockopt else Direction.GET
    descriptor, level, option, value_at, length = arguments[:5]
    return _Call(
        SocketOption(direction, _signed(level), _signed(option)),
        descriptor=_signed(descriptor),
        value_at=value_at,
        length=_signed(length) if direction is Direction.SET else length,
    )


def _signed(word: int) -> int:
    """The C `int` in a register: its lower 32 bits."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
