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
    """Who hears whom, worked out once for a topology."""

    def __init__(self, topology: Topology) -> None:
        self._subnets: dict[str, set[_Subnet]] = defaultdict(set)
        self._routers = {node.name for node in topology.nodes if node.kind is Kind.ROUTER}
        self._neighbours: dict[str, list[End]] = defaultdict(list)
        for segment in topology.segments():
            for end in segment:
                self._subnets[end.node].update(map(_subnet, end.addresses))
                self._neighbours[end.node] += [other for other in segment if other.node != end.node]

    def ways(self, start: str) -> _Ways:
        """The subnets that are not a node's own, by the gateway of the shortest way to them (breadth first)."""
        own = self._subnets[start]
        known = set(own)
        found: _Ways = {4: defaultdict(set), 6: defaultdict(set)}
        reached = {start}
        queue: deque[tuple[str, dict[int, Gateway]]] = deque([(start, {})])
        while queue:
            name, first_hop = queue.popleft()
            for neighbour in self._neighbours[name]:
                if neighbour.node in reached or neighbour.node not in self._routers:
                    continue
                hop = first_hop if name != start else _gateways(neighbour, own)
                if not hop:
                    continue
                reached.add(neighbour.node)
                queue.append((neighbour.node, hop))
                for subnet in self._subnets[neighbour.node] - known:
                    if gateway := hop.get(subnet[0]):
                        known.add(subnet)
                        found[subnet[0]][gateway].add(subnet)
        return found


def _subnet(address: Address) -> _Subnet:
    network = address.network
    return address.version, int(network.network_address), network.prefixlen


def _gateways(neighbour: End, own: set[_Subnet]) -> dict[int, Gateway]:
    """By family, the neighbour's address that a node with these subnets reaches without a gateway."""
    return {address.version: address.ip for address in reversed(neighbour.addresses) if _subnet(address) in own}


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
