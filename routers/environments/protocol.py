"""Agent environments: one small protocol, what an executor sees of an episode, and the loop that plays one.

An environment object plays one episode: `reset` once, `step` until done. Executors choose the actions; they keep no
state of their own, everything they know is in the `View`, which holds the steps that other executors took too.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar, cast

from srpo.types import Reply

T = TypeVar("T")

NOTHING_HAPPENS = "Nothing happens."
"""What ALFWorld answers to a command that is not admissible."""


class GameError(ValueError):
    """A game file, a field of it, or a use of an environment that is not possible; the text says which and why."""


class AgentEnvironment(Protocol):
    """One episode of an environment. Single use: a second `reset`, or a step before it or after the end, raises."""

    @property
    def seed(self) -> str:
        """Name of what is played (a game's id, a task and variation): the same name is the same world."""

    @property
    def task(self) -> str:
        """What has to be done, in words."""

    @property
    def task_type(self) -> str:
        """Kind of task, for tables by kind."""

    @property
    def limit(self) -> int:
        """Number of steps after which the episode ends."""

    @property
    def steps(self) -> int:
        """Steps taken."""

    @property
    def score(self) -> float:
        """Success so far, in [0, 1]."""

    @property
    def won(self) -> bool:
        """Whether the task is fulfilled."""

    @property
    def done(self) -> bool:
        """Won, or at the limit."""

    @property
    def admissible(self) -> Sequence[str]:
        """Commands that are possible now, sorted; empty where actions are free text. May be worked out when read."""

    @property
    def how(self) -> str:
        """How actions are written, for the prompt of a language model; "" where `admissible` says it all."""

    @property
    def waits(self) -> bool:
        """Whether steps wait for another process. Each is then taken in a thread of its own, never two at once; a
        thread is dearer than a step that computes."""

    def reset(self) -> str:
        """The first observation, task included."""

    def step(self, action: str) -> tuple[str, bool]:
        """(observation, done). An action that is not possible costs a step and changes nothing."""


@dataclass(frozen=True)
class Step:
    action: str
    observation: str


@dataclass(frozen=True)
class View:
    """What an executor is given. `environment` is for privileged executors only, which say so in their docstring."""

    first: str
    """What `reset` returned."""
    steps: tuple[Step, ...]
    """All steps so far, whoever took them."""
    admissible: Sequence[str]
    environment: AgentEnvironment
    seed: str
    """Names the rollout: the randomness of a scripted executor is a function of it."""

    @property
    def how(self) -> str:
        """The environment's words on how actions are written; asked for when somebody looks: they may take a call."""
        return self.environment.how


@dataclass(frozen=True)
class Act:
    """One decision of an executor: the action for `AgentEnvironment.step`, and what the call was and cost."""

    action: str
    """"" where the call failed; the environment then answers as to any impossible action."""
    cost: float
    """USD at list prices. `reply.cost` is what was really spent, 0 for a reply out of a cache."""
    reply: Reply


class Executor(Protocol):
    """Chooses actions, for a price."""

    @property
    def name(self) -> str: ...

    def bound(self, view: View) -> float:
        """Upper bound in USD of the call that `act(view)` would make: what a hard budget reserves before it."""

    async def act(self, view: View, deadline: float) -> Act:
        """The next action. `deadline`: seconds from now over everything, as in `routers.pool`."""


class Session:
    """Drives one environment and keeps what executors may see of it."""

    def __init__(self, environment: AgentEnvironment, seed: str) -> None:
        self.environment = environment
        self.seed = seed
        self._first: str | None = None
        self._steps: list[Step] = []
        self._between = True
        """No step is under way, or was left behind."""

    @property
    def view(self) -> View:
        if self._first is None:
            raise GameError(f"{self.environment.seed}: the session has not been started; call start() first")
        environment = self.environment
        return View(self._first, tuple(self._steps), environment.admissible, environment, self.seed)

    def start(self) -> str:
        self._first = self.environment.reset()
        return self._first

    def take(self, action: str) -> tuple[str, bool]:
        observation, done = self.environment.step(action)
        self._steps.append(Step(action, observation))
        return observation, done

    async def advance(self, job: Callable[[], T]) -> T:
        """What `job` returns, which takes a step and looks at what came of it; where the environment waits, others go
        on meanwhile.

        Raises:
            GameError: the job before failed, or was left behind and may still be at work: the episode is over.
        """
        if not self._between:
            raise GameError(f"{self.environment.seed}: a step failed or was left behind; the episode cannot go on")
        self._between = False
        result = await _in_thread(job) if self.environment.waits else job()
        self._between = True
        return result


async def _in_thread(job: Callable[[], T]) -> T:
    """What `job` returns or raises. Cancelled, it leaves the thread behind: one that never ends holds up nobody.

    Not `asyncio.to_thread`: its few threads would be used up by those that hang, and are waited for at the end.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():  # cancelled
            return
        if error is None:
            done.set_result(cast(T, result))
        else:
            done.set_exception(error)

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = job()
        except StopIteration as raised:  # cannot pass through a future, nor through a coroutine
            error = RuntimeError(repr(raised))
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="environment-step", daemon=True).start()
    return await done


@dataclass(frozen=True)
class Played:
    """An episode that was played to its end."""

    won: bool
    score: float
    steps: tuple[Step, ...]
    calls: tuple[int, ...]
    """Index of the executor of each step."""
    costs: tuple[float, ...]
    """USD of each step."""

    @property
    def cost(self) -> float:
        return sum(self.costs)


async def play(
    environment: AgentEnvironment,
    executors: Sequence[Executor],
    choose: Callable[[View], int],
    seed: str,
    deadline: float = 60.0,
) -> Played:
    """Play one episode. `choose` picks the executor of every step; `deadline`: seconds for each of its calls."""
    session = Session(environment, seed)
    session.start()
    calls: list[int] = []
    costs: list[float] = []
    while not environment.done:
        view = session.view
        calls.append(choose(view))
        act = await executors[calls[-1]].act(view, deadline)
        costs.append(act.cost)
        await session.advance(partial(session.take, act.action))
    return Played(environment.won, environment.score, session.view.steps, tuple(calls), tuple(costs))
