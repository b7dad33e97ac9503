"""Agent environments: one small protocol, and what an executor sees of an episode.

An environment object plays one episode: `reset` once, `step` until done. Executors choose the actions; they keep no
state of their own, everything they know is in the `View`, which holds the steps that other executors took too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from routers.data.catalogue import Member
from routers.data.prompt_cache import Conversation
from srpo.rollout.worker_loop import in_thread
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
    by: str = ""
    """The executor that chose the action; "": nobody says."""
    at: float = 0.0
    """Seconds of calls before its own, since the episode began."""


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
    now: float = 0.0
    """Seconds of all calls so far."""

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
    """Chooses actions, for a price. One whose calls are priced by their tokens may be a `PricedByTokens`."""

    @property
    def name(self) -> str: ...

    def bound(self, view: View) -> float:
        """Upper bound in USD of the call that `act(view)` would make: what a hard budget reserves before it."""

    async def act(self, view: View, deadline: float) -> Act:
        """The next action. `deadline`: seconds from now over everything, as in `routers.pool`."""


class PricedByTokens(Executor, Protocol):
    """Then what its prompt cache saves, and a switch loses, is told."""

    @property
    def member(self) -> Member:
        """Of its name: prices, and the rules of its cache."""

    def caches(self, view: View) -> Conversation:
        """Its next prompt, and what every member has of the episode in its prompt cache, before the call."""


class Session:
    """Drives one environment and keeps what executors may see of it."""

    def __init__(self, environment: AgentEnvironment, seed: str) -> None:
        self.environment = environment
        self.seed = seed
        self._first: str | None = None
        self._steps: list[Step] = []
        self._seconds = 0.0
        self._between = True
        """No step is under way, or was left behind."""

    @property
    def view(self) -> View:
        if self._first is None:
            raise GameError(f"{self.environment.seed}: the session has not been started; call start() first")
        environment = self.environment
        return View(self._first, tuple(self._steps), environment.admissible, environment, self.seed, self._seconds)

    def start(self) -> str:
        self._first = self.environment.reset()
        return self._first

    def take(self, action: str, by: str = "", seconds: float = 0.0) -> tuple[str, bool]:
        """Take a step; `by`, `seconds`: the executor that chose it, and how long that took."""
        observation, done = self.environment.step(action)
        self._steps.append(Step(action, observation, by, self._seconds))
        self._seconds += seconds
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
        result = await in_thread(job) if self.environment.waits else job()
        self._between = True
        return result
