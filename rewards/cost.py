"""The cost reward."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from rewards.columns import numbers, texts


def make_cost_reward(
    scale_usd: float,
    *,
    limit: float = 1.0,
    on_success: bool = False,
    needs_format: bool = False,
    per_prompt: bool = False,
) -> Callable[..., list[float]]:
    """A reward function ``cost_reward``: ``-min(cost / scale_usd, limit)``, times what the switches say.

    The scale is a constant of the run, not a running statistic: a reward never depends on order, history or resuming.
    It is linear in dollars, so its weight is a price: an extra call pays where it adds more than
    ``weight * dollars / scale_usd`` to the chance of being right.

    Args:
        scale_usd: the cost of one completion that counts as 1, USD. Costs above ``limit`` scales all count the same,
            so take a scale that is rarely exceeded, such as ``ReplyTable.max_cost``.
        limit: the largest normalised cost.
        on_success: times the column ``correct``: only right answers pay (Router-R1, xRouter). A wrong answer then
            costs nothing, however dear it was.
        needs_format: with ``on_success``, a format error counts as not right, as in `make_answer_reward`.
        per_prompt: times the dataset's column ``cost_weight`` (0 to 1), which the prompt tells the policy.

    Raises:
        ValueError: the scale or the limit is not a positive number; and, when called, names the row whose column is
            missing, not finite or out of range.
    """
    for name, value in (("cost scale", scale_usd), ("limit", limit)):
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"the {name} is {value!r}; it must be a positive number")
    if needs_format and not on_success:
        raise ValueError("needs_format without on_success would make a format error free of cost")

    def cost_reward(completions: Sequence[Any], cost: Sequence[float], **columns: Any) -> list[float]:
        rows = len(completions)
        factors = [1.0] * rows
        if on_success:
            factors = numbers("correct", columns["correct"], rows, 0.0, 1.0, **columns)
        if needs_format:
            errors = texts("format_error", columns["format_error"], rows, **columns)
            factors = [0.0 if error else factor for factor, error in zip(factors, errors, strict=True)]
        if per_prompt:
            weights = numbers("cost_weight", columns["cost_weight"], rows, 0.0, 1.0, **columns)
            factors = [factor * weight for factor, weight in zip(factors, weights, strict=True)]
        costs = numbers("cost", cost, rows, 0.0, math.inf, **columns)
        return [-factor * min(value / scale_usd, limit) for factor, value in zip(factors, costs, strict=True)]

    return cost_reward


def warn_of_group_scale(scale_rewards: object, cost_weight: float) -> None:
    """Warn where advantages are divided by their group's std and cost is a part of the reward."""
    if scale_rewards in ("group", True) and cost_weight > 0:
        logging.getLogger(__name__).warning(
            "scale_rewards: group with a price of cost: where all answers of a group score alike only cost differs, "
            "and dividing by the group's std makes that as large as right against wrong, so that the policy may "
            "collapse to the cheapest member: set scale_rewards: none"
        )
