"""The references of topology and scenario files, made from their JSON Schemas.

    python -m testbed.schema_page topology > docs/topology.md
    python -m testbed.schema_page scenario > docs/scenarios.md

Owns: how a schema reads as a page, and what is said there beside it: addresses, durations, names that the engine and
changes give. Pure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from functools import reduce
from importlib.resources import files
from typing import Any, Final

from nfq_engine.core.decision import Reason
from testbed.changes import EMBEDDED, FIELDS

_TOPOLOGY: Final = """\
# Topology files

A topology file is YAML. An unknown key is an error, told with line, column and the nearest known key; so is everything
else that is wrong with it, all at once: `testbed validate FILE`. `topologies/` has thirteen to begin with.

This page is made from `testbed/topology.schema.json`, which editors understand, too. In those with the YAML language
server, a first line in the file does it:

    # yaml-language-server: $schema=…/testbed/topology.schema.json

## Addresses and routes

Ends without `addresses` get one of each family, in the order of the links: the first segment has 10.0.0.0/24 and
fd00::/64, the next one 10.0.1.0/24 and fd00:0:0:1::/64, and so on; in each the ends are 1, 2 … What bridges join is one
segment, and subnets that the file names are left out. In a segment that has a subnet, such ends get its lowest free
addresses. Link-local addresses are given to all interfaces with IPv6. They are usable at once: there is no duplicate
address detection in a lab.

Every node but bridges gets routes by the shortest way to every subnet; a host whose ways all begin at one router gets a
default route instead. A route that the file gives stands. Reverse path filtering is off, so answers may take another
way. What is known of a topology without building it: `testbed plan FILE`, `testbed diagram FILE`.

Bridges that make a loop are refused, unless one of them has `setup`, which may start what keeps frames from going
round.
"""
_SCENARIO: Final = """\
# Scenario files

A scenario is a lab as a regression test, without Python: a topology, and steps that are done in it one after the other.
`testbed run FILE` prints a line a step and ends with 0 only if all came out as they should; the first that fails is the
last. Mistakes in the file are told before anything is built: `testbed validate FILE`. `topologies/scenarios/` has four
to begin with, and [tutorial.md](tutorial.md) an example.

A duration is a number with its unit: `300us`, `500ms`, `1.5s`. Only `within` of a program's `ready` is a bare number,
of seconds.

