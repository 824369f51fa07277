"""Topology files: what they become, and what their errors say."""

from __future__ import annotations

import ipaddress
from itertools import pairwise
from pathlib import Path

import pytest

from testbed.topology import EngineSpec, Kind, Readiness, Route, Topology
from testbed.topology_file import TopologyError, load, loads

READY_LABS = sorted((Path(__file__).parents[2] / "topologies").glob("*.yaml"))

LAB = """\
name: lab
nodes:
  client:
  gateway:
    kind: router
    sysctls: {net.ipv4.ip_default_ttl: 63}
    engine:
      rules:
        - -A PREROUTING -p tcp -j TPROXY --on-port 50080
  server:
    routes:
      - {to: default, via: 10.1.0.1}
      - {to: "2001:db8::/32", via: "fd01::1"}
    services:
      web: {command: [serve, --port, 80], ready: {port: 80}}
      echo: {command: [echo, "{notify_fd}"], ready: notify}
links:
  - ends: [{node: client}, {node: gateway}]
  - ends:
      - {node: gateway, addresses: [10.1.0.1/24, "fd01::1/64"], mac: "02:00:00:00:00:01"}
      - {node: server, interface: wan, addresses: [10.1.0.2/24, "fd01::2/64"]}
    mtu: 1400
"""


@pytest.fixture(scope="module")
def lab() -> Topology:
    return loads(LAB)


def test_nodes_become_values(lab: Topology) -> None:
    assert [(node.name, node.kind) for node in lab.nodes] == [
        ("client", Kind.HOST),
        ("gateway", Kind.ROUTER),
        ("server", Kind.HOST),
    ]
    assert lab.node("gateway").engine == EngineSpec("inline", ("-A PREROUTING -p tcp -j TPROXY --on-port 50080",))
    assert lab.node("gateway").sysctls == (("net.ipv4.ip_default_ttl", "63"),)
    assert lab.node("server").routes == (
        Route(ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_address("10.1.0.1")),
        Route(ipaddress.ip_network("2001:db8::/32"), ipaddress.ip_address("fd01::1")),
    )
    assert [(service.name, service.command, service.ready) for service in lab.node("server").services] == [
        ("web", ("serve", "--port", "80"), Readiness(port=80)),
        ("echo", ("echo", "{notify_fd}"), Readiness(notify=True)),
    ]


@pytest.mark.parametrize(
    ("option", "wrapper"),
    [
        pytest.param("", (), id="not-asked-for"),
        pytest.param(", tproxy: false", (), id="off"),
        pytest.param(", tproxy: true", ("tproxyctl", "run", "--"), id="on"),
        pytest.param(
            ", tproxy: recvorigaddrs", ("tproxyctl", "run", "--recvorigaddrs", "--"), id="with-original-addresses"
        ),
    ],
)
def test_services_written_for_tproxy_run_unmodified(option: str, wrapper: tuple[str, ...]) -> None:
    lab = loads(f"name: zorp\nnodes: {{gateway: {{services: {{zorp: {{command: [zorp]{option}}}}}}}}}\nlinks: []\n")
    [service] = lab.node("gateway").services
    assert service.words == (*wrapper, "zorp")


def test_what_an_end_does_not_say_follows_from_its_place(lab: Topology) -> None:
    automatic, written = lab.links
    assert [end.interface for end in (*automatic.ends, *written.ends)] == ["eth0", "eth0", "eth1", "wan"]
    assert [str(address) for end in automatic.ends for address in end.addresses] == [
        "10.0.0.1/24",
        "fd00::1/64",
        "10.0.0.2/24",
        "fd00::2/64",
    ]
    assert (automatic.mtu, written.mtu) == (1500, 1400)
    assert written.left.mac == "02:00:00:00:00:01"


def test_the_same_file_gives_the_same_topology(lab: Topology) -> None:
    assert loads(LAB) == lab


@pytest.mark.parametrize("path", READY_LABS, ids=lambda path: path.stem)
def test_a_ready_lab_is_named_as_its_file(path: Path) -> None:
    assert load(path).name == path.stem


