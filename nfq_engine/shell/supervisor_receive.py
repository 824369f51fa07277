"""recvmsg and recvmmsg of programs that switched IP_RECVORIGADDRS on: the datagram, and the control message with it.

Owns: doing the call in the program's stead, with the program's own socket, and waiting for a datagram without holding
up anyone. Must not know how original addresses are found: a `Receiver` tells them. Place in the path: supervisor.py
comes here with each recvmsg of such a socket.

Rules that hold here:
- A call that waits is remembered with all that it needs. Its thread is looked at again and again: a signal ends the
  call as it would end the kernel's own, and a call whose thread was killed gives back its socket.
- recvmmsg waits for one datagram only, also where the kernel's would wait for more, and gives all that are there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import math
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from struct import Struct
from typing import Final, assert_never

from nfq_engine.core.option import IP_RECVORIGADDRS
from nfq_engine.shell.seccomp import SOL_IP, Listener, Notification
from nfq_engine.shell.supervisor_caller import Caller
from nfq_engine.shell.supervisor_message import (
    LARGEST,
    MANY_SIZE,
    Control,
    Message,
    read_controls,
    read_message,
    write_controls,
    write_length,
    write_message,
)
from nfq_engine.shell.supervisor_signals import ERESTARTNOHAND, ERESTARTSYS, Due, due_signal, look_for_signals

_LOOK: Final = 0.01  # seconds from one look at the threads that wait to the next
_LOOK_AT_EACH: Final = 0.001  # and for each of them: with many, looking must not become all that is done
_IDLE_LOOK: Final = 0.05  # the same where no call has begun to wait for so many seconds:
_IDLE: Final = 1.0

_COMING: Final = select.POLLIN | select.POLLRDHUP
_LOCAL: Final = (SOL_IP, 20)  # IP_RECVORIGDSTADDR: original to the kernel is what is local here, behind us

_MOST_MESSAGES: Final = 1024  # in one recvmmsg
_TIMEOUT: Final = Struct("=qq")  # struct timeval
_INT_MAX: Final = 0x7FFFFFFF
_NAME_SIZE: Final = 128  # struct sockaddr_storage

_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Datagram:
    """A datagram that a program is about to get: the addresses that recvmsg tells, and all that it carries.

    `local` is where it was delivered to, which is more than the name of a socket that is bound to every address; empty
    for IPv6.
    """

    source: bytes  # a struct sockaddr
    local: bytes  # a struct sockaddr_in
    data: bytes
    is_peeked: bool  # it stays in the socket


Receiver = Callable[[Datagram], bytes | None]
"""Tells the control message's 12 bytes (source and destination address, source and destination port), or None."""


