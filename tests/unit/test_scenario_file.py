"""Scenario files: what they become, and what their errors say."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.scenario import (
    Change,
    ChangeLinks,
    Ending,
    Expect,
    ExpectEngine,
    ExpectNever,
    ExpectSame,
    Fetch,
    Kill,
    Run,
    Send,
    Start,
    Tool,
)
from testbed.scenario_file import ScenarioError, is_scenario, load_scenario
from testbed.topology import Impairment, Readiness, Service
from testbed.topology_file import TopologyError

LAB = """\
name: lab
nodes:
  a: {services: {web: {command: [serve]}}}
  b: {engine: {}}
links: [{ends: [{node: a}, {node: b}]}, {ends: [{node: a}, {node: b}], impair: {}}]
"""
STEPS = """\
name: all-steps
description: one of each
topology: lab.yaml
steps:
  - start: {in: a, name: echo, command: [echo, 7], ready: {port: 7}}
  - start: {in: a, name: web}
  - run: {in: a, command: [ls], exit: 2, output: "no such", within: 5s, retry: 2s}
  - fetch: {in: a, url: "http://10.0.0.2/", status: 404, size: 0}
  - fetch: {in: a, url: "http://10.0.0.2/", fails: true, within: 500ms}
  - send: {in: a, packet: {ip.dst: 10.0.0.2, udp.dport: 9, raw.load: hello}, count: 3}
  - expect: {at: "b:eth0", match: {net.src: 10.0.0.1, udp.dport: [9, 10]}, count: 3, within: 1s}
  - expect: {at: "b:eth0", match: {tcp.dport: 9}, never: 200ms}
  - expect: {at: ["a:eth0", "b:eth0"], changed: [ip.src]}
  - engine: {in: b, counters: {PREROUTING.redirect: 2}, connections: 0, sockrefs: 1}
  - change: {in: b, tproxy: -F PREROUTING}
  - change: {in: a, ip: link set eth0 down}
  - change: {in: b, impair: {eth1: {loss: 10%, delay: 5ms}}}
  - kill: {in: a, name: echo}
  - kill: {in: b, name: tproxyd, signal: KILL}
