"""Ready clients and servers for labs, as commands: `python -m testbed.traffic NAME`.

Owns: small TCP, UDP and HTTP programs that say when they are ready and what they saw. Must not know that they run in a
lab. What a server saw of its peers, and what a client got, is printed as one JSON object a line.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import http.server
import json
import os
import random
import signal
import socket
import socketserver
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
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


class _Programs(click.Group):
    """Programs that tell what keeps them from working in a line, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{where}{error.strerror or error}") from error


_EPILOG = """\b
Examples:
  python -m testbed.traffic http-server --port 80 --size 1000
  python -m testbed.traffic fetch http://10.0.1.2/
  python -m testbed.traffic tcp-echo --port 7
  python -m testbed.traffic tcp-ask 10.0.1.2 --port 7
  python -m testbed.traffic udp-echo --port 7
  python -m testbed.traffic udp-ask fd00::2 --port 7 --count 3

Exit codes: 0 done; 1 no answer, or not the right one, or it cannot work; 2 wrong usage;
3 an answer, but not one that can be read (fetch).
Servers run until they are ended."""


@click.group(cls=_Programs, epilog=_EPILOG)
def main() -> None:
    """Small clients and servers for labs, which print what they saw as JSON, an object a line."""


_SECONDS = click.FloatRange(0, min_open=True)
_notify = click.option("--notify-fd", type=click.IntRange(min=3), help="Write a newline there when ready.")
_port = click.option("--port", type=click.IntRange(1, 0xFFFF), required=True)


class _DualStackServer(http.server.ThreadingHTTPServer):
    """An HTTP server for IPv6 and IPv4."""

    address_family = socket.AF_INET6
    daemon_threads = True

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # HTTPServer looks up the host's own name: a DNS query in the lab, and a wait, where /etc/hosts lacks it.
        socketserver.TCPServer.server_bind(self)


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


class _UnreadableError(click.ClickException):
    """There was an answer, but not one that can be read."""

    exit_code = 3

    def __init__(self, url: str, error: Exception) -> None:
        super().__init__(f"{url}: an answer, but not one that can be read: {error or type(error).__name__}")


class _EveryStatus(urllib.request.HTTPErrorProcessor):
    """Takes an answer for what it is, whatever its status: it follows no redirect."""

    def http_response(
        self, request: urllib.request.Request, response: http.client.HTTPResponse
    ) -> http.client.HTTPResponse:
        return response

    https_response = http_response


class _TooLongError(Exception):
    """It took too long. No OSError: whoever tries one address after the other would go on to the next."""


@main.command()
@click.argument("url")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the body there.")
@click.option("--timeout", type=_SECONDS, default=15.0, show_default=True, help="Seconds that all of it may take.")
def fetch(url: str, output: Path | None, timeout: float) -> None:
    """Fetch a URL; print its status, size and SHA-256. Redirects are not followed.

    Exit code 1: there was no answer. 2: nobody could be asked, such as a name without an address. 3: there was an
    answer, but not all of it, or it is not HTTP.
    """
    started = time.monotonic()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _EveryStatus)
    with _limited(timeout):
        try:
            response = opener.open(url)
        except (ValueError, http.client.InvalidURL) as error:
            raise click.UsageError(f"{url}: {error}") from error
        except (OSError, _TooLongError) as error:  # http.client.RemoteDisconnected is an OSError, too
            raise _without_answer(url, error) from error
        except http.client.HTTPException as error:
            raise _UnreadableError(url, error) from error
        try:
            with response:
                body = response.read()
        except (OSError, _TooLongError, http.client.HTTPException) as error:
            raise _UnreadableError(url, error) from error
    if output is not None:
        output.write_bytes(body)
    digest = hashlib.sha256(body).hexdigest()
    _say(status=response.status, size=len(body), sha256=digest, seconds=round(time.monotonic() - started, 3))


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """_TooLongError when what is done inside takes longer; a socket's own limit begins anew with each piece."""

    def end(*_: object) -> None:
        raise _TooLongError(f"it took longer than {seconds:g} s")

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _without_answer(url: str, error: Exception) -> click.ClickException:
    """What a fetch ends with that got nothing of HTTP: nobody was asked, or said something else, or said nothing."""
    match error.reason if isinstance(error, urllib.error.URLError) else error:
        case str() | socket.gaierror() as reason:
            return click.UsageError(f"{url}: {reason}")
        case ssl.SSLError() as reason if not isinstance(reason, ssl.SSLEOFError):
            return _UnreadableError(url, reason)
    return click.ClickException(f"{url}: {error}")


