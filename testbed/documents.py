"""YAML documents: parsed, held against a schema, and complained of by file, line, column and key.

Owns: the way from text to values that keep to a JSON Schema, and from a problem's place to the words that tell it. Must
not know what a document is about: topology_file.py and scenario_file.py do.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import jsonschema
import referencing
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, RoundTripConstructor, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import Node, ScalarNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.tag import Tag

from testbed.errors import TestbedError

Where = tuple[str | int, ...]  # a path into a document, spelled as there
Problem = tuple[Where, str]

_DEEPEST: Final = 20  # levels; the schemas know no more than twelve
_MOST: Final = 100_000  # values, and keys with them; a star of 50 clients has 600


@dataclass(frozen=True, slots=True)
class Complaint:
    """What is wrong: in which document, `what`, and where in it; None when it has no place there."""

    source: str
    what: str
    line: int | None = None
    column: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        """`file:line:column: key: what`."""
        at = f"{self.source}:{self.line}:{self.column}" if self.line is not None else self.source
        return ": ".join(part for part in (at, self.key, self.what) if part is not None)


class DocumentError(TestbedError):
    """A document that cannot be used, and all that is wrong with it, one line each."""

    def __init__(self, *complaints: Complaint) -> None:
        super().__init__(*complaints)
        self.complaints = complaints

    def __str__(self) -> str:
        return "\n".join(map(str, self.complaints))


class _Constructor(RoundTripConstructor):
    """Makes values; one that cannot be made (a date that there is not, a tag that does not fit) is told by place."""

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (YAMLError, RecursionError):
            raise
        except Exception as problem:
            what = f"{problem}" if isinstance(problem, ValueError) else f"no value of the kind {node.tag}"
            raise ConstructorError(None, None, what, node.start_mark) from problem


class _Integer(int):
    """A number that is text as it was written: `+5` and `007` of a command are not 5 and 7."""

    written: str

    @classmethod
    def read(cls, constructor: _Constructor, node: ScalarNode) -> _Integer:
        """Make one of what the document has."""
        made = cls(SafeConstructor.construct_yaml_int(constructor, node))
        made.written = node.value
        return made

    def __str__(self) -> str:
        return self.written

    def __format__(self, spec: str) -> str:
        return format(int(self), spec)


# Plain values: those that keep how they are written are no `bool` where there is an anchor.
_Constructor.add_constructor("tag:yaml.org,2002:bool", SafeConstructor.construct_yaml_bool)
_Constructor.add_constructor("tag:yaml.org,2002:int", _Integer.read)


class Document:
    """A YAML document that was read. `source`: the name that errors give it."""

    def __init__(self, root: Any, source: str, error: type[DocumentError]) -> None:
        self.root = root
        self.source = source
        self._error = error

    @classmethod
    def load(cls, path: Path, error: type[DocumentError]) -> Document:
        """Read a file; what is wrong with it is told as `error`."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise error(Complaint(str(path), f"cannot be read: {problem}")) from problem
        return cls.parse(text, str(path), error)

    @classmethod
    def parse(cls, text: str, source: str, error: type[DocumentError]) -> Document:
        """Read YAML text, with lines and columns kept."""
        yaml = YAML(typ="rt")
        yaml.Constructor = _Constructor
        try:
            return cls(yaml.load(text), source, error)
        except MarkedYAMLError as problem:
            mark = problem.problem_mark or problem.context_mark
            at = (mark.line + 1, mark.column + 1) if mark is not None else ()
            raise error(Complaint(source, f"{problem.problem or problem.context}", *at)) from problem
        except ReaderError as problem:
            before = text[: problem.position].splitlines(keepends=True) or [""]
            what = f"a character that YAML does not allow: {text[problem.position]!r}"
            raise error(Complaint(source, what, len(before), len(before[-1]) + 1)) from problem
        except RecursionError as problem:
            raise error(Complaint(source, "nested too deeply")) from problem
        except Exception as problem:  # what a mapping that is merged into itself comes to, for one
            raise error(Complaint(source, " ".join(str(problem).split()))) from problem

    def refuse(self, found: Sequence[Problem]) -> None:
        """Raise the error that tells these problems, in the order of the file; nothing if there are none."""
        located = sorted({(_position(self.root, where), key_text(where), what) for where, what in found})
        if located:
            raise self._error(*(Complaint(self.source, what, *position, key) for position, key, what in located))


