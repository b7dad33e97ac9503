"""Agent episodes in which the policy picks at every step who acts, a cheap or an expensive executor, within a budget.

    [ choices: labels of the executors that are still affordable -> the policy's label -> that executor's action
      -> the environment's observation, described for the policy ] ... until won, the step limit, or the budget's end

The policy's turn is one token. The mask of affordable executors is stored with it by the rollout (`srpo.types.Turn`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from routers.environments.protocol import AgentEnvironment, Executor, Session, View
from routers.pool.ledger import Ledger, OverBudget
from routers.tasks.step_routing.budget import Budget, BudgetGate
from srpo.types import CORRECT, COST, FEEDBACK, Observation, Row, Stop

CAP = "cap"
"""Dataset column: the row's own cap, in the budget's unit; None: no limit."""
TASK = "task"
"""Dataset column: id of the task; the same for all rows and rollouts of a task."""


@dataclass(frozen=True)
class Situation:
    """What a decision can be based on: texts so far, steps and budget left, and who acted."""

    view: View
    steps_left: int
    gate: BudgetGate
    calls: tuple[str, ...]
    """Names of the executors of all steps so far."""


Describe = Callable[[Situation], Observation]
"""What the policy is told after a step (and, in its prompt, before the first)."""
Choose = Callable[[Situation, Sequence[str]], str]
"""A routing rule: the situation and the affordable executors' names -> one of these names."""


class OutOfMoney(RuntimeError):
    """The run's money does not pay for the next call; it was not made."""


class BudgetEnvironment:
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
    ) -> None:
        names = [executor.name for executor in executors]
        self.labels = dict(zip(names, names if labels is None else labels, strict=True))
        if len(names) < 2 or len(set(names)) < len(names) or len(set(self.labels.values())) < len(names):
            raise ValueError(f"executors {names} with labels {list(self.labels.values())}: two or more, all different")
        self.executors = {executor.name: executor for executor in executors}
        self.make = make
        self.describe = describe
        self.budget = Budget(None) if budget is None else budget
        self.deadline = deadline
        self.ledger = ledger
        self._spent = 0.0
        self._episodes: list[dict[str, float]] = []
        self._outcomes: dict[str, tuple[int, int]] = {}

    def episode(self, row: Row, seed: str) -> BudgetEpisode:
        """A fresh episode; the same row and seed give the same world and the same dice of scripted executors.

        Raises:
            ValueError: a budget that cannot pay for one call, or not for what `force_small` promises.
        """
        session = Session(self.make(row), seed)
        session.start()
        return BudgetEpisode(self, session, self._gate(row.get(CAP, self.budget.cap)), row.get(TASK))

    def starts(self, row: Row, caps: Sequence[float | None]) -> list[Situation]:
        """The situation before the first decision at each of these caps; the world is made once.

        Raises:
            ValueError: as `episode`.
        """
        session = Session(self.make(row), "start")
        session.start()
        return [BudgetEpisode(self, session, self._gate(cap)).situation for cap in caps]

    def _gate(self, cap: float | None) -> BudgetGate:
        return BudgetGate(replace(self.budget, cap=cap))

    def ended(self, episode: BudgetEpisode, cost: float, solved: bool | None) -> None:
        """Book an episode; it calls this once. A lost one is solved: None, which says nothing of its task."""
        self._spent += cost
        if solved is not None and episode.task is not None:
            played, won = self._outcomes.get(episode.task, (0, 0))
            self._outcomes[episode.task] = played + 1, won + solved
        large = len(episode.calls) - episode.calls.count(next(iter(self.executors)))
        numbers = {
            "budget/large_calls": float(large),
            "budget/large_share": large / max(len(episode.calls), 1),
            "budget/steps": float(len(episode.calls)),
            "budget/violations": float(episode.gate.violated),
        }
        if episode.gate.used is not None:
            numbers["budget/used"] = episode.gate.used
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


