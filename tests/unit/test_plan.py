"""Plans and routes: what follows from a topology."""

from __future__ import annotations

from itertools import pairwise

import pytest

from testbed.impair import KERNEL_MEANS, notes
from testbed.plan import (
    AddAddress,
    AddRoute,
    Configure,
    Impair,
    JoinBridge,
    LoadRules,
    MakeBridge,
    MakeLink,
    MakeNamespace,
    Operation,
    Redirect,
    RunCommand,
    SetUp,
    StopOffload,
    WaitReady,
    describe,
    plan,
)
from testbed.routes import routes
from testbed.shapes import chain
from testbed.topology import Topology
from testbed.topology_file import loads

TRIANGLE = """
name: triangle
nodes:
  a: {}
  r1: {kind: router}
  r2: {kind: router}
  b: {ROUTES}
links:
  - ends: [{node: a}, {node: r1}]
  - ends: [{node: a}, {node: r2}]
  - ends: [{node: r1}, {node: b}]
  - ends: [{node: r2}, {node: b}]
"""


def ways(topology: Topology) -> dict[str, dict[str, str]]:
    """The routes of each node, as text."""
    return {node: {str(to): str(via) for to, via in found} for node, found in routes(topology).items()}


def test_a_host_with_one_gateway_has_a_default_route() -> None:
    found = ways(chain(3))
    assert found["n0"] == {"0.0.0.0/0": "10.0.0.2", "::/0": "fd00::2"}
    assert found["n2"] == {"0.0.0.0/0": "10.0.1.1", "::/0": "fd00:0:0:1::1"}
    assert found["n1"] == {}


def test_a_router_has_routes_to_what_others_are_next_to_joined_where_they_touch() -> None:
    found = ways(chain(6))
    assert found["n1"] == {
        "10.0.2.0/23": "10.0.1.2",
        "10.0.4.0/24": "10.0.1.2",
        "fd00:0:0:2::/63": "fd00:0:0:1::2",
        "fd00:0:0:4::/64": "fd00:0:0:1::2",
    }
    assert found["n4"]["10.0.0.0/23"] == "10.0.3.1"


def test_every_subnet_is_reached_from_everywhere() -> None:
    topology = chain(9)
    subnets = {address.network for link in topology.links for end in link.ends for address in end.addresses}
    for node, found in routes(topology).items():
        own = {address.network for end in topology.ends_of(node) for address in end.addresses}
        reached = {net for net in subnets for to, _ in found if net.version == to.version and net.overlaps(to)}
        assert own | reached == subnets


def test_a_host_with_two_gateways_has_a_route_for_each_subnet() -> None:
    found = ways(loads(TRIANGLE.replace("{ROUTES}", "{}")))
    assert found["a"]["10.0.2.0/24"] == "10.0.0.2"
    assert found["a"]["10.0.3.0/24"] == "10.0.1.2"


def test_a_route_that_was_given_stands() -> None:
    found = ways(loads(TRIANGLE.replace("{ROUTES}", "{routes: [{to: 10.0.0.0/24, via: 10.0.3.1}]}")))
    assert found["b"]["10.0.0.0/24"] == "10.0.3.1"
    assert found["b"]["fd00::/64"] == "fd00:0:0:2::1"


def test_hosts_on_a_bridge_reach_each_other_without_a_route_and_others_by_the_router() -> None:
    found = ways(
        loads(
            """
            name: switched
            nodes: {a: , b: , s: {kind: bridge}, r: {kind: router}, c: }
            links:
              - ends: [{node: a}, {node: s, addresses: []}]
              - ends: [{node: b}, {node: s, addresses: []}]
              - ends: [{node: r}, {node: s, addresses: []}]
              - ends: [{node: r}, {node: c}]
            """
        )
    )
    assert "s" not in found
    assert found["a"] == found["b"] == {"0.0.0.0/0": "10.0.0.3", "::/0": "fd00::3"}


