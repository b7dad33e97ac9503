"""What an agent is, to an environment of messages: tasks, and a talk per episode.

A talk is a generator. It yields the bodies of its requests (``messages``, ``tools``, ... as in a chat completion), is
sent the assistant's message that answers each, and returns its score in [0, 1]:

    def talk(self, task):
        messages = [{"role": "user", "content": task}]
        while True:
            reply = yield {"messages": list(messages), "tools": TOOLS}
            messages += [reply, *results_of(reply["tool_calls"])]
            if finished():
                return score()

A call that failed raises `MemberFailed` in the talk, and the step limit `CutOff`; who lets them pass scores 0. Agents
of other people, which call a server, become talks by `routers.environments.messages.served`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from importlib.metadata import entry_points
from typing import Any, Protocol

from routers.environments.protocol import GameError

GROUP = "srpo.agents"
"""Entry points of other packages: name -> an `Agent`, or a function without arguments that makes one."""

Talk = Generator[Mapping[str, Any], Mapping[str, Any], float]


class MemberFailed(RuntimeError):
    """The call was not answered; the text says why."""


class CutOff(RuntimeError):
    """The episode has used all its steps."""


class Agent(Protocol):
    """One kind of agent. Many of its talks may be open at the same time."""

    waits: bool
    """Whether its talks wait for something outside this process or thread. See `AgentEnvironment.waits`."""

    def tasks(self, split: str, count: int = 0) -> Mapping[str, str]:
        """Task id -> its type, of a named split, in a fixed order; the first `count` of them, 0: all.

        Raises:
            ValueError: no such split; says which there are.
        """

    def talk(self, task: str) -> Talk:
        """A fresh episode of a task; the same task is the same world."""


AGENTS: dict[str, Agent] = {}
"""Agents of this process by name: a script adds its own here, before it trains. See `agent_of` for those beside it."""


def agent_of(name: str) -> Agent:
    """The agent with this name: of `AGENTS`, of the library (`repairs`, and the benchmarks of `registry`), of another
    one (`named.FAMILIES`), or of an installed package (entry points, `GROUP`).

    Raises:
        GameError: no such agent.
    """
    if name not in AGENTS:
        AGENTS[name] = _found(name)
    return AGENTS[name]


def _found(name: str) -> Agent:
    from routers.environments.messages.bfcl import BfclAgent
    from routers.environments.messages.games import GameAgent
    from routers.environments.messages.named import FAMILIES, named
    from routers.environments.messages.repairs import Repairs
    from routers.environments.registry import BENCHMARKS

    if (other := named(name)) is not None:
        return other
    games = {game: lambda: GameAgent(name) for game in BENCHMARKS if game != "messages"}
    ours: dict[str, Callable[[], Agent]] = {"repairs": Repairs, **games, "bfcl": BfclAgent}
    if name in ours:
        return ours[name]()
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        there = ", ".join(dict.fromkeys([*ours, *(f"{family}:..." for family in FAMILIES), *AGENTS, *known]))
        raise GameError(f"there is no agent {name!r}; there are {there}")
    found = known[name].load()
    made: Agent = found() if isinstance(found, type) or not hasattr(found, "talk") else found
    return made
