"""Bad input: a clear errno, nobody else delayed, nothing leaked; over the control socket and by unmodified programs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from engine_lab import TCP, UDP, EngineLab, engine_lab, until

from nfq_engine import wire
from nfq_engine.client import ControlError, Tproxy
from nfq_engine.core.option import Operation, pack_address, pack_number
from nfq_engine.core.packet import Endpoint
from testbed.topology import ENGINE

pytestmark = [pytest.mark.lab, pytest.mark.needs("seccomp-notify")]
pytest_plugins = ["supervisor_fixtures"]

RUN = ("tproxyctl", "run", "--")
FOREIGN = Endpoint.of("198.51.100.7", 7)
ASSIGN = pack_address(Operation.ASSIGN, FOREIGN)
REPLIES = {  # all that section 4 of tproxy.md has, and what any call on a descriptor may say
    "OK", "EPERM", "ENOENT", "EBADF", "EFAULT", "EEXIST", "EINVAL", "ENOTSOCK", "ENOPROTOOPT", "EADDRINUSE",
}  # fmt: skip
DELAY: Final = 0.005  # seconds; what 'a few milliseconds' are


@pytest.fixture(scope="module", params=["inline", "kernel"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineLab]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # as the engine finds it on most machines
    with engine_lab(tmp_path_factory.mktemp("lab"), datapath=request.param) as running:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        yield running


def engine_descriptors(lab: EngineLab) -> int:
    lab.tproxy.call({"call": "counters"})  # it has then served what came before
    return len(list(Path(f"/proc/{lab.lab.programs['gateway', ENGINE].pid}/fd").iterdir()))


@pytest.fixture(autouse=True)
def nothing_leaks(lab: EngineLab) -> Iterator[None]:
    """After each test the engine has as many descriptors and sockrefs as before."""
    before = engine_descriptors(lab)
    yield
    until(lambda: lab.tproxy.call({"call": "sockrefs"}) == {"sockrefs": []}, "no sockref remains")
    until(lambda: engine_descriptors(lab) == before, "the engine closes what it was given")


@pytest.fixture
def local(lab: EngineLab) -> Iterator[socket.socket]:
    """A bound socket in the gateway."""
    with lab.gateway.namespace.socket(socket.AF_INET, TCP) as made:
        made.bind((lab.gateway.address(4, "eth0"), 0))
        yield made


def connect(sock: socket.socket) -> None:
    """Connect to the engine, and wait for the turn if need be, which Python's own time limit would not."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("=qq", 5, 0))
    sock.connect(wire.ADDRESS)
    sock.settimeout(5)


@contextlib.contextmanager
def raw_client(lab: EngineLab) -> Iterator[socket.socket]:
    """A connection to the control socket, for bytes of any kind."""
    with lab.gateway.namespace.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        connect(made)
        yield made


# Values.


@pytest.mark.parametrize("length", [0, 1, 4, 7])
@pytest.mark.parametrize("call", ["setsockopt", "getsockopt"])
def test_short_values(lab: EngineLab, local: socket.socket, call: str, length: int) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        lab.tproxy.call({"call": call, "argument": ASSIGN[:length].hex()}, local.fileno())
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("length", [13, 4096, 400_000])
def test_of_long_values_the_beginning_counts(lab: EngineLab, local: socket.socket, length: int) -> None:
    lab.tproxy.setsockopt(local.fileno(), ASSIGN.ljust(length, b"\xff"))
    assert lab.tproxy.query(local) == FOREIGN
    lab.tproxy.unassign(local)


def test_garbage_values_get_an_errno_of_the_table(lab: EngineLab, local: socket.socket) -> None:
    chance = random.Random(4)
    seen = set()
    for _ in range(500):
        operation = chance.choice([*range(8), chance.getrandbits(32)]).to_bytes(4, "little")
        argument = (operation + chance.randbytes(36))[: chance.randrange(41)]
        try:
            chance.choice([lab.tproxy.setsockopt, lab.tproxy.getsockopt])(local.fileno(), argument)
            seen.add("OK")
        except OSError as problem:
            seen.add(errno.errorcode[problem.errno or 0])
    assert {"OK", "EINVAL", "ENOENT", "ENOPROTOOPT"} <= seen <= REPLIES


