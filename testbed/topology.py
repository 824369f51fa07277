"""Topologies: what a lab consists of, as values.

Owns: nodes, links, addresses, services, and what must hold between them. Must not know namespaces, netlink or files; a
file becomes a topology in topology_file.py, a topology becomes operations in plan.py.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import StrEnum

Address = ipaddress.IPv4Interface | ipaddress.IPv6Interface


class Kind(StrEnum):
    """What a node is: an end, something that forwards packets, something that forwards frames."""

    HOST = "host"
    ROUTER = "router"
    BRIDGE = "bridge"


@dataclass(frozen=True, slots=True)
class Route:
    """A static route; `to` is a prefix, the default ones are 0.0.0.0/0 and ::/0."""

    to: ipaddress.IPv4Network | ipaddress.IPv6Network
    via: ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Readiness:
    """How a service says that it is ready; with nothing set, it is as soon as it runs.

    `port`: something listens on that TCP port in the node. `log`: a regular expression found in its output.
    `notify`: it writes a newline to the descriptor whose number replaces `{notify_fd}` in its command.
    """

    port: int | None = None
    log: str | None = None
    notify: bool = False
    within: float = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class Service:
    """A program that runs in a node as long as the lab does."""

    name: str
    command: tuple[str, ...]
    ready: Readiness = Readiness()


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """The tproxy engine of a node."""

    datapath: str = "inline"
    rules: tuple[str, ...] = ()  # one `-A CHAIN ...` each
    options: tuple[str, ...] = ()  # further options of tproxyd


@dataclass(frozen=True, slots=True)
class Node:
    """One network namespace."""

    name: str
    kind: Kind = Kind.HOST
    routes: tuple[Route, ...] = ()
    sysctls: tuple[tuple[str, str], ...] = ()
    services: tuple[Service, ...] = ()
    engine: EngineSpec | None = None
    nft: str = ""  # the user's own rules, as `nft -f` takes them


@dataclass(frozen=True, slots=True)
class End:
    """One end of a link: an interface in a node. `mac` is made from the link's place when it is not given."""

    node: str
    interface: str
    addresses: tuple[Address, ...] = ()
    mac: str | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """A veth pair."""

    left: End
    right: End
    mtu: int = 1500

    @property
    def ends(self) -> tuple[End, End]:
        """Both ends."""
        return self.left, self.right


@dataclass(frozen=True, slots=True)
class Topology:
    """Nodes and links."""

    name: str
    nodes: tuple[Node, ...]
    links: tuple[Link, ...] = ()
    # Whether interfaces may pass on what is no packet on any wire: segments joined to 64 KB, checksums left half done.
    # Without, captures show what a network would carry; with, throughput is a multiple.
    offload: bool = False

    def node(self, name: str) -> Node:
        """A node by name; KeyError when there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def ends_of(self, name: str) -> list[End]:
        """The interfaces of a node."""
        return [end for link in self.links for end in link.ends if end.node == name]

    def problems(self) -> list[tuple[tuple[str | int, ...], str]]:
        """What is wrong, all of it: where (a path into the values, as the file has it) and what."""
        return [*_node_problems(self), *_link_problems(self), *_route_problems(self)]


def _node_problems(topology: Topology) -> list[tuple[tuple[str | int, ...], str]]:
    """A service's name must be its own, and a bridge has no addresses."""
    found: list[tuple[tuple[str | int, ...], str]] = []
    for node in topology.nodes:
        names = [service.name for service in node.services]
        found += [
            (("nodes", node.name, "services"), f"two services are called {name!r}")
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        if node.kind is Kind.BRIDGE and any(end.addresses for end in topology.ends_of(node.name)):
            found.append((("nodes", node.name), "a bridge forwards frames: its interfaces have no addresses"))
    return found


def _link_problems(topology: Topology) -> list[tuple[tuple[str | int, ...], str]]:
    """Ends are in nodes that exist, interfaces and addresses are unique, both ends of a link are in one subnet."""
    found: list[tuple[tuple[str | int, ...], str]] = []
    names = {node.name for node in topology.nodes}
    interfaces: set[tuple[str, str]] = set()
    addresses: dict[object, str] = {}
    for number, link in enumerate(topology.links):
        where = ("links", number)
        for end in link.ends:
            label = f"{end.node}:{end.interface}"
            if end.node not in names:
                found.append((where, f"there is no node {end.node!r}"))
            if (end.node, end.interface) in interfaces:
                found.append((where, f"{label} is the end of another link already"))
            interfaces.add((end.node, end.interface))
            for address in end.addresses:
                if address.ip in addresses:
                    found.append((where, f"{label} has the address {address.ip}, which {addresses[address.ip]} has"))
                addresses[address.ip] = label
        found += [(where, problem) for problem in _subnet_problems(link)]
    return found


def _subnet_problems(link: Link) -> list[str]:
    """What keeps the two ends of a link from reaching each other."""
    problems = []
    left, right = link.ends
    for version in (4, 6):
        nets = [{address.network for address in end.addresses if address.version == version} for end in (left, right)]
        if all(nets) and not nets[0] & nets[1]:
            problems.append(
                f"{left.node}:{left.interface} and {right.node}:{right.interface} share no IPv{version} subnet"
            )
    return problems


def _route_problems(topology: Topology) -> list[tuple[tuple[str | int, ...], str]]:
    """A gateway is in a subnet of the node."""
    found: list[tuple[tuple[str | int, ...], str]] = []
    for node in topology.nodes:
        subnets = [address.network for end in topology.ends_of(node.name) for address in end.addresses]
        for route in node.routes:
            if not any(route.via in subnet for subnet in subnets if subnet.version == route.via.version):
                found.append((("nodes", node.name, "routes"), f"the gateway {route.via} is in none of its subnets"))
    return found
