"""What is wrong with a topology, case by case."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest

from testbed.topology import End, EngineSpec, Kind, Link, Node, Readiness, Route, Service, Topology
from testbed.topology_checks import problems


def end(node: str, *addresses: str, interface: str = "eth0", mac: str | None = None) -> End:
    return End(node, interface, tuple(ipaddress.ip_interface(address) for address in addresses), mac=mac)


def lab(*links: Link, **changes: Node) -> Topology:
    """Hosts a and b, router r, bridge s, with `changes` to them, and some links."""
    nodes = {"a": Node("a"), "b": Node("b"), "r": Node("r", Kind.ROUTER), "s": Node("s", Kind.BRIDGE)} | changes
    return Topology("lab", tuple(nodes.values()), links)


def routes(*pairs: tuple[str, str]) -> tuple[Route, ...]:
    return tuple(Route(ipaddress.ip_network(to), ipaddress.ip_address(via)) for to, via in pairs)


AB = Link(end("a", "10.0.0.1/24", "fd00::1/64"), end("b", "10.0.0.2/24", "fd00::2/64"))
NOTIFY = Readiness(notify=True)

# Without a problem.
SOUND = {
    "one link": lab(AB),
    "no links": lab(),
    "an end without addresses": lab(Link(end("a", "10.0.0.1/24"), end("b"))),
    "a point-to-point subnet": lab(Link(end("a", "10.0.0.0/31", "fd00::/127"), end("b", "10.0.0.1/31", "fd00::1/127"))),
    "the same link-local address on two links": lab(
        Link(end("a", "fe80::1/64"), end("r", "fe80::2/64")),
        Link(end("b", "fe80::1/64"), end("r", "fe80::2/64", interface="eth1")),
    ),
    "two subnets on a link, one of them shared": lab(
        Link(end("a", "10.0.0.1/24"), end("b", "10.0.0.2/24", "10.9.0.1/24"))
    ),
    "a bridge between subnets' ends": lab(
        Link(end("a", "10.0.0.1/24"), end("s")), Link(end("b", "10.0.0.2/24"), end("s", interface="eth1"))
    ),
    "a short link without IPv6": lab(Link(end("a", "10.0.0.1/24"), end("b", "10.0.0.2/24"), mtu=576)),
    "captures by name": replace(lab(AB), capture=("a:eth0", "b:lo")),
    "a capture at what setup makes": replace(lab(a=Node("a", setup=(("true",),))), capture=("a:br7",)),
    "a route by a neighbour": lab(AB, a=Node("a", routes=routes(("0.0.0.0/0", "10.0.0.2"), ("::/0", "fd00::2")))),
    "a setting": lab(AB, a=Node("a", sysctls=(("net.ipv4.conf.eth0.rp_filter", "1"),))),
    "a service that notifies": lab(AB, a=Node("a", services=(Service("x", ("x", "{notify_fd}"), NOTIFY),))),
}


@pytest.mark.parametrize("topology", SOUND.values(), ids=SOUND)
def test_a_sound_topology_has_no_problem(topology: Topology) -> None:
    assert problems(topology) == []


# The topology, where the problem is, and part of what it says.
BROKEN = {
    "two nodes of a name": (
        replace(lab(AB), nodes=(*lab().nodes, Node("a"))),
        ("nodes", "a"),
        "2 nodes of that name",
    ),
    "unknown node": (
        lab(Link(end("a", "10.0.0.1/24"), end("bb", "10.0.0.2/24"))),
        ("links", 0, "ends", 1, "node"),
        "no node 'bb'; did you mean 'b'?",
    ),
    "link to itself": (
        lab(Link(end("a", "10.0.0.1/24"), end("a", "10.0.0.2/24", interface="eth1"))),
        ("links", 0),
        "both ends are in a",
    ),
    "interface twice": (
        lab(AB, Link(end("a", "10.1.0.1/24"), end("r", "10.1.0.2/24"))),
        ("links", 1, "ends", 0, "interface"),
        "a:eth0 is the end of another link",
    ),
    "interface lo": (
        lab(Link(end("a", interface="lo"), end("b"))),
        ("links", 0, "ends", 0, "interface"),
        "lo is not to be had",
    ),
    "a bridge's own interface": (
        lab(Link(end("a"), end("s", interface="br0"))),
        ("links", 0, "ends", 1, "interface"),
        "br0 is not to be had",
    ),
    "a bridge with an address": (
        lab(Link(end("a", "10.0.0.1/24"), end("s", "10.0.0.2/24"))),
        ("links", 0, "ends", 1, "addresses"),
        "a bridge forwards frames",
    ),
    "a bridge with a route": (
        lab(AB, s=Node("s", Kind.BRIDGE, routes=routes(("10.1.0.0/24", "10.0.0.1")))),
        ("nodes", "s", "routes", 0),
        "a bridge forwards frames",
    ),
    "address twice": (
        lab(AB, Link(end("r", "10.0.0.1/24"), end("s"))),
        ("links", 1, "ends", 0, "addresses", 0),
        "a:eth0 has the address 10.0.0.1 already",
    ),
    "address twice at an interface": (
        lab(Link(end("a", "fd00::1/64", "fd00::1/48"), end("b"))),
        ("links", 0, "ends", 0, "addresses", 1),
        "a:eth0 has the address fd00::1 already",
    ),
    "multicast address": (
        lab(Link(end("a", "224.0.0.1/24"), end("b"))),
        ("links", 0, "ends", 0, "addresses", 0),
        "no interface's address",
    ),
    "the subnet's own address": (
        lab(Link(end("a", "fd00::/64"), end("b"))),
        ("links", 0, "ends", 0, "addresses", 0),
        "subnet's own address",
    ),
    "the broadcast address": (
        lab(Link(end("a", "10.0.0.255/24"), end("b"))),
        ("links", 0, "ends", 0, "addresses", 0),
        "broadcast address",
    ),
    "subnets apart on a link": (
        lab(Link(end("a", "10.0.0.1/24"), end("b", "10.1.0.2/24"))),
        ("links", 0, "ends", 0, "addresses"),
        "a:eth0 shares no IPv4 subnet with b:eth0",
    ),
    "subnets apart across a bridge": (
        lab(Link(end("a", "fd00::1/64"), end("s")), Link(end("s", interface="eth1"), end("b", "fd01::1/64"))),
        ("links", 0, "ends", 0, "addresses"),
        "a:eth0 shares no IPv6 subnet with b:eth0",
    ),
    "IPv6 on a link that is too small": (
        lab(replace(AB, mtu=1279)),
        ("links", 0),
        "IPv6 needs an MTU of 1280",
    ),
    "a group's MAC": (
        lab(Link(end("a", mac="01:00:5e:00:00:01"), end("b"))),
        ("links", 0, "ends", 0, "mac"),
        "a group's address",
    ),
    "MAC twice": (
        lab(Link(end("a", mac="02:00:00:00:00:0a"), end("b", mac="02:00:00:00:00:0A"))),
        ("links", 0, "ends", 1, "mac"),
        "a:eth0 has that one already",
    ),
    "the MAC that another has by its place": (
        lab(Link(end("a", mac="02:00:00:00:00:0b"), end("b"))),
        ("links", 0, "ends", 0, "mac"),
        "b:eth0 has that one already",
    ),
    "nobody's MAC": (
        lab(Link(end("a", mac="00:00:00:00:00:00"), end("b"))),
        ("links", 0, "ends", 0, "mac"),
        "no interface's address",
    ),
    "a gateway out of reach": (
        lab(AB, a=Node("a", routes=routes(("0.0.0.0/0", "10.1.0.1")))),
        ("nodes", "a", "routes", 0, "via"),
        "in none of its subnets",
    ),
    "itself as gateway": (
        lab(AB, a=Node("a", routes=routes(("0.0.0.0/0", "10.0.0.1")))),
        ("nodes", "a", "routes", 0, "via"),
        "its own address",
    ),
    "a subnet's broadcast address as gateway": (
        lab(AB, a=Node("a", routes=routes(("0.0.0.0/0", "10.0.0.255")))),
        ("nodes", "a", "routes", 0, "via"),
        "10.0.0.255 is the subnet's broadcast address",
    ),
    "a link-local gateway": (
        lab(Link(end("a", "fe80::1/64"), end("r", "fe80::2/64")), a=Node("a", routes=routes(("::/0", "fe80::2")))),
        ("nodes", "a", "routes", 0, "via"),
        "does not tell the interface",
    ),
    "a route to its own subnet": (
        lab(AB, a=Node("a", routes=routes(("10.0.0.0/24", "10.0.0.2")))),
        ("nodes", "a", "routes", 0, "to"),
        "10.0.0.0/24 is a subnet of its own",
    ),
    "two routes to a prefix": (
        lab(AB, a=Node("a", routes=routes(("::/0", "fd00::2"), ("::/0", "fd00::3")))),
        ("nodes", "a", "routes", 1, "to"),
        "a route to ::/0 already",
    ),
    "a setting outside net": (
        lab(AB, a=Node("a", sysctls=(("kernel.hostname", "x"),))),
        ("nodes", "a", "sysctls", "kernel.hostname"),
        "below net. only",
    ),
    "a setting that climbs": (
        lab(AB, a=Node("a", sysctls=(("net/../../../etc/x", "x"),))),
        ("nodes", "a", "sysctls", "net/../../../etc/x"),
        "below net. only",
    ),
    "a setting of an interface that there is not": (
        lab(AB, a=Node("a", sysctls=(("net.ipv4.conf.eth1.rp_filter", "1"),))),
        ("nodes", "a", "sysctls", "net.ipv4.conf.eth1.rp_filter"),
        "a has no interface 'eth1'; did you mean 'eth0'?",
    ),
    "a setting without a value": (
        lab(AB, a=Node("a", sysctls=(("net.ipv4.ip_forward", ""),))),
        ("nodes", "a", "sysctls", "net.ipv4.ip_forward"),
        "'' is no setting's value",
    ),
    "two services of a name": (
        lab(AB, a=Node("a", services=(Service("x", ("x",)), Service("x", ("y",))))),
        ("nodes", "a", "services", "x"),
        "2 services of that name",
    ),
    "a service called as the engine": (
        lab(AB, a=Node("a", services=(Service("tproxyd", ("x",)),), engine=EngineSpec())),
        ("nodes", "a", "services", "tproxyd"),
        "the name of the node's engine",
    ),
    "two ways to be ready": (
        lab(AB, a=Node("a", services=(Service("x", ("x",), Readiness(port=1, log="x")),))),
        ("nodes", "a", "services", "x", "ready"),
        "only one of",
    ),
    "nothing to notify": (
        lab(AB, a=Node("a", services=(Service("x", ("x",), NOTIFY),))),
        ("nodes", "a", "services", "x", "ready"),
        "{notify_fd}",
    ),
    "a log line that is no expression": (
        lab(AB, a=Node("a", services=(Service("x", ("x",), Readiness(log="(")),))),
        ("nodes", "a", "services", "x", "ready"),
        "no regular expression",
    ),
    "a capture nowhere": (
        replace(lab(AB), capture=("a:eth1",)),
        ("capture", 0),
        "no interface 'a:eth1'; did you mean 'a:eth0'?",
    ),
    "a capture at no interface of a node with setup": (
        replace(lab(a=Node("a", setup=(("true",),))), capture=("a",)),
        ("capture", 0),
        "no interface 'a'",
    ),
    "a capture at too much": (
        replace(lab(a=Node("a", setup=(("true",),))), capture=("a:br7:1",)),
        ("capture", 0),
        "no interface 'a:br7:1'",
    ),
}


@pytest.mark.parametrize(("topology", "where", "what"), BROKEN.values(), ids=BROKEN)
def test_a_problem_is_told_with_its_place(topology: Topology, where: tuple[str | int, ...], what: str) -> None:
    found = problems(topology)
    assert [place for place, _ in found] == [where]
    assert what in found[0][1]
