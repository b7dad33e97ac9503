"""An agent that speaks OpenAI's messages as an `AgentEnvironment`: one of its calls is one step.

    observation    the digest of the agent's next request (`routers.language.digest`)
    action         who answered it, and the assistant's message, as JSON (`answer`)
    score          the agent's own, when its talk is over

Executors of such environments (`routers.environments.messages.members`) read the whole request, `request`, and what
every member has of it in its prompt cache, `caches`: a switch throws the prefix away, and its price is in every cost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from routers.data.prompt_cache import Conversation, Message, estimated_messages
from routers.environments.messages.agent import Agent, CutOff, MemberFailed, Talk, agent_of
from routers.environments.protocol import GameError
from routers.language.digest import digest

SECONDS = 5.0
"""Between two calls of an agent, on the clock of the simulated prompt caches."""


def answer(member: str, message: Mapping[str, Any]) -> str:
    """The action of a member that answered."""
    return json.dumps({"member": member, "message": message})


class MessagesEnvironment:
    """One episode of an agent.

    Args:
        agent: whose.
        name: of the episode, `AGENT/TASK`.
        task_type: of the task.
        limit: calls, after which the agent is cut off.
    """

    how, admissible = "", ()

    def __init__(self, agent: Agent, name: str, task_type: str, limit: int) -> None:
        self.seed, self.task_type, self.limit = name, task_type, limit
        self.waits = agent.waits
        self.task = ""
        self.steps, self.score, self.done = 0, 0.0, False
        self.request: Mapping[str, Any] = {}
        """The body of the call that waits for an answer."""
        self.caches = Conversation()
        """Its prompt, and what members have of it in their caches."""
        self._talk: Talk = agent.talk(name.partition("/")[2])
        self._begun = False
        self._counted: tuple[list[Any], tuple[Message, ...]] = ([], ())

    @property
    def won(self) -> bool:
        return self.score >= 1

    def reset(self) -> str:
        if self._begun:
            raise GameError(f"{self.seed}: an episode is played once")
        self._begun = True
        try:
            request = next(self._talk)
        except StopIteration:
            raise GameError(f"{self.seed}: the agent ended without a call") from None
        observation = self._asked(request)
        self.task = digest(request["messages"]).task
        return observation

    def step(self, action: str) -> tuple[str, bool]:
        if not self._begun or self.done:
            raise GameError(f"{self.seed}: no call is open")
        self.steps += 1
        try:
            request = self._answered(action)
            if self.steps < self.limit:
                return self._asked(request), False
            self._talk.throw(CutOff(f"all {self.limit} steps were used"))
        except StopIteration as end:
            self._end(end.value)
        except (MemberFailed, CutOff):
            self._end(0.0)
        finally:
            if self.steps >= self.limit:
                self.done = True
                self._talk.close()
        return "", True

    def _answered(self, action: str) -> Mapping[str, Any]:
        if not action:
            return self._talk.throw(MemberFailed("the member did not answer"))
        found = json.loads(action)
        self.caches = self.caches.asked(found["member"])
        return self._talk.send(found["message"])

    def _asked(self, request: Mapping[str, Any]) -> str:
        self.request = request
        self.caches = self.caches.then(self._count(request), SECONDS * self.steps)
        return digest(request["messages"], request.get("tools")).text

    def _count(self, request: Mapping[str, Any]) -> tuple[Message, ...]:
        """The prompt in tokens; what it begins with as the last one did is not counted again."""
        parts, (old, known) = [*(request.get("tools") or ()), *request["messages"]], self._counted
        same = len(old) if parts[: len(old)] == old else 0
        self._counted = parts, (*known[:same], *estimated_messages(parts[same:]))
        return self._counted[1]

    def _end(self, score: Any) -> None:
        self.done = True
        if not isinstance(score, (int, float)) or not 0 <= score <= 1 or math.isnan(score):
            raise GameError(f"{self.seed}: the agent's score is {score!r}; it must be a number from 0 to 1")
        self.score = float(score)


class MessagesBenchmark:
    """Agents that speak messages; a `Benchmark`. Parts: `AGENT/SPLIT`; see `agent_of` for the agents."""

    def __init__(self) -> None:
        self._types: dict[str, str] = {}

    def tasks(self, which: str, count: int = 0) -> dict[str, str]:
        name, _, split = which.partition("/")
        try:
            found = agent_of(name).tasks(split, count)
        except ValueError as error:
            raise GameError(f"{which}: {error}") from None
        tasks = {f"{name}/{task}": kind for task, kind in list(found.items())[: count or None]}
        self._types.update(tasks)
        return tasks

    def make(self, task: str, limit: int) -> MessagesEnvironment:
        if task not in self._types:
            raise GameError(f"there is no task {task!r}; tasks() comes first")
        return MessagesEnvironment(agent_of(task.partition("/")[0]), task, self._types[task], limit)

    def close(self) -> None: ...