def shape_problems(root: Any, schema: Path) -> list[Problem]:
    """Where a document has values that none may have, or does not keep to the schema in a file."""
    return _alien_values(root) or _schema_problems(root, schema)


def _alien_values(document: Any) -> list[Problem]:
    """What YAML can write and no document has: keys that are no text, NUL bytes, depth or aliases without end."""
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
        elif isinstance(value, str) and any("\ud800" <= each <= "\udfff" for each in value):
            found.append((where, "half of a pair of surrogates is no character"))
        elif isinstance(value, float) and not math.isfinite(value):
            found.append((where, f"{value} is no finite number"))
        elif tag := _tag(value):
            found.append((where, f"the tag {tag} means nothing here: text is written with quotes"))
        elif isinstance(value, Mapping):
            left += [((*where, key), inner) for key, inner in value.items()]
            aliens = [key for key in value if not isinstance(key, str)]
            found += [((*where, key), f"a key must be text: write {str(key)!r} with the quotes") for key in aliens]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            left += [((*where, place), inner) for place, inner in enumerate(value)]
    return [((), f"more than {_MOST} values, those of an alias counted each time")]


def _tag(value: Any) -> str:
    """The tag that a value was given, as it is written; empty where there is none."""
    tag = getattr(value, "tag", None)
    return f"{tag.handle or ''}{tag.suffix}" if isinstance(tag, Tag) and tag.suffix else ""


def _is_integer(_: object, value: object) -> bool:
    """JSON Schema takes 2.0 for one; Python counts with none such."""
    return isinstance(value, int) and not isinstance(value, bool)


_Validator: Final[type[jsonschema.Draft202012Validator]] = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)


@cache
def _validator(schema: Path) -> jsonschema.Draft202012Validator:
    """For a schema, which may refer to those beside it by their file names."""
    beside = {
        path.name: referencing.Resource.from_contents(json.loads(path.read_text(encoding="utf-8")))
        for path in schema.parent.glob("*.schema.json")
    }
    registry: referencing.Registry[Any] = referencing.Registry().with_resources(beside.items())
    return _Validator(beside[schema.name].contents, registry=registry)


def _schema_problems(document: Any, schema: Path) -> list[Problem]:
    """Where the document does not keep to the schema."""
    found: list[Problem] = []
    for error in (each for whole in _validator(schema).iter_errors(document) for each in _meant(whole)):
        where = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            found += [((*where, key), what) for key, what in _unknown_keys(error)]
        elif error.validator == "pattern" and isinstance(error.schema, Mapping):
            is_key = "propertyNames" in error.absolute_schema_path
            what = f"{error.instance!r} is not {error.schema['title']}"
            found.append(((*where, str(error.instance)) if is_key else where, what))
        else:
            found.append((where, _explained(error)))
    return found


def _meant(error: jsonschema.ValidationError) -> Iterator[jsonschema.ValidationError]:
    """What is wrong in particular: of alternatives, all that is wrong with the one that came furthest."""
    if not error.context:
        yield error
        return
    alternative = max(error.context, key=_nearness).relative_schema_path[0]
    for inner in error.context:
        if inner.relative_schema_path[0] == alternative:
            yield from _meant(inner)


def _explained(error: jsonschema.ValidationError) -> str:
    """What is wrong with a value, in words for who wrote it as YAML."""
    value = error.instance
    if error.validator == "maxProperties" and isinstance(value, Mapping) and isinstance(error.schema, Mapping):
        return f"too much at once: {', '.join(key for key in value if key not in error.schema.get('required', ()))}"
    wanted = error.validator_value if error.validator == "type" else ()
    kinds = [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, Sequence) else []
    if kinds and value is None:
        return f"there is nothing, where {' or '.join(kinds)} is wanted"
    if "string" in kinds and not isinstance(value, Mapping | Sequence):
        return f"{error.message}; text that looks like something else is written with quotes"
    return str(error.message)


def _nearness(error: jsonschema.ValidationError) -> tuple[int, bool, bool]:
    """How near a value came to one of its alternatives; who wrote something did not mean nothing."""
    return len(error.absolute_path), error.validator != "type", error.validator_value != "null"


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


def key_text(where: Where) -> str:
    """A path as people write it: nodes.client.routes[0]."""
    text = ""
    for step in where:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text or "document"
