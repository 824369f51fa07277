"""Routes that follow from a topology: for each node, the shortest ways to all other subnets.

Owns: the graph of who hears whom, and the search in it. Pure; plan.py makes operations of what comes out.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict, deque
from typing import Final

from testbed.topology import Address, End, Gateway, Kind, Network, Node, Topology

_DEFAULT: Final[dict[int, Network]] = {4: ipaddress.IPv4Network("0.0.0.0/0"), 6: ipaddress.IPv6Network("::/0")}

# A subnet as numbers: family, network address, prefix length. Ten times as fast to compare as ipaddress's, and a chain
# of 50 nodes takes 10,000 comparisons.
_Subnet = tuple[int, int, int]

# By address family: a gateway and the subnets that lie behind it.
_Ways = dict[int, dict[Gateway, set[_Subnet]]]


def routes(topology: Topology) -> dict[str, list[tuple[Network, Gateway]]]:
    """The routes of each node but bridges: those it was given, then those worked out.

    A host whose ways of one family all begin at one gateway gets a default route instead of one for each subnet. A
    route that was given stands, whatever the search finds for the same prefix.
    """
    graph = _Graph(topology)
    return {node.name: _routes(graph, node) for node in topology.nodes if node.kind is not Kind.BRIDGE}


def _routes(graph: _Graph, node: Node) -> list[tuple[Network, Gateway]]:
    chosen: dict[Network, Gateway] = {route.to: route.via for route in node.routes}
    for version, ways in graph.ways(node.name).items():
        if node.kind is Kind.HOST and len(ways) == 1:
            chosen.setdefault(_DEFAULT[version], *ways)
            continue
        for gateway, subnets in ways.items():
            for subnet in _collapsed(subnets):
                chosen.setdefault(subnet, gateway)
    return list(chosen.items())


class _Graph:
    """Who hears whom, worked out once for a topology.

    Each family has ways of its own: a link may carry one and not the other. Link-local addresses are no part of any: a
    route by one would have to name the interface, and what lies behind it is the link itself.
    """

    def __init__(self, topology: Topology) -> None:
        routers = {node.name for node in topology.nodes if node.kind is Kind.ROUTER}
        # By family and node: its subnets, and the routers next to it.
        self._subnets: dict[int, dict[str, set[_Subnet]]] = {family: defaultdict(set) for family in _DEFAULT}
        self._gateways: dict[int, dict[str, list[tuple[str, Gateway]]]] = {
            family: defaultdict(list) for family in _DEFAULT
        }
        for segment in topology.segments():
            for end in segment:
                own = {_subnet(address) for address in _routed(end)}
                for subnet in own:
                    self._subnets[subnet[0]][end.node].add(subnet)
                for other in segment:
                    if other.node != end.node and other.node in routers:
                        for version, gateway in _gateways(other, own).items():
                            self._gateways[version][end.node].append((other.node, gateway))

    def ways(self, start: str) -> _Ways:
        """The subnets that are not a node's own, by the gateway of the shortest way to them (breadth first)."""
        return {version: self._ways(version, start) for version in _DEFAULT}

    def _ways(self, version: int, start: str) -> dict[Gateway, set[_Subnet]]:
        subnets, gateways = self._subnets[version], self._gateways[version]
        known = set(subnets[start])
        found: dict[Gateway, set[_Subnet]] = defaultdict(set)
        reached = {start}
        queue: deque[tuple[str, Gateway | None]] = deque([(start, None)])
        while queue:
            name, first_hop = queue.popleft()
            for neighbour, gateway in gateways[name]:
                if neighbour in reached:
                    continue
                reached.add(neighbour)
                hop = first_hop or gateway
                queue.append((neighbour, hop))
                if fresh := subnets[neighbour] - known:
                    known |= fresh
                    found[hop] |= fresh
        return found


def _routed(end: End) -> list[Address]:
    """The addresses of an end that routes may begin at or lead to."""
    return [address for address in end.addresses if not (address.version == 6 and address.is_link_local)]


def _subnet(address: Address) -> _Subnet:
    network = address.network
    return address.version, int(network.network_address), network.prefixlen


def _gateways(neighbour: End, own: set[_Subnet]) -> dict[int, Gateway]:
    """By family, the neighbour's address that an end with these subnets reaches without a gateway."""
    return {address.version: address.ip for address in reversed(_routed(neighbour)) if _subnet(address) in own}


def _collapsed(subnets: set[_Subnet]) -> list[Network]:
    """The fewest prefixes that cover these subnets of one family and nothing else."""
    left, done = set(subnets), []
    while left:
        version, number, length = subnet = max(left, key=lambda each: each[2])
        left.remove(subnet)
        bit = 1 << ((32 if version == 4 else 128) - length)
        sibling = (version, number ^ bit, length)
        if length and sibling in left:
            left.remove(sibling)
            left.add((version, number & ~bit, length - 1))
        else:
            done.append(subnet)
    return [_network(*subnet) for subnet in sorted(done)]


def _network(version: int, number: int, length: int) -> Network:
    return ipaddress.IPv4Network((number, length)) if version == 4 else ipaddress.IPv6Network((number, length))