# Descriptors.


def pipe_end() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


NOT_FOR_US: list[tuple[str, Callable[[], int], int]] = [
    ("a-file", lambda: os.open("/etc/passwd", os.O_RDONLY), errno.ENOTSOCK),
    ("a-path", lambda: os.open("/etc/passwd", os.O_PATH), errno.EBADF),
    ("a-pipe", pipe_end, errno.ENOTSOCK),
    ("a-pidfd", lambda: os.pidfd_open(os.getpid()), errno.ENOTSOCK),
    ("memory", lambda: os.memfd_create("bad"), errno.ENOTSOCK),
    ("a-unix-socket", lambda: socket.socket(socket.AF_UNIX, UDP).detach(), errno.EINVAL),
    ("a-netlink-socket", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).detach(), errno.EINVAL),
    ("a-raw-socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).detach(), errno.EINVAL),
    ("a-packet-socket", lambda: socket.socket(socket.AF_PACKET, UDP).detach(), errno.EINVAL),
]


@pytest.mark.parametrize(("make", "expected"), [case[1:] for case in NOT_FOR_US], ids=[case[0] for case in NOT_FOR_US])
def test_descriptors_that_are_no_tcp_or_udp_sockets(lab: EngineLab, make: Callable[[], int], expected: int) -> None:
    descriptor = lab.gateway.call(make)
    try:
        for call in (lab.tproxy.setsockopt, lab.tproxy.getsockopt):
            with pytest.raises(OSError) as caught:  # noqa: PT011
                call(descriptor, ASSIGN)
            assert caught.value.errno == expected
    finally:
        os.close(descriptor)


def test_a_descriptor_that_is_not_there(lab: EngineLab) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        lab.tproxy.call({"call": "setsockopt", "argument": ASSIGN.hex()})
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("count", [1, 16, 200])
def test_descriptors_that_nobody_asked_for_are_closed(lab: EngineLab, count: int) -> None:
    with raw_client(lab) as client, Path(os.devnull).open() as null:
        socket.send_fds(client, [wire.encode({"call": "counters"})], [null.fileno()] * count)
        with contextlib.suppress(ConnectionResetError):  # so many that the engine hangs up
            client.recv(1 << 16)


# Requests.

DESTINATION: Final = {
    "call": "original-destination", "protocol": 17, "local": ["0a000001", 53], "peer": ["0a000002", 53],
}  # fmt: skip
BAD_REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("pid-infinite", {"pid": float("inf")}),
    ("pid-not-a-number", {"pid": float("nan")}),
    ("pid-enormous", {"pid": 10**30}),
    ("pid-negative", {"pid": -1}),
    ("pid-text", {"pid": "1"}),
    ("pid-null", {"pid": None}),
    ("pid-true", {"pid": True}),
    ("argument-number", {"argument": 12}),
    ("argument-null", {"argument": None}),
    ("argument-list", {"argument": []}),
    ("argument-odd", {"argument": "123"}),
    ("argument-no-hexadecimal", {"argument": "zz" * 12}),
    ("port-enormous", {**DESTINATION, "local": ["0a000001", 10**30]}),
    ("port-infinite", {**DESTINATION, "local": ["0a000001", float("inf")]}),
    ("port-negative", {**DESTINATION, "local": ["0a000001", -1]}),
    ("address-short", {**DESTINATION, "local": ["0a", 53]}),
    ("address-long", {**DESTINATION, "peer": ["00" * 1000, 53]}),
    ("two-families", {**DESTINATION, "peer": ["00" * 16, 53]}),
    ("endpoint-number", {**DESTINATION, "local": 1}),
    ("protocol-infinite", {**DESTINATION, "protocol": float("inf")}),
    ("protocol-object", {**DESTINATION, "protocol": {}}),
    ("digest-enormous", {**DESTINATION, "digest": 10**40}),
    ("digest-infinite", {**DESTINATION, "digest": float("inf")}),
    ("text-number", {"call": "restore", "text": 5}),
    ("text-half-a-character", {"call": "restore", "text": "\ud800"}),
    ("rules-of-numbers", {"call": "rules", "arguments": [1, 2]}),
    ("rules-half-a-character", {"call": "rules", "arguments": ["-A", "PREROUTING", "\ud800"]}),
    ("call-object", {"call": {}}),
]


