"""setsockopt(IP_TPROXY) of unmodified programs: takes their calls and answers them, one supervisor for one run.

Owns: what a call was (socket, option, argument), and giving its result back as a kernel would. Must not know what the
options do: a `Handler` answers. Place in the path: seccomp.py hands the calls over, supervisor_caller.py opens the
caller, supervisor_receive.py does recvmsg, supervisor_launch.py starts program and supervisor.

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
from contextlib import ExitStack
from dataclasses import dataclass
from struct import Struct
from typing import Final, TypeVar

from nfq_engine.core.option import IP_RECVORIGADDRS, IP_TPROXY
from nfq_engine.shell.seccomp import (
    SOCKETCALLS,
    Direction,
    Listener,
    Notification,
    SocketOption,
)
from nfq_engine.shell.supervisor_caller import Caller, user_namespaces_over_network
from nfq_engine.shell.supervisor_receive import Receiver, ReceivingCalls

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SocketCall:
    """One getsockopt or setsockopt of a program.

    `length` is the program's own; `value` is what the option takes of that many bytes (getsockopt: what lay in the
    buffer, where IP_TPROXY has its op), so it may be shorter. `socket_fd` is a copy of the program's socket, open as
    long as the handler runs. `pid` is the process, `thread` that of its threads which calls, `uid` the thread's
    effective user; `is_privileged`: it has CAP_NET_ADMIN over the supervisor's network namespace.
    """

    direction: Direction
    level: int
    option: int
    value: bytes
    length: int
    socket_fd: int
    thread: int
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

_MOST_REMEMBERED: Final = 65536  # more sockets than the programs of one run have open, more threads than they have
_SO_COOKIE: Final = 57

_INT: Final = Struct("=i")
_SOCKETCALL: Final = Struct("=5I")  # what an i386 program's one pointer points to


@dataclass(frozen=True, slots=True)
class _Call:
    """A call's arguments; `length` is the length itself for setsockopt, a pointer to it for getsockopt."""

    option: SocketOption
    descriptor: int
    value_at: int
    length: int


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class _Bounded(dict[_Key, _Value]):
    """A dict that forgets its oldest entry when it has too many: nobody tells when a thread or a socket is gone."""

    def __setitem__(self, key: _Key, value: _Value) -> None:
        self.pop(key, None)
        super().__setitem__(key, value)
        if len(self) > _MOST_REMEMBERED:
            del self[next(iter(self))]


