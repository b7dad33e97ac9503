"""BoSFT: demonstrations of cost-efficient routing, made from boundary runs and a sweep of the expensive calls' share.

    Easy          the cheapest successful always-small run
    Intractable   the cheapest always-small run, at most `max_intractable_share` of all
    Hard          P(large) = k/N per step for k < N, and always-large; the `keep` cheapest successes

    strata, of the Easy and Hard ones (the smaller repeated)
           "class": as many episodes of each class
           "p_large": as many of every P(large), always-small and always-large included

Every episode weighs the same whatever its length: its steps weigh 1/T each (`srpo.sft.sft`, mean over rows).

Source: the labels of each class, the sweep and "cheapest success" as described by Budget-Aware Agentic Routing (arXiv
2602.21227) and notes on it. INFERRED (A.5 of our specification): which run of an Intractable task, always-large as a
fallback, balancing, 1/T. A single cheapest success is biased towards lucky runs; `keep` takes more of them.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from routers.tasks.step_routing.arguments import Synthesis
from routers.tasks.step_routing.environment import TASK, Choose
from routers.tasks.step_routing.player import Driven, Job, PlayAll, play_jobs
from routers.tasks.step_routing.profiles import Class
from routers.tasks.step_routing.rules import always_large, always_small, random_mix
from routers.tasks.step_routing.settings import StepSettings
from srpo.rollout.loop import observation_ids
from srpo.task import Ids
from srpo.types import CORRECT, COST, Observation, Row


@dataclass(frozen=True)
class Demonstration:
    """One episode to imitate: what was said and decided, and where it comes from. Texts only, no tokens."""

    task: str
    prompt: Any
    """Chat messages."""
    decisions: Sequence[Mapping[str, str]]
    """Per step: `executor`, and the observation that followed as `before`, `body`, `after` (`srpo.types.Observation`);
    all three are empty after the last one."""
    difficulty: Class
    p_large: float
    score: float
    cost_usd: float


def demonstrations(
    rows: Iterable[Row], how: Synthesis, seeds: Callable[[Row], Sequence[str]], play: PlayAll, path: Path
) -> list[Demonstration]:
    """The demonstrations of each row; none where nothing succeeded on a task that is not Intractable.

    Args:
        rows: dataset rows with `query_id` and `difficulty`; without a cap of its own an episode is free to spend.
        seeds: of a row's always-small and always-large runs; the sweep adds its k to the first.
        path: where finished runs are kept, see `play_jobs`.
    """
    planned = [(row, _plan(row, how, seeds(row))) for row in rows]
    played = iter(play_jobs([job for _, runs in planned for _, job in runs], path, play, _kept))
    found = []
    for row, runs in planned:
        pool = [
            Demonstration(row[TASK], row["prompt"], decisions, row["difficulty"], p_large, score, cost)
            for (p_large, _), (decisions, score, cost) in zip(runs, played, strict=False)
        ]
        if row["difficulty"] == "intractable":
            found += _cheapest([d for d in pool if d.decisions], 1)
        else:
            found += _cheapest([d for d in pool if d.score >= 1], how.keep if row["difficulty"] == "hard" else 1)
    return found


def _plan(row: Row, how: Synthesis, seeds: Sequence[str]) -> list[tuple[float, Job]]:
    """The runs of a row, with their share of expensive calls."""

    def run(p_large: float, seed: str, rule: Choose) -> tuple[float, Job]:
        return p_large, Job(f"{row['query_id']}/{p_large:g}/{seed}", row, seed, rule)

    if row["difficulty"] != "hard":
        return [run(0.0, seed, always_small) for seed in seeds]
    shares = [k / how.sweep for k in range(1, how.sweep)]
    sweep = [run(p, f"{seeds[0]}/sweep{k}", random_mix(p)) for k, p in enumerate(shares, 1)]
    return [*(run(1.0, seed, always_large) for seed in seeds), *sweep]


def _kept(driven: Driven) -> tuple[list[dict[str, str]], float, float]:
    """Decisions, score and cost. A lost episode has no decisions."""
    decisions = [
        {"executor": name, "before": o.before, "body": o.body, "after": o.after} for name, o in driven.decisions
    ]
    return decisions, float(driven.columns[CORRECT]), float(driven.columns[COST])


def _cheapest(pool: Sequence[Demonstration], count: int) -> list[Demonstration]:
    return sorted(pool, key=lambda d: d.cost_usd)[:count]


def balance(found: Sequence[Demonstration], how: Synthesis, rng: random.Random) -> list[Demonstration]:
    """Repeat Easy and Hard episodes until every stratum is as large as the largest; add Intractable ones; shuffled.

    Those are never repeated: they teach to fail cheaply.
    """
    intractable = [d for d in found if d.difficulty == "intractable"]
    rng.shuffle(intractable)
    strata: Mapping[Any, list[Demonstration]] = defaultdict(list)
    for demonstration in found:
        if demonstration.difficulty != "intractable":
            strata[_stratum(demonstration, how)].append(demonstration)
    most = max((len(s) for s in strata.values()), default=0) if how.strata != "none" else 0
    balanced = [d for s in strata.values() for d in (*s, *(rng.choice(s) for _ in range(most - len(s))))]
    share = how.max_intractable_share
    balanced += intractable[: int(len(balanced) * share / (1 - share))]
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
    records = [asdict(demonstration) for demonstration in chosen]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "train.parquet")
    counts = Counter(record["difficulty"] for record in records)
    classes = "\n".join(f"| {name} | {count} |" for name, count in sorted(counts.items()))
    (folder / "README.md").write_text(_CARD.format(executors=", ".join(executors), classes=classes), encoding="utf-8")


def read_dataset(folder: Path) -> list[Demonstration]:
    """Inverse of `write_dataset`."""
    import pyarrow.parquet

    return [Demonstration(**row) for row in pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()]


def encode(demonstration: Demonstration, settings: StepSettings, tokenizer: Any) -> Ids:
    """A demonstration as the rollout would have made it, with labels on the decisions only."""
    ids = settings.prompt_ids(demonstration.prompt, tokenizer)
    labels = [-100] * len(ids)
    for step in demonstration.decisions:
        decision = tokenizer(settings.names[step["executor"]], add_special_tokens=False)["input_ids"]
        observation = Observation(step["body"], step["before"], step["after"])
        said = observation_ids(observation, tokenizer, settings.observation_tokens)
        ids += [*decision, *said]
        labels += [*decision, *[-100] * len(said)]
    return {"input_ids": ids, "labels": labels}


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
episodes. Columns: `task`, `prompt` (chat messages), `decisions` (executor, and what the router was told afterwards),
`difficulty`, `p_large` (share in the sweep), `score`, `cost_usd`. Train on the decisions only, every episode with the
same weight.

| class | episodes |
|---|--:|
{classes}
"""