@pytest.mark.parametrize("request_", [case[1] for case in BAD_REQUESTS], ids=[case[0] for case in BAD_REQUESTS])
def test_malformed_requests_are_told_and_harm_nobody(
    lab: EngineLab, local: socket.socket, request_: dict[str, Any]
) -> None:
    call = {"call": "setsockopt", "argument": ASSIGN.hex(), **request_}
    with pytest.raises(ControlError):
        lab.tproxy.call(call, None if "protocol" in call else local.fileno())
    assert lab.tproxy.call({"call": "sockrefs"}) == {"sockrefs": []}


def test_bytes_that_are_no_requests(lab: EngineLab) -> None:
    chance = random.Random(5)
    with raw_client(lab) as client:
        for _ in range(200):
            client.sendall(chance.randbytes(chance.randrange(1, 100)).replace(b"\n", b"") + b"\n")
            assert b"not a request" in client.recv(1 << 16)


# Floods.


def round_trips(tproxy: Tproxy, sock: socket.socket, seconds: float) -> list[float]:
    """How long a client waits for each of its replies, in seconds, when it asks every 2 ms."""
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.perf_counter()
        tproxy.setsockopt(sock.fileno(), pack_number(Operation.VERSION, 2 << 24))
        times.append(time.perf_counter() - begin)
        time.sleep(0.002)  # the pace of the measurement, not a wait for anything
    return times


