"""Unmodified programs and the real engine: there, gone, and there again."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from supervisor_runs import ROOT, TIMEOUT, Start

from testbed.netns import Namespace

pytestmark = [pytest.mark.lab, pytest.mark.needs("seccomp-notify")]
pytest_plugins = ["supervisor_fixtures"]


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A network namespace with 127.0.0.1 in it."""
    with Namespace.new() as made:
        with made.entered():
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        yield made


class Engine:
    """A tproxyd in a namespace, ready."""

    def __init__(self, namespace: Namespace, *options: str) -> None:
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "nfq_engine.daemon", *options, "--notify-fd", str(writing)]
        with namespace.entered():
            self._process = subprocess.Popen(
                command, pass_fds=[writing], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
            )
        os.close(writing)
        with os.fdopen(reading) as notice:
            if notice.read() != "\n":
                pytest.fail(f"tproxyd is not ready: {self._process.communicate()[1].decode()}")

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=TIMEOUT)


# One ASSIGN on a new socket for each line that comes through the FIFO, which it holds open itself; prints the result.
ASSIGN_ON_DEMAND = """
import errno, socket, sys
sockets = []
for line in open(sys.argv[1]):
    sockets.append(socket.socket())
    sockets[-1].bind(("127.0.0.1", 0))
    argument = b"\\1\\0\\0\\0" + socket.inet_aton("192.0.2.7") + int(line).to_bytes(2, "big") + b"\\0\\0"
    try:
        sockets[-1].setsockopt(socket.SOL_IP, 11274, argument)
        print("OK", flush=True)
    except OSError as problem:
        print(errno.errorcode[problem.errno], flush=True)
"""


def test_a_program_outlives_engines(start: Start, namespace: Namespace, gate: Path) -> None:
    with namespace.entered():
        run = start(sys.executable, "-c", ASSIGN_ON_DEMAND, gate, engine=True)
    with gate.open("w", buffering=1) as orders:

        def assign(port: int) -> str:
            orders.write(f"{port}\n")
            return run.line()

        assert assign(80) == "ENOPROTOOPT"
        with Engine(namespace):
            assert assign(80) == "OK"
            assert assign(80) == "EADDRINUSE"
        assert assign(80) == "ENOPROTOOPT"
        with Engine(namespace):
            assert assign(80) == "OK"


def test_an_engine_that_does_not_answer_hangs_nobody(start: Start, namespace: Namespace, gate: Path) -> None:
    with namespace.entered():
        run = start(sys.executable, "-c", ASSIGN_ON_DEMAND, gate, engine=True, patience=6)
    with Engine(namespace) as engine, gate.open("w", buffering=1) as orders:
        for number, port, expected in [(None, 80, "OK"), (signal.SIGSTOP, 81, "ETIMEDOUT"), (signal.SIGCONT, 82, "OK")]:
            if number is not None:
                engine.send_signal(number)
            orders.write(f"{port}\n")
            assert run.line() == expected


REDIRECT = """*tproxy
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A OUTPUT -p tcp -m tcp --dport 80 -j TPROXY --on-port {port}
-A OUTPUT -p udp -m udp --dport 53 -j TPROXY --on-port {port}
COMMIT
"""


def redirect_by_engine(namespace: Namespace, port: int, folder: Path) -> contextlib.AbstractContextManager[object]:
    ruleset = folder / "ruleset"
    ruleset.write_text(REDIRECT.format(port=port))
    return Engine(namespace, "--ruleset", str(ruleset))


def redirect_without_engine(namespace: Namespace, port: int, _: Path) -> contextlib.AbstractContextManager[object]:
    rules = f"type nat hook output priority -100; tcp dport 80 redirect to :{port};"
    with namespace.entered():
        subprocess.run(["nft", f"table ip user {{ chain out {{ {rules} }}; }}"], check=True)
    return contextlib.nullcontext()


def redirect_beside_engine(namespace: Namespace, port: int, folder: Path) -> contextlib.AbstractContextManager[object]:
    redirect_without_engine(namespace, port, folder)
    return Engine(namespace)


@pytest.mark.parametrize("redirect", [redirect_by_engine, redirect_beside_engine, redirect_without_engine])
def test_the_original_destination_whoever_redirected(
    start: Start,
    namespace: Namespace,
    tmp_path: Path,
    redirect: Callable[[Namespace, int, Path], contextlib.AbstractContextManager[object]],
) -> None:
    with namespace.entered():
        run = start("original_destination", "127.0.0.1", 0, engine=True, original_dst=True)
    with redirect(namespace, int(run.line().rpartition(":")[2]), tmp_path):
        with namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(TIMEOUT)
            client.connect(("127.0.0.1", 80))
            assert run.line() == "destination 127.0.0.1:80"
        assert run.output() == ""


def test_a_datagram_s_original_destination(start: Start, namespace: Namespace, tmp_path: Path) -> None:
    with (
        redirect_by_engine(namespace, 50053, tmp_path),
        namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        with namespace.entered():
            run = start("udp_origin", "127.0.0.1", 50053, engine=True)
        assert run.line() == "local 127.0.0.1:50053"
        client.bind(("127.0.0.1", 40000))
        client.sendto(b"are you there?", ("127.0.0.1", 53))
        assert run.output() == "source 127.0.0.1:40000\ndestination 127.0.0.1:53\n"
