"""Tables of budget-aware routing, from episodes as rows: one table per set of tasks, with paired intervals.

Episodes are a data frame with the columns of `COLUMNS`; `cap` is infinite where there was no budget. A column `used`
says which share of it was spent; without it caps are numbers of expensive calls. Rules are named
"FAMILY SETTING" (see `routers.tasks.step_routing.rules`); everything else is a policy, its repetitions are seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from routers.evaluation.budget_evaluation import (
    Draws,
    Played,
    by_group,
    chance_auc,
    difference,
    draws,
    estimate,
    gain_at_equal_cost,
    normalised_auc,
    ratio,
)
from routers.evaluation.tables import aligned
from routers.evaluation.statistics import Estimate
from routers.tasks.step_routing.profiles import CLASSES

COLUMNS = (
    "set method repetition task task_type difficulty cap success executor_usd policy_usd large_calls steps violated"
).split()
FAMILIES = ("random mixing", "first-large", "cascade")
SMALL, LARGE = "random mixing 0", "random mixing 1"
"""The two boundary policies, as ends of a family."""


@dataclass(frozen=True)
class Method:
    """One line: a policy without a budget, or a boundary."""

    name: str
    success: Estimate
    usd: Estimate
    share_of_large: Estimate
    """Cost over always-large's."""
    kept: Estimate
    """Success over always-large's."""
    large_calls: float
    large_share: float
    """Share of steps that an expensive executor took."""
    by_class: Mapping[str, float]
    by_type: Mapping[str, float]
    gains: Mapping[str, Estimate]
    """Family -> success beyond its mixing frontier at equal cost."""
    auc: float | None


@dataclass(frozen=True)
class Capped:
    """A policy under one cap."""

    name: str
    cap: float
    success: Estimate
    used: float
    """Mean share of the cap that was spent."""
    violations: int


class Episodes:
    """The episodes of one set of tasks, played without a cap and at caps.

    Raises:
        ValueError: a column is missing, or a method was not played on every task.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        if missing := [name for name in COLUMNS if name not in frame]:
            raise ValueError(f"the episodes have no column {missing[0]!r}")
        self.frame = frame
        self.tasks = sorted(frame["task"].unique())
        known = frame.drop_duplicates("task").set_index("task").loc[self.tasks]
        self.types = known["task_type"].tolist()
        self.difficulty = known["difficulty"].tolist()
        names = frame["method"].unique().tolist()
        self.families = {family: [name for name in names if name.startswith(family + " ")] for family in FAMILIES}
        rules = {name for settings in self.families.values() for name in settings}
        self.policies = [name for name in names if name not in rules]
        self._played = self._arrays()

    def played(self, method: str, cap: float = math.inf) -> Played:
        """[repetitions, tasks] arrays of a method at a cap; the policy's own tokens are part of the cost."""
        if (method, cap) not in self._played:
            raise ValueError(f"{method} at cap {cap:g} was not played on all {len(self.tasks)} tasks")
        return self._played[method, cap]

    def _arrays(self) -> dict[tuple[str, float], Played]:
        found = {}
        frame = self.frame.assign(usd=self.frame["executor_usd"] + self.frame["policy_usd"])
        for key, rows in frame.groupby(["method", "cap"], sort=False):
            sizes = rows.groupby("repetition")["task"].nunique()
            if (sizes == len(self.tasks)).all() and len(rows) == len(self.tasks) * len(sizes):
                rows = rows.sort_values(["repetition", "task"])
                shape = (len(sizes), len(self.tasks))
                columns = ("success", "usd", "large_calls", "steps")
                found[key] = Played(*(rows[c].to_numpy(dtype=float).reshape(shape) for c in columns))
        return found

    def methods(self) -> list[Method]:
        """Boundaries and policies without a budget, in the order in which they were first seen."""
        families = {
            family: [self.played(name) for name in settings] for family, settings in self.families.items() if settings
        }
        return [self._method(name, families) for name in (SMALL, LARGE, *self.policies)]

    def _method(self, name: str, families: Mapping[str, Sequence[Played]]) -> Method:
        played, large = self.played(name), self.played(LARGE)
        drawn = self._draws(played)
        policy = name in self.policies
        return Method(
            name={SMALL: "always-small", LARGE: "always-large"}.get(name, name),
            success=estimate(played.success, drawn),
            usd=estimate(played.cost, drawn),
            share_of_large=ratio(played.cost, large.cost, drawn),
            kept=ratio(played.success, large.success, drawn),
            large_calls=float(played.large_calls.mean()),
            large_share=float(played.large_calls.sum() / played.steps.sum()),
            by_class=by_group(played.success, self.difficulty),
            by_type=by_group(played.success, self.types),
            gains={f: gain_at_equal_cost(played, s, drawn) for f, s in families.items()} if policy else {},
            auc=self._auc([name]) if policy else None,
        )

    def family_aucs(self) -> dict[str, float]:
        """Normalised AUC of every family over its settings, and of the chord between the boundaries."""
        small, large = self.played(SMALL).success.mean(), self.played(LARGE).success.mean()
        found = {family: self._auc(settings) for family, settings in self.families.items() if settings}
        return {**found, "chord (chance)": float(chance_auc(small, large))}

    def _auc(self, methods: Sequence[str]) -> float:
        """Of the methods' settings and caps; the boundary policies need no training and belong to every frontier."""
        small, large = self.played(SMALL), self.played(LARGE)
        points = [(float(p.cost.mean()), float(p.success.mean())) for p in (small, large)]
        for method in methods:
            for cap in sorted(self.frame.loc[self.frame["method"] == method, "cap"].unique()):
                played = self.played(method, cap)
                points.append((float(played.cost.mean()), float(played.success.mean())))
        return normalised_auc(points, small.cost.mean(), large.cost.mean())

    def capped(self) -> list[Capped]:
        """Every policy under every finite cap; and First-Large, where the cap is a number of expensive calls."""
        found = []
        for cap in sorted(c for c in self.frame["cap"].unique() if math.isfinite(c) and c > 0):
            calls = True
            for name in self.policies:
                rows = self.frame[(self.frame["method"] == name) & (self.frame["cap"] == cap)]
                if len(rows):
                    played = self.played(name, cap)
                    success = estimate(played.success, self._draws(played))
                    counted = rows["large_calls"] / cap
                    used = rows["used"].astype(float).fillna(counted) if "used" in rows else counted
                    calls &= bool(((used - counted).abs() < 1e-9).all())
                    found.append(Capped(name, cap, success, float(used.mean()), int(rows["violated"].sum())))
            first = f"first-large {cap:g}"
            if calls and first in self.families["first-large"]:
                played = self.played(first)
                success = estimate(played.success, self._draws(played))
                found.append(Capped("first-large", cap, success, float(played.large_calls.mean() / cap), 0))
        return found

    def against(self, name: str, other: str) -> Estimate:
        """Success of one policy minus another's, paired by task and seed."""
        a, b = self.played(name), self.played(other)
        return difference(a.success, b.success, self._draws(a))

    def _draws(self, played: Played) -> Draws:
        return draws(*reversed(played.success.shape))


