"""The cost reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rewards.columns import numbers


def make_cost_reward(scale_usd: float) -> Callable[..., list[float]]:
    """A reward function ``cost_reward``: ``-cost / scale_usd``, clipped to [-1, 0].

    The scale is a constant of the run, not a running statistic: a reward never depends on order, history or resuming.
    Costs above the scale all count -1, so take a scale that is rarely exceeded, such as ``ReplyTable.max_cost``.

    Args:
        scale_usd: the cost of one completion that counts as 1, USD.

    Raises:
        ValueError: the scale is not a positive number; and, when called, names the row whose cost is missing, not
            finite or negative.
    """
    if not math.isfinite(scale_usd) or scale_usd <= 0:
        raise ValueError(f"the cost scale is {scale_usd!r} USD; it must be a positive number")

    def cost_reward(completions: Sequence[Any], cost: Sequence[float], **columns: Any) -> list[float]:
        costs = numbers("cost", cost, len(completions), 0.0, math.inf, **columns)
        return [-min(value / scale_usd, 1.0) for value in costs]

    return cost_reward
