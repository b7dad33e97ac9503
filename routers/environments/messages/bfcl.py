"""BFCL's multi-turn conversations as an agent that speaks messages: functions are `tools`, calls are tool calls.

``train_tasks: bfcl/base:train`` with `environment: messages`; parts, tools, and the score by the package's own checks
are those of `routers.environments.bfcl`. As for the package's models with function calling there is no system message,
and an answer without a call ends the user's turn.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from routers.environments.bfcl import BfclBenchmark, Conversation, documents
from routers.environments.messages.agent import Talk
from routers.environments.registry import benchmark
from routers.environments.tool_calls import call_named


class BfclAgent:
    """The conversations; an `Agent`."""

    waits = False

    def __init__(self) -> None:
        made = benchmark("bfcl")
        assert isinstance(made, BfclBenchmark)
        self._benchmark = made

    def tasks(self, split: str, count: int = 0) -> Mapping[str, str]:
        return self._benchmark.tasks(split, count)

    def talk(self, task: str) -> Talk:
        known = self._benchmark.task(task)
        conversation, tools = Conversation(known), [_tool(document) for document in documents(known, 0)]
        messages: list[Mapping[str, Any]] = [{"role": "user", "content": known.turns[0]}]
        while not conversation.over:
            reply = yield {"messages": list(messages), "tools": list(tools)}
            messages.append(reply)
            if calls := reply.get("tool_calls"):
                messages += [_result(call, conversation) for call in calls]
            else:
                messages.append({"role": "user", "content": conversation.end_turn()})
                tools += [_tool(document) for document in documents(known, conversation.turn)]
        return float(conversation.won)


def _result(call: Mapping[str, Any], conversation: Conversation) -> dict[str, Any]:
    function = call["function"]

    def read() -> tuple[Sequence[Any], Mapping[str, Any]]:
        given = json.loads(function["arguments"] or "{}")
        if not isinstance(given, dict):
            raise ValueError("the arguments are not a JSON object")
        return (), given

    said = conversation.run(lambda tools, excluded: call_named(tools, function["name"], read, excluded))
    return {"role": "tool", "tool_call_id": call["id"], "content": said}


def _tool(document: Mapping[str, Any]) -> dict[str, Any]:
    """A function as OpenAI's API takes it: types of JSON schema, by the package's own table."""
    names = importlib.import_module("bfcl_eval.constants.type_mappings").GORILLA_TO_OPENAPI

    def schema(told: Any) -> Any:
        if isinstance(told, list):
            return [schema(part) for part in told]
        if not isinstance(told, Mapping):
            return told
        found = {name: schema(value) for name, value in told.items()}
        if isinstance(kind := told.get("type"), str):  # a property may be called "type": then it is a mapping
            found["type"] = names.get(kind, kind)
        return found

    function = {"name": document["name"], "description": document["description"]}
    return {"type": "function", "function": {**function, "parameters": schema(document["parameters"])}}
