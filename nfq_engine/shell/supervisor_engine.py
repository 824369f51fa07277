"""The supervisor's handler and receiver that ask the engine of this network namespace.

Owns: what each option is called there. Must not know programs or their memory (supervisor.py). Place in the path:
between supervisor and the engine's control socket.

Without an engine a program sees a kernel without tproxy: ENOPROTOOPT, and SO_ORIGINAL_DST as the kernel has it.
"""

from __future__ import annotations

import errno
import os
import socket
from struct import Struct
from typing import Final

from nfq_engine.client import EngineConnection
from nfq_engine.core.option import IP_RECVORIGADDRS, IP_TPROXY
from nfq_engine.core.packet import Endpoint
from nfq_engine.shell.seccomp import SOL_IP, SOL_IPV6, Direction
from nfq_engine.shell.supervisor import SocketCall, SocketReply
from nfq_engine.shell.supervisor_receive import Datagram

_IPV4_NAME: Final = Struct("=H2s4s8x")  # struct sockaddr_in
_IPV6_NAME: Final = Struct("=H2s4x16s4x")  # struct sockaddr_in6


class EngineHandler:
    """Does each call at the engine.

    `has_receiver`: datagrams get their original addresses (`EngineReceiver`), so IP_RECVORIGADDRS may be switched on.
    """

    def __init__(self, *, has_receiver: bool) -> None:
        self._has_receiver = has_receiver
        self._engine = EngineConnection()

    def __call__(self, call: SocketCall) -> SocketReply:
        """The engine's reply."""
        try:
            return SocketReply(value=self._do(call))
        except OSError as problem:
            return SocketReply(problem.errno or errno.EIO)

    def _do(self, call: SocketCall) -> bytes:
        """The value of a getsockopt, nothing for a setsockopt; OSError with the call's errno."""
        if call.option == IP_TPROXY and call.direction is Direction.GET:
            return self._engine.ask(lambda engine: engine.getsockopt(call.socket_fd, call.value, call.thread))
        if call.option == IP_TPROXY:
            self._engine.ask(lambda engine: engine.setsockopt(call.socket_fd, call.value, call.thread))
            return b""
        if call.option != IP_RECVORIGADDRS:
            return self._original_destination(call)
        if not self._has_receiver:
            raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
        self._engine.ask(lambda engine: engine.call({"call": "counters"}))  # is there an engine?
        return b""

    def _original_destination(self, call: SocketCall) -> bytes:
        """SO_ORIGINAL_DST; of a connection that the engine does not translate, the kernel's own."""
        with socket.socket(fileno=os.dup(call.socket_fd)) as taken:
            try:
                name = _name(call, self._engine.ask(lambda engine: engine.original_destination(taken)))
            except OSError as problem:
                if problem.errno not in (errno.ENOENT, errno.ENOPROTOOPT):
                    raise
                return taken.getsockopt(call.level, call.option, min(call.length, _IPV6_NAME.size))
        if call.length < len(name):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return name


class EngineReceiver:
    """Asks the engine who sent each datagram, and where to."""

    def __init__(self) -> None:
        self._engine = EngineConnection()

    def __call__(self, datagram: Datagram) -> bytes | None:
        """The control message's bytes: IPv4 only, as the struct is; None for what the engine did not translate."""
        if len(datagram.local) != _IPV4_NAME.size:
            return None
        peer, local = _endpoint(datagram.source), _endpoint(datagram.local)
        try:
            original = self._engine.ask(
                lambda engine: engine.original_of(local, peer, datagram.data, is_peeked=datagram.is_peeked)
            )
        except OSError:
            return None
        ends = original.source, original.destination
        return b"".join((*(end.address for end in ends), *(end.port.to_bytes(2, "big") for end in ends)))


def _endpoint(name: bytes) -> Endpoint:
    """The IPv4 endpoint in a struct sockaddr_in, or in a struct sockaddr_in6, which has it mapped."""
    layout = _IPV4_NAME if len(name) == _IPV4_NAME.size else _IPV6_NAME
    _, port, address = layout.unpack(name)
    return Endpoint(address[-4:], int.from_bytes(port, "big"))


def _name(call: SocketCall, endpoint: Endpoint) -> bytes:
    """An endpoint as the struct sockaddr of the call's level; OSError (ENOENT) for one of the other family."""
    port = endpoint.port.to_bytes(2, "big")
    if call.level == SOL_IP and len(endpoint.address) == 4:
        return _IPV4_NAME.pack(socket.AF_INET, port, endpoint.address)
    if call.level == SOL_IPV6 and len(endpoint.address) == 16:
        return _IPV6_NAME.pack(socket.AF_INET6, port, endpoint.address)
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
