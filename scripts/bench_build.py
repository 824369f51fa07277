#!/usr/bin/env python3
"""How long a lab takes to build and to delete: chains of 10 and 50 nodes, beside others doing the same.

A chain counts as built when a datagram of each family has come from its first node to its last: routes, neighbours,
carriers and addresses are all needed for that. `ip` runs once for each operation, as scripts have it. A chain counts as
deleted when the kernel begins to take its last namespace apart: nobody can find or hold it any more. mininet and munet
take part where they are installed; what they have no calls for, a shell in each node does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

import benchlib
import other_testbeds

from testbed.build import Builder
from testbed.netns import Namespace
from testbed.nsid import Watch
from testbed.plan import AddAddress, AddRoute, MakeLink, MakeNamespace, Operation, SetUp, StopOffload, plan
from testbed.shapes import chain
from testbed.topology import End, Topology

SIZES = (10, 50)
PATIENCE = 10.0  # seconds for a datagram to arrive, and for a deleted chain to be gone
SETTLE = 0.2  # seconds for what the kernel does late and tells nobody of
PORT = 7
NAMED = Path("/run/netns")  # where `ip` keeps its namespaces
PRIVATE = "BENCH_BUILD_PRIVATE"


class Maker(Protocol):
    """A way to build a chain."""

    def build(self, operations: Sequence[Operation]) -> None: ...
    def namespace(self, node: str) -> Namespace: ...
    def close(self) -> None: ...


class IpCommand:
    """Builds with one `ip` (or `sysctl`, `ethtool`) command an operation, in named namespaces."""

    def __init__(self) -> None:
        self._opened: dict[str, Namespace] = {}

    def build(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            for command in self._commands(operation):
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if isinstance(operation, MakeNamespace):
                self._opened[operation.node] = Namespace.at(NAMED / operation.node)

    def namespace(self, node: str) -> Namespace:
        return self._opened[node]

    def close(self) -> None:
        for node, namespace in self._opened.items():
            namespace.close()
            subprocess.run(["ip", "netns", "del", node], check=True)
        self._opened.clear()

    def _commands(self, operation: Operation) -> Iterator[list[str]]:
        match operation:
            case MakeNamespace(node, settings):
                yield ["ip", "netns", "add", node]
                yield [*self._inside(node), "sysctl", "-qw", *(f"{key}={value}" for key, value in settings)]
            case MakeLink(left, right, mtu):
                peer = ["type", "veth", "peer", *self._end(right, mtu)]
                yield ["ip", "link", "add", *self._end(left, mtu), *peer]
            case StopOffload(node, interface):
                yield [*self._inside(node), "ethtool", "-K", interface, "tx", "off"]
            case AddAddress(node, interface, address):
                yield [*self._ip(node), "addr", "add", str(address), "dev", interface]
            case SetUp(node, interface):
                yield [*self._ip(node), "link", "set", interface, "up"]
            case AddRoute(node, to, via):
                yield [*self._ip(node), "route", "add", str(to), "via", str(via)]

    def _ip(self, node: str) -> list[str]:
        return ["ip", "-n", node]

    def _inside(self, node: str) -> list[str]:
        return ["ip", "netns", "exec", node]

    def _end(self, end: End, mtu: int) -> list[str]:
        return ["name", end.interface, "netns", end.node, "mtu", str(mtu)]


def prove_ready(topology: Topology, maker: Maker) -> None:
    """Send a datagram of each family through the chain; ends the program when one does not arrive."""
    first, last = (maker.namespace(topology.nodes[place].name) for place in (0, -1))
    (end,) = topology.ends_of(topology.nodes[-1].name)
    for address in end.addresses:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with last.socket(family, socket.SOCK_DGRAM) as receiver, first.socket(family, socket.SOCK_DGRAM) as sender:
            receiver.bind((str(address.ip), PORT))
            receiver.settimeout(PATIENCE)
            sender.sendto(b"through", (str(address.ip), PORT))
            try:
                receiver.recv(16)
            except TimeoutError:
                sys.exit(f"{type(maker).__name__}: nothing came to {address.ip} in {PATIENCE:g} s")


def let_the_kernel_finish() -> None:
    """Wait until what was deleted before is gone: the kernel takes namespaces apart late, one batch after the other.

    Else whoever comes after munet, which does not wait for it, is measured with munet's leavings. That a namespace is
    the next is told; when it is done is not.
    """
    last = Namespace.new()
    with Watch({"last": last}) as watch:
        last.close()
        if watch.remaining(PATIENCE):
            sys.exit(f"the kernel still takes namespaces apart after {PATIENCE:g} s")
    time.sleep(SETTLE)


def measure(size: int, make: Callable[[], Maker], deleted: list[float]) -> float:
    """Milliseconds to build a chain, from the topology on; those to delete it are put into `deleted`."""
    topology = chain(size)
    let_the_kernel_finish()
    with ExitStack() as stack:
        maker = make()
        stack.callback(maker.close)
        started = time.perf_counter()
        maker.build(plan(topology))
        prove_ready(topology, maker)
        built = time.perf_counter() - started
        time.sleep(SETTLE)  # the kernel frees sockets late: those of the proof hold two of the namespaces
        with Watch({node.name: maker.namespace(node.name) for node in topology.nodes}) as watch:
            started = time.perf_counter()
            stack.close()
            if left := watch.remaining(PATIENCE):
                sys.exit(f"{type(maker).__name__} left {', '.join(left)}")
            deleted.append((time.perf_counter() - started) * 1e3)
    return built * 1e3


def run_in_private_mounts() -> None:
    """Begin again where /run is this process's own: the names that `ip` gives end with it, even when it is killed."""
    if PRIVATE not in os.environ:
        become = 'mount -t tmpfs tmpfs /run && exec "$@"'
        os.environ[PRIVATE] = "yes"
        os.execvp("unshare", ["unshare", "--mount", "sh", "-ec", become, "sh", sys.executable, *sys.argv])


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchlib.parser("Chains of nodes: built, and deleted again.", rounds=5)
    parser.add_argument("--munet", metavar="PYTHON", default="python3", help="the Python that has munet (%(default)s)")
    options = parser.parse_args(argv)
    run_in_private_mounts()
    makers: dict[str, Callable[[], Maker]] = {"testbed": Builder, "ip": IpCommand}
    pythons = other_testbeds.pythons(options.munet)
    makers |= {name: partial(other_testbeds.Other, name, python) for name, python in pythons.items()}
    deleted: dict[str, list[float]] = {}
    cases: dict[str, Callable[[], float]] = {}
    for size in SIZES:
        for name, make in makers.items():
            case = f"{name}, {size} nodes"
            cases[case] = partial(measure, size, make, deleted.setdefault(f"{case}, delete", []))
    samples = benchlib.run_paired(cases, options.rounds) | deleted
    ratios = {
        f"{name}/testbed, {what}": (f"{name}, {what}", f"testbed, {what}")
        for name in list(makers)[1:]
        for size in SIZES
        for what in (f"{size} nodes", f"{size} nodes, delete")
    }
    benchlib.publish(benchlib.summarise("build", "ms", samples, ratios), options.json)
    for name, remedy in other_testbeds.REMEDIES.items():
        if name not in makers:
            print(f"without {name}, which is not installed: {remedy}")


if __name__ == "__main__":
    main()
