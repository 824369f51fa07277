"""Scenario files: YAML to values.

Owns: the file format and its schema (scenario.schema.json), and the check that steps speak of what there is. All
problems of a file are told at once (documents.py).
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from nfq_engine.core.decision import Reason
from testbed.changes import check_change
from testbed.craft import SEVERAL, is_several
from testbed.documents import Document, DocumentError, Problem, Where, shape_problems
from testbed.expect import DURING, WITHIN
from testbed.impair import is_impaired
from testbed.layers import MatchError, packet_of
from testbed.matching import matcher_of
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
    Scenario,
    Send,
    Start,
    Step,
    Tool,
)
from testbed.topology import ENGINE, Topology
from testbed.topology_checks import NO_REGULAR_EXPRESSION, readiness_problem
from testbed.topology_file import load, understand
from testbed.topology_reader import duration, impairment, service

SCHEMA: Final = Path(__file__).with_name("scenario.schema.json")
_STEPS: Final = "steps"  # the key that no topology has

_HOOKS: Final = ("PREROUTING", "OUTPUT", "POSTROUTING")  # where an engine takes packets, and counts them
_REASONS: Final = tuple(reason.value for reason in Reason)

_Raw = TypeVar("_Raw")
_Value = TypeVar("_Value")


class ScenarioError(DocumentError):
    """A scenario file that cannot be used."""


def is_scenario(path: Path) -> bool:
    """Is a file a scenario, and no topology? ScenarioError when it cannot be read."""
    root = Document.load(path, ScenarioError).root
    return isinstance(root, Mapping) and _STEPS in root


def load_scenario(path: Path) -> Scenario:
    """Read a scenario file; TopologyError for what is wrong with the topology file that it names."""
    document = Document.load(path, ScenarioError)
    root = document.root
    document.refuse(shape_problems(root, SCHEMA))
    if isinstance(root["topology"], str):
        topology = _topology_beside(document, path.parent / root["topology"])
    else:
        topology, found = understand(root["topology"])
        document.refuse([(("topology", *where), what) for where, what in found])
    reader = _Reader(topology)
    steps = tuple(reader.step(at, value) for at, value in enumerate(root[_STEPS]))
    document.refuse(reader.problems)
    return Scenario(root["name"], topology, tuple(filter(None, steps)), root.get("description", ""))


def _topology_beside(document: Document, path: Path) -> Topology:
    if not path.is_file():
        document.refuse([(("topology",), f"there is no file {path}")])
    return load(path)


class _Reader:
    """Reads the steps of one document; all of what is wrong with them goes into `problems`."""

    def __init__(self, topology: Topology) -> None:
        self.problems: list[Problem] = []
        self._topology = topology
        self._nodes = [node.name for node in topology.nodes]
        self._points = topology.captured()
        self._own = {
            node.name: [each.name for each in node.services] + [ENGINE] * (node.engine is not None)
            for node in topology.nodes
        }
        self._started: set[tuple[str, str]] = set()

    def step(self, at: int, document: Mapping[str, Any]) -> Step | None:
        """One step; None when it cannot be read."""
        (kind, value), *_ = document.items()
        where: Where = (_STEPS, at, kind)
        before = len(self.problems)
        if "in" in value:
            self._known((*where, "in"), value["in"], self._nodes, "node")
        found = _READERS[kind](self, where, value)
        return found if len(self.problems) == before else None

    def start(self, where: Where, value: Mapping[str, Any]) -> Step:
        node, name = value["in"], value["name"]
        if "command" in value:
            self._started.add((node, name))
            made = service(name, value)
            if what := readiness_problem(made):
                self.problems.append(((*where, "ready"), what))
            return Start(node, name, made)
        self._known((*where, "name"), name, self._own.get(node, ()), "service")
        if further := sorted({"ready", "tproxy"} & set(value)):
            self.problems.append(((*where, further[0]), "only with a command"))
        return Start(node, name)

    def run(self, where: Where, value: Mapping[str, Any]) -> Step:
        output = value.get("output", "")
        try:
            re.compile(output)
        except NO_REGULAR_EXPRESSION as error:
            self.problems.append(((*where, "output"), f"no regular expression: {error}"))
        command = tuple(map(str, value["command"]))
        within, retry = self._time(where, value, "within", 60.0), self._time(where, value, "retry", 0.0)
        return Run(value["in"], command, value.get("exit", 0), output, within, retry)

    def fetch(self, where: Where, value: Mapping[str, Any]) -> Step:
        fails = value.get("fails", False)
        if fails and (further := sorted({"status", "size"} & set(value))):
            self.problems.append(((*where, further[0]), "not where the fetch is to fail"))
        status = None if fails else value.get("status", 200)
        within, retry = self._time(where, value, "within", 15.0), self._time(where, value, "retry", 0.0)
        return Fetch(value["in"], value["url"], status, value.get("size"), within, retry)

    def send(self, where: Where, value: Mapping[str, Any]) -> Step:
        packet = self._try((*where, "packet"), packet_of, dict(value["packet"]))
        if packet is not None and is_several(packet):
            self.problems.append(((*where, "packet"), SEVERAL))
        return Send(value["in"], dict(value["packet"]), value.get("count", 1))

    def expect(self, where: Where, value: Mapping[str, Any]) -> Step:
        at, match = value["at"], dict(value.get("match", {}))
        self._check_changes((*where, "match"), match)
        points = [at] if isinstance(at, str) else list(at)
        for point in points:
            self._known((*where, "at"), point, self._points, "captured interface")
        within, changed = self._time(where, value, "within", WITHIN), tuple(value.get("changed", ()))
        if len(points) == 2:
            if points[0] == points[1]:
                self.problems.append(((*where, "at"), "give two points, not one twice"))
            self._refuse(where, value, ("count", "never"), "not with two points")
            for place, name in enumerate(changed):
                self._try((*where, "changed", place), check_change, name)
            return ExpectSame((points[0], points[1]), match, changed, within)
        self._refuse(where, value, ("changed",), "only with two points")
        if "never" in value:
            self._refuse(where, value, ("count", "within"), "not with never")
            return ExpectNever(points[0], match, self._time(where, value, "never", DURING))
        return Expect(points[0], match, value.get("count"), within)

    def engine(self, where: Where, value: Mapping[str, Any]) -> Step:
        counters: dict[tuple[str, str], int] = {}
        for name, count in value.get("counters", {}).items():
            hook, dot, reason = name.partition(".")
            if not dot:
                self.problems.append(((*where, "counters", name), "write hook.reason, as in PREROUTING.redirect"))
            else:
                where_named = (*where, "counters", name)
                self._known(where_named, hook, _HOOKS, "hook")
                self._known(where_named, reason, _REASONS, "counter")
            counters[hook, reason] = count
        self._require_engine((*where, "in"), value["in"])
        within = self._time(where, value, "within", WITHIN)
        return ExpectEngine(value["in"], counters, value.get("connections"), value.get("sockrefs"), within)

    def change(self, where: Where, value: Mapping[str, Any]) -> Step:
        if "impair" in value:
            return self._change_links((*where, "impair"), value["in"], value["impair"])
        tool = next(each for each in Tool if each in value)
        if tool is Tool.TPROXY:
            self._require_engine((*where, "in"), value["in"])
        words = self._try((*where, tool.value), shlex.split, value[tool]) or []
        return Change(value["in"], tool, tuple(words))

    def _change_links(self, where: Where, node: str, value: Mapping[str, Any]) -> Step:
        ends = [end for link in self._topology.links if is_impaired(link) for end in link.ends]
        impaired = [end.interface for end in ends if end.node == node]
        found = {}
        for interface, written in value.items():
            if interface not in impaired:
                what = f"{node}:{interface} is no end of an impaired link: `impair: {{}}` in the topology makes it one"
                self.problems.append(((*where, interface), what))
            found[interface], problems = impairment(written)
            self.problems += [((*where, interface, *inner), what) for inner, what in problems]
        return ChangeLinks(node, found)

    def kill(self, where: Where, value: Mapping[str, Any]) -> Step:
        node, started = value["in"], (name for at, name in self._started if at == value["in"])
        self._known((*where, "name"), value["name"], (*self._own.get(node, ()), *started), "program")
        return Kill(value["in"], value["name"], Ending(value.get("signal", "TERM")))

    def _require_engine(self, where: Where, node: str) -> None:
        if ENGINE not in self._own.get(node, [ENGINE]):
            self.problems.append((where, f"{node} has no engine"))

    def _known(self, where: Where, name: str, known: Iterable[str], what: str) -> None:
        """Report a name that nothing has."""
        names = list(known)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names) or 'none'}"
            self.problems.append((where, f"there is no {what} {name!r}; {hint}"))

    def _refuse(self, where: Where, value: Mapping[str, Any], keys: Iterable[str], why: str) -> None:
        self.problems += [((*where, key), why) for key in keys if key in value]

    def _check_changes(self, where: Where, fields: Mapping[str, Any]) -> None:
        for name, value in fields.items():
            try:
                matcher_of({name: value})
            except MatchError as error:
                self.problems.append(((*where, name) if name in fields else where, str(error)))

    def _time(self, where: Where, value: Mapping[str, Any], key: str, default: float) -> float:
        found = self._try((*where, key), duration, value[key]) if key in value else default
        return default if found is None else found

    def _try(self, where: Where, read_value: Callable[[_Raw], _Value], raw: _Raw) -> _Value | None:
        """A value read from what was written; None, and a problem more, when it cannot be."""
        try:
            return read_value(raw)
        except ValueError as error:
            self.problems.append((where, str(error)))
            return None


_READERS: Final[dict[str, Callable[[_Reader, Where, Mapping[str, Any]], Step]]] = {
    "start": _Reader.start,
    "run": _Reader.run,
    "fetch": _Reader.fetch,
    "send": _Reader.send,
    "expect": _Reader.expect,
    "engine": _Reader.engine,
    "change": _Reader.change,
    "kill": _Reader.kill,
}
