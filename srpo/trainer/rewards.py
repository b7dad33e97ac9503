"""From completions to rewards: what reward functions are given and what they return is checked and counted.

completions -> world or episodes -> rows with columns -> TRL's reward functions -> lost ones out -> [B, functions]
                                                              -> advantages, where the objective has credit of its own

A bad reward names its function and row, and may not turn into a training signal: what is no number stops the run, a
NaN or an infinity its step (`srpo.trainer.bad_numbers`).
"""

import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import Module
from transformers.utils import logging

from srpo.columns import LOST_ROW, as_list, checked_columns
from srpo.losses import note
from srpo.objectives import Objective
from srpo.objectives.advantages import REFERENCES, importance_weighted, references_of
from srpo.rollout.loop import as_columns
from srpo.run.apart import Lost
from srpo.run.watch import part
from srpo.trainer.bad_numbers import BadSteps
from srpo.trainer.generation_step import GenerationStep
from srpo.trainer.late import one_by_one, one_by_one_async
from srpo.trainer.limits import without_trl_warning
from srpo.trainer.metrics import TRUNCATED, CompletionsTable, Losses, as_the_policy_drew, gathered_metrics
from srpo.types import COST, FEEDBACK, LOST, Columns, World

logger = logging.get_logger(__name__)


class Scoring:
    """Of one trainer.

    Args:
        world: in place of an environment; None: there is none.
        add_metrics: (in training, numbers by name), to be logged.
        episodes: there is an environment, which counts its lost rollouts itself.
        late: reward functions have a deadline.
    """

    def __init__(
        self,
        world: World | None,
        losses: Losses,
        bad_steps: BadSteps,
        table: CompletionsTable,
        accelerator: Accelerator,
        add_metrics: Callable[[bool, Mapping[str, float]], None],
        episodes: bool,
        late: bool,
    ) -> None:
        self.world, self.episodes, self.late = world, episodes, late
        self.losses, self.bad_steps, self.table = losses, bad_steps, table
        self.accelerator, self._add_metrics = accelerator, add_metrics

    def rows(
        self, step: GenerationStep, rows: Sequence[Any], completions: Sequence[Any], taken: Collection[str]
    ) -> list[dict[str, Any]]:
        """Those of a step as reward functions see them; `step` gets the columns.

        Args:
            completions: texts, or messages.
            taken: names that no column may have.
        """
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        step.opened = step.opened or [""] * len(texts)
        step.rows = rows
        with part("world"):
            step.columns, repaired = columns_of(step, texts, self.world, taken)
        if repaired := gather_object(repaired):
            self._add_metrics(step.training, {"records/repaired": len(repaired)})
            self.table.say(f"texts of the world are no valid Unicode, and were repaired: {repaired[0]}", step.number)
        whole = rows_with_columns(rows, step.columns, self._may_lose)
        step.references = [row.get(REFERENCES) for row in whole]
        return whole

    @property
    def _may_lose(self) -> bool:
        return self.world is not None or self.episodes

    def quiet(self, rows: Sequence[Mapping[str, Any]]) -> AbstractContextManager[None]:
        """Around TRL's scoring of `rows`."""
        lost = any(row.get(LOST_ROW) is not None for row in rows)
        return without_trl_warning() if lost or self.late else nullcontext()

    def settled(
        self, step: GenerationStep, scored: Tensor, functions: Sequence[Any], weights: Tensor, ends: Collection[int]
    ) -> Tensor:
        """[all B, functions] of all processes as advantages may read them: NaN where a function does not apply, where
        a rollout is lost, and where the number was none. `step` gets its own summed rewards, and what was cut short.

        Args:
            scored: what TRL has gathered, [all B, functions].
            weights: of the functions.
            ends: ids that end a completion by themselves.
        """
        count = len(step.rows)
        scored = of_models(scored, functions)
        if self._may_lose or self.late:
            gone, counted = lost_rows(step, self.losses, self.episodes, self.table.args.output_dir)
            self._add_metrics(step.training, counted)
            # A lost rollout has no reward, whatever a reward model says of it.
            scored = scored.masked_fill(torch.tensor(gone, device=scored.device).unsqueeze(1), torch.nan)
        step.truncated = cut_short(step, ends)
        start = self.accelerator.process_index * count
        mine = slice(start, start + count)
        scored, step.bad_rewards = self.bad_steps.rewards(scored, mine)
        step.rewards = summed(scored[mine], weights)
        self._add_metrics(step.training, gathered_metrics(step.columns, count, step.importance))
        return scored


