"""Evaluates one expression that a language model wrote, without ``eval``.

Only literals, lists, arithmetic and calls of the functions passed in are understood; there are no names, attributes,
subscripts, comprehensions, lambdas or keywords. Sizes are bounded before anything is computed, because a weak model
writes ``9**9**9`` by accident.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

MAX_CHARS = 300
MAX_DEPTH = 20
MAX_MAGNITUDE = 10**18
MAX_EXPONENT = 64
MAX_TEXT = 1000
MAX_ITEMS = 100

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}


class ExpressionError(ValueError):
    """The expression is not allowed, too large, or fails; the message says why in one line."""


def evaluate(source: str, functions: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """Value of ``source``: an int, float, bool, str or list of these.

    Args:
        source: at most ``MAX_CHARS`` characters.
        functions: what may be called, by name. They are called with values already evaluated, positional only, and
            must raise ``ValueError`` or ``TypeError`` on arguments they do not understand.

    Raises:
        ExpressionError: whatever else happens.
    """
    if len(source) > MAX_CHARS:
        raise ExpressionError(f"longer than {MAX_CHARS} characters")
    try:
        tree = ast.parse(source.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ExpressionError("not an expression") from error
    return _value(tree.body, functions or {}, 0)


def _value(node: ast.expr, functions: Mapping[str, Callable[..., Any]], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ExpressionError(f"nested deeper than {MAX_DEPTH}")

    def inner(child: ast.expr) -> Any:
        return _value(child, functions, depth + 1)

    if isinstance(node, ast.Constant):
        if isinstance(node.value, (int, float, str)):
            return _bounded(node.value)
    elif isinstance(node, ast.List):
        return _bounded([inner(item) for item in node.elts])
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_number(inner(node.operand)))
    elif isinstance(node, ast.BinOp):
        left, right = _number(inner(node.left)), _number(inner(node.right))
        return _bounded(_binary(node.op, left, right))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = functions.get(node.func.id)
        if function is None:
            raise ExpressionError(f"no function {node.func.id[:40]!r}")
        return _bounded(_call(function, [inner(argument) for argument in node.args]))
    raise ExpressionError(f"{type(node).__name__} is not allowed")


def _binary(op: ast.operator, left: float, right: float) -> float:
    try:
        if isinstance(op, ast.Pow):
            if not 0 <= right <= MAX_EXPONENT or abs(left) > MAX_MAGNITUDE:
                raise ExpressionError("power too large")
            return float(left**right) if isinstance(right, float) else left**right
        if type(op) not in _BINARY:
            raise ExpressionError(f"{type(op).__name__} is not allowed")
        return _BINARY[type(op)](left, right)  # type: ignore[no-any-return]
    except (ArithmeticError, TypeError, ValueError) as error:
        raise error if isinstance(error, ExpressionError) else ExpressionError(str(error)) from error


def _call(function: Callable[..., Any], arguments: list[Any]) -> Any:
    try:
        return function(*arguments)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ExpressionError(f"{getattr(function, '__name__', 'function')}: {error}") from error


def _number(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    raise ExpressionError(f"arithmetic on {type(value).__name__}")


def _bounded(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise ExpressionError(f"text longer than {MAX_TEXT}")
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        raise ExpressionError(f"list longer than {MAX_ITEMS}")
    if isinstance(value, (int, float)) and not abs(value) <= MAX_MAGNITUDE:
        raise ExpressionError(f"number beyond {MAX_MAGNITUDE:.0e}")
    return value


def show(value: Any) -> str:
    """How a value stands in a reply: yes/no, numbers without a needless fraction, lists with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:.10g}"
    if isinstance(value, list):
        return ", ".join(show(item) for item in value)
    return str(value)
