"""What must hold in a topology beyond the shape of its file. Pure.

Each check yields where (a path into the topology, spelled as in its file) and what; all are run, so that all problems
are told at once.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from testbed.documents import Problem, Where
from testbed.topology import (
    BRIDGE,
    ENGINE,
    LOOPBACK,
    Address,
    End,
    Gateway,
    Kind,
    Link,
    Network,
    Node,
    Service,
    Topology,
    automatic_mac,
    first_index,
    is_link_local,
)

NO_REGULAR_EXPRESSION: Final = (re.error, OverflowError, RecursionError)  # what Python says of one that it cannot take
_IPV6_LEAST_MTU: Final = 1280  # RFC 8200, section 5
_SYSCTL: Final = re.compile(r"net(\.[A-Za-z0-9_-]+)+")
_SYSCTL_OF_INTERFACE: Final = re.compile(r"net\.ipv[46]\.(?:conf|neigh)\.([^.]+)\.")
_NO_MAC: Final = "00:00:00:00:00:00"
_ALL_INTERFACES: Final = {"all", "default"}
_RESERVED: Final = {LOOPBACK, *_ALL_INTERFACES}  # interfaces that are there, and what sysctls call all of them


def problems(topology: Topology) -> list[Problem]:
    """What is wrong, all of it."""
    return [
        *_node_problems(topology),
        *_link_problems(topology),
        *_address_problems(topology),
        *_segment_problems(topology),
        *_capture_problems(topology),
    ]


def _node_problems(topology: Topology) -> Iterator[Problem]:
    for name, times in Counter(node.name for node in topology.nodes).items():
        if times > 1:
            yield ("nodes", name), f"there are {times} nodes of that name"
    for node in topology.nodes:
        found = (*_service_problems(node), *_sysctl_problems(topology, node), *_route_problems(topology, node))
        for where, what in found:
            yield ("nodes", node.name, *where), what


def _service_problems(node: Node) -> Iterator[Problem]:
    for name, times in Counter(service.name for service in node.services).items():
        if times > 1:
            yield ("services", name), f"there are {times} services of that name"
        if name == ENGINE and node.engine is not None:
            yield ("services", name), "that is the name of the node's engine"
    for service in node.services:
        if what := readiness_problem(service):
            yield ("services", service.name, "ready"), what


def readiness_problem(service: Service) -> str | None:
    """What is wrong with the way in which a service is to be found ready."""
    ready = service.ready
    if (ready.port is not None) + (ready.log is not None) + ready.notify > 1:
        return "only one of port, log and notify"
    if ready.notify and not any("{notify_fd}" in word for word in service.command):
        return "the command is not told the descriptor to notify: {notify_fd}"
    if ready.log is not None:
        try:
            re.compile(ready.log)
        except NO_REGULAR_EXPRESSION as error:
            return f"{ready.log!r} is no regular expression: {error}"
    return None


def _sysctl_problems(topology: Topology, node: Node) -> Iterator[Problem]:
    interfaces = {LOOPBACK, *(end.interface for end in topology.ends_of(node.name))}
    interfaces |= {BRIDGE} if node.kind is Kind.BRIDGE else set()
    for key, value in node.sysctls:
        named = _SYSCTL_OF_INTERFACE.match(key)
        if not _SYSCTL.fullmatch(key):
            yield ("sysctls", key), "a namespace has settings of its own below net. only"
        elif named is not None and named[1] not in interfaces | _ALL_INTERFACES:
            yield ("sysctls", key), f"{node.name} has no interface {named[1]!r}{_nearest(named[1], interfaces)}"
        elif not (value.isascii() and value.strip()):
            yield ("sysctls", key), f"{value!r} is no setting's value"


def _route_problems(topology: Topology, node: Node) -> Iterator[Problem]:
    """A prefix lies elsewhere, and has one route."""
    own = [address for end in topology.ends_of(node.name) for address in end.addresses]
    seen = set()
    for place, route in enumerate(node.routes):
        if node.kind is Kind.BRIDGE:
            yield ("routes", place), "a bridge forwards frames: it has no routes"
        elif what := _gateway_problem(route.via, own):
            yield ("routes", place, "via"), what
        if any(route.to == address.network for address in own):
            yield ("routes", place, "to"), f"{route.to} is a subnet of its own: it needs no gateway"
        if route.to in seen:
            yield ("routes", place, "to"), f"there is a route to {route.to} already"
        seen.add(route.to)


def _gateway_problem(via: Gateway, own: Sequence[Address]) -> str | None:
    """Why a node with these addresses has no such gateway: it is a neighbour."""
    if any(via == address.ip for address in own):
        return f"{via} is its own address"
    if is_link_local(via):
        return f"{via} is a link-local address: it does not tell the interface"
    near = [address.network for address in own if address.version == via.version and via in address.network]
    if not near:
        return f"the gateway {via} is in none of its subnets"
    return next((what for network in near if (what := _no_host(via, network))), None)


def _link_problems(topology: Topology) -> Iterator[Problem]:
    """Ends are in nodes that exist, and interfaces have one link."""
    kinds = {node.name: node.kind for node in topology.nodes}
    seen: set[str] = set()
    for place, link in enumerate(topology.links):
        where: Where = ("links", place)
        if link.left.node == link.right.node:
            yield where, f"both ends are in {link.left.node}"
        for side, end in enumerate(link.ends):
            here: Where = (*where, "ends", side)
            if end.node not in kinds:
                yield (*here, "node"), f"there is no node {end.node!r}{_nearest(end.node, kinds)}"
            if end.label in seen:
                yield (*here, "interface"), f"{end.label} is the end of another link already"
            if end.interface in _RESERVED or (end.interface == BRIDGE and kinds.get(end.node) is Kind.BRIDGE):
                yield (*here, "interface"), f"{end.interface} is not to be had: it means something else"
            if end.addresses and kinds.get(end.node) is Kind.BRIDGE:
                yield (*here, "addresses"), "a bridge forwards frames: its interfaces have no addresses"
            seen.add(end.label)
        yield from ((where, what) for what in _mtu_problems(link))
    yield from _mac_problems(topology)
    yield from _circle_problems(topology)


def _circle_problems(topology: Topology) -> Iterator[Problem]:
    """Bridges are joined one way only, unless a command of one may see to it (spanning tree): frames would circle."""
    bridges = {node.name: node for node in topology.nodes if node.kind is Kind.BRIDGE}
    joined = {name: {name} for name in bridges}
    for place, link in enumerate(topology.links):
        left, right = link.left.node, link.right.node
        if left not in joined or right not in joined or left == right:
            continue
        if joined[left] is not joined[right]:
            both = joined[left] | joined[right]
            joined |= dict.fromkeys(both, both)
        elif not any(bridges[name].setup for name in joined[left]):
            yield ("links", place), "closes a circle of bridges, in which frames would go round without end"


def _mtu_problems(link: Link) -> Iterator[str]:
    if link.mtu < _IPV6_LEAST_MTU and any(address.version == 6 for end in link.ends for address in end.addresses):
        yield f"IPv6 needs an MTU of {_IPV6_LEAST_MTU} (RFC 8200), this link has {link.mtu}"


def _mac_problems(topology: Topology) -> Iterator[Problem]:
    owners = {
        automatic_mac(first_index(number) + side): end.label
        for number, link in enumerate(topology.links)
        for side, end in enumerate(link.ends)
        if end.mac is None
    }
    for where, end in _places(topology.links):
        mac = (end.mac or "").lower()
        if mac and int(mac[:2], 16) & 1:
            yield (*where, "mac"), f"{mac} is a group's address"
        elif mac == _NO_MAC:
            yield (*where, "mac"), f"{mac} is no interface's address"
        elif mac and mac in owners:
            yield (*where, "mac"), f"{owners[mac]} has that one already"
        elif mac:
            owners[mac] = end.label


def _address_problems(topology: Topology) -> Iterator[Problem]:
    """Addresses are a host's, and of one interface: those of a link among all that hear each other."""
    owners: dict[object, str] = {}
    near = {end.label: place for place, segment in enumerate(topology.segments(), start=1) for end in segment}
    for where, end in _places(topology.links):
        for place, address in enumerate(end.addresses):
            here = (*where, "addresses", place)
            if what := _unusable(address):
                yield here, what
            elif any(address.ip == other.ip for other in end.addresses[:place]):
                yield here, f"{end.label} has the address {address.ip} already"
            elif owners.get(key := (address.ip, address.is_link_local and near.get(end.label)), end.label) != end.label:
                yield here, f"{owners[key]} has the address {address.ip} already"
            else:
                owners[key] = end.label


