"""Plans: what has to be done to build a topology, in order, as values that can be printed and compared.

Owns: the order, and the settings that every namespace gets. Must not do anything: build.py does.
"""

from __future__ import annotations

import ipaddress
import shlex
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, assert_never

from testbed.impair import WIRE, described, disciplines, is_impaired, why_in_user_space, wire_ends
from testbed.routes import routes
from testbed.topology import (
    BRIDGE,
    LOOPBACK,
    Address,
    End,
    Gateway,
    Impairment,
    Kind,
    Link,
    Network,
    Node,
    Topology,
    first_index,
    is_link_local,
)

# What every namespace needs for a quiet, honest lab. Addresses are ready at once (no duplicate address detection),
# interfaces make up no IPv6 address of their own, and replies may take another way than requests (rp_filter: the larger
# of `all` and the interface counts). Link-local addresses are given by the plan: a router without one on an interface
# sends no neighbour solicitation for what it forwards (net/ipv6/ndisc.c, ndisc_send_ns), so traffic stops there.
# Those come first that most kernels begin with: they are left out there (build.py). But not the default of rp_filter:
# an interface keeps it from then on only if it was written (net/ipv4/devinet.c, devinet_conf_proc).
_SETTINGS: Final = (
    ("net.ipv4.conf.all.rp_filter", "0"),
    ("net.ipv6.conf.all.accept_dad", "0"),
    ("net.ipv6.conf.default.accept_dad", "0"),
    ("net.ipv4.conf.default.rp_filter", "0"),
    ("net.ipv6.conf.default.addr_gen_mode", "1"),
    ("net.ipv6.conf.default.accept_ra", "0"),
)
_NO_IPV6: Final = (("net.ipv6.conf.default.disable_ipv6", "1"),)  # impaired links only pass frames on
_FORWARDING: Final = (("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1"))


@dataclass(frozen=True, slots=True)
class MakeNamespace:
    """Make a node's namespace, and its settings."""

    node: str
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class MakeBridge:
    """Make the bridge of a bridge node."""

    node: str


@dataclass(frozen=True, slots=True)
class MakeLink:
    """Make a veth pair between two namespaces. `index` is the left end's; the right one's differs (facts: carrier)."""

    left: End
    right: End
    mtu: int
    index: int


@dataclass(frozen=True, slots=True)
class Redirect:
    """Have the kernel send whatever an interface receives from another one of the same node."""

    node: str
    interface: str
    to: str


@dataclass(frozen=True, slots=True)
class Impair:
    """Have the kernel impair what an interface sends; it comes from the node's end `sender`."""

    node: str
    interface: str
    sender: str
    impairment: Impairment
    mtu: int


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
    to: Network
    via: Gateway


@dataclass(frozen=True, slots=True)
class WaitReady:
    """Wait until every interface of a node is up and every address usable."""

    node: str


@dataclass(frozen=True, slots=True)
class Configure:
    """Change settings that exist only once the interfaces do."""

    node: str
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class RunCommand:
    """Run a command of the user's in a node."""

    node: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadRules:
    """Load the user's rules of a node with a command that reads them."""

    node: str
    command: tuple[str, ...]
    text: str


_LINK_LOCAL: Final = 0xFE80 << 112

NetlinkOperation = AddRoute | AddAddress | SetUp | MakeLink | JoinBridge | MakeBridge | Redirect | Impair
_Plug = tuple[End, bool]  # an end, and whether it may pass on frames that are several
Operation = NetlinkOperation | MakeNamespace | StopOffload | WaitReady | Configure | RunCommand | LoadRules