class Supervisor:
    """Answers the calls of all programs under one filter. Owns the listener and closes it in the end."""

    def __init__(
        self, listener: Listener, options: Iterable[SocketOption], handler: Handler, receiver: Receiver | None = None
    ) -> None:
        self._listener = listener
        self._options = frozenset(options)
        self._handler = handler
        self._administrators = user_namespaces_over_network()
        self._unheard = _Bounded[int, tuple[object, int]]()
        self._wants_addresses = _Bounded[bytes, bool]()
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._receiving = None if receiver is None else ReceivingCalls(listener, self._poll, receiver)

    def serve(self) -> None:
        """Answer calls until the last program is gone."""
        try:
            while self._serve_once():
                pass
        finally:
            self._listener.close()

    def _serve_once(self) -> bool:
        """Do what is to be done now; False when the last program is gone."""
        patience = None if self._receiving is None else self._receiving.patience()
        for descriptor, events in self._poll.poll(None if patience is None else patience * 1000):
            if self._receiving is not None and descriptor != self._listener.fileno():
                self._receiving.resume(descriptor, events)
            elif events & select.POLLIN:
                notification = self._listener.receive()
                if notification is not None:
                    self._settle(notification)
            else:
                return False
        if self._receiving is not None:
            self._receiving.tidy()
        return True

    def _settle(self, notification: Notification) -> None:
        """Give one call its answer, whatever happens on the way to it."""
        try:
            with ExitStack() as handles:
                caller = handles.enter_context(Caller(notification.thread, self._administrators))
                if not self._listener.is_waiting(notification):
                    return
                if notification.number in (notification.table.recvmsg, notification.table.recvmmsg):
                    self._receive(notification, caller, handles)
                else:
                    self._do_option(notification, caller)
        except OSError as problem:
            self._listener.answer(notification, problem.errno or errno.EIO)
        except Exception:  # one call fails; the programs' other calls still need us
            _log.exception("a call of thread %d fails with EIO", notification.thread)
            self._listener.answer(notification, errno.EIO)

    def _receive(self, notification: Notification, caller: Caller, handles: ExitStack) -> None:
        """Serve a recvmsg of a socket that has IP_RECVORIGADDRS on; the kernel does all others."""
        taken = handles.enter_context(_take_socket(caller, _signed(notification.arguments[0])))
        # Only IP's datagrams have addresses of their own; other sockets may have the option on, as in the kernel.
        is_datagram = taken.type == socket.SOCK_DGRAM and taken.family in (socket.AF_INET, socket.AF_INET6)
        if self._receiving is not None and is_datagram and self._wants_addresses.get(_cookie(taken)):
            self._receiving.begin(notification, caller, taken, handles)
        else:
            self._listener.let_go_on(notification)

    def _do_option(self, notification: Notification, caller: Caller) -> None:
        """Serve a getsockopt or setsockopt; OSError with its errno when it fails."""
        call = _decode(notification, caller)
        if call.option not in self._options:  # a socketcall that is none of ours
            self._listener.let_go_on(notification)
            return
        if call.option.option == IP_RECVORIGADDRS and notification.table.recvmsg is None:
            raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))  # its recvmsg is never handed over
        with _take_socket(caller, call.descriptor) as taken:
            if call.option.direction is Direction.GET:
                self._get(notification, call, caller, taken)
            else:
                self._set(notification, call, caller, taken)

    def _get(self, notification: Notification, call: _Call, caller: Caller, taken: socket.socket) -> None:
        request = _read_request(call, _INT.unpack(caller.read(call.length, _INT.size))[0], caller, taken)
        reply = self._ask(request)
        value = reply.value
        if request.option == IP_RECVORIGADDRS and self._receiving is not None:
            value = _INT.pack(self._wants_addresses.get(_cookie(taken), False))
        value = value[: request.length]
        if not reply.error and self._listener.is_waiting(notification):
            caller.write(call.value_at, value)
            caller.write(call.length, _INT.pack(len(value)))
        self._listener.answer(notification, reply.error)

    def _set(self, notification: Notification, call: _Call, caller: Caller, taken: socket.socket) -> None:
        """Do it once, also when a signal ends the call meanwhile and it is then made again."""
        request = _read_request(call, call.length, caller, taken)
        cookie = _cookie(taken)
        this = (cookie, call.option, request.value, request.length)
        done, error = self._unheard.pop(notification.thread, (None, 0))
        if done != this:
            error = self._ask(request).error
        if request.option == IP_RECVORIGADDRS and not error:
            self._wants_addresses[cookie] = any(request.value)
        if not self._listener.answer(notification, error):
            self._unheard[notification.thread] = (this, error)

    def _ask(self, request: SocketCall) -> SocketReply:
        """The handler's reply; EIO when it fails."""
        try:
            return self._handler(request)
        except Exception:
            _log.exception("a call of process %d fails with EIO", request.pid)
            return SocketReply(errno.EIO)


def _read_request(call: _Call, length: int, caller: Caller, taken: socket.socket) -> SocketCall:
    """What the handler is asked; OSError: EINVAL for a negative length, EFAULT for a value that is not there."""
    if length < 0:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    size = _VALUE_SIZES.get((call.option.direction, call.option.option), _NOTHING)
    return SocketCall(
        direction=call.option.direction,
        level=call.option.level,
        option=call.option.option,
        value=caller.read(call.value_at, min(length, size.most), at_least=size.enough),
        length=length,
        socket_fd=taken.fileno(),
        thread=caller.identity.thread,
        pid=caller.identity.pid,
        uid=caller.identity.uid,
        is_privileged=caller.identity.is_privileged,
    )


def _cookie(taken: socket.socket) -> bytes:
    """The kernel's own number of a socket, which no other socket ever has."""
    return taken.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)


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
