"""Agent episodes in which the policy picks at every step who acts, a cheap or an expensive executor, within a budget.

    [ choices: labels of the executors that are still affordable -> the policy's label -> that executor's action
      -> the environment's observation, described for the policy ] ... until won, the step limit, or the budget's end

The policy's turn is one token. The mask of affordable executors is stored with it by the rollout (`srpo.types.Turn`).
An episode of which no call was answered says nothing about its executors: it is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from routers.data.billing import saved
from routers.data.prompt_cache import switch_cost
from routers.environments.protocol import Act, AgentEnvironment, Executor, PricedByTokens, Session, View
from routers.evaluation.episodes import CACHES
from routers.pool.ledger import Ledger, OverBudget
from routers.pool.protocol import CIRCUIT_OPEN
from routers.tasks.step_routing.budget import Budget, BudgetGate
from srpo.types import CORRECT, COST, FEEDBACK, LOST, Observation, Row, Stop, Usage

CAP = "cap"
"""Dataset column: the row's own cap, in the budget's unit; None: no limit."""
TASK = "task"
"""Dataset column: id of the task; the same for all rows and rollouts of a task."""
UNANSWERED = "no call was answered"
_BROKEN = "raised, or was cut off"


@dataclass(frozen=True)
class Situation:
    """What a decision can be based on: texts so far, steps and budget left, and who acted."""

    view: View
    steps_left: int
    gate: BudgetGate
    calls: tuple[str, ...]
    """Names of the executors of all steps so far."""
    left: float
    """Of the budget, in its unit; infinite without a cap."""
    bounds: Mapping[str, float] = field(default_factory=dict)
    """USD that the next call of each executor costs at most."""
    affordable: tuple[str, ...] = ()
    """Names of the executors that can be chosen now."""


Describe = Callable[[Situation], Observation]
"""What the policy is told after a step (and, in its prompt, before the first)."""
Choose = Callable[[Situation, Sequence[str]], str]
"""A routing rule: the situation and the affordable executors' names -> one of these names."""


@dataclass(frozen=True)
class RoutedStep:
    """One step: who acted, out of whom, and what became of it."""

    executor: str
    allowed: tuple[str, ...]
    """Who was affordable."""
    bounds: Mapping[str, float]
    """USD that each executor's call would have cost at most."""
    left: float
    """Of the budget, in its unit, before the step; infinite without a cap."""
    probability: float
    """Of the choice, renormalised over `allowed`; NaN where a rule decided."""
    usd: float = 0.0
    action: str = ""
    observation: str = ""
    error: str | None = None
    """Why the call failed."""
    usage: Usage = field(default_factory=Usage)
    """Of the call, where its executor counts tokens."""
    saved_usd: float = 0.0
    """That the provider's cache made it cheaper."""
    switch_usd: float = 0.0
    """That it cost more because another executor's cache holds the prompt: estimated by `prompt_cache.switch_cost`."""


class OutOfMoney(RuntimeError):
    """The run's money does not pay for the next call; it was not made."""


