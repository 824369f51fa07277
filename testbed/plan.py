"""Plans: what has to be done to build a topology, in order, as values that can be printed and compared.

Owns: the order, the routes that follow from the topology, the settings that every namespace gets. Must not do anything:
build.py does.
"""

from __future__ import annotations

import ipaddress
from collections import deque
from dataclasses import dataclass
from typing import Final

from testbed.topology import Address, End, Kind, Topology

# What every namespace needs for a quiet, honest lab. Addresses are ready at once (no duplicate address detection),
# interfaces make up no IPv6 address of their own, and replies may take another way than requests (rp_filter: the larger
# of `all` and the interface counts). Link-local addresses are given by the plan: a router without one on an interface
# sends no neighbour solicitation for what it forwards (net/ipv6/ndisc.c, ndisc_send_ns), so traffic stops there.
_SETTINGS: Final = (
    ("net.ipv6.conf.default.accept_dad", "0"),
    ("net.ipv6.conf.all.accept_dad", "0"),
    ("net.ipv6.conf.default.addr_gen_mode", "1"),
    ("net.ipv6.conf.default.accept_ra", "0"),
    ("net.ipv4.conf.all.rp_filter", "0"),
    ("net.ipv4.conf.default.rp_filter", "0"),
)
_FORWARDING: Final = (("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1"))


@dataclass(frozen=True, slots=True)
class MakeNamespace:
    """Make a node's namespace, and its settings."""

    node: str
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class MakeBridge:
    """Make the bridge `br0` of a bridge node."""

    node: str


@dataclass(frozen=True, slots=True)
class MakeLink:
    """Make a veth pair between two namespaces. `index` is the left end's; the right one's differs (facts: carrier)."""

    left: End
    right: End
    mtu: int
    index: int


@dataclass(frozen=True, slots=True)
class StopOffload:
    """Have an interface send only what a wire would carry: whole checksums, one segment a packet."""

    node: str
    interface: str


@dataclass(frozen=True, slots=True)
class JoinBridge:
    """Make an interface a port of its node's bridge."""

    node: str
    interface: str


@dataclass(frozen=True, slots=True)
class AddAddress:
    """Give an interface an address."""

    node: str
    interface: str
    address: Address


@dataclass(frozen=True, slots=True)
class SetUp:
    """Set an interface up."""

    node: str
    interface: str


@dataclass(frozen=True, slots=True)
class AddRoute:
    """Add a route."""

    node: str
    to: ipaddress.IPv4Network | ipaddress.IPv6Network
    via: ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class WaitReady:
    """Wait until every interface of a node is up and every address usable."""

    node: str


@dataclass(frozen=True, slots=True)
class LoadRules:
    """Load the user's nft rules of a node."""

    node: str
    text: str


Operation = (
    MakeNamespace
    | MakeBridge
    | MakeLink
    | StopOffload
    | JoinBridge
    | AddAddress
    | SetUp
    | AddRoute
    | WaitReady
    | LoadRules
)


def plan(topology: Topology) -> list[Operation]:
    """The operations that build a topology."""
    operations: list[Operation] = []
    for node in topology.nodes:
        forwarding = _FORWARDING if node.kind is Kind.ROUTER else ()
        operations.append(MakeNamespace(node.name, (*_SETTINGS, *forwarding, *node.sysctls)))
    operations += [MakeBridge(node.name) for node in topology.nodes if node.kind is Kind.BRIDGE]
    operations += [
        MakeLink(link.left, link.right, link.mtu, 10 + 2 * number) for number, link in enumerate(topology.links)
    ]
    for node in topology.nodes:
        operations += _configuration(topology, node.name)
    operations += [WaitReady(node.name) for node in topology.nodes]
    operations += [LoadRules(node.name, node.nft) for node in topology.nodes if node.nft]
    return operations


