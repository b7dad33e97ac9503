"""The result of an evaluation: kept as JSON, printed as text or Markdown, drawn as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from routers.evaluation.statistics import (
    PER_QUERIES,
    Difference,
    Estimate,
    Outcomes,
    RewardRule,
    Score,
    SeedSummary,
    difference,
    mixing_accuracy,
    play,
    reference_scores,
    resamples,
    score,
    summarise_seeds,
)

EVALUATION = "evaluation.json"
PICTURE = "frontier.png"
METRICS = ("accuracy", "cost", "reward")
COLUMNS = ("", "accuracy", "95 % interval", "$ / 1k queries", "reward", "95 % interval", "valid", "entropy")


@dataclass(frozen=True)
class Evaluation:
    """A policy on the queries of one split, beside everything it has to beat.

    ``queries`` holds per query its id, family, the policy's route (None: no valid action), correct, cost (USD, own
    tokens included) and reward, so that runs can be compared query by query.
    """

    split: str
    rule: RewardRule
    policy: Score
    references: list[Score]
    difference: Difference
    queries: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``from_dict`` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        estimates: dict[str, Any] = {name: _estimate(data["difference"][name]) for name in METRICS}
        return cls(
            split=data["split"],
            rule=RewardRule(**data["rule"]),
            policy=_score(data["policy"]),
            references=[_score(entry) for entry in data["references"]],
            difference=Difference(**(data["difference"] | estimates)),
            queries=data["queries"],
        )

    def values(self) -> dict[str, np.ndarray]:
        """Per query ``[Q]``: correct, cost (USD per 1,000 queries) and reward, as ``summarise_seeds`` takes them."""
        columns = {name: np.array([q[name] for q in self.queries]) for name in ("correct", "cost", "reward")}
        return columns | {"cost": columns["cost"] * PER_QUERIES}

    def ids(self) -> list[str]:
        """Which queries were evaluated."""
        return [query["query_id"] for query in self.queries]

    def write(self, folder: str | Path, before: Evaluation | None = None) -> tuple[Path, Path]:
        """Write ``evaluation.json`` and ``frontier.png`` into ``folder`` and return their paths.

        ``before``, usually the warm start, is drawn into the picture.
        """
        from routers.evaluation.plot import draw_frontier  # matplotlib, which numbers do not need

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        numbers, picture = folder / EVALUATION, folder / PICTURE
        numbers.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        draw_frontier(self._rows(before), picture, title=f"{len(self.queries):,} {_split(self.split)} queries")
        return numbers, picture

    @classmethod
    def read(cls, folder: str | Path) -> Evaluation:
        """Read ``evaluation.json`` of a folder.

        Raises:
            FileNotFoundError: there is none.
        """
        return cls.from_dict(json.loads((Path(folder) / EVALUATION).read_text(encoding="utf-8")))

    def text(self, before: Evaluation | None = None) -> str:
        """Aligned plain text: the table, whom the policy asked, and how it compares with the best single member."""
        return "\n\n".join([render_table(self._rows(before)), self._routes(), self._verdict()])

    def markdown(self, before: Evaluation | None = None) -> str:
        """The same for a README or a model card."""
        return "\n\n".join([render_table(self._rows(before), markdown=True), self._routes(), self._verdict()])

    def _rows(self, before: Evaluation | None) -> list[Score]:
        return [self.policy, *([] if before is None else [before.policy]), *self.references]

    def _routes(self) -> str:
        shares = sorted(self.policy.share.items(), key=lambda item: -item[1])
        return f"{self.policy.name} asked: " + ", ".join(f"{name} {part:.1%}" for name, part in shares)

    def _verdict(self) -> str:
        d = self.difference
        return (
            f"{self.policy.name} minus the best single member ({d.member}), paired over {len(self.queries):,} "
            f"{_split(self.split)} queries, with 95 % intervals: "
            f"reward {d.reward.value:+.3f} {_interval(d.reward, '+.3f')}, "
            f"accuracy {d.accuracy.value:+.3f} {_interval(d.accuracy, '+.3f')}, "
            f"cost {d.cost.value:+.4f} $ per {PER_QUERIES:,} queries {_interval(d.cost, '+.4f')}. "
            f"Mixing members at random for the same cost: {d.mixing:.1%} right."
        )


def evaluate_routes(
    name: str,
    routes: Sequence[str | None],
    queries: Sequence[dict[str, Any]],
    members: Sequence[str],
    correct: np.ndarray,
    cost: np.ndarray,
    rule: RewardRule,
    own_cost: np.ndarray | None = None,
    split: str = "heldout",
    seed: int = 0,
    baselines: Mapping[str, np.ndarray] | None = None,
) -> Evaluation:
    """Evaluate whom a policy chose.

    Args:
        name: how the policy is called in tables.
        routes: per query the member's name, or None for no valid action.
        queries: dicts with query_id and family, in the order of ``routes``.
        members: names of the columns of ``correct`` and ``cost``.
        correct, cost: ``[queries, members]``; cost in USD.
        rule: the reward.
        own_cost: ``[queries]`` USD for the policy's own tokens; None: free.
        split, seed: the split's name, and the seed of the bootstrap.
        baselines: other routers to show: name -> member index ``[queries]``.

    Raises:
        ValueError: shapes differ, no query, or a route that is not a member.
    """
    unknown = sorted({route for route in routes if route is not None and route not in members})
    if unknown:
        raise ValueError(f"routes to {unknown}, but the members are {list(members)}")
    index = np.array([-1 if route is None else members.index(route) for route in routes], dtype=int)
    paid = np.zeros(len(routes)) if own_cost is None else own_cost
    outcomes = play(index, correct, cost, paid, rule)
    draws = resamples(len(routes), seed)
    families = [query["family"] for query in queries]
    share = np.bincount(index[index >= 0], minlength=len(members)) / len(routes)
    references = reference_scores(correct, cost, members, families, rule, draws, baselines)
    policy = score(name, "policy", outcomes, share, draws, members, families)
    singles = [reference for reference in references if reference.kind == "member"]
    best = max(range(len(singles)), key=lambda i: singles[i].reward.value)
    single = play(np.full(len(routes), best), correct, cost, np.zeros(len(routes)), rule)
    mixing = mixing_accuracy(cost.mean(0) * PER_QUERIES, correct.mean(0), policy.cost.value)
    return Evaluation(
        split=split,
        rule=rule,
        policy=policy,
        references=references,
        difference=difference(outcomes, single, members[best], mixing, draws),
        queries=_per_query(queries, routes, outcomes),
    )


def render_table(scores: Sequence[Score], markdown: bool = False) -> str:
    """One line per score. Plain text is aligned with spaces, Markdown is a pipe table; both read well as they are."""
    return aligned([COLUMNS, *(_cells(entry) for entry in scores)], markdown)


def compare_runs(runs: Sequence[Evaluation]) -> dict[str, SeedSummary]:
    """Runs of one name are seeds of one recipe: name -> their summary, in order of first appearance.

    Raises:
        ValueError: no run, or runs on different queries or with different rewards.
    """
    groups: dict[str, list[Evaluation]] = {}
    for run in runs:
        for what, value, first in (("reward", run.rule, runs[0].rule), ("queries", run.ids(), runs[0].ids())):
            if value != first:
                raise ValueError(f"a run of {run.policy.name!r} has other {what} than one of {runs[0].policy.name!r}")
        groups.setdefault(run.policy.name, []).append(run)
    if not groups:
        raise ValueError("there are no runs to compare")
    return {name: summarise_seeds([run.values() for run in group]) for name, group in groups.items()}


def render_comparison(
    summaries: Mapping[str, SeedSummary], references: Sequence[Score], markdown: bool = False
) -> str:
    """A table of ``compare_runs`` above the references of any of its runs (they are the same for all)."""
    rows: list[tuple[str, ...]] = [(*COLUMNS[:-2], "reward of each seed")]
    for name, summary in summaries.items():
        found, seeds = summary.estimates, summary.per_seed["reward"]
        rows.append(
            (*_numbers(name, found["correct"], found["cost"], found["reward"]), " ".join(f"{x:.3f}" for x in seeds))
        )
    rows += [(*_numbers(entry.name, entry.accuracy, entry.cost, entry.reward), "") for entry in references]
    return aligned(rows, markdown)


def render_gains(runs: Sequence[Evaluation], starts: Sequence[Evaluation]) -> str:
    """Per recipe one sentence: what its runs gained over the runs they started from, paired by seed and query.

    Args:
        runs, starts: as many of each, in the same order.
    """
    groups: dict[str, list[dict[str, np.ndarray]]] = {}
    for run, start in zip(runs, starts, strict=True):
        before = start.values()
        gain = {metric: values - before[metric] for metric, values in run.values().items()}
        groups.setdefault(run.policy.name, []).append(gain)
    lines = []
    for name, gains in groups.items():
        found = summarise_seeds(gains).estimates
        lines.append(
            f"{name} minus {starts[0].policy.name}: reward {found['reward'].value:+.3f} "
            f"{_interval(found['reward'], '+.3f')}, accuracy {found['correct'].value:+.3f} "
            f"{_interval(found['correct'], '+.3f')}, cost {found['cost'].value:+.4f} "
            f"{_interval(found['cost'], '+.4f')} $ per {PER_QUERIES:,} queries"
        )
    return "\n".join(lines)


def aligned(rows: Sequence[tuple[str, ...]], markdown: bool) -> str:
    """A table with its header in the first row; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    rule = ["-" * widths[0], *("-" * (w - markdown) + ":" * markdown for w in widths[1:])]
    lines.insert(1, f"| {' | '.join(rule)} |" if markdown else "  ".join(rule))
    return "\n".join(lines)