"""


def written(folder: Path, steps: str = STEPS) -> Path:
    """A scenario file, beside its topology."""
    (folder / "lab.yaml").write_text(LAB)
    path = folder / "scenario.yaml"
    path.write_text(steps)
    return path


def test_steps_become_values(tmp_path: Path) -> None:
    scenario = load_scenario(written(tmp_path))
    assert (scenario.name, scenario.description, scenario.topology.name) == ("all-steps", "one of each", "lab")
    assert scenario.steps == (
        Start("a", "echo", Service("echo", ("echo", "7"), Readiness(port=7))),
        Start("a", "web"),
        Run("a", ("ls",), 2, "no such", 5.0, 2.0),
        Fetch("a", "http://10.0.0.2/", 404, 0),
        Fetch("a", "http://10.0.0.2/", None, within=0.5),
        Send("a", {"ip.dst": "10.0.0.2", "udp.dport": 9, "raw.load": "hello"}, 3),
        Expect("b:eth0", {"net.src": "10.0.0.1", "udp.dport": [9, 10]}, 3, 1.0),
        ExpectNever("b:eth0", {"tcp.dport": 9}, 0.2),
        ExpectSame(("a:eth0", "b:eth0"), {}, ("ip.src",)),
        ExpectEngine("b", {("PREROUTING", "redirect"): 2}, 0, 1),
        Change("b", Tool.TPROXY, ("-F", "PREROUTING")),
        Change("a", Tool.IP, ("link", "set", "eth0", "down")),
        ChangeLinks("b", {"eth1": Impairment(delay=0.005, loss=0.1)}),
        Kill("a", "echo"),
        Kill("b", "tproxyd", Ending.KILL),
    )


def test_a_scenario_is_told_from_a_topology(tmp_path: Path) -> None:
    assert is_scenario(written(tmp_path))
    assert not is_scenario(tmp_path / "lab.yaml")


def test_a_topology_may_stand_in_the_scenario(tmp_path: Path) -> None:
    inside = "".join(f"  {line}\n" for line in LAB.splitlines())
    path = written(tmp_path, f"name: x\ntopology:\n{inside}steps: [kill: {{in: a, name: web}}]\n")
    assert load_scenario(path).topology.node("b").engine is not None


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        pytest.param("fetch: {in: a, ulr: x}", "5:20: steps[0].fetch.ulr: unknown key; did you mean 'url'?", id="key"),
        pytest.param("fech: {in: a}", "5:5: steps[0].fech: unknown key; did you mean 'fetch'?", id="kind"),
        pytest.param("kill: {in: c, name: web}", "kill.in: there is no node 'c'", id="node"),
        pytest.param("kill: {in: a, name: wep}", "no program 'wep'; did you mean 'web'?", id="program"),
        pytest.param("start: {in: a, name: echo}", "no service 'echo'", id="service"),
        pytest.param("start: {in: a, name: web, ready: notify}", "start.ready: only with a command", id="ready"),
        pytest.param('expect: {at: "a:eth2"}', "no captured interface 'a:eth2'; did you mean 'a:eth1'", id="point"),
        pytest.param('expect: {at: "a:eth0", match: {tcp.dprt: 1}}', "did you mean dport?", id="field"),
        pytest.param('expect: {at: "a:eth0", changed: [ip.src]}', "changed: only with two points", id="changed"),
        pytest.param(
            'expect: {at: ["a:eth0", "b:eth0"], changed: [payload, ip.sorc]}',
            "changed[1]: 'ip.sorc' is no field that changes are told of; did you mean ip.src?",
            id="changed field",
        ),
        pytest.param('expect: {at: "a:eth0", never: 1s, count: 2}', "count: not with never", id="never"),
        pytest.param('expect: {at: "a:eth0", within: 2}', "within", id="no unit"),
        pytest.param(
            "start: {in: a, name: x, command: [ls], ready: {log: '('}}",
            "start.ready: '(' is no regular",
            id="ready log",
        ),
        pytest.param(
            "start: {in: a, name: x, command: [ls], ready: notify}", "start.ready: the command is not told", id="notify"
        ),
        pytest.param("run: {in: a, command: [ls], output: '('}", "no regular expression", id="regular expression"),
        pytest.param("run: {in: a, command: [ls], within: 2h}", "no number followed by us or ms or s", id="time"),
        pytest.param("fetch: {in: a, url: ftp://x}", "http", id="url"),
        pytest.param('fetch: {in: a, url: "http://x", fails: true, size: 1}', "size: not where the fetch", id="fails"),
        pytest.param("send: {in: a, packet: {ip.dst: 10.0.0.2, udp.dport: x}}", "no packet can be made", id="value"),
        pytest.param("send: {in: a, packet: {ip.dst: server}}", "ip.dst is never 'server'", id="address"),
        pytest.param("send: {in: a, packet: {ib.dst: 10.0.0.2}}", "no layer 'ib', only frame", id="layer"),
        pytest.param(
            "send: {in: a, packet: {ip.dst: 10.0.0.2, udp.dport: [80, 443]}}",
            "packet: several packets in one",
            id="list",
        ),
        pytest.param('expect: {at: ["a:eth0", "a:eth0"]}', "expect.at: give two points", id="one point twice"),
        pytest.param("engine: {in: a, sockrefs: 1}", "engine.in: a has no engine", id="engine"),
        pytest.param("engine: {in: b, counters: {redirect: 1}}", "write hook.reason", id="counter"),
        pytest.param("engine: {in: b, counters: {PREROUTNG.redirect: 0}}", "did you mean 'PREROUTING'", id="hook"),
        pytest.param("engine: {in: b, counters: {OUTPUT.redirekt: 0}}", "did you mean 'redirect'", id="reason"),
        pytest.param("change: {in: a, ip: a, nft: b}", "change: too much at once: ip, nft", id="two changes"),
        pytest.param("change: {in: a, tproxy: -F}", "a has no engine", id="no table"),
        pytest.param('change: {in: a, ip: "link \'x"}', "change.ip: No closing quotation", id="words"),
        pytest.param("change: {in: a, impair: {eth0: {}}}", "impair.eth0: a:eth0 is no end of an", id="unimpaired"),
        pytest.param("change: {in: a, impair: {eth1: {los: 1%}}}", "did you mean 'loss'?", id="impairment"),
        pytest.param("change: {in: a, impair: {eth1: {loss: 1}}}", "eth1.loss: 1 is not of type", id="loss"),
        pytest.param("change: {in: a, impair: {eth1: {loss: 200%}}}", "eth1.loss: more than 100 %", id="much loss"),
        pytest.param("{}", "steps[0]", id="nothing"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, step: str, complaint: str) -> None:
    path = written(tmp_path, f"name: x\ntopology: lab.yaml\n\nsteps:\n  - {step}\n")
    with pytest.raises(ScenarioError) as caught:
        load_scenario(path)
    assert str(caught.value).startswith(f"{path}:5:")
    assert complaint in str(caught.value)


def test_a_topology_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, STEPS.replace("lab.yaml", "lap.yaml"))
    with pytest.raises(ScenarioError, match=r"scenario.yaml:3:1: topology: there is no file"):
        load_scenario(path)


def test_what_is_wrong_with_the_topology_is_told_of_its_own_file(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "lab.yaml").write_text(LAB.replace("nodes", "nods"))
    with pytest.raises(TopologyError, match=r"lab.yaml:2:1: nods: unknown key"):
        load_scenario(path)
