#!/usr/bin/env python3
"""What an UNASSIGN costs while many connections are tracked: both ways of deletion, both datapaths.

The UDP socket that is unassigned has four connections; all others are strangers', redirected by a rule. `core` is the
call in the engine's core, in this process, with the engine's own table or with the conntrack of a namespace; `client`
is the call as a program makes it, from a tproxyd that runs. With `kernel`, the strangers' connections carry the tproxy
mark; `kernel, others unmarked` has strangers that the engine never saw, whose entries the kernel leaves out of a dump.

Then the case that the method was invented for: UDP sockets assigned, used and unassigned one after another, among
10,000 connections: how many a second, and what CPU time the engine takes for each.
"""

from __future__ import annotations

import itertools
import random
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import benchlib
import crowds
import gateways
from bench_assign import NoInterfaces, udp_socket
from bench_forward import ASKED_PORT, datagram
from matplotlib.figure import Figure

from nfq_engine.client import Tproxy
from nfq_engine.core.kernel_engine import KernelEngine
from nfq_engine.core.nat import PortRange
from nfq_engine.core.option import Operation, pack_address, pack_number
from nfq_engine.core.packet import Endpoint, FlowTuple, Hook, Protocol
from nfq_engine.core.pipeline import Engine
from nfq_engine.core.sockopt import SocketApi
from nfq_engine.core.sockref import Flag
from nfq_engine.core.tproxy_table import Arrival, Deletion
from nfq_engine.shell.ctnetlink import KernelConntrack
from testbed.topology import EngineSpec

SIZES: Final = (100, 1_000, 10_000, 100_000)
SEED_SIZE: Final = 10_000
SEED_SECONDS: Final = 2.0
RELATED: Final = 4
CLIENT: Final = "10.0.0.2"
FOREIGN: Final = Endpoint.of("198.51.100.9", ASKED_PORT)
LOCAL: Final = Endpoint.of(gateways.GATEWAY, 5000)
PEERS: Final = tuple(Endpoint.of(CLIENT, 10_000 + number) for number in range(RELATED))
RULE: Final = f"-A PREROUTING -p udp -m udp --dport {ASKED_PORT} -j TPROXY --on-port {crowds.REDIRECTED.port}"
PORTS: Final = PortRange(32768, 60999)
PATIENCE: Final = 10.0
STYLES: Final = {
    (", core", "scan"): "C3-",
    (", client", "scan"): "C3--",
    (", others unmarked, core", "scan"): "C1-",
    (", core", "linked"): "C0-",
    (", client", "linked"): "C0--",
}

# In the core, in this process.


class InlineCore:
    """An engine with its own table."""

    def __init__(self, deletion: Deletion) -> None:
        self.engine = Engine(NoInterfaces(), random.Random(1), PORTS, deletion)
        self.api = SocketApi(self.engine)

    def fill(self, present: int, count: int) -> None:
        """Have `count` strangers' connections, where there were `present`."""
        crowds.fill_table(self.engine, itertools.islice(crowds.strangers(count), present, None))

    def unassign(self) -> float:
        """Microseconds of an UNASSIGN."""
        assign(self.api)
        for packet in arrivals():
            self.engine.decide(packet)
        return unassigned(self.api)


class KernelCore:
    """An engine over the conntrack of a namespace; `mark` is what strangers' connections carry."""

    def __init__(self, deletion: Deletion, stack: ExitStack, mark: int = crowds.MARK) -> None:
        self._node = gateways.with_engine(None, stack)["gateway"]
        self._mark = mark
        self.conntrack = self._node.call(lambda: KernelConntrack(crowds.MARK))
        self.engine = KernelEngine(NoInterfaces(), random.Random(1), PORTS, self.conntrack, deletion)
        self.api = SocketApi(self.engine)
        stack.callback(self.conntrack.close)

    def fill(self, present: int, count: int) -> None:
        """Have `count` strangers' connections, where there were `present`."""
        crowds.fill_conntrack(self._node, mapped_strangers(present, count), self._mark)

    def unassign(self) -> float:
        """Microseconds of an UNASSIGN."""
        assign(self.api)
        for packet in arrivals():
            self.engine.decide(packet)
        flows = [FlowTuple(Protocol.UDP, peer, FOREIGN) for peer in PEERS]
        mapped = [FlowTuple(Protocol.UDP, peer, LOCAL) for peer in PEERS]
        crowds.fill_conntrack(self._node, zip(flows, mapped, strict=True), crowds.MARK)
        for flow in flows:
            entry = self.conntrack.find(flow)
            if entry is not None:
                self.engine.appeared(entry)
        took = unassigned(self.api)
        if any(self.conntrack.find(flow) for flow in flows):
            raise RuntimeError("UNASSIGN has left connections")
        return took


