"""Reward parts by the names that a recipe gives them: `rewards: [{correctness: 1.0}, {cost: 0.2}, {format: 0.2}]`.

To add one: write the function in a file of this package, and give it a line in `REWARDS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.answer import make_answer_reward
from rewards.correctness import correctness_reward
from rewards.cost import make_cost_reward
from rewards.format import format_reward, make_invalid_action_reward
from rewards.schemes import Rewards


@dataclass(frozen=True)
class Facts:
    """What a part may need to know of the run."""

    scale_usd: float
    """USD that count as 1."""
    per_prompt: bool = False
    """Every row brings its own `cost_weight`, which its prompt states."""


REWARDS: dict[str, Callable[[Facts], Callable[..., Any]]] = {
    "correctness": lambda _: correctness_reward,
    "cost": lambda facts: make_cost_reward(facts.scale_usd, per_prompt=facts.per_prompt),
    "format": lambda _: format_reward,
    "invalid_action": lambda _: make_invalid_action_reward(),
    "em": lambda _: make_answer_reward("em"),
    "f1": lambda _: make_answer_reward("f1"),
}


def check_rewards(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Name -> weight, in order.

    Raises:
        ValueError: an entry that is not one `name: weight`, a name twice, an unknown name (with the nearest), or a
            weight that is not a positive number.
    """
    weights: dict[str, float] = {}
    for part in parts:
        if not isinstance(part, Mapping) or len(part) != 1:
            raise ValueError(f"rewards: {part!r} is not one `name: weight`")
        [(name, weight)] = part.items()
        if name not in REWARDS:
            [close] = difflib.get_close_matches(str(name), REWARDS, n=1, cutoff=0.0)
            raise ValueError(f"rewards: there is no {name!r}, the nearest is {close!r}; {', '.join(REWARDS)}")
        if name in weights:
            raise ValueError(f"rewards: {name} is given twice")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"rewards: {name} has the weight {weight!r}; it must be a positive number")
        weights[name] = float(weight)
    if not weights:
        raise ValueError("rewards: give at least one part")
    return weights


def make_rewards(weights: Mapping[str, float], facts: Facts) -> Rewards:
    """Reward functions and their weights, as `check_rewards` returned them."""
    return [REWARDS[name](facts) for name in weights], list(weights.values())
