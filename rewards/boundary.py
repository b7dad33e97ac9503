"""Boundary-relative reward of budget-aware routing: success, more for hard tasks, less cost between two boundaries.

    R(tau | x) = y + beta 1[x Hard] y - lambda C_norm                 success-gated: ... - lambda y C_norm
    y in [0, 1] success     C cost of the episode, USD     Cbar_S, Cbar_L mean costs of always-small, always-large on x

    C_norm, clipped to [0, c_max]
        boundary   (C - Cbar_S) / (Cbar_L - Cbar_S)   where Cbar_L - Cbar_S > gap_eps Cbar_S, else as `max`
        large      C / Cbar_L
        max        C / max(Cbar_S, Cbar_L)
        budget     C / B, B the episode's budget

The guard matters: an always-small run that fails goes on to the horizon and can cost more than a short success of
always-large. The difference is then negative, and without the guard the ratio would reward spending.

The references R_S, R_L of `srpo.objectives.advantages` are the same reward at a boundary's success rate p and mean
cost:
R = p (1 + beta 1[Hard]) - lambda C_norm(Cbar)                        success-gated: ... - lambda p C_norm(Cbar)

INFERRED. "BoPO-style": Budget-Aware Agentic Routing (arXiv 2602.21227) has a reward of success, a bonus for hard tasks
and a calibrated cost, but no public formula or code; the forms are those of our specification (A.6, A.7).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rewards.columns import numbers, where
from srpo.ranges import Ranges, at_least, check_numbers

COST_NORMS = ("boundary", "large", "max", "budget")
SAFE_RATIO = 3.0
"""Least (1 + beta) p_L / (lambda gap) at which no form collapsed in our tabular simulation; 1: cheap failure pays."""


@dataclass(frozen=True)
class Boundary:
    """What a task's profile says: success rates and mean costs in USD of both boundary policies, and its class."""

    p_small: float
    p_large: float
    cost_small: float
    cost_large: float
    hard: bool


@dataclass(frozen=True)
class BoundaryReward:
    """The constants of the reward above.

    Raises:
        ValueError: a constant out of its range.
    """

    RANGES: ClassVar[Ranges] = {
        "cost_weight": at_least(0),
        "hard_bonus": at_least(0),
        "c_max": at_least(1, math.inf),  # 1 is the cost of always-large
        "gap_eps": at_least(0),
    }

    cost_weight: float = 0.3
    """lambda."""
    hard_bonus: float = 1.0
    """beta."""
    cost_norm: str = "boundary"
    gate_cost_on_success: bool = False
    c_max: float = 2.0
    gap_eps: float = 0.1

    def __post_init__(self) -> None:
        if self.cost_norm not in COST_NORMS:
            raise ValueError(f"cost_norm={self.cost_norm!r} is not one of {', '.join(COST_NORMS)}")
        check_numbers(self)

    def normalised(self, cost: float, boundary: Boundary, budget: float | None = None) -> float:
        """C_norm of a cost in USD. A boundary that costs nothing at all makes every cost above 0 count c_max."""
        small, large = boundary.cost_small, boundary.cost_large
        if self.cost_norm == "budget":
            if budget is None:
                raise ValueError("cost_norm 'budget' needs the budget of the episode")
            return self._clipped(cost, budget)
        if self.cost_norm == "large":
            return self._clipped(cost, large)
        if self.cost_norm == "boundary" and large - small > self.gap_eps * small:
            return self._clipped(cost - small, large - small)
        return self._clipped(cost, max(small, large))

    def _clipped(self, numerator: float, denominator: float) -> float:
        if denominator <= 0:
            return self.c_max if numerator > 0 else 0.0
        return min(max(numerator / denominator, 0.0), self.c_max)

    def __call__(self, success: float, cost: float, boundary: Boundary, budget: float | None = None) -> float:
        """R of one trajectory: success in [0, 1], cost and budget in USD."""
        charged = self.cost_weight * self.normalised(cost, boundary, budget)
        gate = success if self.gate_cost_on_success else 1.0
        return success * (1 + self.hard_bonus * boundary.hard) - gate * charged

    def references(self, boundary: Boundary, budget: float | None = None) -> tuple[float, float]:
        """(R_S, R_L)."""
        return (
            self(boundary.p_small, boundary.cost_small, boundary, budget),
            self(boundary.p_large, boundary.cost_large, boundary, budget),
        )


