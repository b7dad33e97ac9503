"""What budget-aware routing reaches on held-out tasks, beside rules that spend the same money.

A *method* was played R times on Q tasks (repetitions of a rule, seeds of a policy). A *family* is a rule with a knob
(probability of the expensive executor, first calls, calls before escalation): its settings span a frontier of
cost and success, and mixing two settings by a coin per episode reaches every point between. So

    gain = success of the method - success of the family's mixing frontier at the method's mean cost

with the 95 % interval of a bootstrap that draws tasks and seeds, and evaluates both on the same draw (paired).

    normalised AUC: cost axis rescaled so that always-small is 0 and always-large 1, clipped to [0, 1];
    area under the step-wise upper envelope of the method's points and of both boundary policies
    AUC of chance: the area under the straight line between the two boundaries (random mixing per episode)

INFERRED (A.9 of our specification): the paper speaks of an efficiency frontier and defines no number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from routers.evaluation.statistics import Estimate, mixing_score

RESAMPLES = 2000


@dataclass(frozen=True)
class Played:
    """Success in [0, 1] and cost in USD of a method, both [R, Q]; expensive calls and steps, [R, Q]."""

    success: np.ndarray
    cost: np.ndarray
    large_calls: np.ndarray
    steps: np.ndarray

    def __post_init__(self) -> None:
        shapes = {a.shape for a in (self.success, self.cost, self.large_calls, self.steps)}
        if len(shapes) != 1 or self.success.ndim != 2:
            raise ValueError(f"arrays [repetitions, tasks] of one shape are needed, got {sorted(shapes)}")

    def only(self, tasks: np.ndarray) -> Played:
        """The tasks of a mask [Q]."""
        return Played(*(a[:, tasks] for a in (self.success, self.cost, self.large_calls, self.steps)))


@dataclass(frozen=True)
class Draws:
    """Bootstrap weights: tasks [B, Q] and repetitions [B, R], each row summing to 1."""

    tasks: np.ndarray
    repetitions: np.ndarray


def draws(tasks: int, repetitions: int, seed: int = 0, count: int = RESAMPLES) -> Draws:
    """Draws with replacement of tasks and, independently, of repetitions."""
    rng = np.random.default_rng(seed)
    return Draws(
        rng.multinomial(tasks, np.full(tasks, 1 / tasks), size=count) / tasks,
        rng.multinomial(repetitions, np.full(repetitions, 1 / repetitions), size=count) / repetitions,
    )


def estimate(values: np.ndarray, drawn: Draws) -> Estimate:
    """Mean of values [R, Q] with its 95 % interval over tasks and repetitions."""
    low, high = np.quantile(_means(values, drawn), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def ratio(values: np.ndarray, reference: np.ndarray, drawn: Draws) -> Estimate:
    """Mean of values [R, Q] over the mean of a reference [R', Q] on the same tasks."""
    resampled = _means(values, drawn) / (drawn.tasks @ reference.mean(axis=0))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(values.mean() / reference.mean()), float(low), float(high))


def difference(values: np.ndarray, other: np.ndarray, drawn: Draws) -> Estimate:
    """Mean of values minus mean of other, both [R, Q]: paired over tasks and over repetitions (the same seeds)."""
    low, high = np.quantile(_means(values - other, drawn), [0.025, 0.975])
    return Estimate(float((values - other).mean()), float(low), float(high))


def gain_at_equal_cost(method: Played, family: Sequence[Played], drawn: Draws) -> Estimate:
    """Success of the method minus that of the family's mixing frontier at the same mean cost, paired by task."""
    success = np.stack([setting.success.mean(axis=0) for setting in family])
    cost = np.stack([setting.cost.mean(axis=0) for setting in family])
    own_success, own_cost = _means(method.success, drawn), _means(method.cost, drawn)
    family_success, family_cost = drawn.tasks @ success.T, drawn.tasks @ cost.T
    gains = [
        s - mixing_score(costs, successes, at)
        for s, at, costs, successes in zip(own_success, own_cost, family_cost, family_success, strict=True)
    ]
    value = method.success.mean() - mixing_score(cost.mean(axis=1), success.mean(axis=1), method.cost.mean())
    low, high = np.quantile(gains, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def normalised_auc(points: Sequence[tuple[float, float]], small: float, large: float) -> float:
    """Area under the step-wise upper envelope of (cost, success) points; see above for the axis.

    Where always-small is not cheaper than always-large the axis is cost / max(small, large).
    """
    start, width = (small, large - small) if large > small else (0.0, max(small, large))
    scaled = sorted((min(max((cost - start) / width, 0.0), 1.0), success) for cost, success in points)
    area, best, at = 0.0, 0.0, 0.0
    for cost, success in scaled:
        area += (cost - at) * best
        best, at = max(best, success), cost
    return area + (1.0 - at) * best


def chance_auc(small: float, large: float) -> float:
    """Area under the straight line from always-small's success to always-large's."""
    return (small + large) / 2


def by_group(values: np.ndarray, groups: Sequence[str]) -> Mapping[str, float]:
    """Mean of values [R, Q] per group of tasks [Q]."""
    names = np.asarray(groups)
    return {str(name): float(values[:, names == name].mean()) for name in sorted(set(groups))}


def _means(values: np.ndarray, drawn: Draws) -> np.ndarray:
    """[B] weighted means of values [R, Q]."""
    return np.einsum("br,rq,bq->b", drawn.repetitions, values, drawn.tasks, optimize=True)