SIDE_BY_SIDE = """
name: side-by-side
nodes:
  client: {}
  near: {kind: router}
  over6: {kind: router}
  far: {kind: router}
  server: {}
links:
  - ends: [{node: client, addresses: auto4}, {node: near, addresses: auto4}]
  - ends: [{node: client, addresses: auto6}, {node: near, addresses: auto6}]
  - ends: [{node: near, addresses: auto4}, {node: far, addresses: auto4}]
  - ends: [{node: near, addresses: auto6}, {node: over6, addresses: auto6}]
  - ends: [{node: over6, addresses: auto6}, {node: far, addresses: auto6}]
  - ends: [{node: far}, {node: server}]
"""


def test_each_family_takes_the_way_that_carries_it() -> None:
    found = ways(loads(SIDE_BY_SIDE))
    assert found["client"] == {"0.0.0.0/0": "10.0.0.2", "::/0": "fd00:0:0:1::2"}
    assert found["near"] == {
        "10.0.5.0/24": "10.0.2.2",
        "fd00:0:0:4::/63": "fd00:0:0:3::2",
    }
    assert found["far"]["fd00:0:0:1::/64"] == "fd00:0:0:4::1"


LINK_LOCAL = """
name: link-local
nodes: {a: {}, r: {kind: router}, b: {}}
links:
  - ends: [{node: a, addresses: ["fe80::a/64"]}, {node: r, addresses: ["fe80::1/64"]}]
  - ends: [{node: r, addresses: ["fe80::1/64", "fd00::1/64"]}, {node: b, addresses: ["fe80::b/64", "fd00::b/64"]}]
"""


def test_no_route_goes_by_a_link_local_address_or_leads_to_one() -> None:
    found = ways(loads(LINK_LOCAL))
    assert found == {"a": {}, "r": {}, "b": {}}


def test_no_way_leads_through_a_host() -> None:
    text = "name: x\nnodes: {a: , h: , b: }\nlinks: [{ends: [{node: a}, {node: h}]}, {ends: [{node: h}, {node: b}]}]"
    assert ways(loads(text)) == {"a": {}, "h": {}, "b": {}}


def operations(text: str) -> list[Operation]:
    return plan(loads(text))


PAIR = "name: pair\nnodes: {{a: {a}, b: {b}}}\nlinks: [{{ends: [{{node: a}}, {{node: b}}]}}]"


def test_a_plan_is_in_the_order_in_which_things_can_be_done() -> None:
    text = PAIR.format(a="{}", b="{kind: bridge}").replace("{node: b}", "{node: b, addresses: []}")
    kinds = [type(operation) for operation in operations(text)]
    host = [MakeLink, SetUp, AddAddress, StopOffload]
    bridge = [MakeBridge, JoinBridge, SetUp, StopOffload]
    order = [MakeNamespace, *host, *bridge, WaitReady]
    assert [kind for kind, following in pairwise([*kinds, None]) if kind is not following] == order


def test_a_link_is_made_with_the_first_of_its_nodes() -> None:
    text = "name: x\nnodes: {a: , b: , c: }\nlinks: [{ends: [{node: c}, {node: b}]}, {ends: [{node: b}, {node: a}]}]"
    made = [each for each in operations(text) if isinstance(each, MakeLink | SetUp)]
    assert [describe(each).split(", MTU")[0] for each in made] == [
        "b: link eth1 to a:eth0",
        *("a: lo up", "a: eth0 up"),
        "c: link eth0 to b:eth0",
        *("b: lo up", "b: eth0 up", "b: eth1 up"),
        *("c: lo up", "c: eth0 up"),
    ]


def test_a_plan_is_the_same_each_time() -> None:
    assert plan(chain(5)) == plan(chain(5))


def test_a_router_forwards_and_a_host_does_not() -> None:
    nodes = [operation for operation in plan(chain(3)) if isinstance(operation, MakeNamespace)]
    settings = {operation.node: dict(operation.settings) for operation in nodes}
    assert settings["n1"]["net.ipv4.ip_forward"] == settings["n1"]["net.ipv6.conf.all.forwarding"] == "1"
    assert "net.ipv4.ip_forward" not in settings["n0"]