def describe(operation: Operation) -> str:  # noqa: C901 one line a kind of operation
    """An operation in words, the node first."""
    match operation:
        case MakeNamespace(node, settings):
            return f"{node}: namespace with {_listed(settings)}"
        case MakeBridge(node):
            return f"{node}: bridge {BRIDGE}"
        case MakeLink(left, right, mtu):
            return f"{left.node}: link {left.interface} to {right.label}, MTU {mtu}{_impaired(left)}{_impaired(right)}"
        case Redirect(node, interface, to):
            return f"{node}: {interface} goes to {to}"
        case Impair(node, interface, sender, impairment):
            means = " and ".join(disciplines(impairment))
            return f"{node}: {means} on {interface} for what {sender} sends: {described(impairment)}"
        case StopOffload(node, interface):
            return f"{node}: no offload on {interface}"
        case JoinBridge(node, interface):
            return f"{node}: {interface} into {BRIDGE}"
        case AddAddress(node, interface, address):
            return f"{node}: address {address} on {interface}"
        case SetUp(node, interface):
            return f"{node}: {interface} up"
        case AddRoute(node, to, via):
            return f"{node}: route to {to} by {via}"
        case WaitReady(node):
            return f"{node}: wait until it is ready"
        case Configure(node, settings):
            return f"{node}: {_listed(settings)}"
        case RunCommand(node, command):
            return f"{node}: {shlex.join(command)}"
        case LoadRules(node, command, text):
            return f"{node}: {' '.join(command)} with {len(text.splitlines())} lines of the user's"
        case _:
            assert_never(operation)


def _impaired(end: End) -> str:
    """What the stage is to do to what an end sends."""
    return f", user-space stage for what {end.label} sends: {described(end.impair)}" if end.impair is not None else ""


def _listed(settings: Sequence[tuple[str, str]]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings)


def plan(topology: Topology, kernel: Collection[str] = ()) -> list[Operation]:
    """The operations that build a topology. `kernel`: what it has of impair.KERNEL_MEANS."""
    operations: list[Operation] = []
    plugs = _plugs(topology)
    for node in topology.nodes:
        forwarding = _FORWARDING if node.kind is Kind.ROUTER else ()
        settings, _ = _settings(node, plugs[node.name])
        operations.append(MakeNamespace(node.name, (*_SETTINGS, *forwarding, *settings)))
    if any(is_impaired(link) for link in topology.links):
        operations += [MakeNamespace(WIRE, (*_SETTINGS, *_NO_IPV6)), SetUp(WIRE, LOOPBACK)]
    links = _links_by_first_node(topology)
    ways = routes(topology)
    link_locals = _link_locals(topology)
    for node in topology.nodes:
        # All that is done in one node in a row: what comes in a row is sent at once (build.py).
        for number in links[node.name]:
            operations += _link(number, topology.links[number], kernel)
        operations += _configuration(node, plugs[node.name], link_locals, ways.get(node.name, ()))
    # A bridge that joins nothing has no carrier, ever.
    operations += [WaitReady(node.name) for node in topology.nodes if node.kind is not Kind.BRIDGE or plugs[node.name]]
    for node in topology.nodes:
        operations += _last_touches(node, plugs[node.name])
    return operations


def _plugs(topology: Topology) -> Mapping[str, Sequence[_Plug]]:
    """The ends of each node, and whether each may pass joined frames on.

    What an impaired link loses or delays is one frame.
    """
    found: defaultdict[str, list[_Plug]] = defaultdict(list)
    for link in topology.links:
        has_offload = topology.offload and not is_impaired(link)
        for end in link.ends:
            found[end.node].append((end, has_offload))
    return found


