"""The parts of a predicate, so that a failure can say which of them did not hold.

Owns: finding the expression that a function returns, in its source, and evaluating what `and` joins in it one by one.
Where the source is not to be had, or the function is more than one expression, there are no parts.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Part:
    """One condition: `subject` and what is `expected` of it, as the source has them, and how to see."""

    subject: str
    expected: str
    evaluate: Callable[[Mapping[str, Any]], tuple[str, bool]]

    @classmethod
    def whole(cls, function: Callable[..., object]) -> Self:
        """A function that is one condition."""

        def evaluate(layers: Mapping[str, Any]) -> tuple[str, bool]:
            try:
                answer = function(**layers)
            except Exception as error:
                return raised(error), False
            return str(answer), bool(answer)

        return cls(getattr(function, "__name__", repr(function)), "is true", evaluate)


def parts_of(function: Callable[..., object]) -> list[Part]:
    """The conditions that `and` joins in a lambda, or in a function that is a single `return`; else none."""
    if not isinstance(function, FunctionType):
        return []
    expression = _returned_expression(function)
    # What gives names to values is evaluated in one piece.
    if expression is None or any(isinstance(node, ast.NamedExpr) for node in ast.walk(expression)):
        return []
    names = {**vars(builtins), **function.__globals__, **inspect.getclosurevars(function).nonlocals}
    for parameter in inspect.signature(function).parameters:
        names.pop(parameter, None)
    return [_part(condition, names) for condition in _conjuncts(expression)]


def raised(error: Exception) -> str:
    """What is seen of a condition that cannot be asked."""
    return f"raises {type(error).__name__}: {error}"


def _returned_expression(function: FunctionType) -> ast.expr | None:
    tree = _parsed("".join(linecache.getlines(function.__code__.co_filename, function.__globals__)))
    found = [body for node in ast.walk(tree) if (body := _body_of(node, function.__code__)) is not None]
    # A lambda may stand inside another's body: the innermost begins last.
    return max(found, key=lambda body: (body.lineno, body.col_offset), default=None)


@lru_cache(maxsize=16)
def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.Module([], [])


def _body_of(node: ast.AST, code: CodeType) -> ast.expr | None:
    """The expression that a node of the source returns, when the node is what the code was made from."""
    match node:
        case ast.Lambda(body=body) if _covers(body, code) and node.lineno == code.co_firstlineno:
            return body
        case ast.FunctionDef(name=code.co_name, body=[*lines, ast.Return(value=ast.expr() as value) as last]):
            is_single = all(isinstance(line, ast.Expr) for line in lines)  # a docstring
            return value if is_single and _covers(last, code) else None
        case _:
            return None


def _covers(body: ast.expr | ast.stmt, code: CodeType) -> bool:
    """Was the code compiled from this very expression? Two lambdas may stand in one line."""
    spots = [(line, column) for line, _, column, _ in code.co_positions() if line is not None and column is not None]
    # The first instruction has no place in the source.
    places = [spot for spot in spots if spot != (code.co_firstlineno, 0)]
    begin, end = (body.lineno, body.col_offset), (body.end_lineno or 0, body.end_col_offset or 0)
    return bool(places) and all(begin <= place < end for place in places)


def _conjuncts(expression: ast.expr) -> Iterator[ast.expr]:
    match expression:
        case ast.BoolOp(op=ast.And(), values=values):
            for value in values:
                yield from _conjuncts(value)
        case _:
            yield expression


def _part(condition: ast.expr, names: Mapping[str, Any]) -> Part:
    whole = _compiled(condition)
    shown = condition
    expected = "is true"
    match condition:
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            shown, expected = left, f"{_OPERATORS[type(operator)]} {_known(right, names)}"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            shown, expected = operand, "is false"
        case _:
            pass
    side = _compiled(shown)

    def evaluate(layers: Mapping[str, Any]) -> tuple[str, bool]:
        scope = {**names, **layers}
        try:
            return str(eval(side, scope)), bool(eval(whole, scope))
        except Exception as error:
            return raised(error), False

    return Part(ast.unparse(shown), expected, evaluate)


def _compiled(expression: ast.expr) -> CodeType:
    return compile(ast.Expression(expression), "<match>", "eval")


def _known(expression: ast.expr, names: Mapping[str, Any]) -> str:
    """An expression's value where it does not depend on the frame, nor calls anything, else its source."""
    try:
        if any(isinstance(node, ast.Call) for node in ast.walk(expression)):
            return ast.unparse(expression)
        return repr(eval(_compiled(expression), dict(names)))
    except Exception:
        return ast.unparse(expression)


_OPERATORS = {
    ast.Eq: "is",
    ast.NotEq: "is not",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
}