class _OwnVector(ctypes.Structure):
    """struct iovec of the supervisor's own call."""

    _fields_ = (("at", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _OwnMessage(ctypes.Structure):
    """struct msghdr of the supervisor's own call."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_size", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


@dataclass(frozen=True, slots=True)
class _Call:
    """One recvmsg or recvmmsg under way.

    `message` is the first or only one, `count` how many recvmmsg has room for; `until` is when SO_RCVTIMEO ends it.
    """

    notification: Notification
    caller: Caller
    taken: socket.socket
    message: Message
    flags: int
    count: int | None
    until: float

    @property
    def may_wait(self) -> bool:
        """Is neither the call nor the socket non-blocking?"""
        return not (self.flags & socket.MSG_DONTWAIT or fcntl.fcntl(self.taken, fcntl.F_GETFL) & os.O_NONBLOCK)


class ReceivingCalls:
    """The recvmsg calls of one run's programs; the sockets of those that wait are registered at `poll`."""

    def __init__(self, listener: Listener, poll: select.poll, receiver: Receiver) -> None:
        self._listener = listener
        self._poll = poll
        self._receiver = receiver
        self._waiting: dict[int, tuple[_Call, ExitStack]] = {}
        self._resting: set[int] = set()  # of their sockets, those that are not at `poll` for now
        self._next_look = 0.0
        self._began_to_wait = 0.0  # when the youngest of the waiting calls did
        self._data = ctypes.create_string_buffer(LARGEST)
        self._name = ctypes.create_string_buffer(_NAME_SIZE)
        self._control = ctypes.create_string_buffer(LARGEST)

    def patience(self) -> float | None:
        """Seconds until `tidy` has something to do; None when no call waits."""
        if not self._waiting:
            return None
        ends = min(call.until for call, _ in self._waiting.values())
        return max(0.0, min(self._next_look, ends) - time.monotonic())

    def begin(self, notification: Notification, caller: Caller, taken: socket.socket, handles: ExitStack) -> None:
        """Answer a call, or keep it and its handles until there is a datagram. OSError: the call's errno."""
        is_many = notification.number == notification.table.recvmmsg
        _, at, *rest = notification.arguments
        flags = rest[1 if is_many else 0] & _INT_MAX
        count = min(rest[0] & 0xFFFFFFFF, _MOST_MESSAGES) if is_many else None
        if flags & socket.MSG_ERRQUEUE or count == 0:  # no datagram is asked for
            self._listener.let_go_on(notification)
            return
        call = _Call(notification, caller, taken, read_message(caller, at), flags, count, _deadline(taken))
        try:
            self._listener.answer(notification, 0, self._receive(call))
        except BlockingIOError:
            if not call.may_wait:
                raise
            self._waiting[taken.fileno()] = (call, handles.pop_all())
            self._poll.register(taken, _COMING)
            self._began_to_wait = time.monotonic()
            self._next_look = min(self._next_look, self._began_to_wait + _LOOK)

    def resume(self, descriptor: int, events: int) -> None:
        """Something came to a socket that a call waits for."""
        call, _ = self._waiting[descriptor]
        if self._listener.is_waiting(call.notification):
            try:
                self._listener.answer(call.notification, 0, self._receive(call))
            except BlockingIOError:
                if not events & select.POLLRDHUP:  # another call of the program was quicker
                    if events & select.POLLERR:  # or there are errors that it may never read: until the next look
                        self._poll.unregister(descriptor)
                        self._resting.add(descriptor)
                    return
                write_message(call.caller, call.message, memoryview(b""), b"", b"", 0)
                self._listener.answer(call.notification, 0)
            except OSError as problem:
                self._listener.answer(call.notification, problem.errno or errno.EIO)
        self._forget(descriptor)

    def tidy(self) -> None:
        """End the calls whose time is up or that a signal ends, and let go of those whose thread is gone."""
        now = time.monotonic()
        for descriptor, (call, _) in list(self._waiting.items()):
            if now >= call.until:
                self._listener.answer(call.notification, errno.EAGAIN)
                self._forget(descriptor)
        if now >= self._next_look:
            interval = _LOOK if now < self._began_to_wait + _IDLE else _IDLE_LOOK
            self._next_look = now + interval + _LOOK_AT_EACH * len(self._waiting)
            self._look()

    def _look(self) -> None:
        """Look at each thread that waits: has a signal come, is it still there?"""
        while self._resting:
            self._poll.register(self._resting.pop(), _COMING)
        held = {call.notification.thread for call, _ in self._waiting.values()}
        served: set[int] = set()  # processes: a signal for one is taken by one thread
        for descriptor, (call, _) in list(self._waiting.items()):
            process = call.caller.identity.pid
            due = due_signal(call.notification.thread, process, held)
            if due is Due.PROCESS:
                due = Due.NOBODY if process in served else due
                served.add(process)
            if self._end_by_signal(call, due) or not self._listener.is_waiting(call.notification):
                self._forget(descriptor)

    def _end_by_signal(self, call: _Call, due: Due) -> bool:
        """End a call as the kernel would if a signal came; False when none did."""
        has_limit = call.until < math.inf
        match due:
            case Due.NOBODY:
                return False
            case Due.THIS_THREAD:
                # sock_intr_errno(): with a time limit the call would begin anew with all of it
                self._listener.answer(call.notification, errno.EINTR if has_limit else ERESTARTSYS)
            case Due.PROCESS:
                with look_for_signals(call.notification.thread) as does_look:
                    word = ERESTARTNOHAND if has_limit else ERESTARTSYS
                    self._listener.answer(call.notification, word if does_look else errno.EINTR)
            case _:
                assert_never(due)
        return True

    def _forget(self, descriptor: int) -> None:
        if descriptor in self._resting:
            self._resting.discard(descriptor)
        else:
            self._poll.unregister(descriptor)
        _, handles = self._waiting.pop(descriptor)
        handles.close()

    def _receive(self, call: _Call) -> int:
        """Take what is there and give it to the program: what the call returns. OSError as from recvmsg(2)."""
        if call.count is None:
            return self._receive_one(call, call.message)
        message, done = call.message, 0
        try:
            while True:
                length = self._receive_one(call, message)
                write_length(call.caller, message, length)
                done += 1
                if done == call.count:
                    return done
                message = read_message(call.caller, message.at + MANY_SIZE)
        except OSError:
            if not done:
                raise
        return done

    def _receive_one(self, call: _Call, message: Message) -> int:
        """Take one datagram and give the program what it has room for; the length that recvmsg tells."""
        with _local_address_told(call.taken) as is_ours:
            header, length = self._take(call)
        name = ctypes.string_at(self._name, header.name_size)
        controls = read_controls(ctypes.string_at(self._control, header.control_size))
        local = next((one.data for one in controls if one.kind == _LOCAL), b"")
        if is_ours:
            controls = [one for one in controls if one.kind != _LOCAL]
        is_peeked = bool(call.flags & socket.MSG_PEEK)
        original = self._original_addresses(Datagram(name, local, ctypes.string_at(self._data, length), is_peeked))
        if original is not None:
            controls.append(Control((SOL_IP, IP_RECVORIGADDRS), original))
        control, flags = write_controls(controls, message.control_size)
        given = min(length, message.room)
        if given < length:
            flags |= socket.MSG_TRUNC
        write_message(call.caller, message, memoryview(self._data)[:given], name, control, header.flags | flags)
        return length if call.flags & socket.MSG_TRUNC else given

    def _take(self, call: _Call) -> tuple[_OwnMessage, int]:
        """Take all of a datagram into our own buffers: the message, and its length. OSError as from recvmsg(2)."""
        vector = _OwnVector(ctypes.addressof(self._data), LARGEST)
        header = _OwnMessage(
            name=ctypes.addressof(self._name),
            name_size=_NAME_SIZE,
            vectors=ctypes.addressof(vector),
            vector_count=1,
            control=ctypes.addressof(self._control),
            control_size=LARGEST,
        )
        length: int = _libc.recvmsg(call.taken.fileno(), ctypes.byref(header), call.flags | socket.MSG_DONTWAIT)
        if length < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return header, length

    def _original_addresses(self, datagram: Datagram) -> bytes | None:
        """The receiver's word; a receiver that fails knows nothing."""
        try:
            return self._receiver(datagram)
        except Exception:
            _log.exception("a datagram's original addresses cannot be told")
            return None


@contextlib.contextmanager
def _local_address_told(taken: socket.socket) -> Iterator[bool]:
    """Have the kernel tell with a datagram where it was delivered to; True unless the program asked for that itself."""
    is_ours = not taken.getsockopt(*_LOCAL)
    if is_ours:
        taken.setsockopt(*_LOCAL, 1)
    try:
        yield is_ours
    finally:
        if is_ours:
            taken.setsockopt(*_LOCAL, 0)


def _deadline(taken: socket.socket) -> float:
    """When a call that begins now ends by SO_RCVTIMEO."""
    seconds, microseconds = _TIMEOUT.unpack(taken.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT.size))
    return time.monotonic() + seconds + microseconds / 1e6 if seconds or microseconds else math.inf
