"""The engine's end of the control socket.

Owns: connections of clients, their half-read lines, the descriptors they handed over. Must not know what the requests
mean: `answer` does. Place: beside the packets; the daemon's loop calls `accept` and `Client.serve` when they are ready.

No client can hold up the others: each is served one request a turn, its replies wait in its own buffer, and while they
wait it is not read.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nfq_engine import wire

_MOST_CLIENTS: Final = 512
_OWN_DESCRIPTORS: Final = 128  # that the rest of the engine may need
_READ: Final = 1 << 16
_LARGEST_OUTBOX: Final = 1 << 20  # bytes of events
_MOST_DESCRIPTORS: Final = 16
_CREDENTIALS: Final = struct.Struct("=3i")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, by the kernel's word at the time of connecting."""

    pid: int
    uid: int
    deliver: Callable[[bytes], bool]  # puts a line into its outbox; False when that is full


Answer = Callable[[Caller, wire.Message, int | None], wire.Message]


class Client:
    """One connected client."""

    def __init__(self, connection: socket.socket, answer: Answer) -> None:
        self._connection = connection
        self._answer = answer
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(credentials)
        self.caller = Caller(pid, uid, self._push)
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._unsent = bytearray()
        self._is_blocked = False  # it does not read what was sent

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._connection.fileno()

    @property
    def has_work(self) -> bool:
        """Is there something to do without waiting: to send what is new, or a whole request?"""
        return not self._is_blocked if self._unsent else b"\n" in self._received

    @property
    def wants_to_write(self) -> bool:
        """Does a reply wait for the client to read?"""
        return bool(self._unsent)

    def serve(self) -> bool:
        """Do what can be done now without waiting, one request at the most; False when the client is finished."""
        try:
            if self._unsent:
                self._send()
            elif self.has_work or self._receive():
                self._next_request()
            else:
                return False
        except BlockingIOError:
            pass
        except OSError:
            return False
        return len(self._received) <= wire.LONGEST_REQUEST

    def close(self) -> None:
        """Drop the connection and the descriptors that came with it."""
        self._connection.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def _receive(self) -> bool:
        """Read what is there; False at the end."""
        data, descriptors, _, _ = socket.recv_fds(
            self._connection, _READ, _MOST_DESCRIPTORS, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
        self._descriptors.extend(descriptors)
        self._received += data
        if len(self._descriptors) > _MOST_DESCRIPTORS:
            return False  # nobody who keeps to the protocol gets so far ahead
        return bool(data)

    def _next_request(self) -> None:
        """Answer one request, if a whole one is there."""
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return
        self._received = rest
        self._unsent[:0] = wire.encode(self._reply(bytes(line)))  # before the events that it asked for
        self._send()

    def _push(self, line: bytes) -> bool:
        """Put an event into the outbox; False when there is no room."""
        if len(self._unsent) > _LARGEST_OUTBOX:
            return False
        self._unsent += line
        return True

    def _send(self) -> None:
        """Send as much of the outbox as goes."""
        try:
            sent = self._connection.send(self._unsent)
        except BlockingIOError:
            sent = 0
        del self._unsent[:sent]
        self._is_blocked = bool(self._unsent)

    def _reply(self, line: bytes) -> wire.Message:
        """The reply to one line; the descriptor that belongs to it is closed in any case."""
        try:
            request = wire.decode(line)
        except (ValueError, RecursionError) as error:
            return {"error": f"not a request: {error}"}
        if request.get("with_socket") is not True:
            return self._answer(self.caller, request, None)
        if not self._descriptors:
            return {"error": "the request announces a socket, but none came with it"}
        descriptor = self._descriptors.popleft()
        try:
            return self._answer(self.caller, request, descriptor)
        finally:
            os.close(descriptor)


class ControlSocket:
    """The listening socket."""

    def __init__(self, answer: Answer) -> None:
        """Listen; OSError(EADDRINUSE) when an engine runs in this namespace already."""
        self._answer = answer
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._listening.bind(wire.ADDRESS)
            self._listening.listen(128)
        except OSError:
            self._listening.close()
            raise
        self.clients: set[Client] = set()
        self._most_clients = _most_clients()

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._listening.fileno()

    def accept(self) -> Client | None:
        """Take one new client; None when it has gone, or when there are too many, in all or of its user."""
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return None
        connection.setblocking(False)
        client = Client(connection, self._answer)
        of_its_user = sum(other.caller.uid == client.caller.uid for other in self.clients)
        if len(self.clients) >= self._most_clients or of_its_user >= self._most_clients // 2:
            client.close()
            return None
        self.clients.add(client)
        return client

    def drop(self, client: Client) -> None:
        """Forget a client."""
        self.clients.discard(client)
        client.close()

    def close(self) -> None:
        """Stop listening and drop every client."""
        for client in list(self.clients):
            self.drop(client)
        with contextlib.suppress(OSError):
            self._listening.close()


def _most_clients() -> int:
    """How many clients may be connected, each with all the descriptors that it may hand over, and leave us enough."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most == resource.RLIM_INFINITY:
        return _MOST_CLIENTS
    return max(2, min(_MOST_CLIENTS, (most - _OWN_DESCRIPTORS) // (2 * _MOST_DESCRIPTORS)))
