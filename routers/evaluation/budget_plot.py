"""The picture of budget-aware routing: cost against success, rules as lines, policies as points with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from routers.evaluation.budget_report import Episodes
from routers.evaluation.statistics import Estimate

# Okabe and Ito's palette, as in `routers.evaluation.plot`; line styles and markers tell them apart in grey.
_LINES = {"random mixing": ("#E69F00", "-"), "first-large": ("#CC79A7", "--"), "cascade": ("#56B4E9", ":")}
_POINTS = ("#D55E00", "#0072B2", "#009E73", "#666666", "#000000", "#F0E442", "#8C564B")
_MARKERS = "Dsv^oXP"


def draw(sets: Mapping[str, Episodes], path: str | Path) -> None:
    """One panel per set. Cost includes the policy's own tokens; intervals are 95 % over tasks and seeds."""
    figure = Figure(figsize=(6.2 * len(sets), 5.0), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for axes, (name, episodes) in zip(panels, sets.items(), strict=True):
        for family, (colour, style) in _LINES.items():
            played = [episodes.played(setting) for setting in episodes.families[family]]
            points = sorted((1000 * p.cost.mean(), p.success.mean()) for p in played)
            axes.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=family)
        for i, method in enumerate(m for m in episodes.methods() if m.name in episodes.policies):
            cost, success = method.usd, method.success
            axes.errorbar(
                1000 * cost.value,
                success.value,
                xerr=_arms(cost, 1000),
                yerr=_arms(success, 1),
                fmt=_MARKERS[i % len(_MARKERS)],
                color=_POINTS[i % len(_POINTS)],
                capsize=2,
                label=method.name,
            )
        axes.set_title(name, loc="left", fontsize=11)
        axes.set_xlabel("cost, USD per 1,000 episodes")
        axes.set_ylabel("success")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(color="#E5E5E5", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path)


def _arms(value: Estimate, factor: float) -> list[list[float]]:
    """Lengths below and above; an interval of one value may miss its mean by a rounding error."""
    return [[max(0.0, factor * (value.value - value.low))], [max(0.0, factor * (value.high - value.value))]]
