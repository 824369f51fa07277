"""Topology files and scenarios that are legal but odd, or look legal and are not."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.addressing import addressed
from testbed.plan import AddAddress, plan
from testbed.scenario import Run
from testbed.scenario_file import load_scenario
from testbed.topology import Topology
from testbed.topology_file import TopologyError, loads

PAIR = "name: pair\nnodes: {a: %s, b: }\nlinks: [{ends: [{node: a}, {node: b}]}]\n"
NUMBERS = "tail, -n, +5, 007, 0x10, 1_000, 0o17, -0, 80"
SCENARIO = "name: s\ntopology: {name: s, nodes: {a: }, links: []}\nsteps: [%s]\n"


def service(topology: Topology) -> tuple[str, ...]:
    return topology.nodes[0].services[0].command


def test_words_of_a_command_are_as_they_were_written(tmp_path: Path) -> None:
    words = tuple(NUMBERS.split(", "))
    topology = loads(PAIR % f"{{services: {{s: {{command: [{NUMBERS}]}}}}}}")
    assert service(topology) == words
    assert service(copy.deepcopy(topology)) == words
    scenario = tmp_path / "s.yaml"
    scenario.write_text(SCENARIO % f"run: {{in: a, command: [{NUMBERS}]}}")
    (step,) = load_scenario(scenario).steps
    assert isinstance(step, Run)
    assert step.command == words


def test_other_numbers_are_numbers() -> None:
    topology = loads((PAIR % "").replace("ends:", "mtu: 0x5dc, ends:"))
    assert (topology.links[0].mtu, f"{topology.links[0].mtu}", json.dumps(topology.links[0].mtu)) == (
        *(1500, "1500", "1500"),
    )


@pytest.mark.parametrize(
    "text",
    [
        (PAIR % "").replace("ends:", "mtu: 1500.0, ends:"),
        PAIR % "{sysctls: {net.ipv4.ip_forward: 1.0}}",
        (PAIR % "").replace("{node: a}", "{node: a, impair: {seed: 7.0}}"),
        PAIR % "{services: {s: {command: [echo, 2.0]}}}",
    ],
)
def test_a_fraction_is_no_integer(text: str) -> None:
    with pytest.raises(TopologyError, match=r":\d+:\d+: .*\.0 is not of type"):
        loads(text)


def test_a_truth_value_may_have_an_anchor() -> None:
    topology = loads("offload: &o true\n" + PAIR % "{services: {s: {command: [x], ready: {log: x}, tproxy: *o}}}")
    assert topology.offload is True
    with pytest.raises(TopologyError, match="not of type"):
        loads(PAIR % "{services: {s: {command: [echo, &o true]}}}")


def test_bridges_in_a_circle_are_refused() -> None:
    text = "name: x\nnodes: {a: , s: {kind: bridge}, t: {kind: bridge}, u: {kind: bridge}}\nlinks:\n"
    pairs = [("a", "s"), ("s", "t"), ("t", "u")]
    lines = [f"- {{ends: [{{node: {left}}}, {{node: {right}}}]}}\n" for left, right in [*pairs, ("u", "s")]]
    loads(text + "".join(lines[:-1]))
    with pytest.raises(TopologyError, match=r"links\[3\]: closes a circle of bridges"):
        loads(text + "".join(lines))


def test_addresses_are_in_the_order_of_the_links_when_bridges_are_joined_late() -> None:
    pairs = [("a", "s"), ("b", "t"), ("c", "t"), ("s", "t")]
    lines = [f"- {{ends: [{{node: {left}}}, {{node: {right}}}]}}\n" for left, right in pairs]
    text = "name: x\nnodes: {a: , b: , c: , s: {kind: bridge}, t: {kind: bridge}}\nlinks:\n" + "".join(lines)
    topology = loads(text)
    assert [str(topology.ends_of(name)[0].addresses[0]) for name in "abc"] == [
        *("10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24"),
    ]


@pytest.mark.parametrize(
    ("given", "wanted", "found"),
    [
        ("10.0.0.1/8", "auto4", "10.0.0.2/8"),
        ("192.0.2.1/32, 10.0.0.1/24", "auto4", "10.0.0.2/24"),
        ("169.254.1.1/16", "auto4", "169.254.0.1/16"),
    ],
)
def test_an_automatic_address_is_in_the_subnet_that_there_is(given: str, wanted: str, found: str) -> None:
    ends = f"{{node: a, addresses: [{given}]}}, {{node: b, addresses: {wanted}}}"
    topology = loads((PAIR % "").replace("{node: a}, {node: b}", ends))
    assert [str(address) for address in topology.links[0].right.addresses] == [found]


def link_locals(text: str) -> list[str]:
    added = [each.address for each in plan(addressed(loads(text))) if isinstance(each, AddAddress)]
    return [str(address) for address in added if address.version == 6 and address.is_link_local]


SWITCHED = """
name: x
nodes: {s: {kind: bridge}, a: , b: , c: , d: }
links:
- ends: [{node: a, addresses: ["fd00:1::1/64"]}, {node: s}]
- ends: [{node: b, addresses: ["fd00:1::2/64"]}, {node: s}]
- ends: [{node: c, addresses: ["fd00:2::1/64"]}, {node: s}]
- ends: [{node: d, addresses: ["fd00:2::2/64"]}, {node: s}]
"""


def test_link_local_addresses_of_a_segment_differ() -> None:
    given = 'ends: [{node: a, addresses: ["fd00:9::1/64"]}, {node: b, addresses: ["fe80::1/64", "fd00:9::fe/64"]}]'
    point = 'ends: [{node: a, addresses: ["fd00:9::/127"]}, {node: b, addresses: ["fd00:9::1/127"]}]'
    ends = "ends: [{node: a}, {node: b}]"
    for text in ((PAIR % "").replace(ends, given), (PAIR % "").replace(ends, point), SWITCHED):
        found = link_locals(text)
        assert len(set(found)) == len(found) >= 2, found
        assert "fe80::/64" not in found
    both = 'ends: [{node: a, addresses: ["fe80::1/64"]}, {node: b, addresses: ["fe80::1/64"]}]'
    with pytest.raises(TopologyError, match="has the address fe80::1 already"):
        loads((PAIR % "").replace(ends, both))


def test_a_link_local_address_of_a_bridge_is_refused_as_any_other() -> None:
    ends = 'ends: [{node: a}, {node: b, addresses: ["fe80::1/64"]}]'
    text = (PAIR % "").replace("b: }", "b: {kind: bridge}}").replace("ends: [{node: a}, {node: b}]", ends)
    with pytest.raises(TopologyError, match="a bridge forwards frames: its interfaces have no addresses"):
        loads(text)


@pytest.mark.parametrize("pattern", ["a{99999999999}", "(" * 3000 + ")" * 3000], ids=["too many", "too deep"])
def test_a_regular_expression_that_python_cannot_take_is_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="is no regular expression"):
        loads(PAIR % f"{{services: {{s: {{command: [x], ready: {{log: '{pattern}'}}}}}}}}")
    scenario = tmp_path / "s.yaml"
    scenario.write_text(SCENARIO % f"run: {{in: a, command: [x], output: '{pattern}'}}")
    with pytest.raises(Exception, match="no regular expression"):
        load_scenario(scenario)


def test_a_drawing_is_written_whatever_the_locale_is(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(PAIR % "" + "description: größer\n", encoding="utf-8")
    command = [sys.executable, "-m", "testbed.cli", "diagram", str(file), "-o", str(tmp_path / "x.svg")]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.svg").read_text(encoding="utf-8").endswith("</svg>\n")
