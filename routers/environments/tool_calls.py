"""Calls that a model wrote as text, run without evaluating it: literal arguments, methods of given objects only."""

import ast
import inspect
import json
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
    """Run one call on the tool that has such a method; what goes wrong in it is its result.

    Private and `excluded` methods are not there. A tool may take long: bound the time from outside.
    """
    name = call.func.id  # type: ignore[attr-defined]
    methods = (getattr(tool, name, None) for tool in tools.values())
    found = next((method for method in methods if inspect.ismethod(method)), None)
    if name.startswith("_") or name in excluded or found is None:
        return f"Error during execution: name '{name}' is not defined"
    try:
        arguments = [ast.literal_eval(value) for value in call.args]
        result = found(*arguments, **{word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg})
    except Exception as error:
        return f"Error during execution: {error}"
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except TypeError:  # numbers of mpmath
            return str(result)
    return str(result)