def _configuration(topology: Topology, name: str) -> list[Operation]:
    """What is done inside one node."""
    node = topology.node(name)
    ends = topology.ends_of(name)
    operations: list[Operation] = []
    if not topology.offload:
        operations += [StopOffload(name, end.interface) for end in ends]
    if node.kind is Kind.BRIDGE:
        operations += [JoinBridge(name, end.interface) for end in ends]
        operations.append(SetUp(name, "br0"))
    for end in ends:
        operations += [AddAddress(name, end.interface, address) for address in (*end.addresses, *_link_local(end))]
    operations += [SetUp(name, interface) for interface in ("lo", *(end.interface for end in ends))]
    if node.kind is not Kind.BRIDGE:
        operations += [AddRoute(name, to, via) for to, via in _routes(topology, name)]
    return operations


def _link_local(end: End) -> list[Address]:
    """The link-local address of an interface with IPv6: its lower half is that of its first address."""
    ipv6 = [int(address.ip) for address in end.addresses if address.version == 6]
    lower_half = (1 << 64) - 1
    return [ipaddress.IPv6Interface((0xFE80 << 112 | ipv6[0] & lower_half, 64))] if ipv6 else []


_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Gateway = ipaddress.IPv4Address | ipaddress.IPv6Address


def _routes(topology: Topology, name: str) -> list[tuple[_Network, _Gateway]]:
    """A node's routes: those it was given, and for each family the shortest ways to all other subnets.

    A host whose ways all begin at one gateway gets a default route. Given routes to the same prefix come first.
    """
    given: dict[_Network, _Gateway] = {route.to: route.via for route in topology.node(name).routes}
    by_gateway = _ways(topology, name)
    for version in (4, 6):
        ways = {via: nets for via, nets in by_gateway.items() if via.version == version}
        if topology.node(name).kind is Kind.HOST and len(ways) == 1:
            (gateway,) = ways
            given.setdefault(ipaddress.ip_network("0.0.0.0/0" if version == 4 else "::/0"), gateway)
            continue
        for gateway, subnets in ways.items():
            for subnet in ipaddress.collapse_addresses(sorted(subnets)):  # type: ignore[type-var]
                given.setdefault(subnet, gateway)
    return list(given.items())


def _ways(topology: Topology, start: str) -> dict[_Gateway, set[_Network]]:
    """The subnets that are not a node's own, by the gateway of the shortest way to them (breadth first)."""
    segments = _segments(topology)
    known: set[_Network] = {address.network for end in topology.ends_of(start) for address in end.addresses}
    found: dict[_Gateway, set[_Network]] = {}
    reached = {start}
    queue: deque[tuple[str, dict[int, _Gateway]]] = deque([(start, {})])
    while queue:
        name, first_hop = queue.popleft()
        for neighbour in _neighbours(segments, name):
            if neighbour.node in reached or topology.node(neighbour.node).kind is not Kind.ROUTER:
                continue
            reached.add(neighbour.node)
            hop = first_hop or {address.version: address.ip for address in neighbour.addresses}
            queue.append((neighbour.node, hop))
            for end in topology.ends_of(neighbour.node):
                for address in end.addresses:
                    if address.network not in known and address.version in hop:
                        known.add(address.network)
                        found.setdefault(hop[address.version], set()).add(address.network)
    return found


def _neighbours(segments: list[list[End]], name: str) -> list[End]:
    """The ends of others that a node shares a segment with."""
    shared = [segment for segment in segments if any(end.node == name for end in segment)]
    return [end for segment in shared for end in segment if end.node != name]


def _segments(topology: Topology) -> list[list[End]]:
    """The ends that hear each other's frames: those of a link, and of all links that bridges join; bridges left out."""
    bridges = {node.name for node in topology.nodes if node.kind is Kind.BRIDGE}
    groups: list[list[End]] = []
    for link in topology.links:
        joined = [
            group
            for group in groups
            if any(end.node == other.node and end.node in bridges for end in link.ends for other in group)
        ]
        merged = [*link.ends, *(end for group in joined for end in group)]
        groups = [group for group in groups if group not in joined] + [merged]
    return [[end for end in group if end.node not in bridges] for group in groups]
