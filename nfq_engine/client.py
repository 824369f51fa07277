"""The Python client: what a proxy needs, in three lines.

    tproxy = Tproxy()
    tproxy.assign(sock, client_address, client_port)
    tproxy.set_flags(sock, Flag.CONNECT)

The calls are those of `setsockopt(IP_TPROXY)` and fail as it does: OSError with the errno that `sockopt.py` tells.
Without an engine in this network namespace: ENOPROTOOPT, as on a kernel without tproxy. ConnectionError when the engine
has ended meanwhile: what lives longer than an engine may asks through an `EngineConnection`.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable
from typing import Any, Final, TypeVar

from nfq_engine import wire
from nfq_engine.control_client import Control, ControlError
from nfq_engine.core.one_way import digest_of
from nfq_engine.core.option import Operation, pack_address, pack_number, unpack_address, unpack_number
from nfq_engine.core.packet import Endpoint, FlowTuple, Protocol
from nfq_engine.core.sockref import Flag

__all__ = ["ControlError", "Endpoint", "EngineConnection", "Flag", "Tproxy"]

_Result = TypeVar("_Result")

_LARGEST_DATAGRAM: Final = 0x10000
_CONTROL_SIZE: Final = 1024
# Control messages with the address that a datagram was delivered to: a struct sockaddr_in, a struct sockaddr_in6.
_IP_RECVORIGDSTADDR: Final = 20
_IPV6_RECVORIGDSTADDR: Final = 74
_LOCAL: Final = {(socket.SOL_IP, _IP_RECVORIGDSTADDR), (socket.IPPROTO_IPV6, _IPV6_RECVORIGDSTADDR)}


class Tproxy(Control):
    """A connection to the engine of this network namespace. One at a time may use it; a fork makes its own."""

    # The socket API.

    def assign(self, sock: socket.socket, address: str, port: int = 0) -> None:
        """Let a bound socket appear as a foreign address; port 0: picked later; address 0.0.0.0 or ::: mark only."""
        self.setsockopt(sock.fileno(), pack_address(Operation.ASSIGN, Endpoint.of(address, port)))

    def unassign(self, sock: socket.socket) -> None:
        """Take the assignment back."""
        self.setsockopt(sock.fileno(), pack_number(Operation.UNASSIGN))

    def set_flags(self, sock: socket.socket, flags: Flag) -> None:
        """Say what the foreign address is for: CONNECT, LISTEN or ESTABLISHED, with ONCE and UNIDIR.

        LISTEN | UNIDIR may be said of a bound UDP socket without one: what rules redirect to it is then one-way.
        """
        self.setsockopt(sock.fileno(), pack_number(Operation.FLAGS, flags))

    def connect(self, sock: socket.socket, address: str, port: int) -> None:
        """Narrow the assignment to a peer (this connects nothing)."""
        self.setsockopt(sock.fileno(), pack_address(Operation.CONNECT, Endpoint.of(address, port)))

    def alloc(self, sock: socket.socket) -> None:
        """Have a free foreign port picked now."""
        self.setsockopt(sock.fileno(), pack_number(Operation.ALLOC))

    def flags(self, sock: socket.socket) -> Flag:
        """The flags, APPLIED and MARK_ONLY among them."""
        return Flag(unpack_number(self.getsockopt(sock.fileno(), pack_number(Operation.FLAGS))))

    def query(self, sock: socket.socket) -> Endpoint:
        """The foreign address and port."""
        size = 4 if sock.family == socket.AF_INET else 16
        value = self.getsockopt(sock.fileno(), pack_number(Operation.QUERY))
        endpoint = unpack_address(value, min(size, len(value) - 8))
        if endpoint is None:
            raise ControlError(f"the engine's reply to QUERY is too short: {value.hex()}")
        return endpoint

    def original_destination(self, sock: socket.socket) -> Endpoint:
        """Where a redirected connection was going, asked with the accepted socket; ENOENT when it is no such."""
        return _flow_from(self.call({"call": "original-destination"}, sock.fileno()), Protocol.TCP).destination

    def original_of(self, local: Endpoint, peer: Endpoint, data: bytes, *, is_peeked: bool = False) -> FlowTuple:
        """Source and destination of a datagram before translation; ENOENT when it was not translated.

        `local` and `peer` are the addresses that it came with, `data` is all that it carried: one-way datagrams, of
        which no connection is kept, are told apart by it, and told once, unless MSG_PEEK left it in the socket.
        """
        request = {
            "call": "original-destination",
            "protocol": int(Protocol.UDP),
            "local": [local.address.hex(), local.port],
            "peer": [peer.address.hex(), peer.port],
            "digest": digest_of(data),
            "is_peeked": is_peeked,
        }
        return _flow_from(self.call(request), Protocol.UDP)

    def receive_original(self, sock: socket.socket) -> tuple[bytes, Endpoint, FlowTuple | None]:
        """Receive a datagram: all of it, its sender, and, if it was translated, its source and destination before that.

        What IP_RECVORIGADDRS is to unmodified programs. OSError as from recvmsg(2).
        """
        sock.setsockopt(socket.SOL_IP, _IP_RECVORIGDSTADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVORIGDSTADDR, 1)
        data, controls, _, name = sock.recvmsg(_LARGEST_DATAGRAM, _CONTROL_SIZE)
        peer = Endpoint.of(name[0].partition("%")[0], name[1]).unmapped
        local = next((_local_from(value) for level, kind, value in controls if (level, kind) in _LOCAL), None)
        if local is None:
            return data, peer, None
        try:
            return data, peer, self.original_of(local, peer, data)
        except FileNotFoundError:  # ENOENT
            return data, peer, None

    def setsockopt(self, descriptor: int, argument: bytes, pid: int | None = None) -> None:
        """setsockopt(IP_TPROXY) with the option's own bytes; `pid`: on whose behalf, if not our own."""
        self._sockopt("setsockopt", descriptor, argument, pid)

    def getsockopt(self, descriptor: int, argument: bytes, pid: int | None = None) -> bytes:
        """getsockopt(IP_TPROXY) with the option's own bytes."""
        return bytes.fromhex(self._sockopt("getsockopt", descriptor, argument, pid)["value"])

    def _sockopt(self, call: str, descriptor: int, argument: bytes, pid: int | None) -> wire.Message:
        request: dict[str, Any] = {"call": call, "argument": argument.hex()}
        if pid is not None:
            request["pid"] = pid
        return self.call(request, descriptor)


