"""The executors that a recipe names: scripted ones, and members of a catalogue behind their endpoints."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from routers.data.catalogue import load_catalogue
from routers.environments.protocol import Executor
from routers.environments.react import ReActExecutor
from routers.environments.scripted import SCRIPTED
from routers.pool import Pool, ReplyCache, live_pool

if TYPE_CHECKING:
    from routers.tasks.step_routing.world import BudgetTask


@functools.cache
def live_executors(catalogue: str, names: tuple[str, ...], reply_cache: str | None) -> Pool:
    """The one pool of this process behind these executors: limits, circuit breakers and money are shared.

    Raises:
        ValueError: a member is missing, or not usable.
    """
    members = load_catalogue(catalogue)
    if unknown := [name for name in names if name not in members]:
        raise ValueError(f"executors: {unknown[0]!r} is not in {catalogue}")
    cache = None if reply_cache is None else ReplyCache(reply_cache)
    return live_pool({name: members[name] for name in names}, cache=cache, agent_prompt="{query}")


def make_pool(task: BudgetTask) -> Pool | None:
    """The pool of the recipe's live executors; None where all are scripted."""
    return live_executors(str(task.catalogue), tuple(task.live), task.reply_cache) if task.live else None


def make_executors(task: BudgetTask) -> list[Executor]:
    """The recipe's executors, cheapest first."""
    pool = make_pool(task)
    return [
        SCRIPTED[name](usd) if pool is None or name in SCRIPTED else ReActExecutor(pool, name)
        for name, usd in zip(task.executors, task.executor_usd, strict=True)
    ]