def _links_by_first_node(topology: Topology) -> Mapping[str, Sequence[int]]:
    """The links of each node that none before it has, by their places."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    places = {node.name: place for place, node in enumerate(topology.nodes)}
    for number, link in enumerate(topology.links):
        found[min((end.node for end in link.ends), key=lambda name: places[name])].append(number)
    return found


def _link(number: int, link: Link, kernel: Collection[str]) -> list[Operation]:
    """One veth pair, or two with the kernel's disciplines or the stage between them if the link is impaired.

    The nodes' ends have the same indexes and MACs either way.
    """
    index = first_index(number)
    if not is_impaired(link):
        return [MakeLink(link.left, link.right, link.mtu, index)]
    near, far = wire_ends(number)
    is_staged = why_in_user_space(link, kernel) is not None
    left, right = link.ends if is_staged else (replace(end, impair=None) for end in link.ends)
    return [
        MakeLink(left, near, link.mtu, index),
        MakeLink(far, right, link.mtu, index),
        *([] if is_staged else _through_kernel(link, near.interface, far.interface)),
        *(SetUp(WIRE, end.interface) for end in (near, far)),
    ]


def _through_kernel(link: Link, near: str, far: str) -> list[Operation]:
    """What of the kernel's stands between the two halves of an impaired link."""
    return [
        Redirect(WIRE, near, far),
        Redirect(WIRE, far, near),
        *(
            Impair(WIRE, interface, end.label, end.impair, link.mtu)
            for end, interface in zip(link.ends, (far, near), strict=True)
            if end.impair is not None and disciplines(end.impair)
        ),
    ]


def _settings(node: Node, plugs: Sequence[_Plug]) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """A node's own settings: those that are there from the beginning, and those of its interfaces."""
    interfaces = {end.interface for end, _ in plugs} | {BRIDGE}
    late = tuple((key, value) for key, value in node.sysctls if interfaces.intersection(key.split(".")))
    return tuple(setting for setting in node.sysctls if setting not in late), late


def _last_touches(node: Node, plugs: Sequence[_Plug]) -> list[Operation]:
    """What needs a node that is ready."""
    _, late = _settings(node, plugs)
    rules = (
        (("nft", "-f", "-"), node.nft),
        # There is one lock for all namespaces of the machine, for which iptables-legacy does not wait by itself.
        (("iptables-restore", "-w"), node.iptables),
        (("ip6tables-restore", "-w"), node.ip6tables),
    )
    return [
        *([Configure(node.name, late)] if late else []),
        *(RunCommand(node.name, command) for command in node.setup),
        *(LoadRules(node.name, command, text) for command, text in rules if text),
    ]


def _configuration(
    node: Node, plugs: Sequence[_Plug], link_locals: Mapping[str, Address], ways: Sequence[tuple[Network, Gateway]]
) -> list[Operation]:
    """What is done inside one node."""
    name = node.name
    ends = [end for end, _ in plugs]
    operations: list[Operation] = []
    if node.kind is Kind.BRIDGE:
        operations.append(MakeBridge(name))
        operations += [JoinBridge(name, end.interface) for end in ends]
        operations.append(SetUp(name, BRIDGE))
    operations += [SetUp(name, interface) for interface in (LOOPBACK, *(end.interface for end in ends))]
    for end in ends:
        own = [link_locals[end.label]] if end.label in link_locals else []
        operations += [AddAddress(name, end.interface, address) for address in (*end.addresses, *own)]
    operations += [AddRoute(name, to, via) for to, via in ways]
    operations += [StopOffload(name, end.interface) for end, has_offload in plugs if not has_offload]
    return operations


def _link_locals(topology: Topology) -> dict[str, Address]:
    """The link-local addresses of the interfaces with IPv6 and none of their own.

    The lower half is that of the interface's first address or, where that is none for a host or somebody's who hears
    it, fe80::ff: and the interface's index.
    """
    ends = (end for link in topology.links for end in link.ends)
    indexes = {end.label: first_index(0) + place for place, end in enumerate(ends)}
    found: dict[str, Address] = {}
    for segment in topology.segments():
        ipv6 = {end.label: [address for address in end.addresses if address.version == 6] for end in segment}
        taken = {int(address) for addresses in ipv6.values() for address in addresses if is_link_local(address)}
        for label, addresses in ipv6.items():
            if not addresses or any(map(is_link_local, addresses)):
                continue
            lower_half = int(addresses[0]) & (1 << 64) - 1
            number = _LINK_LOCAL | lower_half
            if not lower_half or number in taken:
                number = _LINK_LOCAL | 0xFF << 16 | indexes[label]
            taken.add(number)
            found[label] = ipaddress.IPv6Interface((number, 64))  # an address would be written out and read again
    return found
