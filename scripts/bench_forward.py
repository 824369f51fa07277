"""UDP through the gateway, every packet through Python: this engine, accept-only NetfilterQueue, and the Scapy script.

Client, gateway, server, no offload. Each packet is queued at PREROUTING and at POSTROUTING, by the engine's own table,
in every case: `accept` only accepts; `scapy` dissects every packet that it gets, as such scripts do, and rebuilds those
that it changes, at PREROUTING; `engine` is tproxyd with a rule that redirects the flow to the server's other port. The
sender keeps a bounded number of packets under way, so nothing is dropped and nothing but forwarding is measured; the
connections are made before the clock starts.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import benchlib

from nfq_engine.core.rewrite import ones_complement_sum
from nfq_engine.shell import divert
from testbed.lab import Lab
from testbed.topology import EngineSpec, Node, Readiness, Service, Topology
from testbed.topology_file import loads

ASKED_PORT: Final = 9000
REDIRECTED_PORT: Final = 9001
QUEUE: Final = 11274
MARK: Final = 0x80000000
FLOWS: Final = (1, 10_000)
PACKETS: Final = {"engine": 30_000, "accept": 30_000, "scapy": 2_000}
WINDOW: Final = 512  # packets under way
CREDIT: Final = 64  # packets that the sink acknowledges at once
PAYLOAD: Final = bytes(64)
PATIENCE: Final = 20.0  # seconds until a stuck measurement is given up

TOPOLOGY: Final = """
name: bench-forward
nodes: {client: , gateway: {kind: router}, server: }
links:
  - ends: [{node: client}, {node: gateway}]
  - ends: [{node: gateway}, {node: server}]
"""


def topology(case: str) -> Topology:
    """The three nodes, with the engine or one of the scripts on the gateway."""
    base = loads(TOPOLOGY)
    rule = f"-A PREROUTING -p udp -m udp --dport {ASKED_PORT} -j TPROXY --on-port {REDIRECTED_PORT} --on-ip 10.0.1.2"
    worker = Service("worker", ("{python}", __file__, "--worker", case, "{notify_fd}"), Readiness(notify=True))
    gateway = base.node("gateway")
    busy = Node(
        gateway.name,
        gateway.kind,
        engine=EngineSpec(rules=(rule,)) if case == "engine" else None,
        services=() if case == "engine" else (worker,),
    )
    nodes = tuple(busy if node.name == "gateway" else node for node in base.nodes)
    return Topology(base.name, nodes, base.links)


def measure(case: str, flows: int) -> float:
    """Packets a second from client to server."""
    with Lab(topology(case), capture=False) as lab:
        source, destination = lab["client"].address(), lab["server"].address()
        port = ASKED_PORT if case == "accept" else REDIRECTED_PORT
        sink = lab["server"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        sink.bind((destination, port))
        raw = lab["client"].namespace.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        packets = [datagram(source, destination, 20_000 + flow) for flow in range(flows)]
        with sink, raw:
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reading)
                acknowledge(sink, writing)
            os.close(writing)
            try:
                signal.alarm(int(PATIENCE) + 10)
                send(raw, packets, max(flows, WINDOW), destination, reading)
                return send(raw, packets, PACKETS[case], destination, reading)
            finally:
                signal.alarm(0)
                os.close(reading)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def datagram(source: str, destination: str, port: int) -> bytes:
    """A whole IPv4 UDP packet; the kernel completes the IP header."""
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    length = 8 + len(PAYLOAD)
    udp = struct.pack("!HHHH", port, ASKED_PORT, length, 0)
    total = ones_complement_sum(addresses + struct.pack("!HH", socket.IPPROTO_UDP, length) + udp + PAYLOAD)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, socket.IPPROTO_UDP, 0)
    return header + addresses + udp[:6] + struct.pack("!H", total ^ 0xFFFF) + PAYLOAD


def send(raw: socket.socket, packets: list[bytes], count: int, destination: str, acknowledged: int) -> float:
    """Send `count` packets, over all flows in turn, as fast as they arrive; packets a second.

    RuntimeError when some do not arrive.
    """
    count -= count % CREDIT
    target, arrived, sent = (destination, 0), 0, 0
    started = time.perf_counter()
    while arrived < count:
        while sent < count and sent - arrived < WINDOW:
            raw.sendto(packets[sent % len(packets)], target)
            sent += 1
        if time.perf_counter() - started > PATIENCE:
            raise RuntimeError(f"only {arrived} of {sent} packets arrived in {PATIENCE:g} s")
        arrived += CREDIT * len(os.read(acknowledged, 1 << 10))
    return count / (time.perf_counter() - started)


def acknowledge(sink: socket.socket, acknowledged: int) -> None:
    """In a process of its own: a byte for every CREDIT packets that arrived. Ends with its parent's pipe, or alarm."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(PATIENCE) * 3)
    try:
        while True:
            for _ in range(CREDIT):
                sink.recv(2048)
            os.write(acknowledged, b".")
    except OSError:
        os._exit(0)


def worker(case: str, notify: int) -> None:
    """On the gateway: what others do with a queue."""
    from netfilterqueue import NetfilterQueue

    queue = NetfilterQueue()
    queue.bind(QUEUE, accept if case == "accept" else scapy_rewriter(), max_len=8192, sock_len=4 << 20)
    divert.build(divert.INLINE, QUEUE, MARK, fail_open=False)
    os.write(notify, b"\n")
    queue.run()


def accept(packet: Any) -> None:
    """The least that a queue can do."""
    packet.accept()


def scapy_rewriter() -> Callable[[Any], None]:
    """What scripts do: dissect, change, drop the checksums, rebuild."""
    from scapy.layers.inet import IP, UDP

    def rewrite(packet: Any) -> None:
        parsed = IP(packet.get_payload())
        if parsed.haslayer(UDP) and parsed[UDP].dport == ASKED_PORT:
            parsed[UDP].dport = REDIRECTED_PORT
            del parsed[IP].len, parsed[IP].chksum, parsed[UDP].len, parsed[UDP].chksum
            packet.set_payload(bytes(parsed))
        packet.accept()

    return rewrite


def main() -> None:
    """Run the benchmark, or, with --worker, be one of the scripts on the gateway."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], int(sys.argv[3]))
        return
    options = benchlib.parser(__doc__.splitlines()[0], rounds=5).parse_args()
    cases = {f"{case}, {flows} flows": partial(measure, case, flows) for flows in FLOWS for case in PACKETS}
    samples = benchlib.run_paired(cases, options.rounds)
    ratios = {
        f"engine/{other}, {flows} flows": (f"engine, {flows} flows", f"{other}, {flows} flows")
        for flows in FLOWS
        for other in ("accept", "scapy")
    }
    benchlib.publish(benchlib.summarise("forward", "packets/s", samples, ratios), options.json)


if __name__ == "__main__":
    main()
