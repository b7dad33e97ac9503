"""BoSFT: demonstrations of cost-efficient routing, made from boundary runs and a sweep of the expensive calls' share.

    Easy          the cheapest successful always-small run
    Intractable   the cheapest always-small run, at most `max_intractable_share` of all
    Hard          P(large) = k/N per step for k < N, and always-large; the `keep` cheapest successes

    strata "class": as many episodes of every class that occurs (the smaller ones repeated)
           "p_large": as many of every P(large), always-small and always-large included, among the Hard ones

Every episode weighs the same whatever its length: its steps weigh 1/T each (`srpo.warmstart.imitate`).

Source: the labels of each class, the sweep and "cheapest success" as described by Budget-Aware Agentic Routing (arXiv
2602.21227) and notes on it. INFERRED (A.5 of our specification): which run of an Intractable task, always-large as a
fallback, balancing, 1/T. A single cheapest success is biased towards lucky runs; `keep` takes more of them.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from routers.budget_episode import TASK, BudgetEnvironment, Driven, drive
from routers.budget_rules import always_large, always_small, random_mix
from routers.profiles import Class
from srpo.types import CORRECT, COST, Row


@dataclass(frozen=True)
class Synthesis:
    """How demonstrations are made.

    Raises:
        ValueError: numbers out of range, an unknown word.
    """

    sweep: int = 10
    """N: rollouts of the sweep on every Hard task."""
    keep: int = 1
    """Cheapest successes that are kept of every Hard task."""
    strata: Literal["class", "p_large", "none"] = "class"
    max_intractable_share: float = 0.2

    def __post_init__(self) -> None:
        if self.sweep < 1 or self.keep < 1:
            raise ValueError(f"sweep={self.sweep}, keep={self.keep}: must be at least 1")
        if self.strata not in ("class", "p_large", "none"):
            raise ValueError(f"strata={self.strata!r} is not one of class, p_large, none")
        if not 0 <= self.max_intractable_share < 1:
            raise ValueError(f"max_intractable_share={self.max_intractable_share}: must lie in [0, 1)")


@dataclass(frozen=True)
class Demonstration:
    """One episode to imitate: the row, what was said and decided, and where it comes from."""

    row: Row
    driven: Driven
    difficulty: Class
    p_large: float

    def record(self) -> dict[str, Any]:
        """A row of a dataset: texts and decisions only, no tokens."""
        return {
            TASK: self.row[TASK],
            "prompt": self.row["prompt"],
            "decisions": [
                {"executor": name, "before": o.before, "body": o.body, "after": o.after}
                for name, o in self.driven.decisions
            ],
            "difficulty": self.difficulty,
            "p_large": self.p_large,
            "score": float(self.driven.columns[CORRECT]),
            "cost_usd": float(self.driven.columns[COST]),
        }


def demonstrations(
    environment: BudgetEnvironment, row: Row, difficulty: Class, how: Synthesis, seeds: Sequence[str]
) -> list[Demonstration]:
    """The demonstrations of one task; none where nothing succeeded on a task that is not Intractable.

    Args:
        row: dataset row; without a cap of its own the episodes are free to spend.
        seeds: of always-small and always-large runs; the sweep adds its k to the first.
    """

    def runs(rule: Any, p_large: float, names: Iterable[str]) -> list[Demonstration]:
        return [Demonstration(row, drive(environment, row, name, rule), difficulty, p_large) for name in names]

    if difficulty != "hard":
        pool = runs(always_small, 0.0, seeds)
        if difficulty == "easy":
            pool = [d for d in pool if d.driven.columns[CORRECT] >= 1]
        return _cheapest(pool, 1)
    pool = runs(always_large, 1.0, seeds)
    for k in range(1, how.sweep):
        pool += runs(random_mix(k / how.sweep), k / how.sweep, [f"{seeds[0]}/sweep{k}"])
    return _cheapest([d for d in pool if d.driven.columns[CORRECT] >= 1], how.keep)


def _cheapest(pool: Sequence[Demonstration], count: int) -> list[Demonstration]:
    return sorted(pool, key=lambda d: d.driven.columns[COST])[:count]


def balance(found: Sequence[Demonstration], how: Synthesis, rng: random.Random) -> list[Demonstration]:
    """Cap the Intractable ones, then repeat episodes until every stratum is as large as the largest; shuffled."""
    intractable = [d for d in found if d.difficulty == "intractable"]
    others = [d for d in found if d.difficulty != "intractable"]
    share = how.max_intractable_share
    rng.shuffle(intractable)
    chosen = others + intractable[: int(len(others) * share / (1 - share))]
    strata: Mapping[Any, list[Demonstration]] = defaultdict(list)
    for demonstration in chosen:
        strata[_stratum(demonstration, how)].append(demonstration)
    most = max((len(s) for s in strata.values()), default=0) if how.strata != "none" else 0
    balanced = [
        d for s in strata.values() for d in (*s, *(rng.choice(s) for _ in range(most - len(s))))
    ]
    rng.shuffle(balanced)
    return balanced


def _stratum(demonstration: Demonstration, how: Synthesis) -> Any:
    if how.strata == "class":
        return demonstration.difficulty
    return demonstration.p_large if how.strata == "p_large" else None


def write_dataset(chosen: Sequence[Demonstration], folder: Path, executors: Sequence[str]) -> None:
    """A folder that `datasets.load_dataset` and the Hub read: `train.parquet` and a card."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    records = [demonstration.record() for demonstration in chosen]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "train.parquet")
    counts = Counter(record["difficulty"] for record in records)
    classes = "\n".join(f"| {name} | {count} |" for name, count in sorted(counts.items()))
    (folder / "README.md").write_text(_CARD.format(executors=", ".join(executors), classes=classes), encoding="utf-8")


_CARD = """---
configs:
- config_name: default
  data_files: train.parquet
tags:
- llm-routing
- agents
---
# Routing demonstrations (BoSFT-style)

Episodes in which a router picked, at every step, which executor acts ({executors}; the first is the cheapest): the
cheapest successful ones of boundary runs and of a sweep over the expensive executor's share, balanced by repeating
episodes. Columns: `prompt` (chat messages), `decisions` (executor, and what the router was told afterwards),
`difficulty`, `p_large` (share in the sweep), `score`, `cost_usd`. Train on the decisions only, every episode with the
same weight.

| class | episodes |
|---|--:|
{classes}
"""