def render(episodes: Episodes, title: str, markdown: bool = True) -> str:
    """The tables of one set, as text."""
    methods, aucs = episodes.methods(), episodes.family_aucs()
    families = [f for f in FAMILIES if episodes.families[f]]
    header = ["", "success", "$ per 1k episodes", "of always-large's cost", "of its success", "expensive calls"]
    header += [c.capitalize() for c in CLASSES if c in episodes.difficulty]
    header += [f"beyond {family} at equal cost" for family in families] + ["AUC"]
    lines: list[tuple[str, ...]] = []
    for m in methods:
        line = [m.name, _interval(m.success, 100, "%"), _interval(m.usd, 1000, "", ".2f")]
        line += [_interval(m.share_of_large, 100, "%"), f"{100 * m.kept.value:.1f}%"]
        line += [f"{m.large_calls:.2f} ({100 * m.large_share:.0f}% of steps)"]
        line += [f"{100 * m.by_class[c]:.0f}%" for c in CLASSES if c in episodes.difficulty]
        line += [_interval(m.gains[f], 100, "", "+.1f") if f in m.gains else "" for f in families]
        lines.append((*line, "" if m.auc is None else f"{m.auc:.3f}"))
    text = [title, "", aligned([tuple(header), *lines], markdown), ""]
    text.append("AUC: " + ", ".join(f"{name} {value:.3f}" for name, value in aucs.items()))
    if capped := episodes.capped():
        rows: list[tuple[str, ...]] = [("cap", "", "success", "% of the cap used", "violations")]
        rows += [
            (f"{c.cap:g}", c.name, _interval(c.success, 100, "%"), f"{100 * c.used:.0f}%", str(c.violations))
            for c in capped
        ]
        text += ["", aligned(rows, markdown)]
    types = sorted(set(episodes.types))
    rows = [("success by task type", *types)]
    rows += [(m.name, *(f"{100 * m.by_type[t]:.0f}%" for t in types)) for m in methods]
    return "\n".join([*text, "", aligned(rows, markdown), ""])


def _interval(value: Estimate, factor: float, unit: str, spec: str = ".1f") -> str:
    number, low, high = (format(factor * v, spec) for v in (value.value, value.low, value.high))
    return f"{number}{unit} [{low}, {high}]"
