"""Topology files: YAML to values.

Owns: the file format, its schema, and errors that name file, line, column and key. All problems of a file are told at
once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import jsonschema
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from testbed.addressing import AddressingError, addressed
from testbed.topology import Topology
from testbed.topology_checks import Problem, Where, problems
from testbed.topology_reader import read

SCHEMA: Final = Path(__file__).with_name("topology.schema.json")
_DEEPEST: Final = 20  # levels; the schema knows no more than ten
_MOST: Final = 100_000  # values, and keys with them; a star of 50 clients has 600


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
    found = _alien_values(document) or _schema_problems(document)
    if not found:
        topology, found = read(document)
        if not found:
            try:
                topology = addressed(topology)
            except AddressingError as error:
                found = [(("links",), str(error))]
            else:
                found = problems(topology)
    if found:
        raise TopologyError("\n".join(_located(document, source, found)))
    return topology


def check(topology: Topology) -> None:
    """TopologyError when something is wrong with a topology, wherever it came from."""
    if found := problems(topology):
        raise TopologyError("\n".join(f"{topology.name}: {_key(where)}: {what}" for where, what in found))


def _parse(text: str, source: str) -> Any:
    """The YAML document, with its lines and columns kept."""
    try:
        return YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise TopologyError(f"{source}{at}: {error.problem or error.context}") from error
    except (YAMLError, ValueError) as error:
        raise TopologyError(f"{source}: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise TopologyError(f"{source}: nested too deeply") from error


def _alien_values(document: Any) -> list[Problem]:
    """What YAML can write and no topology has: keys that are no text, NUL bytes, depth or aliases without end."""
    found: list[Problem] = []
    left: list[tuple[Where, Any]] = [((), document)]
    for _ in range(_MOST):
        if not left:
            return found
        where, value = left.pop()
        if len(where) > _DEEPEST:
            return [(where[:2], "nested too deeply")]
        if isinstance(value, str) and "\0" in value:
            found.append((where, "a NUL byte"))
        elif isinstance(value, Mapping):
            left += [((*where, key), inner) for key, inner in value.items()]
            aliens = [key for key in value if not isinstance(key, str)]
            found += [((*where, key), f"a key must be text: write {str(key)!r} with the quotes") for key in aliens]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            left += [((*where, place), inner) for place, inner in enumerate(value)]
    return [((), f"more than {_MOST} values, those of an alias counted each time")]


@cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _schema_problems(document: Any) -> list[Problem]:
    """Where the document does not keep to the schema."""
    found: list[Problem] = []
    for error in _validator().iter_errors(document):
        # Of alternatives, the one that came furthest is the one that was meant.
        while error.context:
            error = max(error.context, key=lambda inner: (len(inner.absolute_path), inner.validator != "type"))
        where = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            found += [((*where, key), what) for key, what in _unknown_keys(error)]
        elif error.validator == "pattern" and isinstance(error.schema, Mapping):
            is_key = "propertyNames" in error.absolute_schema_path
            what = f"{error.instance!r} is not {error.schema['title']}"
            found.append(((*where, error.instance) if is_key else where, what))
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
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            found.append((key, f"unknown key; {hint}"))
    return found


def _located(document: Any, source: str, found: list[Problem]) -> list[str]:
    """A line for each problem, in the order of the file."""
    located = sorted({(_position(document, where), _key(where), what) for where, what in found})
    return [f"{source}:{line}:{column}: {key}: {what}" for (line, column), key, what in located]


def _position(document: Any, where: Where) -> tuple[int, int]:
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


def _key(where: Where) -> str:
    """A path as people write it: nodes.client.routes[0]."""
    text = ""
    for step in where:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text or "document"
