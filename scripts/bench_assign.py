#!/usr/bin/env python3
"""Assign and unassign: pairs a second with one sockref beside, and with 100,000.

Three ways to make the same two calls: `bookkeeping` asks the socket API's core itself, in this process; `client` is the
Python client, and `program` a C program under `tproxyctl run`, both against a tproxyd in a namespace of their own. Each
pair has another foreign port. The many sockrefs are real: sockets of processes that hold them open as long as it takes.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

import benchlib

from nfq_engine.client import Tproxy
from nfq_engine.core.nat import PortRange
from nfq_engine.core.option import Operation, pack_address, pack_number
from nfq_engine.core.packet import Endpoint, Protocol
from nfq_engine.core.pipeline import Engine
from nfq_engine.core.sockopt import Socket, SocketApi
from nfq_engine.core.surroundings import AddressType
from testbed.lab import Lab, NodeHandle
from testbed.topology import EngineSpec, Node, Readiness, Topology

SOURCE: Final = Path(__file__).parents[1] / "tests" / "programs" / "assign_pairs.c"
SOCKREFS: Final = (1, 100_000)
PAIRS: Final = {"bookkeeping": 20_000, "client": 5_000, "program": 2_000}
FOREIGN: Final = "198.51.100.7"
FIRST_PORT, PORTS = 1024, 60_000
SPARE_DESCRIPTORS: Final = 100  # what a holder needs beside its sockets
PATIENCE: Final = 120.0


class NoInterfaces:
    """Interfaces without addresses: no rule is asked here."""

    def first_address(self, _name: str, _size: int) -> bytes | None:
        return None

    def address_type(self, address: bytes) -> AddressType:
        return AddressType.UNICAST


def others() -> Iterator[tuple[Endpoint, Endpoint]]:
    """Local and foreign endpoints of the sockrefs that are there all the time."""
    for block in range(256):
        local, foreign = bytes((127, 1, 0, block)), bytes((198, 18, 0, block))
        for port in range(FIRST_PORT, FIRST_PORT + PORTS):
            yield Endpoint(local, port), Endpoint(foreign, port)


def udp_socket(cookie: int, local: Endpoint) -> Socket:
    """A socket as the engine knows it."""
    return Socket(
        cookie=cookie,
        protocol=Protocol.UDP,
        local=local,
        is_connected=False,
        has_reuse_address=False,
        is_privileged=True,
        owner=0,
    )


def filled_api(sockrefs: int) -> SocketApi:
    """The socket API of an engine with so many sockrefs."""
    api = SocketApi(Engine(NoInterfaces(), random.Random(1), PortRange(32768, 60999)))
    for cookie, (local, foreign) in enumerate(islice(others(), sockrefs), 2):
        if error := api.set(udp_socket(cookie, local), pack_address(Operation.ASSIGN, foreign), 0.0):
            raise OSError(error, os.strerror(error))
    return api


def measure_bookkeeping(api: SocketApi) -> float:
    """Pairs a second of the core alone."""
    ours, unassign = udp_socket(1, Endpoint.of("127.0.0.1", 9)), pack_number(Operation.UNASSIGN)
    assigns = [pack_address(Operation.ASSIGN, foreign) for foreign in islice(foreigns(), PAIRS["bookkeeping"])]
    begin = time.perf_counter()
    for assign in assigns:
        if api.set(ours, assign, 0.0) or api.set(ours, unassign, 0.0):
            raise RuntimeError("a call failed")
    return len(assigns) / (time.perf_counter() - begin)


def foreigns() -> Iterator[Endpoint]:
    """The foreign endpoints of the pairs, one after another."""
    while True:
        for port in range(FIRST_PORT, FIRST_PORT + PORTS):
            yield Endpoint.of(FOREIGN, port)


# In the namespace: processes of their own.


def be_client() -> None:
    """Print the pairs a second of the Python client."""
    pairs = PAIRS["client"]
    with Tproxy() as tproxy, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
        ours.bind(("127.0.0.1", 0))
        begin = time.perf_counter()
        for number in range(pairs):
            tproxy.assign(ours, FOREIGN, FIRST_PORT + number % PORTS)
            tproxy.unassign(ours)
        print(pairs / (time.perf_counter() - begin))


def be_holder(first: int, last: int, notify: int) -> None:
    """Hold the sockrefs from `first` to `last` until somebody ends this process."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    held = []
    with Tproxy() as tproxy:
        for local, foreign in islice(others(), first, last):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((socket.inet_ntoa(local.address), local.port))
            tproxy.assign(sock, socket.inet_ntoa(foreign.address), foreign.port)
            held.append(sock)
    os.write(notify, b"\n")
    signal.pause()


# The measurement.


def running_engine(sockrefs: int, datapath: str, stack: ExitStack) -> NodeHandle:
    """A node with an engine that has so many sockrefs beside those that are measured."""
    node = Node("host", engine=EngineSpec(datapath=datapath))
    host = stack.enter_context(Lab(Topology(f"bench-assign-{sockrefs}", (node,), ()), capture=False))["host"]
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    step = descriptors - SPARE_DESCRIPTORS
    for first in range(0, sockrefs - 1, step):
        last = min(first + step, sockrefs - 1)
        command = ("{python}", __file__, "--hold", str(first), str(last), "{notify_fd}")
        host.start(f"holder-{first}", command, Readiness(notify=True, within=PATIENCE))
    return host


def measure_client(host: NodeHandle) -> float:
    return float(host.run([sys.executable, __file__, "--client"], timeout=PATIENCE).stdout)


def measure_program(host: NodeHandle, program: Path) -> float:
    command = ["tproxyctl", "run", "--", str(program), FOREIGN, str(PAIRS["program"])]
    return float(host.run(command, timeout=PATIENCE).stdout)


def compare(rounds: int, datapath: str) -> benchlib.Result:
    cases: dict[str, Callable[[], float]] = {}
    with ExitStack() as stack:
        program = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "assign_pairs"
        subprocess.run(["gcc", "-O2", "-o", program, SOURCE], check=True)
        for sockrefs in SOCKREFS:
            host = running_engine(sockrefs, datapath, stack)
            cases[f"bookkeeping, {sockrefs:,}"] = partial(measure_bookkeeping, filled_api(sockrefs - 1))
            cases[f"client, {sockrefs:,}"] = partial(measure_client, host)
            cases[f"program, {sockrefs:,}"] = partial(measure_program, host, program)
        samples = benchlib.run_paired(cases, rounds)
    few, many = (f"{sockrefs:,}" for sockrefs in SOCKREFS)
    ratios = {f"{way}, {many}/{few}": (f"{way}, {many}", f"{way}, {few}") for way in PAIRS}
    return benchlib.summarise(f"assign, {datapath}", "pairs/s", samples, ratios)


def main() -> None:
    options = benchlib.parser("Assign and unassign, with few sockrefs and with many.", 7)
    options.add_argument("--datapath", choices=("inline", "kernel"), default="inline", help="default: %(default)s")
    options.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--hold", nargs=3, type=int, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.client:
        be_client()
    elif chosen.hold:
        be_holder(*chosen.hold)
    else:
        benchlib.publish(compare(chosen.rounds, chosen.datapath), chosen.json)


if __name__ == "__main__":
    main()