def assign(api: SocketApi) -> None:
    """Give the one socket its foreign address."""
    ours = udp_socket(1, LOCAL)
    for argument in (pack_address(Operation.ASSIGN, FOREIGN), pack_number(Operation.FLAGS, Flag.LISTEN)):
        if api.set(ours, argument, 0.0):
            raise RuntimeError("a call failed")


def unassigned(api: SocketApi) -> float:
    ours, argument = udp_socket(1, LOCAL), pack_number(Operation.UNASSIGN)
    begin = time.perf_counter()
    error = api.set(ours, argument, 0.0)
    took = time.perf_counter() - begin
    if error:
        raise RuntimeError("UNASSIGN failed")
    return took * 1e6


def arrivals() -> list[Arrival]:
    """The first datagrams of the socket's peers, as they come to PREROUTING."""
    return [
        Arrival(
            hook=Hook.PREROUTING,
            data=datagram(CLIENT, socket.inet_ntoa(FOREIGN.address), peer.port),
            in_interface="eth0",
            out_interface="",
            now=0.0,
        )
        for peer in PEERS
    ]


# Through the client, from a tproxyd.


class Running:
    """A gateway with tproxyd, and what its peers are."""

    def __init__(self, datapath: str, deletion: Deletion, stack: ExitStack) -> None:
        spec = EngineSpec(datapath=datapath, rules=(RULE,), options=("--deletion", deletion.value))
        self.lab = gateways.with_engine(spec, stack)
        self.is_inline = datapath == "inline"
        self.tproxy = stack.enter_context(self.lab["gateway"].call(Tproxy))
        self._far = self._bound("client", CLIENT, stack)
        self._bound("gateway", gateways.GATEWAY, stack, crowds.REDIRECTED.port)

    def fill(self, present: int, count: int) -> None:
        """Have `count` strangers' connections, where there were `present`; the engine's own time out unless used."""
        if self.is_inline:
            crowds.send_through(self.lab["client"], self.tproxy, crowds.strangers(count))
            found = crowds.counters(self.tproxy)["connections"]
        else:
            crowds.fill_conntrack(self.lab["gateway"], mapped_strangers(present, count), crowds.MARK)
            found = crowds.count_conntrack(self.lab["gateway"], crowds.MARK)
        if found != count:
            raise RuntimeError(f"{found} connections are tracked instead of {count}")

    def unassign(self) -> float:
        """Microseconds of an UNASSIGN."""
        with self.lab["gateway"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
            ours.settimeout(PATIENCE)
            ours.bind((gateways.GATEWAY, 0))
            self.tproxy.assign(ours, socket.inet_ntoa(FOREIGN.address), FOREIGN.port)
            self.tproxy.set_flags(ours, Flag.LISTEN)
            for far in self._far:
                far.sendto(b"?", (socket.inet_ntoa(FOREIGN.address), FOREIGN.port))
            for _ in self._far:
                ours.recv(16)
            begin = time.perf_counter()
            self.tproxy.unassign(ours)
            return (time.perf_counter() - begin) * 1e6

    def sockets(self) -> tuple[float, float]:
        """The seed's own case: sockets a second, and microseconds of the engine's CPU for each."""
        cpu, begin, count = gateways.engine_seconds(self.lab), time.perf_counter(), 0
        while (took := time.perf_counter() - begin) < SEED_SECONDS:
            self.unassign()
            count += 1
        return count / took, (gateways.engine_seconds(self.lab) - cpu) / count * 1e6

    def _bound(self, node: str, address: str, stack: ExitStack, *ports: int) -> list[socket.socket]:
        """UDP sockets that stay as long as the lab."""
        made = []
        for port in ports or [0] * RELATED:
            made.append(stack.enter_context(self.lab[node].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)))
            made[-1].bind((address, port))
        return made


