"""What live executors cost, phase by phase: an estimate before the first call, one cap over all of them, a report."""

from __future__ import annotations

import atexit
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback

from routers.environments.messages.members import LiveMember
from routers.environments.protocol import Executor, Session, Step, View
from routers.environments.react import ReActExecutor
from routers.pool import Ledger, Pool, Spending
from routers.tasks.step_routing.environment import StepRoutingEnvironment
from routers.tasks.step_routing.player import PhaseStopped
from routers.tasks.step_routing.rules import rules_of
from routers.tasks.step_routing.world import StepWorld
from srpo.task import START

if TYPE_CHECKING:
    from srpo.config import SRPOConfig

_SAVED_EVERY = 5.0
_SAMPLED_TASKS = 3


class Money:
    """The money of a run in this process, earlier starts of the same run included.

    Where all executors are scripted it does nothing: their prices are play money.

    Args:
        pool: whose ledger keeps the books; None: all are scripted.
        cap: `max_cost_usd`, of the run over all processes.
        path: the books on disk (JSON), written every few seconds of a phase.
    """

    def __init__(self, pool: Pool | None, cap: float | None, path: Path) -> None:
        self._ledger = None if pool is None else pool.ledger
        self._cap, self._path, self._others = cap, path, 0.0
        if self._ledger is not None:
            self._ledger.exhausted = False
            books = json.loads(path.read_text()) if path.exists() else Ledger().state_dict()
            self._ledger.load_state_dict(books)
            self.take_back()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Report what is spent inside, also where it ends with an exception."""
        end = self.begin(name)
        try:
            yield
        finally:
            end()

    def begin(self, name: str) -> Callable[[], None]:
        """A phase that has no block of its own; ends with what this returns, at the latest with the process."""
        ledger = self._ledger
        if ledger is None:
            return lambda: None
        before, ended = ledger.members(), threading.Event()
        saver = threading.Thread(target=self._save_until, args=(ended,), daemon=True)
        saver.start()

        def end() -> None:
            if ended.is_set():
                return
            atexit.unregister(end)
            ended.set()
            saver.join()
            used, state = spent_between(before, ledger.members()), PartialState()
            if used or state.is_main_process:
                who = f"process {state.process_index}: " if state.num_processes > 1 else ""
                print(who + report(name, used, ledger.spent_usd + self._others, self._cap), flush=True)

        atexit.register(end)
        return end

    def share(self) -> None:
        """Give every process the same part of what is left; all of them call this."""
        if self._ledger is not None and self._cap is not None:
            left = max(0.0, self._cap - self._ledger.spent_usd - self._others)
            self._ledger.account.cap = self._ledger.spent_usd + left / PartialState().num_processes

    def take_back(self) -> None:
        """Where one process works for all: it may spend what all together have left. All of them call this."""
        if self._ledger is not None:
            self._others = sum(gather_object([self._ledger.spent_usd])) - self._ledger.spent_usd
            self._ledger.account.cap = None if self._cap is None else max(0.0, self._cap - self._others)

    def check(self, kept: str) -> None:
        """Stop here where nothing is left.

        Raises:
            PhaseStopped: says what is kept.
        """
        ledger = self._ledger
        if ledger is not None and (ledger.exhausted or ledger.account.available <= 0):
            raise PhaseStopped(f"max_cost_usd is reached: ${ledger.spent_usd + self._others:.4f} are spent. {kept}")

    def total(self) -> str | None:
        """What the run has spent, by the books of all processes on disk, after their last phase; None: play money."""
        if self._ledger is None:
            return None
        books = [json.loads(path.read_text()) for path in sorted(self._path.parent.glob("spending_*.json"))]
        spent = sum(book["spent"] + book["overrun"] for book in books)
        return f"In all, the run has spent ${spent:.4f}{'' if self._cap is None else f' of ${self._cap:g}'}"

    def _save_until(self, ended: threading.Event) -> None:
        while True:
            last = ended.wait(_SAVED_EVERY)
            draft = self._path.with_suffix(".draft")
            draft.write_text(json.dumps(self._ledger.state_dict()))  # type: ignore[union-attr]
            draft.replace(self._path)
            if last:
                return


class TrainingMoney(TrainerCallback):
    """The phase of training: every process spends its part, and once one of them could not pay for a call the training
    ends, with a checkpoint."""

    def __init__(self, money: Money, environment: StepRoutingEnvironment) -> None:
        self._money, self._environment = money, environment

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._money.share()
        self._end = self._money.begin("training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any(gather_object([self._environment.out_of_money()])):
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()


def spent_between(before: Mapping[str, Spending], after: Mapping[str, Spending]) -> dict[str, Spending]:
    """What each member was asked for between two states of a ledger; members that nobody asked are left out."""
    used = {}
    for name, total in after.items():
        was = asdict(before.get(name, Spending()))
        used[name] = Spending(**{field: value - was[field] for field, value in asdict(total).items()})
    return {name: spending for name, spending in used.items() if spending.calls or spending.cached}


def report(phase: str, used: Mapping[str, Spending], spent: float, cap: float | None) -> str:
    """One line: calls, failures and USD of a phase by member, and what the run has spent."""
    parts = []
    for name, spending in used.items():
        odd = ("failed", "estimated", "bounded", "unmetered")
        notes = ", ".join(f"{getattr(spending, n):,} {n}" for n in odd if getattr(spending, n))
        calls = f"{spending.calls:,} calls" + (f" ({notes})" if notes else "")
        cached = f", {spending.cached:,} from the cache" if spending.cached else ""
        if spending.cached_tokens or spending.cache_write_tokens:
            share = spending.cached_tokens / max(spending.prompt_tokens, 1)
            cached += f", {share:.0%} of its prompts in the provider's cache, ${spending.saved:.4f} saved"
        parts.append(f"{name} {calls}{cached}, ${spending.cost:.4f}")
    of = "" if cap is None else f" of ${cap:g}"
    return f"{phase}: {'; '.join(parts) or 'no calls'}. The run has spent ${spent:.4f}{of}"


@dataclass(frozen=True)
class Phase:
    """Calls at most: by the cheapest executor alone, by the most expensive alone, and by whichever is chosen."""

    name: str
    cheapest: int
    dearest: int
    any: int

    @property
    def most(self) -> int:
        return self.cheapest + self.dearest + self.any


def phases(world: StepWorld, args: SRPOConfig, runs_per_row: int, processes: int) -> list[Phase]:
    """The phases of a run, as if nothing had been played before.

    Args:
        runs_per_row: episodes for the demonstrations of a Hard row; the other classes need fewer.
        processes: of the training.
    """
    task, trained = world.arguments, len(world.train_tasks())
    heldout, validation = sum(len(types) for types in world.heldout().values()), len(world.validation())
    rows, steps = trained * len(task.train_caps), task.step_limit
    own = trained + (0 if validation else len(world.choosing()))
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes / args.num_iterations
    rollouts = args.max_steps * batch if args.max_steps > 0 else args.num_train_epochs * rows * args.num_generations
    profiled, evaluated = task.profile_runs * steps, len(task.heldout_caps) * heldout * steps
    rules, repetitions = rules_of(task)
    boundary, choice = validation * profiled, len(rules) * validation * steps
    return [
        Phase("profiling", own * profiled, own * profiled, 0),
        Phase("profiling of held-out tasks", heldout * profiled, heldout * profiled, 0),
        *([Phase("rules on validation tasks", boundary, boundary, choice)] if validation else []),
        Phase("demonstrations", 0, 0, rows * runs_per_row * steps),
        Phase(f"evaluation of {START}", 0, 0, evaluated),
        Phase("training", 0, 0, math.ceil(rollouts) * steps),
        Phase(f"evaluation of {args.objective}", 0, 0, evaluated),
        Phase("rules", 0, 0, len(rules) * repetitions * heldout * steps),
    ]


def estimate(world: StepWorld, found: Sequence[Phase], cap: float | None) -> str:
    """A table of calls and USD at most, before anything is paid.

    Two sums: as if every prompt were as short as the first of an episode, and as if every step added an observation as
    long as the first. Both are upper bounds of such prompts: a byte counts as a token, and every reply is the longest.
    """
    from routers.evaluation.tables import aligned

    executors = world.executors()
    names = executors[0].name, executors[-1].name
    rows: list[tuple[str, ...]] = [("calls at most", *names, "either", "USD, short prompts", "USD, long prompts")]
    usd = worst_usd(world, found)
    for phase, (low, high) in zip(found, usd, strict=True):
        calls = (phase.cheapest, phase.dearest, phase.any)
        rows.append((phase.name, *(f"{n:,}" for n in calls), _usd(low), _usd(high)))
    rows.append(("all", "", "", "", *(_usd(sum(column)) for column in zip(*usd, strict=True))))
    end = "nothing stops the run before that: set max_cost_usd" if cap is None else f"max_cost_usd stops at ${cap:g}"
    note = "A byte counts as a token here, and every reply is as long as it may be: expect a fraction"
    return "\n".join([aligned(rows, True), f"{note}; {end}."])


def worst_usd(world: StepWorld, found: Sequence[Phase]) -> list[list[float]]:
    """The two sums of `estimate` for each phase, in USD."""
    views = [_first_view(world, name) for name in list(world.train_tasks())[:_SAMPLED_TASKS]]

    def most(executor: Executor) -> list[float]:
        bounds = [call_usd(executor, view, world.arguments.step_limit) for view in views]
        return [max(values) for values in zip(*bounds, strict=True)]

    executors = world.executors()
    ends = list(zip(most(executors[0]), most(executors[-1]), strict=True))
    return [[p.cheapest * a + (p.dearest + p.any) * max(a, b) for a, b in ends] for p in found]


def _usd(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.4f}"


def call_usd(executor: Executor, view: View, limit: int) -> tuple[float, float]:
    """Bounds in USD of a call at the first step, and of the mean call of an episode whose observations are all as long
    as the first. Scripted executors cost nothing that is real."""
    if isinstance(executor, LiveMember):
        longer = [executor.bound(view, 1.0 + n) for n in range(limit)]
        return longer[0], sum(longer) / limit
    if not isinstance(executor, ReActExecutor):
        return 0.0, 0.0
    step = Step("", view.first[: executor.characters])
    bounds = [executor.bound(replace(view, steps=(step,) * n)) for n in range(limit)]
    return bounds[0], sum(bounds) / limit


def _first_view(world: StepWorld, name: str) -> View:
    session = Session(world.make(name), "estimate")
    session.start()
    return session.view
