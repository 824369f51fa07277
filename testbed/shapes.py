"""Topologies made by a rule instead of a file: for scale, benchmarks and tests. Pure."""

from __future__ import annotations

from itertools import pairwise

from testbed.addressing import FAMILIES, addressed
from testbed.topology import End, Kind, Link, Node, Topology


def chain(count: int, name: str = "chain") -> Topology:
    """Hosts n0 and n(count-1), and routers in a row between them; each link has two subnets. `count` is at least 2."""
    ends = {0, count - 1}
    nodes = [Node(f"n{number}", Kind.HOST if number in ends else Kind.ROUTER) for number in range(count)]
    links = [
        Link(End(left.name, "right", auto=FAMILIES), End(right.name, "left", auto=FAMILIES))
        for left, right in pairwise(nodes)
    ]
    return addressed(Topology(name, tuple(nodes), tuple(links)))