def test_both_ends_of_a_link_have_an_index_of_their_own() -> None:
    links = [operation for operation in plan(chain(4)) if isinstance(operation, MakeLink)]
    assert [link.index for link in links] == [10, 12, 14]


def test_settings_of_an_interface_are_made_when_it_is_there() -> None:
    own = "{sysctls: {net.ipv4.ip_default_ttl: 9, net.ipv4.conf.eth0.rp_filter: 1}}"
    made = operations(PAIR.format(a=own, b="{}"))
    first = next(operation for operation in made if isinstance(operation, MakeNamespace))
    assert ("net.ipv4.ip_default_ttl", "9") in first.settings
    assert made[-1] == Configure("a", (("net.ipv4.conf.eth0.rp_filter", "1"),))


def test_commands_are_run_in_a_node_that_is_ready_before_its_rules() -> None:
    made = operations(PAIR.format(a="{setup: [\"sh -c 'echo x y'\", ls], nft: rules}", b="{}"))
    assert made[-3:-1] == [RunCommand("a", ("sh", "-c", "echo x y")), RunCommand("a", ("ls",))]
    assert describe(made[-3]) == "a: sh -c 'echo x y'"


@pytest.mark.parametrize(
    ("key", "command"),
    [
        ("nft", ("nft", "-f", "-")),
        ("iptables", ("iptables-restore", "-w")),
        ("ip6tables", ("ip6tables-restore", "-w")),
    ],
)
def test_the_users_rules_are_loaded_last(key: str, command: tuple[str, ...]) -> None:
    made = operations(PAIR.format(a=f"{{{key}: rules}}", b="{}"))
    assert made[-1] == LoadRules("a", command, "rules")


def test_an_interface_with_ipv6_has_a_link_local_address() -> None:
    added = [str(operation.address) for operation in plan(chain(2)) if isinstance(operation, AddAddress)]
    assert added == ["10.0.0.1/24", "fd00::1/64", "fe80::1/64", "10.0.0.2/24", "fd00::2/64", "fe80::2/64"]


def test_a_link_local_address_that_was_given_is_the_only_one() -> None:
    added = [each.address for each in operations(LINK_LOCAL) if isinstance(each, AddAddress) and each.node != "b"]
    assert [str(address) for address in added] == ["fe80::a/64", "fe80::1/64", "fe80::1/64", "fd00::1/64"]


def test_a_bridge_that_joins_nothing_is_not_waited_for() -> None:
    lone = operations("name: lone\nnodes: {host: , bridge: {kind: bridge}}")
    assert [each.node for each in lone if isinstance(each, WaitReady)] == ["host"]


def test_offload_is_left_alone_when_asked_for() -> None:
    text = PAIR.format(a="{}", b="{}")
    assert any(isinstance(operation, StopOffload) for operation in operations(text))
    assert not any(isinstance(operation, StopOffload) for operation in operations(text + "\noffload: true"))


def test_routes_are_added_after_addresses_and_interfaces() -> None:
    made = plan(chain(3))
    of_first = [operation for operation in made if getattr(operation, "node", None) == "n0"]
    route = next(at for at, operation in enumerate(of_first) if isinstance(operation, AddRoute))
    assert not any(isinstance(operation, AddAddress | SetUp) for operation in of_first[route:])


IMPAIRED = "name: pair\nnodes: {a: , b: }\nlinks: [{ends: [{node: a, impair: %s}, {node: b}]}]"
HALVES = ["a: link eth0 to (wire):l0, MTU 1500", "(wire): link r0 to b:eth0, MTU 1500"]
REDIRECTS = ["(wire): l0 goes to r0", "(wire): r0 goes to l0"]
FULL_KERNEL = frozenset(KERNEL_MEANS)