class BudgetEpisode:
    """One episode, from a session that was started; an `Episode` of `srpo.types`."""

    def __init__(self, parent: BudgetEnvironment, session: Session, gate: BudgetGate, task: str | None = None) -> None:
        environment = session.environment
        self.task = task
        self._parent = parent
        self._environment = environment
        self._session = session
        self._calls: list[str] = []
        self._cost = 0.0
        self.errors: list[str] = []
        """Of failed calls, as the pool words them."""
        self.gate = gate
        gate.check_start(self._bounds(), environment.limit)
        if not self.affordable():
            raise ValueError(
                f"{environment.seed}: a budget of {gate.budget.cap:g} {gate.budget.unit} cannot pay for one call of "
                f"{next(iter(parent.executors))}, at most {min(self._bounds().values()):g}; raise the cap"
            )

    @property
    def calls(self) -> tuple[str, ...]:
        """Names of the executors of all steps so far."""
        return tuple(self._calls)

    @property
    def situation(self) -> Situation:
        return Situation(self._session.view, self._steps_left, self.gate, self.calls)

    def affordable(self) -> list[str]:
        """Names of the executors that can be chosen now."""
        return self.gate.allowed(self._bounds(), self._steps_left)

    def choices(self) -> list[str]:
        return [self._parent.labels[name] for name in self.affordable()]

    async def step(self, text: str) -> Observation:
        """Let the executor with this label act. A failed call costs a step and its money, and the episode goes on.

        Raises:
            OutOfMoney: the run cannot pay; a call that was not made says nothing about the executor.
        """
        name = next(name for name, label in self._parent.labels.items() if label == text)
        executor, view, bounds = self._parent.executors[name], self._session.view, self._bounds()
        try:
            act = await self.gate.call(
                name, bounds, lambda: executor.act(view, self._parent.deadline), lambda act: act.cost
            )
        except OverBudget:  # an account that is shared: another episode was faster
            return Observation(end="budget")
        except BaseException:  # the episode is lost, its money is not: the call may be billed
            self._cost += bounds[name]
            raise
        self._calls.append(name)
        self._cost += act.cost
        if act.reply.error is not None:
            self.errors.append(act.reply.error)
            if self._parent.out_of_money():
                raise OutOfMoney(act.reply.error)
        return await self._session.advance(lambda: self._after(act.action))

    def _after(self, action: str) -> Observation:
        """What the policy is told of this action; reads all of the world that is looked at before the next one."""
        _, done = self._session.take(action)
        if done:
            late = not self._environment.won and self._steps_left <= 0
            return Observation(end="turns" if late else "done")
        if not self.affordable():
            return Observation(end="budget")
        return self._parent.describe(self.situation)

    def columns(self, stop: Stop) -> Mapping[str, Any]:
        """Success, cost in USD, calls; `feedback` says in words what was not reached."""
        success = None if stop == "lost" else float(self._environment.score)
        self._parent.ended(self, self._cost, None if success is None else success >= 1)
        cheapest = next(iter(self._parent.executors))
        return {
            CORRECT: success,
            COST: self._cost,
            FEEDBACK: "" if self._environment.won else self._missed(stop),
            "calls": len(self._calls),
            "members": list(self._calls),
            "large_calls": len(self._calls) - self._calls.count(cheapest),
            "budget_used": self.gate.used,
            "budget_violated": self.gate.violated,
        }

    def _missed(self, stop: Stop) -> str:
        why = {"budget": "the budget was spent", "turns": f"all {self._environment.limit} steps were used"}
        return f"The task was not finished: {why.get(stop, 'the episode ended')}."

    @property
    def _steps_left(self) -> int:
        return self._environment.limit - self._environment.steps

    def _bounds(self) -> dict[str, float]:
        view = self._session.view
        return {name: executor.bound(view) for name, executor in self._parent.executors.items()}


@dataclass(frozen=True)
class Driven:
    """An episode that a routing rule played instead of a policy."""

    first: Observation
    """What the policy would have been told before its first decision."""
    decisions: tuple[tuple[str, Observation], ...]
    """(name of the executor, what the policy would have been told after its step); the last observation ends it."""
    columns: Mapping[str, Any]
    stop: Stop


def drive(environment: BudgetEnvironment, row: Row, seed: str, choose: Choose) -> Driven:
    """Play one episode by a rule. Exceptions of the environment or an executor pass through."""

    async def play() -> Driven:
        return await drive_episode(environment, environment.episode(row, seed), choose)

    return asyncio.run(play())


async def drive_episode(
    environment: BudgetEnvironment, episode: BudgetEpisode, choose: Choose, seconds: float | None = None
) -> Driven:
    """Play a fresh episode of the environment by a rule. Exceptions of its world or an executor pass through.

    Raises:
        TimeoutError: a step took more than `seconds`.
    """
    first = environment.describe(episode.situation)
    decisions: list[tuple[str, Observation]] = []
    while not decisions or decisions[-1][1].end is None:
        name = choose(episode.situation, episode.affordable())
        async with asyncio.timeout(seconds):
            decisions.append((name, await episode.step(environment.labels[name])))
    stop = decisions[-1][1].end or "done"
    return Driven(first, tuple(decisions), episode.columns(stop), stop)
