"""Matches: which frames an expectation means.

Owns: the two ways to say it, and how far a frame that does not match is from matching. Must not know captures or time.

    {"net.src": "10.0.0.1", "tcp.dport": {80, 443}, "tcp.flags": "S"}     fields, all of which must hold
    lambda ip, tcp: ip.src == "10.0.0.1" and tcp.dport in (80, 443)       layers by the names of the parameters
    def is_answer(header: IPv6, answer: DNS) -> bool: ...                 layers by Scapy's classes, as annotations

A frame without one of the layers does not match. What can never match, a misspelt field for instance, is an error: an
expectation that nothing comes would pass with it.
"""

from __future__ import annotations

import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from testbed.frames import Frame
from testbed.layers import (
    MISSING,
    MatchError,
    check_field,
    check_value,
    instance_in,
    is_quick,
    layer_class,
    layer_in,
    read_field,
)
from testbed.predicate_parts import Part, parts_of, raised

_LONGEST: Final = 300  # characters of a value in a message

Match = Mapping[str, object] | Callable[..., object] | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one condition came out for one frame. `is_there`: the frame has what the condition is about."""

    subject: str
    expected: str
    seen: str
    is_met: bool
    is_there: bool = True


class Matcher(ABC):
    """A match, ready to be asked. `conditions`: what it wants, subject and expectation."""

    conditions: Sequence[tuple[str, str]]

    @abstractmethod
    def matches(self, frame: Frame) -> bool:
        """Is it such a frame?"""

    @abstractmethod
    def judge(self, frame: Frame) -> list[Verdict]:
        """The same in detail, condition by condition."""

    def __str__(self) -> str:
        """One line."""
        return ", ".join(f"{subject} {expected}".strip() for subject, expected in self.conditions) or "any frame"


def matcher_of(match: Match) -> Matcher:
    """Prepare a match; None is any frame. MatchError when it makes no sense."""
    if match is None:
        return _Fields({})
    if isinstance(match, Mapping):
        return _Fields(match)
    if callable(match):
        return _Predicate(match)
    raise MatchError(f"a match is a mapping of fields or a function, not {match!r}")


class _Fields(Matcher):
    """Fields with values, all of which must hold."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        split = [(*(where := field_of(name)), _checked(*where, value)) for name, value in fields.items()]
        # What needs no dissection decides first.
        self._fields = sorted(split, key=lambda field: not is_quick(field[0], field[1]))
        self.conditions = [(f"{layer}.{field}", _expected_text(value)) for layer, field, value in split]

    def matches(self, frame: Frame) -> bool:
        return all(_holds(value, read_field(frame, layer, field)) for layer, field, value in self._fields)

    def judge(self, frame: Frame) -> list[Verdict]:
        verdicts = []
        for layer, field, value in self._fields:
            seen = read_field(frame, layer, field)
            try:
                came_out = _text(seen), _holds(value, seen)
            except Exception as error:  # of a condition that was not asked while an earlier one did not hold
                came_out = raised(error), False
            verdicts.append(Verdict(f"{layer}.{field}", _expected_text(value), *came_out, seen is not MISSING))
        return verdicts


class _Predicate(Matcher):
    """A function of layers."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function
        self._layers = _layers_of(function)
        self._parts = parts_of(function) or [Part.whole(function)]
        self.conditions = [(part.subject, part.expected) for part in self._parts]

    def matches(self, frame: Frame) -> bool:
        layers = self._arguments(frame)
        if any(layer is None for layer in layers.values()):
            return False
        try:
            answer = self._function(**layers)
        except Exception as error:
            error.add_note(f"raised by the match for {frame}")
            raise
        return _truth(answer)

    def judge(self, frame: Frame) -> list[Verdict]:
        layers = self._arguments(frame)
        found = {name: layer is not None for name, layer in layers.items()}
        if not all(found.values()):
            return [
                Verdict(name, "present", "present" if is_there else "not there", is_there, is_there)
                for name, is_there in found.items()
            ]
        return [Verdict(part.subject, part.expected, *part.evaluate(layers)) for part in self._parts]

    def _arguments(self, frame: Frame) -> dict[str, Any]:
        return {name: find(frame) for name, find in self._layers.items()}


def field_of(name: str) -> tuple[str, str]:
    """The layer and the field that a name means; MatchError when there is no such thing."""
    layer, dot, field = name.partition(".")
    if not dot:
        raise MatchError(f"{name!r} names no field; write layer.field, as in ip.src")
    check_field(layer, field)
    return layer, field


def _checked(layer: str, field: str, value: object) -> object:
    """What a field is compared with, as frames have it; MatchError when no such field can ever be equal to it."""
    if callable(value):
        return value
    if isinstance(value, Collection) and not isinstance(value, str | bytes):
        if not value:
            raise MatchError(f"{layer}.{field}: there is nothing in {value!r} that it could be")
        if isinstance(value, range):
            for one in (value[0], value[-1]):
                check_value(layer, field, one)
            return value
        return [check_value(layer, field, one) for one in value]
    return check_value(layer, field, value)


def _holds(expected: object, seen: object) -> bool:
    if seen is MISSING:
        return False
    if callable(expected):
        return _truth(expected(seen))
    if isinstance(expected, range):
        return seen in expected
    if isinstance(expected, Collection) and not isinstance(expected, str | bytes):
        # One by one: Scapy's flags equal a string, but do not have its hash.
        return any(seen == one for one in expected)
    return bool(seen == expected)


def _truth(answer: object) -> bool:
    """What a function answered; MatchError for what says nothing, though Python takes it for true or false."""
    if answer is None:
        raise MatchError("the match returned None: is there a `return` missing?")
    if callable(answer) or isinstance(answer, tuple | Awaitable | Iterator | AsyncIterator):
        if isinstance(answer, Coroutine):
            answer.close()
        raise MatchError(f"the match returned a {type(answer).__name__}, which is always true: {answer!r}")
    return bool(answer)


def _expected_text(value: object) -> str:
    if callable(value):
        return f"such that {getattr(value, '__name__', value)}"
    if isinstance(value, range):
        return f"{value.start} to {value.stop - 1}"
    if isinstance(value, Collection) and not isinstance(value, str | bytes):
        return f"one of {', '.join(sorted(map(_text, value)))}"
    return _text(value)


def _text(value: object) -> str:
    text = repr(value) if isinstance(value, bytes) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"


def _layers_of(function: Callable[..., object]) -> dict[str, Callable[[Frame], object]]:
    """How to find what each parameter stands for."""
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:
        raise MatchError(f"the annotations of {function!r} cannot be read: {error}") from error
    parameters = inspect.signature(function).parameters
    if not parameters:
        raise MatchError("a match is a function of layers: it has no parameters")
    for parameter in parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise MatchError(f"parameter {parameter.name!r}: layers are given by name, to plain parameters")
    return {name: _finder(name, hints.get(name)) for name in parameters}


def _finder(name: str, annotation: object) -> Callable[[Frame], object]:
    if annotation is Frame:
        return lambda frame: frame
    if annotation is None:
        if name not in ("frame", "net"):
            layer_class(name)
        return lambda frame: layer_in(frame, name)
    if isinstance(annotation, type) and getattr(annotation, "fields_desc", None) is not None:
        if annotation in layer_class("raw").__bases__:
            raise MatchError(f"parameter {name!r}: name the layer, since no layer is a plain {annotation.__name__}")
        return lambda frame: instance_in(frame, annotation)
    raise MatchError(f"parameter {name!r}: {annotation!r} is no Scapy layer")