@pytest.mark.parametrize(
    ("impairment", "kernel", "done", "note"),
    [
        pytest.param(
            "{loss: 5%, rate: 4mbit}",
            FULL_KERNEL,
            [*HALVES, *REDIRECTS, "(wire): netem and tbf on r0 for what a:eth0 sends: loss=0.05 rate=4000000"],
            "by the kernel's netem and tbf",
            id="all in the kernel",
        ),
        pytest.param(
            "{delay: 5ms}",
            FULL_KERNEL - {"tbf"},
            [*HALVES, *REDIRECTS, "(wire): netem on r0 for what a:eth0 sends: delay=0.005"],
            "by the kernel's netem",
            id="only what is needed of the kernel's",
        ),
        pytest.param(
            "{loss: 5%, rate: 4mbit}",
            FULL_KERNEL - {"netem"},
            [f"{HALVES[0]}, user-space stage for what a:eth0 sends: loss=0.05 rate=4000000", HALVES[1]],
            "in user space: this kernel has no netem",
            id="no netem",
        ),
        pytest.param(
            "{rate: 4mbit}",
            FULL_KERNEL - {"netem", "tc-redirect"},
            [f"{HALVES[0]}, user-space stage for what a:eth0 sends: rate=4000000", HALVES[1]],
            "in user space: this kernel has no tc-redirect",
            id="no way from one half to the other",
        ),
        pytest.param(
            "{loss: 5%, rate: 4mbit}",
            frozenset(),
            [f"{HALVES[0]}, user-space stage for what a:eth0 sends: loss=0.05 rate=4000000", HALVES[1]],
            "in user space: this kernel has no netem and no tbf and no tc-redirect",
            id="nothing",
        ),
        pytest.param(
            "{loss: 5%, seed: 0}",
            FULL_KERNEL,
            [f"{HALVES[0]}, user-space stage for what a:eth0 sends: loss=0.05", HALVES[1]],
            "in user space: its seed asks for that",
            id="a seed",
        ),
        pytest.param(
            "{delay: 5s, jitter: 3s}",
            FULL_KERNEL,
            [f"{HALVES[0]}, user-space stage for what a:eth0 sends: delay=5 jitter=3", HALVES[1]],
            "in user space: netem's jitter ends at 2.1 s",
            id="more jitter than netem has",
        ),
        pytest.param("{delay: 0s}", FULL_KERNEL, [*HALVES, *REDIRECTS], None, id="nothing to do"),
    ],
)
def test_an_impaired_link_is_two_with_the_kernel_or_the_stage_between(
    impairment: str, kernel: frozenset[str], done: list[str], note: str | None
) -> None:
    topology = loads(IMPAIRED % impairment)
    made = [each for each in plan(topology, kernel) if isinstance(each, MakeLink | Redirect | Impair)]
    assert [describe(operation) for operation in made] == done
    assert notes(topology, kernel) == ([f"a:eth0: impaired {note}"] if note else [])


def test_both_directions_of_a_link_are_impaired_in_one_place() -> None:
    text = """
name: three
nodes: {a: , b: , c: }
links:
  - ends: [{node: a, impair: {loss: 5%}}, {node: b, impair: {rate: 4mbit}}]
  - {ends: [{node: b}, {node: c}], impair: {rate: 1mbit}}
"""
    topology = loads(text)
    assert notes(topology, FULL_KERNEL - {"netem"}) == [
        "a:eth0, b:eth0: impaired in user space: this kernel has no netem",
        "b:eth1, c:eth0: impaired by the kernel's tbf",
    ]
    described = [describe(each) for each in plan(topology, FULL_KERNEL) if isinstance(each, Impair)]
    assert described == [
        "(wire): netem on r0 for what a:eth0 sends: loss=0.05",
        "(wire): tbf on l0 for what b:eth0 sends: rate=4000000",
        "(wire): tbf on r1 for what b:eth1 sends: rate=1000000",
        "(wire): tbf on l1 for what c:eth0 sends: rate=1000000",
    ]