# What is replaced in LAB by what, and the error that is told for it.
ERRORS = {
    "key that is no text": ("server:", "1:", "10:3: nodes[1]: a key must be text: write '1' with the quotes"),
    "key given twice": ("server:", "client:", '10:3: found duplicate key "client"'),
    "NUL byte": ("[serve,", '["ser\\0ve",', "15:23: nodes.server.services.web.command[0]: a NUL byte"),
    "half a character": ("[serve,", '["\\ud800",', "15:23: nodes.server.services.web.command[0]: half of a pair"),
    "character that YAML does not allow": (
        "mtu: 1400",
        "mtu: \a",
        "22:10: a character that YAML does not allow: '\\x07'",
    ),
    "number without end": ("ready: {port: 80}", "ready: {port: 80, within: .inf}", "within: inf is no finite number"),
    "date that there is not": ("name: lab", "name: 2026-13-01", "1:7: month must be in 1..12"),
    "tag that means nothing": ("name: lab", "name: !!str lab", "1:1: name: the tag !!str means nothing here"),
    "tag of a mapping": ("gateway:", "gateway: !router", "4:3: nodes.gateway: the tag !router means nothing here"),
    "tag that does not fit": ("name: lab", "name: !!bool lab", "1:7: no value of the kind tag:yaml.org,2002:bool"),
    "mapping in itself": ("gateway:", "gateway: &gateway\n    <<: *gateway", "topology"),
    "name with a line break": ("name: lab", "name: >\n  lab\n", "1:1: name: 'lab\\n' is not a name"),
    "node that is none": ("client:", "client: host", "3:3: nodes.client: 'host' is not of type 'object'"),
    "endless aliases": (
        "name: lab",
        "a: &a [x]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in pairwise("abcdefgh")),
        "1:1: document: more than 100000 values, those of an alias counted each time",
    ),
    "endless depth": ("name: lab", f"deep: {'[' * 30}{']' * 30}", "1:8: deep[0]: nested too deeply"),
    "second document": ("links:", "---\nlinks:", "17:1: but found another document"),
    "name that would be a path": (
        "web: {",
        '"../web": {',
        "15:7: nodes.server.services.../web: '../web' is not a name",
    ),
    "sysctl that is no namespace's": (
        "net.ipv4.ip_default_ttl",
        "kernel.hostname",
        "6:15: nodes.gateway.sysctls.kernel.hostname: a namespace has settings of its own below net. only",
    ),
    "MAC address that is none": ("02:00:00:00:00:01", "02:00", "20:65: links[1].ends[0].mac: '02:00' is not a MAC"),
    "interface's name too long": ("wan", "w" * 16, "is not an interface: up to 15"),
    "impairment without a unit": (
        "mtu: 1400",
        "impair: {delay: '20'}",
        "22:14: links[1].impair.delay: '20' is no number followed by us or ms or s",
    ),
    "impairment above everything": (
        "mtu: 1400",
        "impair: {loss: 101%}",
        "22:14: links[1].impair.loss: more than 100 %",
    ),
    "rate of nothing": ("mtu: 1400", "impair: {rate: 0bit}", "impair.rate: '0bit' is not between 1bit and 1000gbit"),
    "delay beyond a day": ("mtu: 1400", "impair: {delay: 86401s}", "impair.delay: '86401s' is more than a day"),
    "patience beyond a day": ("{port: 80}", "{port: 80, within: 86401}", "86401 is greater than the maximum of 86400"),
    "unknown key, with the nearest": (
        "kind: router",
        "knid: router",
        "5:5: nodes.gateway.knid: unknown key; did you mean 'kind'?",
    ),
    "unknown key, with nothing near": (
        "mtu: 1400",
        "zebra: 1",
        "22:5: links[1].zebra: unknown key; known are ends, mtu",
    ),
    "unknown key at the top": ("name: lab", "name: lab\nlink: []", "2:1: link: unknown key; did you mean 'links'?"),
    "missing key": ("name: lab\n", "", "1:1: document: 'name' is a required property"),
    "unknown kind": (
        "kind: router",
        "kind: hub",
        "5:5: nodes.gateway.kind: 'hub' is not one of ['host', 'router', 'bridge']",
    ),
    "wrong type": ("mtu: 1400", "mtu: big", "22:5: links[1].mtu: 'big' is not of type 'integer'"),
    "text that is read as a truth value": (
        "[serve,",
        "[yes, true,",
        "15:28: nodes.server.services.web.command[1]: True is not of type 'string', 'integer'; text that looks like",
    ),
    "address that is none": (
        "10.1.0.2/24",
        "10.1.0.300/24",
        "links[1].ends[1].addresses[0]: '10.1.0.300/24' does not appear to be an IPv4 or IPv6 interface",
    ),
    "address without a prefix length": ("10.1.0.2/24", "10.1.0.2", "10.1.0.2 has no prefix length"),
    "unknown node": (
        "{node: client}",
        "{node: cleint}",
        "18:13: links[0].ends[0].node: there is no node 'cleint'; did you mean 'client'?",
    ),
    "gateway out of reach": (
        "via: 10.1.0.1}",
        "via: 10.9.0.1}",
        "12:23: nodes.server.routes[0].via: the gateway 10.9.0.1 is in none of its subnets",
    ),
    "route of two families": (
        'via: "fd01::1"',
        "via: 10.1.0.1",
        "13:9: nodes.server.routes[1]: 2001:db8::/32 and 10.1.0.1 are of two families",
    ),
    "option that is none": (
        "engine:\n",
        "engine:\n      options: [--fail-opne]\n",
        "8:7: nodes.gateway.engine.options: No such option",
    ),
    "option without its value": (
        "engine:\n",
        "engine:\n      options: [--mark]\n",
        "8:7: nodes.gateway.engine.options: Option '--mark' requires an argument",
    ),
    "option with a value out of range": (
        "engine:\n",
        "engine:\n      options: [--queue-num, 70000]\n",
        "8:7: nodes.gateway.engine.options: Invalid value for '--queue-num'",
    ),
    "option that the lab gives": (
        "engine:\n",
        "engine:\n      options: [--datapath, kernel]\n",
        "8:7: nodes.gateway.engine.options: --datapath is given by the lab",
    ),
    "rule that is none": ("- -A PRE", "- -X PRE", "9:11: nodes.gateway.engine.rules[0]: a rule begins with -A"),
    "command that is none": (
        "kind: router",
        "setup: [' ']",
        "gateway.setup[0]: there is no command in ' '",
    ),
    "command with an open quotation": (
        "kind: router",
        """setup: ["a 'b"]""",
        "5:13: nodes.gateway.setup[0]: No",
    ),
    "rule that the engine refuses": (
        "-j TPROXY --on-port 50080",
        "-j TPROXY",
        '9:11: nodes.gateway.engine.rules[0]: TPROXY: option "--on-port" must be specified',
    ),
    "no YAML": ("kind: router", "kind: [router", "topology:6:12: expected ',' or ']'"),
    "no mapping": (LAB, "- a list", "1:1: document: ['a list'] is not of type 'object'"),
    "empty": (LAB, "", "1:1: document: there is nothing, where object is wanted"),
}


@pytest.mark.parametrize(("old", "new", "message"), ERRORS.values(), ids=ERRORS)
def test_an_error_names_place_and_key(old: str, new: str, message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        loads(LAB.replace(old, new, 1))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_all_errors_are_told_at_once() -> None:
    broken = LAB.replace("kind: router", "knid: router").replace("mtu: 1400", "mtu: 0").replace("name: lab", "name: L")
    with pytest.raises(TopologyError) as caught:
        loads(broken, "lab.yaml")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["lab.yaml:1:1", "lab.yaml:5:5", "lab.yaml:22:5"]


def test_all_errors_of_one_node_are_told_at_once() -> None:
    with pytest.raises(TopologyError) as caught:
        loads("name: lab\nnodes:\n  a: {kind: hots, sysctl: {}, setup: [1]}\nlinks: []")
    keys = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert keys == ["nodes.a.kind", "nodes.a.sysctl", "nodes.a.setup[0]"]


@pytest.mark.parametrize("make", ["missing", "directory", "binary"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, make: str) -> None:
    path = tmp_path / "lab.yaml"
    if make == "directory":
        path.mkdir()
    elif make == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TopologyError, match=r"lab\.yaml: cannot be read"):
        load(path)
