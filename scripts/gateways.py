"""Two gateways that do the same to a client's connections: one with the engine, one with a plain nft rule.

Owns: the topology, the program in C that makes load, and how the engine's CPU time is read. Must not know what is
measured. The client asks for port ASKED of an address that nobody has; the gateway sends it to its own port SERVED,
`engine` by a TPROXY rule and the kernel datapath, `plain` by a DNAT rule. Where TPROXY rules look at no addresses, the
kernel itself sends further connections where the engine sent the first; ASKED_EACH has the engine asked for each.
"""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from testbed.lab import Lab
from testbed.topology import ENGINE, EngineSpec, Node
from testbed.topology_file import loads

ASKED: Final = 80
SERVED: Final = 50080
GATEWAY: Final = "10.0.0.1"
ELSEWHERE: Final = "198.51.100.7"
CASES: Final = ("engine", "plain")
ASKED_EACH: Final = "engine, asked for each"  # its rule looks at addresses

_LOADS: Final = Path(__file__).parent / "load"
_TOPOLOGY: Final = """
name: bench-gateway
nodes: {client: {routes: [{to: 0.0.0.0/0, via: 10.0.0.1}]}, gateway: {kind: router}}
links: [{ends: [{node: client, addresses: [10.0.0.2/24]}, {node: gateway, addresses: [10.0.0.1/24]}]}]
"""
_BASE: Final = loads(_TOPOLOGY)
_GATEWAY_NODE: Final = _BASE.node("gateway")
_QUEUES: Final = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")


def running(case: str, stack: ExitStack, *, offload: bool = False) -> Lab:
    """A lab with one of the gateways, until the end of the stack; `offload` as in a topology."""
    if case != "plain":
        source = "-s 10.0.0.0/24 " if case == ASKED_EACH else ""
        rule = f"-A PREROUTING {source}-p tcp -m tcp --dport {ASKED} -j TPROXY --on-port {SERVED}"
        return with_engine(EngineSpec(datapath="kernel", rules=(rule,)), stack, offload=offload)
    rule = f"tcp dport {ASKED} dnat to {GATEWAY}:{SERVED}"
    chain = f"chain prerouting {{\ntype nat hook prerouting priority dstnat\n{rule}\n}}"
    return _entered(replace(_GATEWAY_NODE, nft=f"table ip plain {{\n{chain}\n}}\n"), stack, offload)


def with_engine(engine: EngineSpec | None, stack: ExitStack, *, offload: bool = False) -> Lab:
    """A lab whose gateway has this engine, or none, until the end of the stack."""
    return _entered(replace(_GATEWAY_NODE, engine=engine), stack, offload)


def _entered(gateway: Node, stack: ExitStack, offload: bool) -> Lab:
    nodes = tuple(gateway if node.name == gateway.name else node for node in _BASE.nodes)
    return stack.enter_context(Lab(replace(_BASE, nodes=nodes, offload=offload), capture=False))


def compiled(program: str, stack: ExitStack) -> Path:
    """A load program, in a folder that lasts until the end of the stack."""
    target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / program
    subprocess.run(["gcc", "-O2", "-o", target, _LOADS / f"{program}.c"], check=True)
    return target


def engine_seconds(lab: Lab) -> float:
    """CPU time that the gateway's engine has used, user and system."""
    return cpu_seconds(lab.programs["gateway", ENGINE].pid)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, user and system (Documentation/scheduler/sched-stats)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def queued(lab: Lab) -> int:
    """How many packets have come to the engine's queues (net/netfilter/nfnetlink_queue.c, seq_show)."""
    return lab["gateway"].call(lambda: sum(int(line.split()[7]) for line in _QUEUES.read_text().splitlines()))


def received(lab: Lab) -> int:
    """How many packets the gateway has got from the client; one that is yet to be cut into segments is one."""
    with lab["gateway"].route() as route:
        return sum(link.get_attr("IFLA_STATS64")["rx_packets"] for link in route.get_links(ifname="eth0"))