def make_boundary_reward(rule: BoundaryReward) -> Callable[..., list[float | None]]:
    """A reward function `boundary_reward` for TRL, from the columns `correct`, `cost` and the row's profile.

    Columns p_small, p_large, cost_small, cost_large and hard are the fields of `Boundary`; `budget` (USD) is read by
    `cost_norm="budget"` only. A row with correct None was lost and gets None.

    Raises:
        ValueError: when called, for a value that is missing, not finite or out of range; it names the row.
    """

    def boundary_reward(
        completions: Sequence[Any],
        correct: Sequence[float | None],
        cost: Sequence[float],
        p_small: Sequence[float],
        p_large: Sequence[float],
        cost_small: Sequence[float],
        cost_large: Sequence[float],
        hard: Sequence[bool],
        budget: Sequence[float | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        n = len(completions)
        rates = [numbers(name, v, n, 0.0, 1.0, **columns) for name, v in (("p_small", p_small), ("p_large", p_large))]
        means = [
            numbers(name, v, n, 0.0, math.inf, **columns)
            for name, v in (("cost_small", cost_small), ("cost_large", cost_large))
        ]
        lost = [value is None for value in correct]
        successes = numbers("correct", [0.0 if v is None else v for v in correct], n, 0.0, 1.0, **columns)
        spent = numbers("cost", [0.0 if gone else c for c, gone in zip(cost, lost, strict=True)], n, 0.0, math.inf)
        rewards: list[float | None] = []
        for i in range(n):
            if not isinstance(hard[i], bool):
                raise ValueError(f"{where(i, **columns)}: hard is {hard[i]!r}; it must be true or false")
            boundary = Boundary(rates[0][i], rates[1][i], means[0][i], means[1][i], hard[i])
            reward = rule(successes[i], spent[i], boundary, None if budget is None else budget[i])
            rewards.append(None if lost[i] else reward)
        return rewards

    return boundary_reward


def cheap_failure_pays(rule: BoundaryReward, hard: Iterable[tuple[Boundary, float | None]]) -> str | None:
    """A warning in words where the price of cost is too high for the Hard tasks' boundaries; None where it is not.

    Failing at the cost of always-small earns as much as always-large, R_L, where lambda gap >= (1 + beta) p_L. The gap
    is the normalised cost between the two; or, where cost is charged on success only, p_L times that of always-large.
    In our tabular simulation that bare inequality was not enough: up to a ratio of `SAFE_RATIO` some runs collapsed to
    always-small.

    Args:
        hard: a Hard task's boundary, and its episodes' budget in USD, which cost_norm "budget" reads. A task that
            always-large never solved says nothing about lambda: no price makes it worth the expensive executor.
    """
    ratios = []
    for boundary, budget in hard:
        if boundary.p_large == 0:
            continue
        gap = rule.normalised(boundary.cost_large, boundary, budget)
        if rule.gate_cost_on_success:
            gap *= boundary.p_large
        else:
            gap -= rule.normalised(boundary.cost_small, boundary, budget)
        price = rule.cost_weight * gap
        ratios.append(math.inf if price <= 0 else (1 + rule.hard_bonus) * boundary.p_large / price)
    pays = sum(ratio <= 1 for ratio in ratios)
    close = sum(ratio < SAFE_RATIO for ratio in ratios)
    if not close:
        return None
    return (
        f"cost_weight={rule.cost_weight:g} is too high: on {pays} of {len(ratios)} Hard tasks failing cheaply earns "
        f"at least as much as always-large, on {close} ({close / len(ratios):.0%}) it comes within a factor of "
        f"{SAFE_RATIO:g}. The policy may learn to fail cheaply: lower cost_weight, raise "
        f"hard_bonus={rule.hard_bonus:g}, or charge cost on success only (gate_cost_on_success)"
    )
