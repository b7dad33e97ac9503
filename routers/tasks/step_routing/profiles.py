"""Boundary profiles: what always-small and always-large reach on a task, and which class that makes it.

    p_S, p_L success rates over K runs each        Easy         p_S >= tau_E
                                                   Hard         p_S <  tau_E and p_L >= tau_L
                                                   Intractable  otherwise

Runs are stored, not labels: K runs are few (a task whose true p_L is .3 shows 0 of 5 successes one time in six), so
the class is computed from the counts, with the thresholds of today. Two guards: a task that always-large fails but
always-small sometimes solves is Easy, and one that the policy solved is not Intractable, but Hard.

Scores between 0 and 1 (ScienceWorld): p_S and p_L are mean scores, here and in reward and references. To *solve* a
task is to score 1: in both guards, and wherever an episode is a success or not (demonstrations, drop_all_fail, who is
distilled).

Source: the three classes and K = 5 are those of Budget-Aware Agentic Routing (arXiv 2602.21227). INFERRED (A.4 of our
specification): the thresholds, both guards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from routers.data.files import read_rows
from routers.tasks.step_routing.arguments import DifficultyRule
from routers.tasks.step_routing.environment import TASK, Choose
from routers.tasks.step_routing.player import Driven, Job, PlayAll, play_jobs
from routers.tasks.step_routing.rules import always_large, always_small
from srpo.types import CORRECT, COST

Class = Literal["easy", "hard", "intractable"]
CLASSES: tuple[Class, ...] = ("easy", "hard", "intractable")
_SETTINGS = "settings"


@dataclass(frozen=True)
class BoundaryProfile:
    """The runs of both boundary policies on one task, and what the policy itself did there later."""

    task: str
    task_type: str
    scores_small: tuple[float, ...]
    costs_small: tuple[float, ...]
    scores_large: tuple[float, ...]
    costs_large: tuple[float, ...]
    policy_runs: int = 0
    policy_successes: int = 0

    @property
    def p_small(self) -> float:
        return fmean(self.scores_small)

    @property
    def p_large(self) -> float:
        return fmean(self.scores_large)

    @property
    def cost_small(self) -> float:
        return fmean(self.costs_small)

    @property
    def cost_large(self) -> float:
        return fmean(self.costs_large)

    def observed(self, runs: int, successes: int) -> BoundaryProfile:
        """With further episodes of the policy on this task added."""
        return replace(self, policy_runs=self.policy_runs + runs, policy_successes=self.policy_successes + successes)

    def difficulty(self, rule: DifficultyRule) -> Class:
        if self.p_small >= rule.tau_easy:
            return "easy"
        if self.p_large >= rule.tau_large:
            return "hard"
        if rule.small_only_is_easy and max(self.scores_small) >= 1:
            return "easy"
        return "hard" if self.policy_successes else "intractable"

    def columns(self, rule: DifficultyRule) -> dict[str, Any]:
        """Dataset columns: what the boundary reward reads, and the class."""
        difficulty = self.difficulty(rule)
        return {
            "p_small": self.p_small,
            "p_large": self.p_large,
            "cost_small": self.cost_small,
            "cost_large": self.cost_large,
            "hard": difficulty == "hard",
            "difficulty": difficulty,
        }


def profile_jobs(tasks: Iterable[str], runs: int) -> list[Job]:
    """K runs of always-small and K of always-large on every task."""
    rules: dict[str, Choose] = {"small": always_small, "large": always_large}
    seeds = [(task, name, f"profile/{name}/{k}/{task}") for task in tasks for name in rules for k in range(runs)]
    return [Job(seed, {TASK: task}, seed, rules[name]) for task, name, seed in seeds]


def profile_tasks(tasks: Mapping[str, str], play: PlayAll, path: Path, runs: int = 5) -> list[BoundaryProfile]:
    """Profile tasks into a parquet file, and return the profiles in the order of `tasks`.

    Every finished run is a line of `path` + ".partial"; an interrupted call goes on from there, and gives the same
    file. An existing file keeps its tasks, and is extended by those that are new.

    Args:
        tasks: task -> its type.
        play: plays the runs; an exception stops the profiling, what is finished stays.
        runs: K, of each boundary policy.

    Raises:
        ValueError: the file holds profiles of another number of runs.
    """
    done = {p.task: p for p in (read_profiles(path) if path.exists() else [])}
    for profile in done.values():
        if len(profile.scores_small) != runs or len(profile.scores_large) != runs:
            raise ValueError(
                f"{path}: {profile.task} has {len(profile.scores_small)} and {len(profile.scores_large)} runs, asked "
                f"for are {runs}; profile into another file"
            )
    if todo := [task for task in tasks if task not in done]:
        partial = path.with_name(path.name + ".partial")
        played = play_jobs(profile_jobs(todo, runs), partial, play, _score_and_cost)
        for number, task in enumerate(todo):
            scores, costs = zip(*played[2 * runs * number : 2 * runs * (number + 1)], strict=True)
            halves = scores[:runs], costs[:runs], scores[runs:], costs[runs:]
            done[task] = BoundaryProfile(task, tasks[task], *halves)
        write_profiles(done.values(), path)
        partial.unlink()
    return [done[task] for task in tasks]


def _score_and_cost(driven: Driven) -> tuple[float, float]:
    return float(driven.columns[CORRECT]), float(driven.columns[COST])


def _profile_of(fields: Mapping[str, Any]) -> BoundaryProfile:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in fields.items()}
    return BoundaryProfile(**values)


def write_profiles(profiles: Iterable[BoundaryProfile], path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write a parquet file: one row per task, by name, with all scores and costs. Whole or not at all.

    Args:
        settings: JSON-able, what the runs were made with; kept in the file's metadata, see `read_settings`.
    """
    import pyarrow
    import pyarrow.parquet

    rows = [
        {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(profile).items()}
        for profile in sorted(profiles, key=lambda profile: profile.task)
    ]
    draft = path.with_name(path.name + ".draft")
    table = pyarrow.Table.from_pylist(rows)
    if settings is not None:
        table = table.replace_schema_metadata({_SETTINGS: json.dumps(settings)})
    pyarrow.parquet.write_table(table, draft)
    os.replace(draft, path)


def read_profiles(path: Path) -> list[BoundaryProfile]:
    """Inverse of `write_profiles`.

    Raises:
        ValueError: no parquet file, or rows that are no profiles; names the file.
    """
    found = []
    for number, row in read_rows(path):
        try:
            found.append(_profile_of(row))
        except TypeError as error:  # a column that is missing, or one too many
            told = str(error).split("() ")[-1]
            raise ValueError(f"{path}: row {number} is no profile ({told}); profile again into another file") from None
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `write_profiles` was given; empty where there are none.

    Raises:
        ValueError: no parquet file; names it.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        known = pyarrow.parquet.read_schema(path).metadata or {}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from None
    return dict(json.loads(known.get(_SETTINGS.encode(), b"{}")))


def observe(
    profiles: Iterable[BoundaryProfile], outcomes: Iterable[Mapping[str, tuple[int, int]]]
) -> list[BoundaryProfile]:
    """Profiles with the policy's outcomes (task -> episodes, solved ones) of every rank added: one that was solved
    makes an Intractable task Hard."""
    found = list(profiles)
    for counts in outcomes:
        found = [p.observed(*counts[p.task]) if p.task in counts else p for p in found]
    return found
