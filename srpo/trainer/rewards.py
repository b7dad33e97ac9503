"""What reward functions are given, and what they return: the world's columns in, one finite number or None out.

A bad reward names its function and row, and may not turn into a training signal: what is no number stops the run, a
NaN or an infinity its step (`srpo.trainer.bad_numbers`).
"""

import functools
import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from srpo.columns import LOST_ROW, as_list, checked_columns
from srpo.rollout.loop import as_columns
from srpo.run.apart import Lost
from srpo.trainer.generation_step import GenerationStep
from srpo.trainer.late import one_by_one, one_by_one_async
from srpo.trainer.metrics import TRUNCATED
from srpo.types import FEEDBACK, LOST, Columns, World

logger = logging.getLogger(__name__)


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
