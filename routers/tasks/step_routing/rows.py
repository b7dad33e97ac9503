"""Rows to train a step router on: every training task at every cap, with what its boundary profile says."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.boundary import Boundary, BoundaryReward, cheap_failure_pays
from routers.tasks.step_routing.environment import CAP, TASK
from routers.tasks.step_routing.profiles import BoundaryProfile, read_profiles, read_settings
from routers.tasks.step_routing.world import BudgetTask, make_rows, refuse_changes, train_tasks
from srpo.objectives.advantages import REFERENCES
from srpo.quarantine import Quarantine

BUDGET = "budget"
"""Column: the episode's budget in USD, for cost_norm budget; None where calls are counted."""


def given_profiles(task: BudgetTask, path: Path) -> dict[str, BoundaryProfile]:
    """Profiles of the training tasks, by task, from a file that an earlier run wrote: OUTPUT/profiles.parquet.

    Raises:
        ValueError: the file was made with other settings, or holds no profile of a training task.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"profiles: there is no {path}; scripts/train_bopo.py writes OUTPUT/profiles.parquet")
    refuse_changes(read_settings(path), task.profile_settings(), f"profiles: {path}", "another file, or none")
    found = {profile.task: profile for profile in read_profiles(path)}
    names = list(train_tasks(task))
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"profiles: {path} has no profile of {missing[0]!r}, nor of {len(missing) - 1} more of the {len(names)} "
            "training tasks; give the file of a run on these tasks, or none, and they are profiled"
        )
    return {name: found[name] for name in names}


def begun_rows(task: BudgetTask, rule: BoundaryReward, quarantine_path: Path | None = None) -> list[dict[str, Any]]:
    """A row per cap and training task that begins.

    Args:
        quarantine_path: where tasks that do not begin are written; None: a warning only.

    Raises:
        BadRows: more of them than `max_bad_share` allows.
        ValueError: cost_norm budget without a budget in USD.
    """
    if rule.cost_norm == "budget" and (task.budget_unit != "usd" or not all(map(math.isfinite, task.train_caps))):
        raise ValueError("cost_norm: budget divides by the budget in USD: set budget_unit: usd and finite train_caps")
    bad = Quarantine("training tasks", quarantine_path, task.max_bad_share)
    return make_rows(task, train_tasks(task), task.train_caps, bad)


def training_rows(
    task: BudgetTask,
    rule: BoundaryReward,
    profiled: Mapping[str, BoundaryProfile],
    begun: Sequence[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """The rows with what the reward and the advantage read.

    Args:
        begun: of `begun_rows`; None: they are begun here.
    """
    rows = []
    for row in begun_rows(task, rule) if begun is None else begun:
        columns = profiled[row[TASK]].columns(task.rule)
        budget = row[CAP] if task.budget_unit == "usd" else None
        references = list(rule.references(_boundary(columns), budget))
        rows.append({**row, **columns, BUDGET: budget, REFERENCES: references})
    return rows


def describe_rows(rule: BoundaryReward, rows: Sequence[Mapping[str, Any]]) -> str:
    """Classes of the training tasks, and a warning where cheap failure pays (for cost_norm budget: at each budget)."""
    counts = Counter({row[TASK]: row["difficulty"] for row in rows}.values())
    budgets = rule.cost_norm == "budget"
    hard = {(row[TASK], budgets and row[BUDGET]): (_boundary(row), row[BUDGET]) for row in rows if row["hard"]}
    warning = cheap_failure_pays(rule, hard.values())
    classes = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return f"training tasks: {classes}" + (f"\nWARNING: {warning}" if warning else "")


def _boundary(columns: Mapping[str, Any]) -> Boundary:
    return Boundary(*(columns[name] for name in ("p_small", "p_large", "cost_small", "cost_large", "hard")))
