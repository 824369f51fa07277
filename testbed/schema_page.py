"""The reference of topology files, made from their JSON Schema: `python -m testbed.schema_page > docs/topology.md`.

Owns: how the schema reads as a page. Pure; what it says is the schema's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, Final

_SCHEMA: Final = "topology.schema.json"
_HEAD: Final = """\
# Topology files

A topology file is YAML. An unknown key is an error, told with line, column and the nearest known key; so is everything
else that is wrong with it, all at once: `testbed validate FILE`. `topologies/` has thirteen to begin with.

This page is made from `testbed/topology.schema.json`, which editors understand, too. In those with the YAML language
server, a first line in the file does it:

    # yaml-language-server: $schema=…/testbed/topology.schema.json
"""
_TITLES: Final = {"link.ends": "An end of a link: one of `ends`", "node.routes": "A route: one of a node's `routes`"}
_UNITS: Final = {
    "node": "A node: a value of `nodes`",
    "service": "A service: a value of a node's `services`",
    "engine": "An engine: a node's `engine`",
    "link": "A link: one of `links`",
    "impairment": "An impairment: a link's or an end's `impair`",
}

Schema = dict[str, Any]


def page() -> str:
    """The whole page."""
    schema: Schema = json.loads(files("testbed").joinpath(_SCHEMA).read_text())
    parts = [_HEAD, *_section("The file", schema, "")]
    for name, definition in schema["$defs"].items():
        if "properties" in definition:
            parts += _section(_UNITS[name], definition, name)
    _, _, looks = schema["$defs"]["name"]["title"].partition(": ")
    parts.append(f"A name has {looks}.")
    return "\n".join(parts) + "\n"


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
        if "properties" in part:
            return dict(part)
    return None


def _type(schema: Schema) -> str:
    """What may stand there, in a few words."""
    match schema:
        case {"$ref": str(name)}:
            kind = name.rpartition("/")[2]
            return "a name" if kind == "name" else f"{'an' if kind[0] in 'aei' else 'a'} {kind}"
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
    if "$ref" in schema:
        return f"{schema['$ref'].rpartition('/')[2]}s"
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
    return f" above {schema['exclusiveMinimum']}" if "exclusiveMinimum" in schema else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
