"""The rules that a router is compared with, on held-out tasks."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from routers.tasks.step_routing.environment import TASK, Choose, Driven
from routers.tasks.step_routing.jobs import Job, play_jobs
from routers.tasks.step_routing.player import Player
from routers.tasks.step_routing.rules import always_large, always_small, cascade, first_large, random_mix
from routers.tasks.step_routing.world import BudgetTask
from srpo.types import CORRECT, COST

Families = Mapping[str, Mapping[str, Choose]]
"""Family -> setting -> rule. Each family spans from always-small to always-large."""

SHARES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.6)
SCRIPTED_FAMILIES: Families = {
    "random mixing": {"0": always_small, **{f"{p:g}": random_mix(p) for p in SHARES}, "1": always_large},
    "first-large": {"0": always_small, **{str(k): first_large(k) for k in range(1, 7)}, "all": always_large},
    "cascade": {"never": always_small, **{str(k): cascade(k) for k in range(2, 20, 2)}, "at once": always_large},
}
SCRIPTED_REPETITIONS = 3
SLOW = ("scienceworld", "textworld")
"""Environments whose steps take hundredths of a second, with scripted executors too."""


def families(task: BudgetTask) -> tuple[Families, int]:
    """The rules to play, and how often each.

    Where calls cost money or steps take time each once, and fewer: two shares, First-Large at the caps of the
    evaluation, two cascades.
    """
    if not task.live and task.environment not in SLOW:
        return SCRIPTED_FAMILIES, SCRIPTED_REPETITIONS
    counted = task.eval_caps if task.budget_unit == "large_calls" else []
    caps = [int(cap) for cap in counted if math.isfinite(cap) and cap >= 1]
    first, late = caps or [max(1, task.step_limit // 4)], {max(1, task.step_limit * k // 3) for k in (1, 2)}
    return {
        "random mixing": {"0": always_small, **{f"{p:g}": random_mix(p) for p in (0.1, 0.3)}, "1": always_large},
        "first-large": {"0": always_small, **{str(k): first_large(k) for k in first}, "all": always_large},
        "cascade": {"never": always_small, **{str(k): cascade(k) for k in sorted(late)}, "at once": always_large},
    }, 1


def rules_played(task: BudgetTask) -> list[Choose]:
    """Every rule once per repetition."""
    made, repetitions = families(task)
    return list({choose: None for settings in made.values() for choose in settings.values()}) * repetitions


def play_rules(task: BudgetTask, types: Mapping[str, str], play: Player, partial: Path) -> pd.DataFrame:
    """Every setting of every family on every task (id -> type): one row per episode.

    Args:
        partial: where finished episodes are kept until the caller has put them into their place.
    """
    made, repetitions = families(task)
    names = {(family, setting): choose for family, settings in made.items() for setting, choose in settings.items()}
    first = {choose: " ".join(name) for name, choose in reversed(names.items())}  # the boundaries belong to all three
    keys = [(choose, k, name) for choose in first for k in range(repetitions) for name in types]
    jobs = [
        Job(f"{first[choose]}/{k}/{name}", {TASK: name}, f"evaluation/{k}/{name}", choose) for choose, k, name in keys
    ]
    played = dict(zip(keys, play_jobs(jobs, partial, play, _columns), strict=True))
    return pd.DataFrame(
        [
            {"method": f"{family} {setting}", "repetition": k, **episode_row(name, kind, played[choose, k, name])}
            for (family, setting), choose in names.items()
            for k in range(repetitions)
            for name, kind in types.items()
        ]
    )


def _columns(driven: Driven) -> dict[str, Any]:
    return {name: driven.columns[name] for name in (CORRECT, COST, "large_calls", "calls", "budget_violated")}


def episode_row(name: str, kind: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables read of an episode without a cap (`routers.evaluation.budget_report.COLUMNS`)."""
    return {
        "task": name,
        "task_type": kind,
        "success": float(columns[CORRECT]),
        "executor_usd": float(columns[COST]),
        "large_calls": int(columns["large_calls"]),
        "steps": int(columns["calls"]),
        "violated": bool(columns["budget_violated"]),
        "cap": math.inf,
        "policy_usd": 0.0,
    }