def _unusable(address: Address) -> str | None:
    """Why no interface can have an address."""
    ip, network = address.ip, address.network
    if ip.is_multicast or ip.is_unspecified or ip.is_loopback:
        return f"{ip} is no interface's address"
    return _no_host(ip, network)


def _no_host(ip: Gateway, network: Network) -> str | None:
    """What an address is, if it is none of a host in its subnet."""
    if network.prefixlen < network.max_prefixlen - 1:
        if ip == network.network_address:
            return f"{ip} is the subnet's own address, not a host's"
        if ip.version == 4 and ip == network.broadcast_address:
            return f"{ip} is the subnet's broadcast address"
    return None


def _segment_problems(topology: Topology) -> Iterator[Problem]:
    """In a segment, whoever has addresses of a family shares a subnet with somebody."""
    places = {end.label: where for where, end in _places(topology.links)}
    for segment in topology.segments():
        for version in (4, 6):
            subnets = {end.label: {a.network for a in end.addresses if a.version == version} for end in segment}
            present = [label for label, own in subnets.items() if own]
            for label in present:
                others = [other for other in present if other != label]
                if others and not any(subnets[label] & subnets[other] for other in others):
                    what = f"{label} shares no IPv{version} subnet with {' or '.join(others)}"
                    yield (*places[label], "addresses"), what
                    break  # its neighbours may have the same to say


def _capture_problems(topology: Topology) -> Iterator[Problem]:
    known = {end.label for link in topology.links for end in link.ends}
    known |= {f"{node.name}:lo" for node in topology.nodes}
    makers = {node.name for node in topology.nodes if node.setup}  # of interfaces that only arming a capture can find
    for place, label in enumerate(topology.captured()):
        node, _, interface = label.partition(":")
        may_be_made = node in makers and interface and ":" not in interface
        if label not in known and not may_be_made:
            yield ("capture", place), f"there is no interface {label!r}{_nearest(label, known)}"


def _places(links: Iterable[Link]) -> Iterator[tuple[Where, End]]:
    """Every end, and where it is."""
    for place, link in enumerate(links):
        for side, end in enumerate(link.ends):
            yield ("links", place, "ends", side), end


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint at what may have been meant."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