def mapped_strangers(first: int, last: int) -> Iterable[tuple[FlowTuple, FlowTuple]]:
    """The strangers' flows from `first` to `last`, each with what it becomes."""
    return ((flow, crowds.redirected(flow)) for flow in itertools.islice(crowds.strangers(last), first, None))


# The measurement.

Subject = InlineCore | KernelCore | Running
GROUPS: Final = ("inline, core", "inline, client", "kernel, core", "kernel, client", "kernel, others unmarked, core")


def group(name: str, stack: ExitStack) -> dict[str, Subject]:
    """The ways of deletion that are compared in one place; strangers without a mark are there for `scan` only."""
    match name:
        case "inline, core":
            return {deletion.value: InlineCore(deletion) for deletion in Deletion}
        case "kernel, core":
            return {deletion.value: KernelCore(deletion, stack) for deletion in Deletion}
        case "kernel, others unmarked, core":
            return {Deletion.SCAN.value: KernelCore(Deletion.SCAN, stack, mark=0)}
        case _:
            datapath = name.partition(",")[0]
            return {deletion.value: Running(datapath, deletion, stack) for deletion in Deletion}


def measure(rounds: int) -> benchlib.Result:
    """All groups, one after another: the kernel has one table for all namespaces, and walks through all of it."""
    samples: dict[str, list[float]] = {}
    further: dict[str, float] = {}
    for name in GROUPS:
        with ExitStack() as stack:
            subjects = group(name, stack)
            for present, size in itertools.pairwise((0, *SIZES)):
                for subject in subjects.values():
                    subject.fill(present, size)
                cases: dict[str, Callable[[], float]] = {
                    f"{name}, {method}, {size:,}": subject.unassign for method, subject in subjects.items()
                }
                samples |= benchlib.run_paired(cases, rounds)
                if size == SEED_SIZE:
                    further |= seed_case(name, subjects)
    ratios = {
        f"scan/linked, {name}, {size:,}": (f"{name}, scan, {size:,}", f"{name}, linked, {size:,}")
        for name in GROUPS
        if f"{name}, linked, {SIZES[0]:,}" in samples
        for size in SIZES
    }
    return benchlib.summarise("unassign", "µs", samples, ratios, further)


def seed_case(name: str, subjects: dict[str, Subject]) -> dict[str, float]:
    """UDP sockets a second, and the engine's CPU time for each."""
    figures: dict[str, float] = {}
    for method, subject in subjects.items():
        if isinstance(subject, Running):
            rate, cpu = subject.sockets()
            figures[f"{name}, {method}: sockets/s"] = rate
            figures[f"{name}, {method}: engine CPU, µs each"] = cpu
    return figures


def plot(result: benchlib.Result, file: Path) -> None:
    """Cost against tracked connections, both axes logarithmic, a panel for each datapath."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, datapath in zip(panels, ("inline", "kernel"), strict=True):
        for (where, method), style in STYLES.items():
            costs = [result.cases.get(f"{datapath}{where}, {method}, {size:,}") for size in SIZES]
            if all(costs):
                medians = [cost.median for cost in costs if cost is not None]
                panel.loglog(SIZES, medians, style, marker="o", label=f"{method}{where}")
        panel.set_title(f"datapath {datapath}")
        panel.set_xlabel("tracked connections")
        panel.grid(visible=True, which="major", alpha=0.4)
        panel.legend()
    panels[0].set_ylabel("cost of one UNASSIGN, µs")
    figure.savefig(file, format="png", dpi=120)


def main() -> None:
    options = benchlib.parser(__doc__.splitlines()[0], rounds=7)
    options.add_argument("--png", type=benchlib.new_file, metavar="FILE", help="write the plot there")
    chosen = options.parse_args()
    result = measure(chosen.rounds)
    benchlib.publish(result, chosen.json)
    if chosen.png is not None:
        plot(result, chosen.png)


if __name__ == "__main__":
    main()