def _cells(entry: Score) -> tuple[str, ...]:
    numbers = _numbers(entry.name, entry.accuracy, entry.cost, entry.reward)
    return (*numbers, f"{entry.format_rate:.1%}", f"{entry.entropy:.2f}")


def _numbers(name: str, accuracy: Estimate, cost: Estimate, reward: Estimate) -> tuple[str, ...]:
    return (
        name,
        f"{accuracy.value:.1%}",
        _interval(accuracy, ".1%"),
        f"{cost.value:.4f}",
        f"{reward.value:.3f}",
        _interval(reward, ".3f"),
    )


def _interval(value: Estimate, spec: str) -> str:
    return f"[{value.low:{spec}}, {value.high:{spec}}]"


def _per_query(
    queries: Sequence[dict[str, Any]], routes: Sequence[str | None], outcomes: Outcomes
) -> list[dict[str, Any]]:
    columns = zip(queries, routes, outcomes.correct, outcomes.cost, outcomes.reward, strict=True)
    return [
        {
            "query_id": query["query_id"],
            "family": query["family"],
            "route": route,
            "correct": float(right),
            "cost": float(paid),
            "reward": float(reward),
        }
        for query, route, right, paid, reward in columns
    ]


def _split(name: str) -> str:
    return "held-out" if name == "heldout" else name


def _estimate(data: dict[str, float]) -> Estimate:
    return Estimate(**data)


def _score(data: dict[str, Any]) -> Score:
    estimates = {name: _estimate(data[name]) for name in METRICS}
    return Score(**(data | estimates))