@main.command("udp-ask")
@click.argument("address")
@_port
@click.option("--count", type=click.IntRange(1, 100_000), default=1, show_default=True)
@click.option("--size", type=click.IntRange(4, 65_507), default=64, show_default=True, help="Bytes of a datagram.")
@click.option("--timeout", type=_SECONDS, default=2.0, show_default=True, help="Seconds to wait for each answer.")
def udp_ask(address: str, port: int, count: int, size: int, timeout: float) -> None:
    """Send datagrams from one socket and expect each back; print how many came, and from where."""
    senders: set[str] = set()
    answered: set[int] = set()
    with socket.socket(_family(address), socket.SOCK_DGRAM) as sock:
        for number in range(count):
            sock.sendto(_datagram(number, size), (address, port))
            deadline = time.monotonic() + timeout
            # Before its answer may come that of an earlier one, late or once more.
            while number not in answered and (left := deadline - time.monotonic()) > 0:
                sock.settimeout(left)
                try:
                    answer, peer = sock.recvfrom(0xFFFF)
                except TimeoutError:
                    break
                senders.add(f"{peer[0]} {peer[1]}")
                about = int.from_bytes(answer[:4], "big")
                if about <= number and answer == _datagram(about, size):
                    answered.add(about)
    _say(sent=count, answered=len(answered), senders=sorted(senders))
    sys.exit(0 if len(answered) == count else 1)


def _datagram(number: int, size: int) -> bytes:
    return number.to_bytes(4, "big") + bytes(size - 4)


@main.command("tcp-ask")
@click.argument("address")
@_port
@click.option("--size", type=click.IntRange(1, 1 << 30), default=64, show_default=True, help="Bytes to send.")
@click.option("--timeout", type=_SECONDS, default=5.0, show_default=True, help="Seconds to wait for the next bytes.")
def tcp_ask(address: str, port: int, size: int, timeout: float) -> None:
    """Send `content(SIZE)` over a connection and expect it back. Exit code 1: there was no answer, or another."""
    sent, started, came = content(size), time.monotonic(), bytearray()
    try:
        with socket.create_connection((address, port), timeout) as connection:
            peer = connection.getpeername()
            # Beside the reading: a server that cannot get rid of its answer takes no more.
            sender = threading.Thread(target=_send_all, args=(connection, sent), daemon=True)
            sender.start()
            while len(came) < size and (data := _next_bytes(connection)):
                came += data
    except OSError as error:
        raise click.ClickException(f"{address} port {port}: {error.strerror or error}") from error
    if came != sent:
        what = "other bytes than were sent" if len(came) >= size else f"{len(came)} of {size} bytes"
        raise click.ClickException(f"{address} port {port} answered {what}")
    seconds = round(time.monotonic() - started, 3)
    _say(sent=size, answered=len(came), peer=f"{peer[0]} {peer[1]}", seconds=seconds)


def _send_all(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # whoever reads sees that less comes back
        connection.sendall(data)


def _next_bytes(connection: socket.socket) -> bytes:
    """What comes next; nothing at the end of the connection, and when nothing came in time."""
    try:
        return connection.recv(_CHUNK)
    except (TimeoutError, ConnectionError):
        return b""


class _Echo(socketserver.BaseRequestHandler):
    """Sends back what one connection says; prints the peer."""

    def handle(self) -> None:
        _say(peer=self.client_address[0].removeprefix("::ffff:"), port=self.client_address[1])
        with contextlib.suppress(ConnectionError):
            while data := self.request.recv(_CHUNK):
                self.request.sendall(data)


class _EchoServer(socketserver.ThreadingTCPServer):
    """A TCP server for IPv6 and IPv4, a thread a connection."""

    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


@main.command("tcp-echo")
@_port
@_notify
def tcp_echo(port: int, notify_fd: int | None) -> None:
    """Send back what TCP connections say; print each peer."""
    with _EchoServer(("::", port), _Echo) as server:
        _ready(notify_fd)
        server.serve_forever()


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
            with contextlib.suppress(OSError):  # the way back is closed: for one peer, or for now
                sock.sendto(data, peer)


if __name__ == "__main__":
    main()
