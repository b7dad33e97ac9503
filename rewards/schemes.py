"""Whole rewards of a think/route agent: functions, and the weights for ``GRPOConfig.reward_weights``.

TRL logs every function by itself, so the parts of a reward are seen apart. Each scheme keeps, for answers graded 0 or
1: right > wrong at any cost, and wrong >= any completion with a format error and no valid answer. ``c`` below is
``cost / scale_usd``; the scale is a constant, such as ``routers.tasks.think_route.environment.cost_scale``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rewards.answer import make_answer_reward
from rewards.cost import make_cost_reward
from rewards.format import format_reward, make_invalid_action_reward

Rewards = tuple[list[Callable[..., Any]], list[float]]


def router_r1_rewards(scale_usd: float, alpha: float | None = 0.0) -> Rewards:
    """-1 for a format error; else 0 if wrong, and ``(1 - alpha) * 1 + alpha * (1 - min(c, 1))`` if right.

    Router-R1's hierarchy (verl/trainer/main_ppo.py). There the cost is the square root of output tokens x price, cut
    and scaled by percentiles of the last 1000 trajectories; here it is linear in all dollars, by a constant.

    Args:
        scale_usd: see above.
        alpha: 0 to below 1; None takes each row's column ``cost_weight``, which its prompt states.
    """
    weight = _weight("alpha", alpha)
    parts = [
        make_answer_reward(needs_format=True),
        format_reward,
        make_cost_reward(scale_usd, on_success=True, needs_format=True, per_prompt=alpha is None),
    ]
    return parts, [1.0, 1.0, weight]


def xrouter_rewards(scale_usd: float, lam: float = 3.0, cap: float = 0.8, K: float = 1.0) -> Rewards:
    """``score * (K - min(lam * c, cap))``, and -1 for a format error.

    xRouter (SalesforceAIResearch/xRouter, verl/recipe/dapo; its script's numbers are the defaults). Its cost is in
    USD: ``scale_usd=1.0`` is the published form. The format part is ours; xRouter calls tools.

    Raises:
        ValueError: unless ``0 < cap < K`` and ``lam > 0``.
    """
    if not (0 < cap < K < math.inf and 0 < lam < math.inf):
        raise ValueError(f"lam={lam}, cap={cap}, K={K}: use lam > 0 and 0 < cap < K, or a wrong answer could win")
    parts = [
        make_answer_reward(needs_format=True),
        format_reward,
        make_cost_reward(scale_usd, limit=cap / lam, on_success=True, needs_format=True),
    ]
    return parts, [K, 1.0, lam]


def additive_rewards(
    scale_usd: float, cost_weight: float | None = 0.2, format_weight: float = 1.0, invalid_penalty: float = 0.25
) -> Rewards:
    """``score - cost_weight * min(c, 1) - format_weight * min(1, invalid_penalty * invalid turns)``.

    Wrong answers pay for their calls too, so a weight is a price: dollars against the chance of being right.

    Args:
        scale_usd: see above.
        cost_weight: 0 to below 1; None takes each row's column ``cost_weight``, which its prompt states: one
            checkpoint then serves a whole frontier.
        format_weight: at least the cost weight (at least 1 with None): else asking nobody in a broken form could earn
            more than an honest try that is wrong.
        invalid_penalty: see `rewards.format.make_invalid_action_reward`; 1.0 is Router-R1's all or nothing.

    Raises:
        ValueError: weights that would turn that order round.
    """
    weight = _weight("cost_weight", cost_weight)
    if not weight <= format_weight < math.inf:
        raise ValueError(f"format_weight={format_weight} is below the cost weight ({weight}): silence could win")
    parts = [
        make_answer_reward(),
        make_invalid_action_reward(invalid_penalty),
        make_cost_reward(scale_usd, per_prompt=cost_weight is None),
    ]
    return parts, [1.0, format_weight, weight]


def _weight(name: str, value: float | None) -> float:
    """The constant weight of the cost part; 1 where every row brings its own."""
    if value is None:
        return 1.0
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: must lie in [0, 1), or a cheap wrong answer could win")
    return float(value)
