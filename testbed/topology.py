"""Topologies: what a lab consists of, as values.

Owns: nodes, links, addresses, services. Must not know namespaces, netlink or files: a file becomes a topology in
topology_file.py, topology_checks.py tells what is wrong with one, a topology becomes operations in plan.py.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Final

Address = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Gateway = ipaddress.IPv4Address | ipaddress.IPv6Address

LOOPBACK: Final = "lo"
BRIDGE: Final = "br0"  # the interface of a bridge node that joins the others
ENGINE: Final = "tproxyd"  # the name that a node's engine has among its services


def is_link_local(address: Address | Gateway) -> bool:
    """Whether it is an IPv6 link-local one (RFC 4291, section 2.5.6); ipaddress takes ten times as long to say so."""
    return address.version == 6 and int(address) >> 118 == 0xFE80 >> 6


def first_index(number: int) -> int:
    """The index of the left end of the link of that number; that of the right end is the next."""
    return 10 + 2 * number


def automatic_mac(index: int) -> str:
    """The locally administered MAC address of an interface that was given none, made of its index."""
    return f"02:00:00:00:{index >> 8:02x}:{index & 0xFF:02x}"


class Kind(StrEnum):
    """What a node is: an end, something that forwards packets, something that forwards frames."""

    HOST = "host"
    ROUTER = "router"
    BRIDGE = "bridge"


class Capture(StrEnum):
    """Where captures are made if not told otherwise: at every interface of every node (without lo), or nowhere."""

    ALL = "all"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Route:
    """A static route; `to` is a prefix, the default ones are 0.0.0.0/0 and ::/0."""

    to: Network
    via: Gateway


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


class TproxyCalls(Enum):
    """Which calls of a service, a program written for tproxy and unmodified, the node's engine is to serve."""

    NONE = auto()
    SOCKOPTS = auto()  # IP_TPROXY, SO_ORIGINAL_DST
    SOCKOPTS_AND_RECVMSG = auto()  # and IP_RECVORIGADDRS, which costs every recvmsg


_WRAPPERS: Final = {
    TproxyCalls.NONE: (),
    TproxyCalls.SOCKOPTS: ("tproxyctl", "run", "--"),
    TproxyCalls.SOCKOPTS_AND_RECVMSG: ("tproxyctl", "run", "--recvorigaddrs", "--"),
}


@dataclass(frozen=True, slots=True)
class Service:
    """A program that runs in a node as long as the lab does."""

    name: str
    command: tuple[str, ...]
    ready: Readiness = Readiness()
    tproxy: TproxyCalls = TproxyCalls.NONE

    @property
    def words(self) -> tuple[str, ...]:
        """What is run in the node."""
        return (*_WRAPPERS[self.tproxy], *self.command)


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
    setup: tuple[tuple[str, ...], ...] = ()  # commands that are run once its interfaces are ready
    services: tuple[Service, ...] = ()
    engine: EngineSpec | None = None
    nft: str = ""  # the user's own rules, as `nft -f` takes them
    iptables: str = ""  # as `iptables-restore` takes them
    ip6tables: str = ""  # as `ip6tables-restore` takes them


@dataclass(frozen=True, slots=True)
class Impairment:
    """What a link does to the packets of one direction. Probabilities are from 0 to 1."""

    delay: float = 0.0  # seconds
    jitter: float = 0.0  # seconds, each packet's delay is that far from `delay` at most
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0  # of packets that overtake those that are being delayed
    corrupt: float = 0.0  # of packets that get one bit flipped
    rate: int | None = None  # bits per second
    seed: int | None = None  # the same one makes the same choices for the same packets, on every machine


@dataclass(frozen=True, slots=True)
class End:
    """One end of a link: an interface in a node.

    `auto`: the families (4, 6) of which it is to get an address by its place in the topology; `addressed` does that.
    `mac` is made from the link's place when it is not given. `impair` is done to what this end sends.
    """

    node: str
    interface: str
    addresses: tuple[Address, ...] = ()
    auto: tuple[int, ...] = ()
    mac: str | None = None
    impair: Impairment | None = None

    @property
    def label(self) -> str:
        """How captures, ladders and messages call it."""
        return f"{self.node}:{self.interface}"


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
    """Nodes and links. `capture`: where captures are made; interfaces by their label, `node:lo` among them."""

    name: str
    nodes: tuple[Node, ...]
    links: tuple[Link, ...] = ()
    description: str = ""
    capture: Capture | tuple[str, ...] = Capture.ALL
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

    def segments(self) -> list[list[End]]:
        """The ends that hear each other's frames: of a link, or of all links that bridges join; bridges left out.

        The ends of a segment are in the order of the links.
        """
        bridges = {node.name for node in self.nodes if node.kind is Kind.BRIDGE}
        segment_of: dict[str, list[End]] = {}  # by bridge
        segments: list[list[End]] = []
        for link in self.links:
            merged = [end for end in link.ends if end.node not in bridges]
            joined = [end.node for end in link.ends if end.node in bridges]
            for segment in {id(segment_of[name]): segment_of[name] for name in joined if name in segment_of}.values():
                segments = [other for other in segments if other is not segment]
                joined += [name for name, other in segment_of.items() if other is segment]
                merged = [*segment, *merged]
            segments.append(merged)
            segment_of |= dict.fromkeys(joined, merged)
        places = {id(end): place for place, end in enumerate(end for link in self.links for end in link.ends)}
        return [sorted(segment, key=lambda end: places[id(end)]) for segment in segments]

    def captured(self) -> list[str]:
        """The labels of the interfaces at which captures are made."""
        match self.capture:
            case Capture.ALL:
                return [end.label for node in self.nodes for end in self.ends_of(node.name)]
            case Capture.NONE:
                return []
            case labels:
                return list(labels)