def await_prompt_replies(tproxy: Tproxy, sock: socket.socket) -> None:
    """Ask for a while, again and again, until a tenth of the replies come in time.

    Behind an engine that serves a flood first, they never do; other programs delay some, and for a while all.
    """

    def prompt() -> float:
        times = sorted(round_trips(tproxy, sock, 0.8))
        return times[len(times) // 10]

    until(lambda: prompt() < DELAY, f"a tenth of the replies after less than {DELAY} s")


def ask_without_end(client: socket.socket) -> None:
    """Send requests as fast as they are taken, and read all replies."""
    requests = wire.encode({"call": "sockrefs"}) * 100
    with contextlib.suppress(OSError):
        while True:
            client.sendall(requests)
            client.recv(1 << 20)


def send_without_reading(client: socket.socket) -> None:
    """Send requests and never read a reply."""
    requests = wire.encode({"call": "counters"}) * 100
    with contextlib.suppress(OSError):
        while True:
            client.sendall(requests)


def send_one_endless_request(client: socket.socket) -> None:
    """Send a line that does not end, again and again."""
    with contextlib.suppress(OSError):
        while True:
            client.sendall(b"[" * 65536)


@pytest.mark.parametrize("flood", [ask_without_end, send_without_reading, send_one_endless_request])
def test_a_flood_from_one_client_delays_no_other(
    lab: EngineLab, local: socket.socket, flood: Callable[[socket.socket], None]
) -> None:
    is_over, clients = threading.Event(), list[socket.socket]()

    def flood_on() -> None:  # who says too much at once is shut out, and comes again
        while not is_over.is_set():
            with raw_client(lab) as client:
                clients.append(client)
                flood(client)

    flooding = threading.Thread(target=flood_on)
    with lab.gateway.call(Tproxy) as other:
        flooding.start()
        try:
            await_prompt_replies(other, local)
            assert flooding.is_alive()
        finally:
            is_over.set()
            while flooding.is_alive():
                with contextlib.suppress(OSError, IndexError):  # it may have none yet
                    clients[-1].shutdown(socket.SHUT_RDWR)
                flooding.join(0.1)


def test_a_request_is_answered_before_those_of_a_flood(lab: EngineLab, local: socket.socket) -> None:
    """Both wait when the engine looks; that it answers one of each in turn shows in what the flood is told."""
    engine, flood = lab.lab.programs["gateway", ENGINE].pid, 500
    with raw_client(lab) as client, raw_client(lab) as other:
        for each in (client, other):  # both are known to the engine when it is stopped
            each.sendall(wire.encode({"call": "sockrefs"}))
            each.recv(1 << 16)
        os.kill(engine, signal.SIGSTOP)
        try:
            client.sendall(wire.encode({"call": "sockrefs"}) * flood)
            request = {"call": "setsockopt", "argument": ASSIGN.hex(), "with_socket": True}
            socket.send_fds(other, [wire.encode(request)], [local.fileno()])
        finally:
            os.kill(engine, signal.SIGCONT)
        with client.makefile("rb") as replies:
            told = [json.loads(replies.readline())["sockrefs"] for _ in range(flood)]
    lab.tproxy.unassign(local)
    assert sum(sockrefs == [] for sockrefs in told) <= 2


def test_more_connections_than_allowed_leave_those_that_are_there(lab: EngineLab, local: socket.socket) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(600):
            stack.enter_context(raw_client(lab))
        lab.tproxy.setsockopt(local.fileno(), pack_number(Operation.VERSION, 2 << 24))


def test_descriptors_that_one_user_has_the_engine_hold_are_in_nobody_s_way(
    lab: EngineLab, local: socket.socket
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack, Path(os.devnull).open() as null:
        # The kernel lets a user who is not root have as many descriptors under way as he may have open.
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(8192, hard)), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(200):
            client = stack.enter_context(raw_client(lab))
            with contextlib.suppress(ConnectionError):  # one too many
                socket.send_fds(client, [b"[" * 10], [null.fileno()] * 16)  # of a request that never ends
        for _ in range(10):
            lab.tproxy.setsockopt(local.fileno(), pack_number(Operation.VERSION, 2 << 24))
        with lab.gateway.call(Tproxy) as other:
            other.setsockopt(local.fileno(), pack_number(Operation.VERSION, 2 << 24))


@pytest.mark.needs("other-users")
def test_a_user_with_all_connections_shuts_no_other_out(lab: EngineLab, local: socket.socket) -> None:
    nobody = 65534
    with contextlib.ExitStack() as stack:
        sockets = [lab.gateway.namespace.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(600)]
        for made in sockets:
            stack.enter_context(made)
        os.seteuid(nobody)
        try:
            for made in sockets:
                connect(made)
        finally:
            os.seteuid(0)
        with lab.gateway.call(Tproxy) as other:
            other.setsockopt(local.fileno(), pack_number(Operation.VERSION, 2 << 24))


def test_a_flood_of_connections_turns_no_other_client_away(lab: EngineLab, local: socket.socket) -> None:
    is_over = threading.Event()

    def connect_without_end() -> None:
        while not is_over.is_set():
            with contextlib.suppress(OSError), raw_client(lab):
                pass

    flooding = [threading.Thread(target=connect_without_end) for _ in range(4)]
    for thread in flooding:
        thread.start()
    try:
        for _ in range(200):
            with lab.gateway.call(Tproxy) as other:
                other.setsockopt(local.fileno(), pack_number(Operation.VERSION, 2 << 24))
    finally:
        is_over.set()
        for thread in flooding:
            thread.join()


# Unmodified programs.


def test_garbage_from_an_unmodified_program(lab: EngineLab, programs: Path) -> None:
    result = lab.gateway.run([*RUN, str(programs / "garbage"), "6", "3000"])
    counts = dict(line.split() for line in result.stdout.splitlines())
    assert sum(map(int, counts.values())) == 3000
    assert {"OK", "EINVAL", "EBADF", "ENOTSOCK", "ENOENT", "ENOPROTOOPT"} <= set(counts) <= REPLIES


def test_a_flood_from_a_program_delays_no_other(lab: EngineLab, local: socket.socket, programs: Path) -> None:
    program = lab.gateway.start("flood", [*RUN, str(programs / "flood"), "100000000"])
    until(lambda: lab.tproxy.call({"call": "counters"}), "the engine is there")
    try:
        await_prompt_replies(lab.tproxy, local)
        program.check()
    finally:
        program.stop()
        lab.lab.programs.pop(("gateway", "flood"))
