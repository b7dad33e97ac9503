"""Environments of others as agents that speak messages: the benchmarks of `registry`, and gymnasium's.

The handbook is the system's message, observations are the user's, an action is what the assistant says. With
`environment: messages`, ``train_tasks: alfworld/generated/train`` plays ALFWorld so, and likewise every benchmark by
its name (BFCL's are tool calls: see `bfcl`); members are then asked by chat, and what they cached is billed as cached.
Scripted executors of those benchmarks do not speak messages: they play there without this module.
``train_tasks: gymnasium:FrozenLake-v1?is_slippery=false/train`` is an environment that gymnasium has registered;
`GymAgent` takes any other of its kind, from a script.
"""

from __future__ import annotations

import inspect
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from routers.environments.messages.agent import Talk
from routers.environments.messages.named import Scale, seeds
from routers.environments.protocol import GameError
from routers.environments.react import FREE_INSTRUCTION, INSTRUCTION, read_action, read_free_action
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
        tasks: (split, count) -> task -> its type, as `Agent.tasks`.
        how: the system's message: what is to be done, and how actions are written.
        read: the assistant's text -> an action; ValueError: it is none, which is said to the assistant.
        tell: an observation, in words.
        score: (sum of rewards, last info) -> the score in [0, 1].
        waits: see `Agent`.

    An environment is reset with its task as the seed, where that is a number, and else with its checksum.
    """

    def __init__(
        self,
        make: Callable[[str], Any],
        tasks: Callable[[str, int], Mapping[str, str]],
        how: str,
        read: Callable[[str], Any],
        tell: Callable[[Any], str] = str,
        score: Callable[[float, Mapping[str, Any]], float] = lambda total, info: total,
        waits: bool = False,
    ) -> None:
        self._make, self._tasks, self._how, self.waits = make, tasks, how, waits
        self._read, self._tell, self._score = read, tell, score

    def tasks(self, split: str, count: int = 0) -> Mapping[str, str]:
        return self._tasks(split, count)

    def talk(self, task: str) -> Talk:
        world, total = self._make(task), 0.0
        try:
            observation, info = world.reset(seed=int(task) if task.isdecimal() else zlib.crc32(task.encode()))
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


def gymnasium_agent(name: str, arguments: Mapping[str, Any], scale: Scale) -> GymAgent:
    """An environment that gymnasium has registered, with whole numbers or texts as actions.

    Args:
        name: its id; `MODULE:ID` imports the module that registers it.
        arguments: of `gymnasium.make`.
        scale: what its rewards are worth.

    Raises:
        GameError: gymnasium is not installed, there is no such environment, or its actions are something else.
    """
    try:
        import gymnasium
        from gymnasium.spaces import Discrete, Text
    except ImportError:
        raise GameError(f"gymnasium:{name} needs the package gymnasium: pip install gymnasium") from None
    try:
        first = gymnasium.make(name, **arguments)
    except Exception as error:  # gymnasium's own, and those of environments, of any kind
        raise GameError(f"gymnasium:{name} cannot be made: {error}") from None
    space, doc = first.action_space, inspect.getdoc(first.unwrapped) or name
    first.close()
    if isinstance(space, Discrete):
        low, high = int(space.start), int(space.start + space.n - 1)
        told = f"An action is a whole number from {low} to {high}, and nothing else."
    elif isinstance(space, Text):
        told = f"An action is a text of {space.min_length} to {space.max_length} characters."
    else:
        raise GameError(
            f"gymnasium:{name}: actions are {space}; whole numbers and texts are read, for others make a GymAgent "
            "with a reader of yours"
        )

    def read(text: str) -> Any:
        action: Any = read_free_action(text)
        if isinstance(space, Discrete):
            action = int(action) if re.fullmatch(r"-?[0-9]{1,18}", action) else None
        if not space.contains(action):
            raise ValueError(told)
        return action

    return GymAgent(
        lambda task: gymnasium.make(name, **arguments),
        lambda split, count: seeds(split, name, count),
        f"{doc}\n\n{FREE_INSTRUCTION}\n\n{told}",
        read,
        score=lambda total, info: scale.score(total),
    )


def _said(role: str, content: str) -> Mapping[str, Any]:
    return {"role": role, "content": content}


def _shown(observation: str, commands: Sequence[str]) -> str:
    return f"{observation}\n\nPossible commands: {'; '.join(commands)}" if commands else observation
