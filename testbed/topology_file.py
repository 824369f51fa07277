"""Topology files: YAML to values.

Owns: the file format, its schema, and errors that name file, line, column and key. All problems of a file are told at
once.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import jsonschema
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from testbed.topology import Address, End, EngineSpec, Kind, Link, Node, Readiness, Route, Service, Topology

SCHEMA: Final = Path(__file__).with_name("topology.schema.json")

_Where = tuple[str | int, ...]


class TopologyError(Exception):
    """A topology file that cannot be used; the message has one line a problem: `file:line:column: key: what`."""


def load(path: Path) -> Topology:
    """Read a topology file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TopologyError(f"{path}: cannot be read: {error}") from error
    return loads(text, str(path))


def loads(text: str, source: str = "topology") -> Topology:
    """Read a topology from YAML text; `source` is the name that errors give it."""
    document = _parse(text, source)
    problems = _schema_problems(document)
    if not problems:
        try:
            topology = _topology(document)
        except _ValueError as problem:
            problems = [(problem.where, str(problem))]
        else:
            problems = topology.problems()
            if not problems:
                return topology
    located = sorted({(_position(document, where), _key(where), what) for where, what in problems})
    raise TopologyError("\n".join(f"{source}:{line}:{column}: {key}: {what}" for (line, column), key, what in located))


class _ValueError(ValueError):
    """A value of the right type that means nothing."""

    def __init__(self, where: _Where, what: str) -> None:
        super().__init__(what)
        self.where = where


def _parse(text: str, source: str) -> Any:
    """The YAML document, with its lines and columns kept."""
    try:
        return YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise TopologyError(f"{source}{at}: {error.problem or error.context}") from error
    except YAMLError as error:
        raise TopologyError(f"{source}: {error}") from error


@cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def _schema_problems(document: Any) -> list[tuple[_Where, str]]:
    """Where the document does not keep to the schema."""
    found = []
    for error in _validator().iter_errors(document):
        # Of alternatives, the one that came furthest is the one that was meant.
        while error.context:
            error = max(error.context, key=lambda inner: (len(inner.absolute_path), inner.validator != "type"))
        where = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            found += [((*where, key), what) for key, what in _unknown_keys(error)]
        else:
            found.append((where, error.message))
    return found


def _unknown_keys(error: jsonschema.ValidationError) -> list[tuple[str, str]]:
    """The keys that the schema does not have, each with the nearest that it has."""
    schema, instance = error.schema, error.instance
    known = list(schema["properties"]) if isinstance(schema, Mapping) else []
    found = []
    for key in instance if isinstance(instance, Mapping) else ():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            found.append((str(key), f"unknown key; {hint}"))
    return found


def _position(document: Any, where: _Where) -> tuple[int, int]:
    """Line and column, from 1, of the deepest part of a path that the document has."""
    line, column = 0, 0
    node = document
    for step in where:
        try:
            if isinstance(node, Mapping):
                line, column = node.lc.key(step)  # type: ignore[attr-defined]
            else:
                line, column = node.lc.item(step)
            node = node[step]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
    return line + 1, column + 1


def _key(where: _Where) -> str:
    """A path as people write it: nodes.client.routes[0]."""
    text = ""
    for step in where:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text or "document"


# Values, from a document that keeps to the schema.


def _topology(document: Mapping[str, Any]) -> Topology:
    links = document.get("links", ())
    used: dict[str, int] = {}
    return Topology(
        name=document["name"],
        nodes=tuple(_node(name, value or {}) for name, value in document["nodes"].items()),
        links=tuple(_link(number, link, used) for number, link in enumerate(links)),
        offload=document.get("offload", False),
    )


def _node(name: str, value: Mapping[str, Any]) -> Node:
    where = ("nodes", name)
    engine = value.get("engine")
    return Node(
        name=name,
        kind=Kind(value.get("kind", "host")),
        routes=tuple(_route((*where, "routes", at), route) for at, route in enumerate(value.get("routes", ()))),
        sysctls=tuple((key, str(setting)) for key, setting in value.get("sysctls", {}).items()),
        services=tuple(_service(key, service) for key, service in value.get("services", {}).items()),
        engine=_engine((*where, "engine"), engine) if engine is not None else None,
        nft=value.get("nft", ""),
    )


def _route(where: _Where, value: Mapping[str, str]) -> Route:
    try:
        via = ipaddress.ip_address(value["via"])
    except ValueError as error:
        raise _ValueError((*where, "via"), str(error)) from error
    text = value["to"]
    if text == "default":
        text = "0.0.0.0/0" if via.version == 4 else "::/0"
    try:
        to = ipaddress.ip_network(text)
    except ValueError as error:
        raise _ValueError((*where, "to"), str(error)) from error
    if to.version != via.version:
        raise _ValueError(where, f"{to} and {via} are of two families")
    return Route(to, via)


def _service(name: str, value: Mapping[str, Any]) -> Service:
    ready = value.get("ready")
    if ready is None:
        readiness = Readiness()
    elif ready == "notify":
        readiness = Readiness(notify=True)
    else:
        readiness = Readiness(port=ready.get("port"), log=ready.get("log"), within=float(ready.get("within", 10.0)))
    return Service(name, tuple(str(part) for part in value["command"]), readiness)


def _engine(where: _Where, value: Mapping[str, Any]) -> EngineSpec:
    rules = tuple(value.get("rules", ()))
    for at, rule in enumerate(rules):
        try:
            words = shlex.split(rule)
        except ValueError as error:
            raise _ValueError((*where, "rules", at), str(error)) from error
        if words[:1] != ["-A"]:
            raise _ValueError((*where, "rules", at), f"a rule begins with -A: {rule!r}")
    return EngineSpec(value.get("datapath", "inline"), rules, tuple(value.get("options", ())))


def _link(number: int, value: Mapping[str, Any], used: dict[str, int]) -> Link:
    left, right = value["ends"]
    return Link(
        left=_end(number, 0, left, used),
        right=_end(number, 1, right, used),
        mtu=value.get("mtu", 1500),
    )


def _end(number: int, side: int, value: Mapping[str, Any], used: dict[str, int]) -> End:
    """One end; its interface and addresses follow from the link's place in the file where they are not given."""
    node = value["node"]
    place = used.get(node, 0)
    used[node] = place + 1
    written = value.get("addresses", "auto")
    where = ("links", number, "ends", side, "addresses")
    addresses = automatic_addresses(number, side) if written == "auto" else _addresses(where, written)
    return End(node, value.get("interface", f"eth{place}"), addresses, value.get("mac"))


def automatic_addresses(number: int, side: int) -> tuple[Address, ...]:
    """The addresses of an end of the link with that number: 10.H.L.S/24 and fd00:0:0:N::S/64, S being 1 or 2."""
    return (
        ipaddress.IPv4Interface(f"10.{number >> 8 & 0xFF}.{number & 0xFF}.{side + 1}/24"),
        ipaddress.IPv6Interface(f"fd00:0:0:{number:x}::{side + 1}/64"),
    )


def _addresses(where: _Where, written: Sequence[str]) -> tuple[Address, ...]:
    found = []
    for at, text in enumerate(written):
        try:
            address = ipaddress.ip_interface(text)
        except ValueError as error:
            raise _ValueError((*where, at), str(error)) from error
        if "/" not in text:
            raise _ValueError((*where, at), f"{text} has no prefix length")
        found.append(address)
    return tuple(found)
