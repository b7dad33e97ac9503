"""Environments of others as agents that speak messages: the benchmarks of `registry`, and gymnasium's.

The handbook is the system's message, observations are the user's, an action is what the assistant says. With
`environment: messages`, ``train_tasks: bfcl/base:train`` plays BFCL's multi-turn conversations so, and likewise every
benchmark by its name; members are then asked by chat, and what they cached is billed as cached. Scripted executors of
those benchmarks do not speak messages: they play there without this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from routers.environments.messages.agent import Talk
from routers.environments.react import FREE_INSTRUCTION, INSTRUCTION, read_action
from routers.environments.registry import benchmark

MOST_STEPS = 10_000
"""Of a benchmark's own; the recipe's `step_limit` ends an episode before."""


class GameAgent:
    """A benchmark's episodes, one command per call. Parts are the benchmark's own.

    Args:
        name: a key of `routers.environments.registry.BENCHMARKS`.
    """

    waits = True

    def __init__(self, name: str) -> None:
        self._name = name

    def tasks(self, split: str, count: int = 0) -> Mapping[str, str]:
        return benchmark(self._name).tasks(split, count)

    def talk(self, task: str) -> Talk:
        world = benchmark(self._name).make(task, MOST_STEPS)
        first, listed = world.reset(), not world.how
        how = INSTRUCTION if listed else f"{FREE_INSTRUCTION}\n\n{world.how}"
        messages = [_said("system", how), _said("user", _shown(first, world.admissible if listed else ()))]
        while not world.done:
            reply = yield {"messages": list(messages)}
            text = str(reply.get("content") or "")
            observation, _ = world.step(read_action(text, world.admissible if listed else ()))
            shown = _shown(observation, world.admissible if listed and not world.done else ())
            messages += [reply, _said("user", shown)]
        return world.score


class GymAgent:
    """Episodes of gymnasium-style environments: `reset(seed=)` and `step(action)` with five results.

    Args:
        make: a fresh environment of a task.
        splits: split -> task -> its type.
        how: the system's message: what is to be done, and how actions are written.
        read: the assistant's text -> an action; ValueError: it is none, which is said to the assistant.
        tell: an observation, in words.
        score: (sum of rewards, last info) -> the score in [0, 1].
    """

    waits = False

    def __init__(
        self,
        make: Callable[[str], Any],
        splits: Mapping[str, Mapping[str, str]],
        how: str,
        read: Callable[[str], Any],
        tell: Callable[[Any], str] = str,
        score: Callable[[float, Mapping[str, Any]], float] = lambda total, info: min(max(total, 0.0), 1.0),
    ) -> None:
        self._make, self._splits, self._how = make, splits, how
        self._read, self._tell, self._score = read, tell, score

    def tasks(self, split: str, count: int = 0) -> Mapping[str, str]:
        if split not in self._splits:
            raise ValueError(f"there is no split {split!r}; there are {', '.join(self._splits)}")
        return self._splits[split]

    def talk(self, task: str) -> Talk:
        world, total = self._make(task), 0.0
        try:
            observation, info = world.reset()
            messages = [_said("system", self._how), _said("user", self._tell(observation))]
            while True:
                reply = yield {"messages": list(messages)}
                try:
                    action = self._read(str(reply.get("content") or ""))
                except ValueError as error:
                    messages += [reply, _said("user", f"Error: {error}")]
                    continue
                observation, reward, terminated, truncated, info = world.step(action)
                total += float(reward)
                messages += [reply, _said("user", self._tell(observation))]
                if terminated or truncated:
                    return self._score(total, info)
        finally:
            world.close()


def _said(role: str, content: str) -> Mapping[str, Any]:
    return {"role": role, "content": content}


def _shown(observation: str, commands: Sequence[str]) -> str:
    return f"{observation}\n\nPossible commands: {'; '.join(commands)}" if commands else observation
