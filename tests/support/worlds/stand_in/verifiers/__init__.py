"""Stands in for the package verifiers where it is not installed: as much of it as `tiny_env` and our worker use."""

import importlib
import inspect
import json
import logging
from typing import Any


class Rubric:
    def __init__(self, funcs: Any) -> None:
        self.funcs = funcs


class MultiTurnEnv:
    def __init__(
        self, dataset: Any, rubric: Rubric, eval_dataset: Any = None, tools: Any = (), max_turns: int = 1
    ) -> None:
        self.dataset, self.eval_dataset, self.rubric, self.max_turns = dataset, eval_dataset, rubric, max_turns
        self.functions = {tool.__name__: tool for tool in tools}

    def build_dataset(self) -> Any:
        return self._prompted(self.dataset)

    def build_eval_dataset(self) -> Any:
        return self.eval_dataset and self._prompted(self.eval_dataset)

    def _prompted(self, rows: Any) -> Any:
        return rows.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]})

    async def env_response(self, messages: Any, state: Any) -> Any:
        return [
            {"role": "tool", "tool_call_id": call["id"], "content": str(self._call(call["function"]))}
            for call in messages[-1].get("tool_calls") or ()
        ]

    def _call(self, function: Any) -> Any:
        return self.functions[function["name"]](**json.loads(function["arguments"]))

    requires_group_rollouts = property(lambda self: any("completions" in _takes(f) for f in self.rubric.funcs))

    async def run_rollout(self, row: Any, client: Any, model: str, sampling: Any) -> dict[str, Any]:
        messages = list(row["prompt"])
        more = {"tools": [{"type": "function", "function": {"name": name}} for name in self.functions]}
        error = None
        for turn in range(self.max_turns):
            try:
                made = await client.client.chat.completions.create(
                    model=model, messages=messages, **(more if self.functions else {})
                )
            except Exception:
                error = "ModelError"
                break
            messages.append(made.choices[0].message.model_dump())
            if turn + 1 < self.max_turns:
                if not (answer := await self.env_response(messages, row)):
                    break
                messages += answer
        said = messages[len(row["prompt"]) :]
        return {"reward": sum(self._score(func, said, row["answer"]) for func in self.rubric.funcs), "error": error}

    def _score(self, func: Any, said: Any, answer: Any) -> float:
        try:
            return float(func(completion=said, answer=answer))
        except Exception as problem:
            logging.getLogger("verifiers.rubrics").error(f"Error calling reward function {func.__name__}: {problem}")
            return 0.0


def _takes(func: Any) -> Any:
    return inspect.signature(func).parameters


SingleTurnEnv = ToolEnv = MultiTurnEnv


def load_environment(name: str, **arguments: Any) -> Any:
    return importlib.import_module(name.replace("-", "_")).load_environment(**arguments)