def lost_rows(step: GenerationStep, losses: Losses, counted: bool, output: str) -> tuple[list[bool], dict[str, float]]:
    """Which completions of all ranks are lost, to their world or to a reward function; and how many, to be logged.

    The column `LOST` of the step says why, and `OUTPUT/losses.jsonl`. All processes call this.

    Args:
        counted: those lost to an environment have been, and are noted.
    """
    none: list[Any] = [None] * len(step.rows)
    tokens, paid = [len(ids) for ids in step.completion_ids], step.columns.get(COST) or none
    columns = (step.columns.get(LOST) or none, step.late or none, tokens, paid)
    mine = list(zip(*columns, strict=True))
    if step.late:
        step.columns[LOST] = [cause or late for cause, late, *_ in mine]
    found = gather_object(mine)
    everyone = [cause or late for cause, late, *_ in found]
    lost = [cause is not None for cause in everyone]
    if not step.training or (counted and not any(late for _, late, *_ in found)):
        return lost, {}
    if (summary := losses.observe(everyone, again=counted)) is not None:
        logger.warning("%s", summary)
        new = [(cause or late, *rest) for cause, late, *rest in found if not (counted and cause)]
        gone = [(why, length, usd or 0.0) for why, length, usd in new if why is not None]
        if gone and PartialState().is_main_process:
            amounts = {"tokens": sum(length for _, length, _ in gone), "usd": sum(usd for *_, usd in gone)}
            note(output, step.number, "rollouts", Counter(why for why, *_ in gone), len(found), **amounts)
    return lost, {"rollout/lost_share": sum(lost) / len(lost)}


def columns_of(
    step: GenerationStep, texts: Sequence[str], world: World | None, taken: Collection[str]
) -> tuple[Columns, list[str]]:
    """What the episodes of a step, or the world, say of its completions, and which texts had to be repaired.

    Args:
        texts: of the completions.
        taken: names of the completions table.
    """
    if step.trajectories is not None:
        columns = as_columns(step.trajectories)
    else:
        texts = [opened + text for opened, text in zip(step.opened, texts, strict=True)]
        columns = {} if world is None else world(step.rows, texts)
    return checked_columns(columns, step.rows, taken)


def cut_short(step: GenerationStep, ends: Collection[int]) -> list[bool]:
    """Which completions a limit ended; `ends` are the ids that end one by itself."""
    if step.trajectories is not None:
        return [t.stop in TRUNCATED for t in step.trajectories]
    return [not len(ids) or int(ids[-1]) not in ends for ids in step.completion_ids]


def summed(rewards: Tensor, weights: Tensor) -> Tensor:
    """[B, functions] -> [B], with their weights; NaN where no function has scored."""
    total = (rewards * weights.to(rewards.device)).nansum(dim=1)
    return total.masked_fill(torch.isnan(rewards).all(dim=1), torch.nan)


def of_models(values: Tensor, functions: Sequence[Any]) -> Tensor:
    """[B, functions] with a NaN of a reward model, which always scores, as the infinity that `BadSteps` looks for; of
    a function it means None."""
    models = torch.tensor([isinstance(function, Module) for function in functions], device=values.device)
    return values.masked_fill(torch.isnan(values) & models, torch.inf)


Correctness = Callable[[Tensor, Columns], Tensor]
"""(rewards [B] summed with their weights, columns) -> correct [B] bool."""


def correct(step: GenerationStep, args: Any, rule: Correctness | None) -> Tensor:
    """[B] bool: completions that count as correct, by `rule` or by their reward; never those that were cut short."""
    rewards = step.rewards
    found = (
        rewards >= args.success_reward_threshold if rule is None else rule(rewards, step.columns).to(rewards.device)
    )
    return found & ~torch.isnan(rewards) & ~torch.tensor(step.truncated, device=rewards.device)


