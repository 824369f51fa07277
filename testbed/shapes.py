"""Topologies made by a rule instead of a file: for scale, benchmarks and tests. Pure."""

from __future__ import annotations

from itertools import pairwise

from testbed.topology import End, Kind, Link, Node, Topology
from testbed.topology_file import automatic_addresses


def chain(count: int, name: str = "chain") -> Topology:
    """Hosts n0 and n(count-1), and routers in a row between them; each link has its two subnets. `count` >= 2."""
    ends = {0, count - 1}
    nodes = [Node(f"n{number}", Kind.HOST if number in ends else Kind.ROUTER) for number in range(count)]
    links = [
        Link(
            End(left.name, "right", automatic_addresses(number, 0)),
            End(right.name, "left", automatic_addresses(number, 1)),
        )
        for number, (left, right) in enumerate(pairwise(nodes))
    ]
    return Topology(name, tuple(nodes), tuple(links))