This page is made from `testbed/scenario.schema.json`.
"""
_TITLES: Final = {
    ".steps": "A step: one of these keys, alone",
    "link.ends": "An end of a link: one of `ends`",
    "node.routes": "A route: one of a node's `routes`",
    "node": "A node: a value of `nodes`",
    "service": "A service: a value of a node's `services`",
    "engine": "An engine: a node's `engine`",
    "link": "A link: one of `links`",
    "impairment": "An impairment: a link's or an end's `impair`",
}
# Parts of a schema that are called by their name, rather than told in full wherever they may stand.
_KINDS: Final = {*_TITLES, "name", "topology", "duration", "fields"}

Schema = dict[str, Any]


def topology_page() -> str:
    """The page about topology files."""
    schema = _load("topology.schema.json")
    parts = [_TOPOLOGY, *_section("The file", schema, "")]
    for name, definition in schema["$defs"].items():
        if "properties" in definition:
            parts += _section(_TITLES[name], definition, name)
    _, _, looks = schema["$defs"]["name"]["title"].partition(": ")
    parts.append(f"A name has {looks}.")
    return "\n".join(parts) + "\n"


def scenario_page() -> str:
    """The page about scenario files."""
    schema = _load("scenario.schema.json")
    parts = [_SCENARIO, *_section("The file", schema, "")]
    for name, step in schema["$defs"]["step"]["properties"].items():
        parts += _section(f"A step: `{name}`", step, name)
    parts += ["## The reasons of an engine's counters", "", _listed(Reason), ""]
    parts += ["## The fields that may be `changed`", "", _listed(FIELDS)]
    parts.append(f"With `{EMBEDDED.strip()} ` before it, a field of the packet that an ICMP error is about.")
    return "\n".join(parts) + "\n"


def _listed(names: Iterable[str]) -> str:
    return f"{', '.join(f'`{name}`' for name in names)}."


PAGES: Final = {"topology": topology_page, "scenario": scenario_page}


def _load(name: str) -> Schema:
    """A schema with what it refers to in its place; `kind` is what that is called."""
    schema: Schema = json.loads(files("testbed").joinpath(name).read_text())
    expanded: Schema = _expanded(schema, name, schema)
    return expanded


def _expanded(value: Any, name: str, root: Schema) -> Any:
    match value:
        case {"$ref": str(reference), **own}:
            return {**_target(reference, name, root), **own}
        case dict():
            return {key: _expanded(part, name, root) for key, part in value.items()}
        case list():
            return [_expanded(part, name, root) for part in value]
        case _:
            return value


def _target(reference: str, name: str, root: Schema) -> Schema:
    """What a reference in the file of a name leads to."""
    file, _, path = reference.partition("#/")
    if file not in ("", name):
        name, root = file, json.loads(files("testbed").joinpath(file).read_text())
    steps = path.split("/") if path else []
    found = _expanded(reduce(lambda schema, step: schema[step], steps, root), name, root)
    return {"kind": steps[-1] if steps else name.partition(".")[0], **found}


def _section(title: str, schema: Schema, place: str) -> Iterator[str]:
    """An object's keys as a table, and behind it the objects in its lists."""
    yield from (f"## {title}", "")
    if "description" in schema:
        yield from (schema["description"], "")
    yield from ("| key | value | meaning |", "| --- | --- | --- |")
    required = schema.get("required", [])
    for key, value in schema["properties"].items():
        must = " (required)" if key in required else ""
        yield f"| `{key}`{must} | {_cell(_type(value))} | {_cell(value.get('description', ''))} |"
    yield ""
    for key, value in schema["properties"].items():
        if (deeper := _nested(value)) is not None:
            yield from _section(_TITLES.get(f"{place}.{key}", f"`{key}`, in full"), deeper, f"{place}.{key}")


def _nested(schema: Schema) -> Schema | None:
    """The object in a list, or among alternatives."""
    for part in (schema.get("items", {}), *schema.get("anyOf", ())):
        if "properties" in part and part.get("kind") not in _KINDS:
            return dict(part)
    return None


def _type(schema: Schema) -> str:
    """What may stand there, in a few words."""
    match schema:
        case {"kind": str(kind)} if kind in _KINDS:
            return kind if kind == "fields" else f"{'an' if kind[0] in 'aei' else 'a'} {kind}"
        case {"const": value}:
            return f"`{value}`"
        case {"enum": values}:
            return ", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in values)
        case {"anyOf": parts}:
            return " or ".join(_type(part) for part in parts)
        case {"type": "array"}:
            return f"a list of {_plural(schema['items'])}{_amount(schema)}"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"a mapping of names to {_plural(values)}"
        case {"type": "object"}:
            return "a mapping, see below"
        case {"title": str(title)}:
            return title
        case _:
            return f"{_ARTICLES[schema['type']]}{_bounds(schema)}"


_ARTICLES: Final = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "`true` or `false`",
    "null": "nothing",
}


def _plural(schema: Schema) -> str:
    if schema.get("kind") in {*_KINDS, "step"}:
        return f"{schema['kind']}s"
    if "anyOf" in schema:
        return " or ".join("nothing" if part.get("type") == "null" else _plural(part) for part in schema["anyOf"])
    kinds = {"string": "texts", "integer": "numbers", "object": "mappings, see below"}
    kind = schema["type"]
    return " or ".join(kinds[each] for each in (kind if isinstance(kind, list) else [kind]))


def _amount(schema: Schema) -> str:
    least, most = schema.get("minItems"), schema.get("maxItems")
    if least is not None and least == most:
        return f", exactly {least}"
    return f", at least {least}" if least is not None else ""


def _bounds(schema: Schema) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']} to {schema['maximum']}"
    if "minimum" in schema:
        return f" from {schema['minimum']} on"
    if "exclusiveMinimum" not in schema:
        return ""
    most = f", at most {schema['maximum']}" if "maximum" in schema else ""
    return f" above {schema['exclusiveMinimum']}{most}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(PAGES[sys.argv[1]](), end="")
