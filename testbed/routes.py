"""Routes that follow from a topology: for each node, the shortest ways to all other subnets.

Owns: the graph of who hears whom, and the search in it. Pure; plan.py makes operations of what comes out.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Final

from testbed.topology import Address, End, Gateway, Kind, Network, Node, Topology, is_link_local

_DEFAULT: Final[dict[int, Network]] = {4: ipaddress.IPv4Network("0.0.0.0/0"), 6: ipaddress.IPv6Network("::/0")}

# A subnet as numbers: network address, prefix length. Ten times as fast to compare as ipaddress's.
_Subnet = tuple[int, int]

# By address family: a gateway, and the subnets that lie behind it.
_Ways = dict[int, list[tuple[Gateway, list[_Subnet]]]]


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
            chosen.setdefault(_DEFAULT[version], ways[0][0])
            continue
        for gateway, subnets in ways:
            for subnet in _collapsed(version, subnets):
                chosen.setdefault(subnet, gateway)
    return list(chosen.items())


class _Graph:
    """Who hears whom, worked out once for a topology.

    Each family has ways of its own: a link may carry one and not the other. Link-local addresses are no part of any: a
    route by one would have to name the interface, and what lies behind it is the link itself.
    """

    def __init__(self, topology: Topology) -> None:
        routers = {node.name for node in topology.nodes if node.kind is Kind.ROUTER}
        # By family: its subnets. By family and node: its own, each a bit at its place among these, since a chain of 50
        # nodes takes 10,000 unions; and the routers next to it.
        self._subnets: dict[int, list[_Subnet]] = {family: [] for family in _DEFAULT}
        self._own: dict[int, dict[str, int]] = {family: defaultdict(int) for family in _DEFAULT}
        self._gateways: dict[int, dict[str, list[tuple[str, Gateway]]]] = {
            family: defaultdict(list) for family in _DEFAULT
        }
        bits: dict[tuple[int, _Subnet], int] = {}
        for segment in topology.segments():
            heard = [(end.node, _routed(end)) for end in segment]
            for node, addresses in heard:
                own: set[tuple[int, _Subnet]] = {(address.version, _subnet(address)) for address in addresses}
                for version, subnet in own:
                    if (version, subnet) not in bits:
                        bits[version, subnet] = 1 << len(self._subnets[version])
                        self._subnets[version].append(subnet)
                    self._own[version][node] |= bits[version, subnet]
                for other, theirs in heard:
                    if other != node and other in routers:
                        for version, gateway in _gateways(theirs, own).items():
                            self._gateways[version][node].append((other, gateway))

    def ways(self, start: str) -> _Ways:
        """The subnets that are not a node's own, by the gateway of the shortest way to them (breadth first)."""
        return {version: self._ways(version, start) for version in _DEFAULT}

    def _ways(self, version: int, start: str) -> list[tuple[Gateway, list[_Subnet]]]:
        own, gateways = self._own[version], self._gateways[version]
        known = own[start]
        found: dict[int, int] = defaultdict(int)  # by the place of the first hop among the gateways of the start
        reached = {start}
        queue: deque[tuple[str, int | None]] = deque([(start, None)])
        while queue:
            name, first_hop = queue.popleft()
            for place, (neighbour, _) in enumerate(gateways[name]):
                if neighbour in reached:
                    continue
                reached.add(neighbour)
                hop = place if first_hop is None else first_hop
                queue.append((neighbour, hop))
                if fresh := own[neighbour] & ~known:
                    known |= fresh
                    found[hop] |= fresh
        return [(gateways[start][hop][1], self._listed(version, subnets)) for hop, subnets in found.items()]

    def _listed(self, version: int, subnets: int) -> list[_Subnet]:
        return [subnet for place, subnet in enumerate(self._subnets[version]) if subnets >> place & 1]


def _routed(end: End) -> list[Address]:
    """The addresses of an end that routes may begin at or lead to."""
    return [address for address in end.addresses if not is_link_local(address)]


def _subnet(address: Address) -> _Subnet:
    network = address.network
    return int(network.network_address), network.prefixlen


def _gateways(addresses: list[Address], own: set[tuple[int, _Subnet]]) -> dict[int, Gateway]:
    """By family, the first of a neighbour's addresses that an end with these subnets reaches without a gateway."""
    return {
        address.version: address.ip for address in reversed(addresses) if (address.version, _subnet(address)) in own
    }


def _collapsed(version: int, subnets: Iterable[_Subnet]) -> list[Network]:
    """The fewest prefixes that cover these subnets of one family and nothing else."""
    width = 32 if version == 4 else 128
    by_length: dict[int, set[int]] = defaultdict(set)
    for number, length in subnets:
        by_length[length].add(number)
    done = []
    while by_length:
        length = max(by_length)
        numbers, bit = by_length.pop(length), 1 << (width - length)
        for number in numbers:
            if number ^ bit in numbers:
                by_length[length - 1].add(number & ~bit)
            else:
                done.append((number, length))
    return [_network(version, *subnet) for subnet in sorted(done)]


def _network(version: int, number: int, length: int) -> Network:
    return ipaddress.IPv4Network((number, length)) if version == 4 else ipaddress.IPv6Network((number, length))
