"""Automatic addresses."""

from __future__ import annotations

import ipaddress

import pytest

from testbed.addressing import FAMILIES, AddressingError, addressed
from testbed.topology import End, Kind, Link, Node, Topology


def end(node: str, *addresses: str, interface: str = "eth0", auto: tuple[int, ...] | None = None) -> End:
    wanted = auto if auto is not None else () if addresses else FAMILIES
    return End(node, interface, tuple(ipaddress.ip_interface(address) for address in addresses), wanted)


def addresses(*links: Link, bridges: tuple[str, ...] = ()) -> dict[str, str]:
    """What each end of some links has in the end."""
    names = {end.node for link in links for end in link.ends}
    nodes = [Node(name, Kind.BRIDGE if name in bridges else Kind.ROUTER) for name in sorted(names)]
    made = addressed(Topology("lab", tuple(nodes), links))
    assert not any(end.auto for link in made.links for end in link.ends)
    return {end.label: " ".join(map(str, end.addresses)) for link in made.links for end in link.ends}


def test_each_link_gets_the_next_subnets() -> None:
    links = (Link(end("a"), end("b")), Link(end("b", interface="eth1"), end("c")))
    assert addresses(*links) == {
        "a:eth0": "10.0.0.1/24 fd00::1/64",
        "b:eth0": "10.0.0.2/24 fd00::2/64",
        "b:eth1": "10.0.1.1/24 fd00:0:0:1::1/64",
        "c:eth0": "10.0.1.2/24 fd00:0:0:1::2/64",
    }


def test_what_bridges_join_is_one_subnet() -> None:
    links = (
        Link(end("a"), end("s", auto=())),
        Link(end("s", interface="eth1", auto=()), end("t", auto=())),
        Link(end("b"), end("t", interface="eth1", auto=())),
        Link(end("c"), end("t", interface="eth2", auto=())),
    )
    found = addresses(*links, bridges=("s", "t"))
    assert {label: text for label, text in found.items() if text} == {
        "a:eth0": "10.0.0.1/24 fd00::1/64",
        "b:eth0": "10.0.0.2/24 fd00::2/64",
        "c:eth0": "10.0.0.3/24 fd00::3/64",
    }


def test_an_end_takes_the_lowest_free_address_of_the_subnet_that_its_link_has() -> None:
    links = (Link(end("a", "192.168.7.1/24", "192.168.7.2/24"), end("b")),)
    assert addresses(*links)["b:eth0"] == "192.168.7.3/24 fd00::1/64"


def test_subnets_that_are_named_are_not_given_again() -> None:
    links = (
        Link(end("a"), end("b")),
        Link(end("b", "10.0.0.0/31", "fd00:0:0:2::1/64", interface="eth1"), end("c", auto=())),
        Link(end("c", interface="eth1"), end("d")),
    )
    found = addresses(*links)
    assert found["a:eth0"] == "10.0.1.1/24 fd00:0:0:1::1/64"
    assert found["d:eth0"] == "10.0.3.2/24 fd00:0:0:3::2/64"


@pytest.mark.parametrize(("family", "expected"), [(4, "10.0.0.1/24"), (6, "fd00::1/64")])
def test_one_family_alone(family: int, expected: str) -> None:
    assert addresses(Link(end("a", auto=(family,)), end("b", auto=(family,))))["a:eth0"] == expected


def test_a_full_subnet_is_told() -> None:
    with pytest.raises(AddressingError, match=r"b:eth0: no address is left in 10\.7\.0\.1/32"):
        addresses(Link(end("a", "10.7.0.1/32"), end("b", auto=(4,))))


def test_no_subnet_left_is_told() -> None:
    links = (Link(end("a", "10.0.0.1/8"), end("b", auto=())), Link(end("a", interface="eth1"), end("c")))
    with pytest.raises(AddressingError, match="no subnet is left"):
        addresses(*links)