class StepRoutingEnvironment:
    """Makes the episodes; an `Environment` of `srpo.types`.

    Args:
        make: the environment of a dataset row; a fresh one at every call.
        executors: the cheapest first; every further one counts as expensive.
        describe: what the policy is told.
        budget: of every episode; a row's own cap (column `cap`) replaces its cap.
        labels: the executors' labels, each one token of the policy; None: their names.
        deadline: seconds for one call of an executor.
        ledger: of the pool behind live executors: what the run has spent, and its cap. None: the episodes' costs at
            list prices are what is spent.
        waits: episodes wait for others before their first step; see `srpo.types.Environment`.

    Raises:
        ValueError: fewer than two executors, or labels or names that are not different.
    """

    def __init__(
        self,
        make: Callable[[Row], AgentEnvironment],
        executors: Sequence[Executor],
        describe: Describe,
        budget: Budget | None = None,
        labels: Sequence[str] | None = None,
        deadline: float = 60.0,
        ledger: Ledger | None = None,
        waits: bool = False,
    ) -> None:
        names = [executor.name for executor in executors]
        self.labels = dict(zip(names, names if labels is None else labels, strict=True))
        if len(names) < 2 or len(set(names)) < len(names) or len(set(self.labels.values())) < len(names):
            raise ValueError(f"executors {names} with labels {list(self.labels.values())}: two or more, all different")
        self.names = {label: name for name, label in self.labels.items()}
        self.executors = {executor.name: executor for executor in executors}
        self.priced: dict[str, PricedByTokens] = {e.name: e for e in executors if getattr(e, "member", None)}  # type: ignore[misc]
        self.cheapest = names[0]
        self.make = make
        self.describe = describe
        self.budget = Budget(None) if budget is None else budget
        self.deadline = deadline
        self.ledger = ledger
        self.waits = waits
        self._spent = 0.0
        self._episodes: list[dict[str, float]] = []
        self._outcomes: dict[str, tuple[int, int]] = {}

    def episode(self, row: Row, seed: str, refuse: bool = True) -> StepRoutingEpisode:
        """A fresh episode; the same row and seed give the same world and the same dice of scripted executors.

        Raises:
            ValueError: a budget that cannot pay for one call (where it is to be refused: a row that nobody could train
                on), or not for what `force_small` promises.
        """
        session = Session(self.make(row), seed)
        session.start()
        return StepRoutingEpisode(self, session, self._gate(row.get(CAP, self.budget.cap)), row.get(TASK), refuse)

    def starts(self, row: Row, caps: Sequence[float | None]) -> list[Situation]:
        """The situation before the first decision at each of these caps; the world is made once.

        Raises:
            ValueError: as `episode`.
        """
        session = Session(self.make(row), "start")
        session.start()
        return [StepRoutingEpisode(self, session, self._gate(cap)).situation for cap in caps]

    def _gate(self, cap: float | None) -> BudgetGate:
        return BudgetGate(replace(self.budget, cap=cap))

    def ended(self, episode: StepRoutingEpisode, cost: float, solved: bool | None) -> None:
        """Book an episode; it calls this once. A lost one is solved: None, which says nothing of its task."""
        self._spent += cost
        if solved is not None and episode.task is not None:
            played, won = self._outcomes.get(episode.task, (0, 0))
            self._outcomes[episode.task] = played + 1, won + solved
        steps, large = len(episode.calls), episode.large_calls
        numbers = {
            "budget/large_calls": float(large),
            "budget/large_share": large / max(steps, 1),
            "budget/steps": float(steps),
            "budget/violations": float(episode.gate.violated),
        }
        if episode.gate.used is not None:
            numbers["budget/used"] = episode.gate.used
        if self.priced:
            read = sum(step.usage.prompt_tokens for step in episode.steps)
            numbers["cache/share"] = sum(step.usage.cached_tokens for step in episode.steps) / max(read, 1)
            numbers["cache/saved_usd"] = sum(step.saved_usd for step in episode.steps)
            numbers["cache/switch_usd"] = sum(step.switch_usd for step in episode.steps)
        self._episodes.append(numbers)

    def metrics(self) -> Mapping[str, float]:
        """Means over the episodes since the last call: expensive calls, their share, steps, violations (must be 0)."""
        episodes, self._episodes = self._episodes, []
        names = {name for numbers in episodes for name in numbers}
        values = {name: [numbers[name] for numbers in episodes if name in numbers] for name in sorted(names)}
        return {name: sum(found) / len(found) for name, found in values.items()}

    def outcomes(self) -> Mapping[str, tuple[int, int]]:
        """Task -> (episodes, solved ones: score 1) since the run began, on this rank."""
        return dict(self._outcomes)

    def out_of_money(self) -> bool:
        """Whether a call was not made because the run's money would not have paid for it."""
        return self.ledger is not None and self.ledger.exhausted

    def spent_usd(self) -> float:
        return self._spent if self.ledger is None else self.ledger.spent_usd

    def state_dict(self) -> dict[str, Any]:
        return {"spent_usd": self.spent_usd(), "outcomes": self._outcomes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._outcomes = {task: (played, solved) for task, (played, solved) in state["outcomes"].items()}
        spent = float(state["spent_usd"])
        if self.ledger is None:
            self._spent = spent
        else:  # what was spent after the checkpoint is spent too: a ledger that knows more keeps it
            self.ledger.account.charge(max(0.0, spent - self.ledger.spent_usd))


class StepRoutingEpisode:
    """One episode, from a session that was started; an `Episode` of `srpo.types`."""

    def __init__(
        self,
        parent: StepRoutingEnvironment,
        session: Session,
        gate: BudgetGate,
        task: str | None = None,
        refuse: bool = True,
    ) -> None:
        environment = session.environment
        self.task = task
        self.steps: list[RoutedStep] = []
        self.gate = gate
        self._parent = parent
        self._environment = environment
        self._session = session
        self._priced = parent.priced
        self.situation = self._look()
        gate.check_start(self.situation.bounds, environment.limit)
        if refuse and not self.situation.affordable:
            raise ValueError(
                f"{environment.seed}: a budget of {gate.budget.cap:g} {gate.budget.unit} cannot pay for one call of "
                f"{parent.cheapest}, at most {min(self.situation.bounds.values()):g}; raise the cap"
            )

    @property
    def calls(self) -> tuple[str, ...]:
        """Names of the executors of all steps so far."""
        return tuple(step.executor for step in self.steps)

    @property
    def large_calls(self) -> int:
        return len(self.steps) - self.calls.count(self._parent.cheapest)

    @property
    def broken(self) -> bool:
        """Whether the last executor raised or was cut off."""
        return bool(self.steps) and self.steps[-1].error == _BROKEN

    def choices(self) -> list[str]:
        return [self._parent.labels[name] for name in self.situation.affordable]

    async def step(self, text: str) -> Observation:
        """Let the executor with this label act. A failed call costs a step and its money, and the episode goes on.

        Raises:
            OutOfMoney: the run cannot pay; a call that was not made says nothing about the executor.
        """
        name, now = self._parent.names[text], self.situation
        executor = self._parent.executors[name]
        step = RoutedStep(name, now.affordable, now.bounds, now.left, float("nan"), now.bounds[name], error=_BROKEN)
        try:
            act = await self.gate.call(
                name, now.bounds, lambda: executor.act(now.view, self._parent.deadline), lambda act: act.cost
            )
        except OverBudget:  # an account that is shared: another episode was faster
            return Observation(end="budget")
        except BaseException:  # the episode is lost, its money is not: the call may be billed
            self.steps.append(step)
            raise
        self.steps.append(replace(self._with_cache(step, act, now.view), usd=act.cost, action=act.action))
        if act.reply.error is not None and self._parent.out_of_money():
            raise OutOfMoney(act.reply.error)
        return await self._session.advance(lambda: self._after(act))

    def _with_cache(self, step: RoutedStep, act: Act, view: View) -> RoutedStep:
        """The step with its tokens, and what the cache did to its price."""
        step = replace(step, error=act.reply.error, usage=act.reply.usage)
        if (executor := self._priced.get(step.executor)) is None:
            return step
        caches = executor.caches(view)
        last = self._priced.get(caches.last or "")
        lost = 0.0 if last is None else switch_cost(last.member, executor.member, caches)
        return replace(step, saved_usd=saved(executor.member, act.reply.usage), switch_usd=lost)

    def _after(self, act: Act) -> Observation:
        """What the policy is told of this action; reads all of the world that is looked at before the next one."""
        observation, done = self._session.take(act.action, self.steps[-1].executor, act.reply.seconds)
        self.steps[-1] = replace(self.steps[-1], observation=observation)
        if done:
            late = not self._environment.won and self._environment.steps >= self._environment.limit
            return Observation(end="turns" if late else "done")
        self.situation = self._look()
        if not self.situation.affordable:
            return Observation(end="budget")
        return self._parent.describe(self.situation)

    def _look(self) -> Situation:
        steps_left, calls, view = self._environment.limit - self._environment.steps, self.calls, self._session.view
        bounds = {name: executor.bound(view) for name, executor in self._parent.executors.items()}
        affordable = tuple(self.gate.allowed(bounds, steps_left))
        return Situation(view, steps_left, self.gate, calls, self.gate.remaining, bounds, affordable)

    def columns(self, stop: Stop) -> Mapping[str, Any]:
        """Success, cost in USD, calls; `feedback` says in words what was not reached."""
        unanswered = None if stop == "lost" else self._unanswered()
        success = None if stop == "lost" or unanswered else float(self._environment.score)
        cost = sum(step.usd for step in self.steps)
        self._parent.ended(self, cost, None if success is None else success >= 1)
        return {
            CORRECT: success,
            COST: cost,
            FEEDBACK: "" if self._environment.won else self._missed(stop),
            LOST: unanswered,
            "calls": len(self.steps),
            "members": list(self.calls),
            "large_calls": self.large_calls,
            "budget_used": self.gate.used,
            "budget_violated": self.gate.violated,
            **self._cached(),
        }

    def _cached(self) -> dict[str, float]:
        """Per priced executor its prompt tokens, those out of its cache, and USD saved and lost; see `CACHES`."""
        found: dict[str, float] = {}
        for name in self._priced:
            steps = [step for step in self.steps if step.executor == name]
            sums = (
                sum(step.usage.prompt_tokens for step in steps),
                sum(step.usage.cached_tokens for step in steps),
                sum(step.saved_usd for step in steps),
                sum(step.switch_usd for step in steps),
            )
            found |= {f"{what}{name}": float(value) for what, value in zip(CACHES, sums, strict=True)}
        return found

    def _unanswered(self) -> str | None:
        """Why the episode says nothing about its executors, if so."""
        errors = [step.error for step in self.steps if step.error is not None]
        if away := [error for error in errors if error.startswith(CIRCUIT_OPEN)]:
            return f"{UNANSWERED} for a while: {away[0]}"
        return f"{UNANSWERED}: {errors[-1]}" if errors and len(errors) == len(self.steps) else None

    def _missed(self, stop: Stop) -> str:
        why = {"budget": "the budget was spent", "turns": f"all {self._environment.limit} steps were used"}
        return f"The task was not finished: {why.get(stop, 'the episode ended')}."
