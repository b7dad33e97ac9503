"""Reward functions with TRL's signature ``f(completions, **columns) -> list[float | None]``.

Each is one part; the weights of ``GRPOConfig.reward_weights`` make the sum ``correct + w_f * format + lambda * cost``.
The columns come from the world that the policy acts in. With binary correctness, non-negative weights and
``lambda < 1``, a right answer always earns more than a wrong one, whatever both cost. Keep ``w_f >= lambda``:
otherwise an invalid action, which asks nobody, can earn more than an honest try that is wrong.

For think/route agents, `rewards.schemes` puts parts and weights together: Router-R1's, xRouter's, and a sum.
"""

from rewards.answer import make_answer_reward
from rewards.correctness import correctness_reward
from rewards.cost import make_cost_reward
from rewards.format import format_reward, make_invalid_action_reward
from rewards.schemes import additive_rewards, router_r1_rewards, xrouter_rewards

__all__ = [
    "additive_rewards",
    "correctness_reward",
    "format_reward",
    "make_answer_reward",
    "make_cost_reward",
    "make_invalid_action_reward",
    "router_r1_rewards",
    "xrouter_rewards",
]
