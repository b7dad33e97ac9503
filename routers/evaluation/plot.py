"""The picture of the accuracy-cost plane."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from routers.evaluation.statistics import Score, pareto_hull

# Okabe and Ito's palette: told apart with any colour vision. Kinds differ in marker too, for print in grey.
_GREY, _ORANGE, _GREEN, _BLUE, _RED, _PURPLE = "#666666", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
_STYLES = {
    "member": (_GREY, "o", 60),
    "random": (_ORANGE, "X", 80),
    "baseline": (_PURPLE, "^", 80),
    "oracle": (_GREEN, "*", 170),
}
_POLICIES = ((_RED, "D", 80), (_BLUE, "s", 70))


def draw_frontier(scores: Sequence[Score], path: str | Path, title: str = "") -> None:
    """Draw scores as points, cost against accuracy, policies with 95 % intervals, and the members' mixing line.

    Args:
        scores: as in the table; the first policy is the trained one, a second one is what it started from.
        path: of the PNG; the folder must exist.
        title: what was evaluated.
    """
    figure = Figure(figsize=(8, 5.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    _mixing_line(axes, [entry for entry in scores if entry.kind == "member"])
    policies = [entry for entry in scores if entry.kind == "policy"]
    for entry in scores:
        if entry.kind != "policy":
            _point(axes, entry, *_STYLES[entry.kind], error=False)
    for entry, style in zip(policies, _POLICIES, strict=False):
        _point(axes, entry, *style, error=True)
    axes.set_xlabel("cost, USD per 1,000 queries")
    axes.set_ylabel("right answers")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlim(0, 1.12 * max(entry.cost.high for entry in scores) or 1.0)
    axes.set_ylim(0, 1.08 * max(entry.accuracy.high for entry in scores) or 1.0)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.draw_without_rendering()  # fixes the layout, which decides where names fit
    _names(axes, scores)
    figure.savefig(path)


def _mixing_line(axes: Axes, members: Sequence[Score]) -> None:
    cost = np.array([entry.cost.value for entry in members])
    accuracy = np.array([entry.accuracy.value for entry in members])
    hull = pareto_hull(cost, accuracy)
    end = max(entry for entry in cost)
    axes.plot(
        [0.0, *cost[hull], end],
        [0.0, *accuracy[hull], accuracy[hull[-1]]],
        color=_GREY,
        linestyle="--",
        linewidth=1.2,
        label="mixing members at random",
    )


def _point(axes: Axes, entry: Score, colour: str, marker: str, size: int, error: bool) -> None:
    if error:
        x, y = entry.cost, entry.accuracy
        axes.errorbar(
            x.value,
            y.value,
            # A flat sample has an interval of width 0, which rounding can turn inside out.
            xerr=[[max(x.value - x.low, 0.0)], [max(x.high - x.value, 0.0)]],
            yerr=[[max(y.value - y.low, 0.0)], [max(y.high - y.value, 0.0)]],
            color=colour,
            linewidth=1.3,
            capsize=3,
            zorder=3,
        )
    label = None if entry.kind == "member" else f"{entry.name}: {entry.accuracy.value:.1%}, ${entry.cost.value:.4f}"
    axes.scatter(
        entry.cost.value, entry.accuracy.value, s=size, color=colour, marker=marker, zorder=4, label=label, ec="white"
    )


def _names(axes: Axes, scores: Sequence[Score]) -> None:
    """Write each member's name at the first of four corners of its point that covers no point and no other name."""
    scale = axes.figure.dpi / 72  # pixels per point of type
    points = [tuple(axes.transData.transform((entry.cost.value, entry.accuracy.value))) for entry in scores]
    taken = [(x - 6 * scale, y - 3 * scale, x + 6 * scale, y + 3 * scale) for x, y in points]
    for entry, (x, y) in zip(scores, points, strict=True):
        if entry.kind != "member":
            continue
        width, height = 5.6 * len(entry.name) * scale, 11 * scale
        boxes = {}
        for right in (True, False):
            for below in (True, False):
                left = x + 7 * scale if right else x - 7 * scale - width
                bottom = y - 4 * scale - height if below else y + 4 * scale
                boxes[right, below] = (left, bottom, left + width, bottom + height)
        side = next((side for side, box in boxes.items() if not any(_overlap(box, o) for o in taken)), (True, True))
        taken.append(boxes[side])
        axes.annotate(
            entry.name,
            (entry.cost.value, entry.accuracy.value),
            xytext=(7 if side[0] else -7, -4 if side[1] else 4),
            textcoords="offset points",
            ha="left" if side[0] else "right",
            va="top" if side[1] else "bottom",
            fontsize=9,
            color="#333333",
        )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
