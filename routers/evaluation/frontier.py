"""Numbers of the plane of cost and score: hulls, areas and shares of the way from a weak to a strong member.

Pure functions of means. Points are the settings of one router; a mixture draws one of them per item, so that all on or
below their upper hull can be had. Below the cheapest point the mixture is with asking nobody, which costs and
scores 0 (RouterBench's null router). NaN: not defined.

Sources: AIQ: RouterBench (arXiv 2403.12031), `evaluation/AIQ.py` at 30e0925. APGR, CPT: RouteLLM (arXiv 2406.18665),
`routellm/evals/evaluate.py` at 0d78f12. ECE: Guo et al. (arXiv 1706.04599); Brier (1950).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Point = tuple[float, float]
"""(cost, score)"""


def pareto_hull(cost: np.ndarray, score: np.ndarray) -> list[int]:
    """Points that random mixing cannot beat: the upper concave hull from the cheapest to the best point.

    Args:
        cost, score: ``[N]``. Of equal points the first counts.

    Returns:
        Indices in order of rising cost; the score rises along them, and the slope falls.
    """
    usd, right = cost.tolist(), score.tolist()  # arithmetic on floats is ten times as fast as on numpy's scalars
    hull: list[int] = []
    for i in sorted(range(len(usd)), key=lambda j: (usd[j], -right[j], j)):
        if hull and right[i] <= right[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (right[b] - right[a]) * (usd[i] - usd[a]) > (right[i] - right[a]) * (usd[b] - usd[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def mixing_line(cost: np.ndarray, score: np.ndarray) -> tuple[list[float], list[float]]:
    """Costs and scores of the corners of the mixing line, from asking nobody on."""
    hull = pareto_hull(cost, score)
    null = [0.0] if cost[hull[0]] > 0 else []
    return [*null, *cost[hull].tolist()], [*null, *score[hull].tolist()]


def mixing_score(cost: np.ndarray, score: np.ndarray, at: float) -> float:
    """Score on the points' mixing line at cost ``at``."""
    return float(np.interp(at, *mixing_line(cost, score)))


def aiq(cost: np.ndarray, score: np.ndarray, low: float, high: float) -> float:
    """Average improvement in quality: the mean height of the mixing line over the costs ``low`` to ``high``.

    RouterBench's ``1 / (c_max - c_min)`` times the integral of the non-decreasing hull. Their code begins at the first
    point, divides by ``c_max``, stops at the best point, and fails on two points; the paper's formula is meant.
    """
    if not high > low:
        return math.nan
    x, y = mixing_line(cost, score)
    at = [low, *(c for c in x if low < c < high), high]
    return float(np.trapezoid(np.interp(at, x, y), at)) / (high - low)


def recovery(cost: np.ndarray, score: np.ndarray, weak: Point, strong: Point) -> list[Point]:
    """A router's curve in shares of the way from the weak to the strong member: (cost, recovered score gap) in order.

    RouteLLM's performance gap recovered against calls of the strong model; here against cost, which is the same where
    each model has one price. Its thresholds end in both members: both are points. []: strong is not dearer and better.
    """
    dearer, better = strong[0] - weak[0], strong[1] - weak[1]
    if not (dearer > 0 and better > 0):
        return []
    points = ((float(c - weak[0]) / dearer, float(s - weak[1]) / better) for c, s in zip(cost, score, strict=True))
    return sorted([(0.0, 0.0), (1.0, 1.0), *(point for point in points if 0 <= point[0] <= 1)])


def apgr(curve: Sequence[Point]) -> float:
    """Average performance gap recovered: the area under `recovery`; 0.5 is a coin between the two members."""
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(curve)) if curve else math.nan


def cpt(curve: Sequence[Point], share: float) -> float:
    """Call-performance threshold: the least share of the cost at which `recovery` reaches ``share`` of the gap.

    The first crossing: RouteLLM's ``np.interp`` over scores is only defined where they rise.
    """
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 >= share:
            return x0 if y0 >= share else x0 + (share - y0) / (y1 - y0) * (x1 - x0)
    return math.nan


def normalised_auc(points: Sequence[tuple[float, ...]], small: float, large: float) -> float:
    """Area under the step-wise upper envelope of (cost, score) points, on an axis where `small` is 0 and `large` 1.

    Costs beyond the ends are clipped; where small is not cheaper than large the axis is cost / max(small, large).
    INFERRED: the BoPO paper speaks of an efficiency frontier and defines no number.
    """
    start, width = (small, large - small) if large > small else (0.0, max(small, large) or 1.0)
    scaled = sorted((min(max((cost - start) / width, 0.0), 1.0), score) for cost, score in points)
    area, best, at = 0.0, 0.0, 0.0
    for cost, score in scaled:
        area += (cost - at) * best
        best, at = max(best, score), cost
    return area + (1.0 - at) * best


def brier(expected: np.ndarray, score: np.ndarray) -> float:
    """Mean squared difference between the score that was foretold and the one that came."""
    return float(np.mean((expected - score) ** 2))


def calibration_error(expected: np.ndarray, score: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: |mean foretold - mean score| per bin of equal width on [0, 1], weighted by items."""
    place = np.clip((expected * bins).astype(int), 0, bins - 1).ravel()
    gaps = np.bincount(place, (expected - score).ravel(), bins)
    return float(np.abs(gaps).sum() / place.size)
