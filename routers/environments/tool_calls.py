"""Calls that a model wrote, run without evaluating its text: literal arguments, methods of given objects only."""

import ast
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def read_calls(text: str) -> list[ast.Call]:
    """The calls in "[f(a=1), g()]" or "f(a=1)"; none where the text is anything else."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return calls if len(calls) == len(nodes) else []


def call_tool(tools: dict[str, Any], call: ast.Call, excluded: tuple[str, ...]) -> str:
    """Run one call that was written as text; see `call_named`."""

    def read() -> tuple[list[Any], dict[str, Any]]:
        words = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
        return [ast.literal_eval(value) for value in call.args], words

    return call_named(tools, call.func.id, read, excluded)  # type: ignore[attr-defined]


def call_named(
    tools: dict[str, Any],
    name: str,
    read: Callable[[], tuple[Sequence[Any], Mapping[str, Any]]],
    excluded: tuple[str, ...],
) -> str:
    """Run a call on the tool that has such a method; what goes wrong in it is its result.

    Private and `excluded` methods are not there. A tool may take long: bound the time from outside.

    Args:
        tools: objects by their name.
        name: of the method.
        read: its arguments, those by position and those by name; what it raises goes wrong in the call.
        excluded: methods that are not there.
    """
    methods = (getattr(tool, name, None) for tool in tools.values())
    found = next((method for method in methods if inspect.ismethod(method)), None)
    if name.startswith("_") or name in excluded or found is None:
        return f"Error during execution: name '{name}' is not defined"
    try:
        arguments, words = read()
        result = found(*arguments, **words)
    except Exception as error:
        return f"Error during execution: {error}"
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except TypeError:  # numbers of mpmath
            return str(result)
    return str(result)