class EngineConnection:
    """The engine of this network namespace, for a program that outlives it: connected when a question needs it.

    A question that an engine's end interrupts is asked again, whole, of the next one. One thread at a time may ask, and
    in the namespace of the engine: elsewhere, there may be another.
    """

    def __init__(self) -> None:
        self._client: Tproxy | None = None

    def ask(self, question: Callable[[Tproxy], _Result]) -> _Result:
        """The engine's reply; OSError with its errno, ENOPROTOOPT when there is none, ETIMEDOUT when it is stuck."""
        try:
            return self._ask_once(question)
        except ConnectionError:  # the engine that was connected is gone; maybe there is a new one
            return self._ask_once(question)

    def _ask_once(self, question: Callable[[Tproxy], _Result]) -> _Result:
        if self._client is None:
            self._client = Tproxy()
        try:
            return question(self._client)
        except (ConnectionError, TimeoutError) as problem:  # a late reply must not meet the next question
            self._client.close()
            self._client = None
            if isinstance(problem, TimeoutError):
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from problem
            raise


def _flow_from(reply: wire.Message, protocol: Protocol) -> FlowTuple:
    """Source and destination of a reply."""
    source, destination = (Endpoint(bytes.fromhex(reply[end][0]), reply[end][1]) for end in ("source", "destination"))
    return FlowTuple(protocol, source, destination)


def _local_from(name: bytes) -> Endpoint:
    """The endpoint in a struct sockaddr_in or sockaddr_in6."""
    is_ipv4 = int.from_bytes(name[:2], sys.byteorder) == socket.AF_INET
    return Endpoint(name[4:8] if is_ipv4 else name[8:24], int.from_bytes(name[2:4], "big")).unmapped
