"""Ready clients and servers for labs, as commands: `python -m testbed.traffic NAME`.

Owns: small TCP, UDP and HTTP programs that say when they are ready and what they saw. Must not know that they run in a
lab. What a server saw of its peers, and what a client got, is printed as one JSON object a line.
"""

from __future__ import annotations

import hashlib
import http.client
import http.server
import json
import os
import random
import socket
import sys
import time
import typing
import urllib.error
import urllib.request
from pathlib import Path

import click

_CHUNK = 1 << 16


def content(size: int) -> bytes:
    """The file that the HTTP server serves: for a size always the same bytes, with no pattern to hide a mix-up."""
    return random.Random(size).randbytes(size)


def _say(**fields: object) -> None:
    """Print one event."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def _ready(descriptor: int | None) -> None:
    if descriptor is not None:
        os.write(descriptor, b"\n")
        os.close(descriptor)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@click.group()
def main() -> None:
    """Small clients and servers for labs."""


_notify = click.option("--notify-fd", type=click.IntRange(min=3), help="Write a newline there when ready.")
_port = click.option("--port", type=click.IntRange(1, 0xFFFF), required=True)


class _DualStackServer(http.server.ThreadingHTTPServer):
    """An HTTP server for IPv6 and IPv4."""

    address_family = socket.AF_INET6
    daemon_threads = True

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


@main.command("http-server")
@_port
@click.option("--size", type=click.IntRange(0, 1 << 30), default=1 << 20, show_default=True, help="Bytes of a file.")
@_notify
def http_server(port: int, size: int, notify_fd: int | None) -> None:
    """Serve `content(SIZE)` at every path; print who asked for what."""
    body = content(size)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            _say(peer=self.client_address[0].removeprefix("::ffff:"), port=self.client_address[1], said=format % args)

    with _DualStackServer(("::", port), Handler) as server:
        _ready(notify_fd)
        server.serve_forever()


@main.command()
@click.argument("url")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the body there.")
@click.option("--timeout", type=float, default=15.0, show_default=True)
def fetch(url: str, output: Path | None, timeout: float) -> None:
    """Fetch a URL; print its status, size and SHA-256. Exit code 1: there was no answer, or not all of it."""
    started = time.monotonic()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with _answer(opener, url, timeout) as response:
            body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise click.ClickException(f"{url}: {error}") from error
    if output is not None:
        output.write_bytes(body)
    digest = hashlib.sha256(body).hexdigest()
    _say(status=response.status, size=len(body), sha256=digest, seconds=round(time.monotonic() - started, 3))


def _answer(opener: urllib.request.OpenerDirector, url: str, timeout: float) -> http.client.HTTPResponse:
    """What the server answers, whatever its status is."""
    try:
        response: http.client.HTTPResponse = opener.open(url, timeout=timeout)
    except urllib.error.HTTPError as error:
        return typing.cast(http.client.HTTPResponse, error)
    return response


@main.command("udp-ask")
@click.argument("address")
@_port
@click.option("--count", type=click.IntRange(1, 100_000), default=1, show_default=True)
@click.option("--size", type=click.IntRange(4, 65_507), default=64, show_default=True, help="Bytes of a datagram.")
@click.option("--timeout", type=float, default=2.0, show_default=True, help="Seconds to wait for each answer.")
def udp_ask(address: str, port: int, count: int, size: int, timeout: float) -> None:
    """Send datagrams from one socket and expect each back; print how many came, and from where."""
    senders: set[str] = set()
    came = 0
    with socket.socket(_family(address), socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        for number in range(count):
            sent = number.to_bytes(4, "big") + bytes(size - 4)
            sock.sendto(sent, (address, port))
            try:
                answer, peer = sock.recvfrom(0xFFFF)
            except TimeoutError:
                continue
            came += answer == sent
            senders.add(f"{peer[0]} {peer[1]}")
    _say(sent=count, answered=came, senders=sorted(senders))
    sys.exit(0 if came == count else 1)


@main.command("tcp-echo")
@_port
@_notify
def tcp_echo(port: int, notify_fd: int | None) -> None:
    """Send back what TCP connections say, one after the other; print each peer."""
    with socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        _ready(notify_fd)
        while True:
            connection, peer = server.accept()
            with connection:
                _say(peer=peer[0].removeprefix("::ffff:"), port=peer[1])
                while data := connection.recv(_CHUNK):
                    connection.sendall(data)


@main.command("udp-echo")
@_port
@click.option("--address", default="::", show_default=True)
@_notify
def udp_echo(port: int, address: str, notify_fd: int | None) -> None:
    """Send datagrams back; print each new peer."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as sock:
        sock.bind((address, port))
        _ready(notify_fd)
        seen = set()
        while True:
            data, peer = sock.recvfrom(0xFFFF)
            if peer not in seen:
                seen.add(peer)
                _say(peer=peer[0].removeprefix("::ffff:"), port=peer[1])
            sock.sendto(data, peer)


if __name__ == "__main__":
    main()
