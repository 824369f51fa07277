"""Topologies as pictures."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from testbed.addressing import addressed
from testbed.diagram import boxes, diagram
from testbed.shapes import chain
from testbed.topology import End, EngineSpec, Impairment, Kind, Link, Node, Service, Topology
from testbed.topology_file import load

TOPOLOGIES = Path(__file__).parents[2] / "topologies"


def star(clients: int) -> Topology:
    """Clients and a server around a router."""
    names = [f"client{number}" for number in range(clients)]
    nodes = [*map(Node, names), Node("router", Kind.ROUTER), Node("server", services=(Service("web", ("true",)),))]
    links = [
        Link(End(name, "eth0", auto=(4, 6)), End("router", f"eth{number}", auto=(4, 6)))
        for number, name in enumerate([*names, "server"])
    ]
    return addressed(Topology("star", tuple(nodes), tuple(links)))


def ring() -> Topology:
    """Four nodes, each linked to the next, and one that is linked to none."""
    nodes = tuple(Node(name) for name in "abcde")
    pairs = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a"), ("b", "d")]
    links = [Link(End(left, f"to-{right}"), End(right, f"to-{left}")) for left, right in pairs]
    return Topology("ring", nodes, tuple(links))


CASES = {
    "chain of 50": chain(50),
    "star of 50": star(50),
    "ring and a lonely node": ring(),
    "one node": Topology("one", (Node("only"),)),
    "bridge": Topology(
        "bridged",
        (Node("a"), Node("b"), Node("s", Kind.BRIDGE)),
        (Link(End("a", "eth0"), End("s", "p0")), Link(End("b", "eth0"), End("s", "p1"))),
    ),
    **{path.stem: load(path) for path in sorted(TOPOLOGIES.glob("*.yaml"))},
}


def elements(topology: Topology, attribute: str) -> list[str]:
    root = ElementTree.fromstring(diagram(topology))
    return [value for element in root.iter() if (value := element.get(attribute)) is not None]


def texts(topology: Topology) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(diagram(topology)).iter()]


@pytest.mark.parametrize("topology", CASES.values(), ids=CASES)
def test_every_node_and_link_is_drawn_once(topology: Topology) -> None:
    assert sorted(elements(topology, "data-node")) == sorted(node.name for node in topology.nodes)
    wanted = [f"{link.left.label} {link.right.label}" for link in topology.links]
    assert sorted(elements(topology, "data-link")) == sorted(wanted)


@pytest.mark.parametrize("topology", CASES.values(), ids=CASES)
def test_no_two_nodes_overlap_and_all_are_inside_the_picture(topology: Topology) -> None:
    placed = boxes(topology)
    for one, other in combinations(placed, 2):
        is_beside = one.x + one.width < other.x or other.x + other.width < one.x
        is_below = one.y + one.height < other.y or other.y + other.height < one.y
        assert is_beside or is_below, (one, other)
    root = ElementTree.fromstring(diagram(topology))
    assert min(min(box.x, box.y) for box in placed) >= 0
    assert max(box.x + box.width for box in placed) <= float(root.get("width") or 0)
    assert max(box.y + box.height for box in placed) <= float(root.get("height") or 0)


@pytest.mark.parametrize("topology", CASES.values(), ids=CASES)
def test_the_same_topology_makes_the_same_picture(topology: Topology) -> None:
    assert diagram(topology) == diagram(replace(topology))


def test_a_chain_runs_from_left_to_right() -> None:
    placed = boxes(chain(50))
    assert [box.node for box in sorted(placed, key=lambda box: box.x)] == [f"n{number}" for number in range(50)]
    assert len({box.y + box.height / 2 for box in placed}) == 1


def test_a_star_has_its_clients_on_one_side_and_its_server_on_the_other() -> None:
    placed = {box.node: box for box in boxes(star(50))}
    assert len({placed[f"client{number}"].x for number in range(50)}) == 1
    assert placed["client0"].x < placed["router"].x < placed["server"].x


def test_interfaces_addresses_impairments_engines_and_services_are_written_down() -> None:
    address = ipaddress.ip_interface("10.0.0.1/24")
    left = End("a", "eth7", (address,), impair=Impairment(delay=0.005, jitter=0.001, loss=0.03, rate=2_000_000))
    nodes = (Node("a", services=(Service("web", ("true",)),)), Node("b", engine=EngineSpec("kernel")))
    found = texts(Topology("all", nodes, (Link(left, End("b", "eth8")),)))
    wanted = {"eth7", "eth8", "10.0.0.1/24", "delay 5 ms ±1 ms, loss 3%, rate 2 Mbit/s", "engine: kernel", "• web"}
    assert wanted <= set(found)


def test_names_are_escaped() -> None:
    hostile = '"><script>&'
    assert "<script" not in diagram(Topology("x", (Node(hostile),)))
    assert elements(Topology("x", (Node(hostile),)), "data-node") == [hostile]


def test_the_name_of_a_tall_box_is_in_sight_wherever_one_looks() -> None:
    places = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>router</text>', diagram(addressed(star(50))))]
    assert len(places) > 4  # the name, and the kind, which has the same word
    assert max(after - before for before, after in pairwise(places)) < 1000
