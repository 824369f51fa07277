"""A transparent TCP relay and a UDP echo service: the two proxies that the labs use, and the shortest examples of one.

The relay accepts a redirected connection, asks the engine where it was going, and connects there from a socket that it
has assigned the client's address: the client sees only the server, the server sees only the client.

The echo service listens on a foreign address: it owns the address of somebody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from typing import Final

import click

from nfq_engine.client import Endpoint, EngineConnection, Flag, Tproxy
from nfq_engine.core.packet import format_address

log: Final = logging.getLogger("relay")

_CHUNK: Final = 1 << 16
_PATIENCE: Final = 10.0  # seconds for a connection to the server


class TransparentRelay:
    """Relays every redirected TCP connection to where it was going, as the client."""

    def __init__(self, port: int, *, same_port: bool) -> None:
        """`same_port`: keep the client's port too, not only its address."""
        self._port = port
        self._same_port = same_port
        self._engine = EngineConnection()
        self._engine.ask(lambda _: None)  # without one to begin with, it says so now

    async def serve(self, notify: int | None) -> None:
        """Accept connections, IPv4 and IPv6, until cancelled."""
        server = await asyncio.start_server(self._relay, None, self._port, backlog=1024)
        _notify(notify)
        async with server:
            await server.serve_forever()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from its redirect to its end."""
        accepted: socket.socket = writer.get_extra_info("socket")
        client = Endpoint.of(*accepted.getpeername()[:2])
        try:
            destination = self._engine.ask(lambda engine: engine.original_destination(accepted))
            outward = self._socket_as(client, destination)
            async with asyncio.timeout(_PATIENCE):
                onward = await _connected(outward, destination)
        except OSError as error:
            log.warning("%s: %s", client, error)
            writer.transport.abort()
            return
        log.info("%s to %s, from %s", client, destination, outward.getsockname()[:2])
        await asyncio.gather(_pump(reader, onward[1]), _pump(onward[0], writer))
        for end in (writer, onward[1]):
            end.close()
            with contextlib.suppress(OSError):
                await end.wait_closed()

    def _socket_as(self, client: Endpoint, destination: Endpoint) -> socket.socket:
        """A socket that the server will see as the client."""
        family = socket.AF_INET if len(destination.address) == 4 else socket.AF_INET6
        outward = socket.socket(family, socket.SOCK_STREAM)
        try:
            outward.setblocking(False)
            outward.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            outward.bind((_local_address_towards(destination), 0))
            address, port = format_address(client.address), client.port if self._same_port else 0

            def own(engine: Tproxy) -> None:
                engine.assign(outward, address, port)
                engine.set_flags(outward, Flag.CONNECT)

            self._engine.ask(own)
        except OSError:
            outward.close()
            raise
        return outward


class ForeignEcho:
    """Echoes datagrams sent to an address that is not this host's."""

    def __init__(self, local: Endpoint, foreign: Endpoint) -> None:
        self._local = local
        self._foreign = foreign

    async def serve(self, notify: int | None) -> None:
        """Answer datagrams until cancelled."""
        family = socket.AF_INET if len(self._local.address) == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as sock, Tproxy() as tproxy:
            sock.setblocking(False)
            sock.bind((format_address(self._local.address), self._local.port))
            tproxy.assign(sock, format_address(self._foreign.address), self._foreign.port)
            tproxy.set_flags(sock, Flag.LISTEN)
            _notify(notify)
            loop = asyncio.get_running_loop()
            while True:
                data, peer = await loop.sock_recvfrom(sock, 0xFFFF)
                await loop.sock_sendto(sock, data, peer)


def _local_address_towards(destination: Endpoint) -> str:
    """The address that this host would use to reach a destination: a route look-up, no packet is sent."""
    family = socket.AF_INET if len(destination.address) == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((format_address(destination.address), destination.port or 1))
        address: str = probe.getsockname()[0]
        return address


async def _connected(
    outward: socket.socket, destination: Endpoint
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect a socket and make streams of it; it is closed when that fails."""
    try:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(outward, (format_address(destination.address), destination.port))
        return await asyncio.open_connection(sock=outward)
    except BaseException:
        outward.close()
        raise


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until the end, then pass the end on; a broken connection breaks the other one too."""
    try:
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        writer.transport.abort()


def _notify(descriptor: int | None) -> None:
    """Say that we are ready, in the way of `tproxyd --notify-fd`."""
    if descriptor is not None:
        os.write(descriptor, b"\n")
        os.close(descriptor)


def _endpoint(text: str) -> Endpoint:
    """An endpoint from `ADDRESS:PORT`, IPv6 in brackets."""
    address, colon, port = text.rpartition(":")
    try:
        if not colon or not 0 <= int(port) <= 0xFFFF:
            raise ValueError("no port from 0 to 65535")
        return Endpoint.of(address.strip("[]"), int(port))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not ADDRESS:PORT: {error}") from error


@click.group()
def main() -> None:
    """Small transparent proxies, for labs and as examples of the Python client."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")


_notify_fd = click.option("--notify-fd", type=click.IntRange(min=3), help="Write a newline there when ready.")


def _run(service: TransparentRelay | ForeignEcho, notify_fd: int | None) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(service.serve(notify_fd))


@main.command()
@click.option("--port", type=click.IntRange(1, 0xFFFF), required=True, help="Where redirected connections come in.")
@click.option("--same-port", is_flag=True, help="Use the client's port as well as its address.")
@_notify_fd
def tcp(port: int, same_port: bool, notify_fd: int | None) -> None:
    """Relay redirected TCP connections to where they were going, from the client's address."""
    _run(TransparentRelay(port, same_port=same_port), notify_fd)


@main.command("udp-echo")
@click.option("--local", required=True, help="ADDRESS:PORT to bind to.")
@click.option("--foreign", required=True, help="ADDRESS:PORT to be reached at.")
@_notify_fd
def udp_echo(local: str, foreign: str, notify_fd: int | None) -> None:
    """Echo datagrams that are sent to a foreign address."""
    _run(ForeignEcho(_endpoint(local), _endpoint(foreign)), notify_fd)


if __name__ == "__main__":
    main()
