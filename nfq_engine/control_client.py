"""The near end of the engine's control socket: one request, one reply, and events.

Owns: the connection, its time limits, and how a refusal is told. What can be asked for is `wire.py`'s matter and the
engine's; what a proxy asks for has names in `client.py`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from struct import Struct
from types import TracebackType
from typing import Final, Self

from nfq_engine import wire

_PATIENCE: Final = 10.0  # seconds; an engine answers in microseconds, so a silent one is stuck or stopped
# Seconds to look for the answer again and again before sleeping: to be woken takes longer than most answers do. Not
# where there is but one processor, which the engine needs.
_MOMENT: Final = 0.0002 if len(os.sched_getaffinity(0)) > 1 else 0.0
_READ: Final = 1 << 18
_TIME_LIMIT: Final = Struct("=qq")  # struct timeval


class ControlError(Exception):
    """The engine refused a request; the message is its own."""


def reason(error: OSError | ControlError) -> str:
    """Why a call failed, for a person."""
    return getattr(error, "strerror", None) or str(error)


class Control:
    """A connection to the engine of this network namespace. One at a time may use it; a fork makes its own."""

    def __init__(self) -> None:
        """Connect; OSError(ENOPROTOOPT) when no engine runs in this namespace."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._received = b""
        # Python's own time limit would have connect(2) fail at once while many others wait to be accepted.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIME_LIMIT.pack(int(_PATIENCE), 0))
        try:
            self._socket.connect(wire.ADDRESS)
        except ConnectionRefusedError as error:
            self._socket.close()
            raise OSError(errno.ENOPROTOOPT, "no tproxy engine runs in this network namespace") from error
        except BlockingIOError as error:
            self._socket.close()
            raise TimeoutError(errno.ETIMEDOUT, "the tproxy engine accepts no connection") from error
        self._socket.settimeout(_PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; assignments stay, they belong to their sockets."""
        self._socket.close()

    def call(self, request: wire.Message, descriptor: int | None = None) -> wire.Message:
        """Send one request and wait for its reply; OSError with the reply's errno, ControlError with its error."""
        if descriptor is None:
            self._socket.sendall(wire.encode(request))
        else:
            line = wire.encode({**request, "with_socket": True})
            sent = socket.send_fds(self._socket, [line], [descriptor])
            self._socket.sendall(line[sent:])
        reply = wire.decode(self._line())
        if reply.get("errno"):
            raise OSError(reply["errno"], reply.get("error", os.strerror(reply["errno"])))
        if "error" in reply:
            raise ControlError(reply["error"])
        return reply

    def _receive(self) -> bytes:
        """What the engine sent; b"" at its end."""
        end = time.perf_counter() + _MOMENT
        while time.perf_counter() < end:
            with contextlib.suppress(BlockingIOError):
                return os.read(self._socket.fileno(), _READ)
            os.sched_yield()  # to an engine on the same processor
        return self._socket.recv(_READ)

    def events(self) -> Iterator[wire.Message]:
        """After a call that listens (`monitor`, `trace`): wait for one event after the other.

        ConnectionError when the engine ends. The connection is of no other use any more.
        """
        self._socket.settimeout(None)
        while True:
            yield wire.decode(self._line())

    def _line(self) -> bytes:
        """One line from the engine."""
        pieces = [self._received]
        while b"\n" not in pieces[-1]:
            received = self._receive()
            if not received:
                raise ConnectionResetError(errno.ECONNRESET, "the tproxy engine closed the connection")
            pieces.append(received)
        line, _, self._received = b"".join(pieces).partition(b"\n")
        return line
