"""Many tracked connections: flows of strangers, put into the engine's own table and into the kernel's conntrack.

Owns: which flows they are, and how they get in. Must not know what is measured among them.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Final

from bench_forward import ASKED_PORT, datagram
from gateways import ELSEWHERE, GATEWAY

from nfq_engine.client import Tproxy
from nfq_engine.core.conntrack import Connection
from nfq_engine.core.packet import Endpoint, FlowTuple, Protocol
from nfq_engine.core.pipeline import Engine
from nfq_engine.shell.ctnetlink import KernelConntrack, tuple_attribute
from nfq_engine.shell.netlink import ERROR, LARGEST_READ, REQUEST, attribute, error_of, message, messages, open_socket
from testbed.lab import NodeHandle

REDIRECTED: Final = Endpoint.of(GATEWAY, 9001)
MARK: Final = 0x80000000

_ASKED: Final = Endpoint.of(ELSEWHERE, ASKED_PORT)
_PORTS: Final = range(20_000, 60_000)
_IPCTNL_MSG_CT_NEW: Final = 1 << 8 | 0
_CREATE: Final = 0x400
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_TIMEOUT, _CTA_MARK = 1, 2, 7, 8
_LIFETIME: Final = 3600  # seconds, of an entry in the kernel
_AT_ONCE: Final = 500  # of messages, and of datagrams
_PATIENCE: Final = 20.0


def strangers(count: int) -> Iterator[FlowTuple]:
    """Datagrams of many clients to one address elsewhere, which the gateway redirects to itself."""
    sources = (Endpoint.of(f"10.1.0.{host}", port) for host in range(1, 255) for port in _PORTS)
    return (FlowTuple(Protocol.UDP, source, _ASKED) for source in islice(sources, count))


def redirected(flow: FlowTuple) -> FlowTuple:
    """What a stranger's flow is inside."""
    return FlowTuple(flow.protocol, flow.source, REDIRECTED)


def fill_table(engine: Engine, flows: Iterable[FlowTuple]) -> None:
    """Enter connections of these flows into an engine's own table, as a rule's redirects."""
    for flow in flows:
        connection = Connection(flow, redirected(flow), 0.0)
        engine.connections.insert(connection)
        engine.connections.decide_source(connection, connection.inside)


def fill_conntrack(node: NodeHandle, flows: Iterable[tuple[FlowTuple, FlowTuple]], mark: int) -> None:
    """Enter connections into a node's conntrack: the flow, and what it becomes; OSError when it takes no more."""
    with node.call(open_socket) as kernel:
        while batch := list(islice(flows := iter(flows), _AT_ONCE)):
            kernel.send(b"".join(_entry(original, final, mark) for original, final in batch))
            _check(kernel)


def count_conntrack(node: NodeHandle, mark: int) -> int:
    """How many entries of a node's conntrack carry a mark; a tproxyd does not count anew each time it is asked."""
    conntrack = node.call(partial(KernelConntrack, mark))
    try:
        return len(conntrack.ours())
    finally:
        conntrack.close()


def _entry(original: FlowTuple, final: FlowTuple, mark: int) -> bytes:
    body = (
        tuple_attribute(_CTA_TUPLE_ORIG, original)
        + tuple_attribute(_CTA_TUPLE_REPLY, final.inverse())
        + attribute(_CTA_TIMEOUT, _LIFETIME.to_bytes(4, "big"))
        + attribute(_CTA_MARK, mark.to_bytes(4, "big"))
    )
    return message(_IPCTNL_MSG_CT_NEW, REQUEST | _CREATE, socket.AF_INET, 0, body)


def _check(kernel: socket.socket) -> None:
    """Raise what the kernel refused; it answers before `send` returns."""
    try:
        data = kernel.recv(LARGEST_READ, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return
    for kind, _, at, _ in messages(data):
        if kind == ERROR and error_of(data, at):
            raise OSError(error_of(data, at), "conntrack takes no more: see net.netfilter.nf_conntrack_max")


def send_through(client: NodeHandle, gateway: Tproxy, flows: Iterable[FlowTuple]) -> None:
    """Send a datagram of each flow through the gateway's engine, no faster than it takes them."""
    with client.namespace.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        while batch := list(islice(flows := iter(flows), _AT_ONCE)):
            for flow in batch:
                source = socket.inet_ntoa(flow.source.address)
                raw.sendto(datagram(source, ELSEWHERE, flow.source.port), (ELSEWHERE, 0))
            _await_empty_queue(gateway)


def counters(gateway: Tproxy) -> dict[str, Any]:
    """The engine's counters."""
    found: dict[str, Any] = gateway.call({"call": "counters"})["counters"]
    return found


def _await_empty_queue(gateway: Tproxy) -> None:
    deadline = time.monotonic() + _PATIENCE
    while waiting := counters(gateway)["queue"]["waiting"]:
        if time.monotonic() > deadline:
            raise OSError(errno.ETIMEDOUT, f"{waiting} packets still wait for the engine")