def credited(
    objective: Objective, step: GenerationStep, success: Tensor, args: Any, accelerator: Accelerator, logged: Any
) -> Tensor:
    """Advantages [B] of this rank's completions, in place of TRL's, where the objective has its own.

    Args:
        success: [B] bool, of this rank.
        logged: TRL's records of all ranks, (metrics by name, columns of the table): what they hold of this batch's
            advantages and rewards is replaced by what these are.
    """
    metrics, table = logged
    rewards = accelerator.gather(step.rewards)  # a group may straddle ranks
    if step.importance is not None:
        importance = accelerator.gather(step.importance)
        advantages = importance_weighted(rewards, importance, args.num_generations)
        as_the_policy_drew(metrics, table, rewards, importance)
    else:
        assert objective.credit is not None
        references = None
        if (found := references_of(step.references, args)) is not None:
            references = accelerator.gather(torch.tensor(found, dtype=torch.float32, device=rewards.device))
        advantages = objective.credit(rewards, references, accelerator.gather(success), args)
    everyone = advantages.tolist()
    for _ in everyone:
        table["advantages"].pop()
    table["advantages"].extend(everyone)
    metrics[f"{args.objective}/below_baseline"].append(sum(a < 0 for a in everyone) / len(everyone))
    start = accelerator.process_index * len(step.rewards)
    return advantages[start : start + len(step.rewards)]


def extra_columns(said: dict[str, Any], step: GenerationStep, shown: Collection[str], rows: int) -> None:
    """Add the world's columns, and the weights of completions that were not drawn, to those that reward functions have
    `said` for the completions table.

    Args:
        shown: names that the table has; without a value here they would show an earlier batch's.
        rows: of the batch.
    """
    if FEEDBACK in said:  # a reward function may give it too, through TRL's `log_extra`; it wins over the world's
        step.columns[FEEDBACK] = list(said[FEEDBACK])
    said |= {name: list(values) for name, values in step.columns.items()}
    if step.importance is not None:
        said["importance_weight"] = step.importance.tolist()
    said |= {name: [None] * rows for name in {*shown} - {*said, "branch"}}


def rows_with_columns(rows: Sequence[Mapping[str, Any]], columns: Columns, has_world: bool) -> list[dict[str, Any]]:
    """Dataset rows as the rewards see them: with the world's columns, which may repeat the dataset's values.

    Args:
        has_world: the rows also say whether they are lost, and why (`srpo.columns.LOST_ROW`).
    """
    whole = []
    for i, row in enumerate(rows):
        found = {name: values[i] for name, values in columns.items()}
        seen = {**row, **{name: value for name, value in found.items() if value is not None or name not in row}}
        whole.append({**seen, LOST_ROW: found.get(LOST) or None} if has_world else seen)
    return whole


def checked_rewards(
    functions: Any,
    not_finite: Callable[[str], object] | None = None,
    seconds: float | None = None,
    lose: Callable[[Sequence[str | None]], object] | None = None,
) -> Any:
    """What TRL takes as `reward_funcs`, with every function checked (`checked_reward`) and named apart."""
    if callable(functions) and not isinstance(functions, Module):
        functions = [functions]
    if not isinstance(functions, list):
        return functions
    return distinct(
        [f if isinstance(f, (str, Module)) else checked_reward(f, not_finite, seconds, lose) for f in functions]
    )


def checked_reward(
    func: Callable[..., Any],
    not_finite: Callable[[str], object] | None = None,
    seconds: float | None = None,
    lose: Callable[[Sequence[str | None]], object] | None = None,
) -> Callable[..., Any]:
    """A TRL reward function whose values are checked: a list with one finite number, or None, per completion.

    None means that the reward does not apply to that row, as in TRL. The function never sees lost rows (whose
    `srpo.columns.LOST_ROW` says why): their reward is None. Synchronous and asynchronous functions are both wrapped,
    and keep their name (TRL logs rewards under it).

    Args:
        not_finite: told of a NaN or an infinity, which then goes on as inf; without it that is an error too.
        seconds: that one completion may take (`srpo.trainer.late`); None: as long as it takes, all in one call.
        lose: told, per completion, why it is lost to a function that took longer, or None.

    Raises:
        ValueError: when called; names function, row, `query_id` where there is one, and the value. At once: a function
            that cannot be given `seconds`.
    """
    inner = func.func if isinstance(func, functools.partial) else func
    name = getattr(inner, "__name__", type(inner).__name__)

    def checked_values(rows: _Survivors, values: Any) -> list[float | None]:
        if lose is not None and seconds is not None:
            lose(rows.spread([value.cause if isinstance(value, Lost) else None for value in values]))
            values = [None if isinstance(value, Lost) else value for value in values]
        return rows.spread(_checked_values(name, values, rows.args, rows.kwargs, not_finite))

    if _is_async(func):
        asked = func if seconds is None else one_by_one_async(func, name, seconds)

        async def checked_async(*args: Any, **kwargs: Any) -> list[float | None]:
            rows = _Survivors(args, kwargs)
            return checked_values(rows, await asked(*rows.args, **rows.kwargs) if rows.any else [])

        return _named_like(checked_async, func, name)
    asked = func if seconds is None else one_by_one(func, name, seconds)

    def checked(*args: Any, **kwargs: Any) -> list[float | None]:
        rows = _Survivors(args, kwargs)
        return checked_values(rows, asked(*rows.args, **rows.kwargs) if rows.any else [])

    return _named_like(checked, func, name)


def distinct(funcs: list[Any]) -> list[Any]:
    """Reward functions of which no two log under one name: the second `<lambda>` becomes `<lambda>_2`.

    Those made by `checked_reward` are renamed; reward models and paths stay as they are.
    """
    seen: Counter[str] = Counter()
    for func in funcs:
        if name := getattr(func, "__name__", None):
            seen[name] += 1
            if seen[name] > 1:
                func.__name__ = f"{name}_{seen[name]}"
                logger.warning("Two reward functions are named %r; one of them is logged as %r", name, func.__name__)
    return funcs


class _Survivors:
    """The arguments of a reward function without the lost rows, and its values with them."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]):
        kwargs = dict(kwargs)
        lost = kwargs.pop(LOST_ROW, None)
        self._all = len(lost) if isinstance(lost, list) else None
        self._kept = [i for i, cause in enumerate(lost or ()) if cause is None]
        if self._all is None or len(self._kept) == self._all:
            self._all, self.args, self.kwargs, self.any = None, tuple(args), kwargs, True
            return
        self.any = bool(self._kept)
        self.args = tuple(self._part(value) for value in args)
        self.kwargs = {name: self._part(value) for name, value in kwargs.items()}
        if (log := kwargs.get("log_extra")) is not None:
            self.kwargs["log_extra"] = lambda column, values: log(column, self.spread(as_list(values)))

    def _part(self, value: Any) -> Any:
        return [value[i] for i in self._kept] if isinstance(value, list) and len(value) == self._all else value

    def spread(self, values: Sequence[Any]) -> list[Any]:
        if self._all is None or len(values) != len(self._kept):
            return list(values)
        rows: list[Any] = [None] * self._all
        for i, value in zip(self._kept, values, strict=True):
            rows[i] = value
        return rows


def _named_like(wrapper: Callable[..., Any], func: Callable[..., Any], name: str) -> Callable[..., Any]:
    functools.update_wrapper(wrapper, func)
    wrapper.__name__ = name  # callable objects and partials have none of their own
    return wrapper


def _is_async(func: Any) -> bool:
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(func.__call__)  # an object's own method


def _checked_values(
    name: str,
    values: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    not_finite: Callable[[str], object] | None,
) -> list[float | None]:
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ValueError(f"reward function {name!r} returned a {type(values).__name__}, not a list of values")
    completions = kwargs.get("completions", args[1] if len(args) > 1 else args[0] if args else None)
    if completions is not None and len(values) != len(completions):
        raise ValueError(f"reward function {name!r} returned {len(values)} values for {len(completions)} completions")
    ids = kwargs.get("query_id")
    return [_checked_value(name, row, value, ids, not_finite) for row, value in enumerate(values)]


def _checked_value(
    name: str, row: int, value: Any, query_ids: Sequence[Any] | None, not_finite: Callable[[str], object] | None
) -> float | None:
    if value is None:
        return None
    problem, is_number = None, not isinstance(value, str) and hasattr(value, "__float__")
    if not is_number:
        problem = f"{value!r} of type {type(value).__name__}, not a number"
    elif not math.isfinite(value):
        problem = f"{float(value)}; return None where the reward does not apply"
    if problem is not None:
        where = f"row {row}" if query_ids is None else f"row {row} (query_id {query_ids[row]!r})"
        if is_number and not_finite is not None:
            not_finite(f"reward function {name!r} returned for {where} {problem}")
            return math.inf
        raise ValueError(f"reward function {name!r} returned for {where} {problem}")
    return float(value)
