"""The recipe keys of query routing: pool and reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from rewards.registry import check_rewards
from srpo.ranges import Ranges, above, at_least, between, check_numbers
from srpo.settings import check_choices


@dataclass
class QueryRoutingArguments:
    """One turn per query: the policy names the member that answers it."""

    RANGES: ClassVar[Ranges] = {
        "cost_weight": between(0, 1, open_high=True),  # at 1 a cheap wrong answer could win
        "cost_weights": between(0, 1, open_high=True),
        "format_weight": at_least(0),
        "sft_temperature": above(0),
        "sft_foretold": between(0, 1),
        "word_dropout": between(0, 1, open_high=True),
        "abstain_reward": between(-1, 1),
    }

    table: str = field(
        default="quickstart",
        metadata={"help": "Recorded replies: quickstart, a parquet/jsonl/json/csv/tsv file, or a Hub id."},
    )
    catalogue: str | None = field(
        default=None,
        metadata={"help": "Members' prices and descriptors (YAML); default: catalogue.yaml beside the table."},
    )
    drop_incomplete: bool = field(
        default=False, metadata={"help": "Leave out queries of the table that lack a row of some member."}
    )
    mask_routes: bool | None = field(
        default=None,
        metadata={
            "help": "Sample and score the route among the members' names only, so that none can be invented. "
            "Default: yes, but where vLLM or continuous batching sample, which cannot. Evaluating and serving always "
            "do."
        },
    )
    show_members: bool | None = field(
        default=None,
        metadata={
            "help": "Begin every prompt with the pool's names, prices and descriptors. Default: yes, but for a policy "
            "made from nothing (tiny), which learns each name as a token of its own."
        },
    )
    on_collapse: str = field(
        default="warn",
        metadata={
            "help": "What happens when one member takes over 95 % of the sampled routes, though on the training "
            "queries routing earns more: warn, or stop the training.",
            "choices": ("warn", "stop"),
        },
    )
    sft_temperature: float = field(
        default=0.1,
        metadata={
            "help": "Members to imitate are drawn from softmax(utility / sft_temperature), utility = the reward of "
            "asking that member; higher: a start that is less sharp."
        },
    )
    sft_foretold: float = field(
        default=0.0,
        metadata={
            "help": "Share of the start's labels that is made, by the same formula, of what a ridge regression on the "
            "other training queries foretells of a query, in place of its own outcomes: labels with less chance in "
            "them."
        },
    )
    word_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Leave each word out of a training prompt's query with this probability, anew in every pass of "
            "start and RL, so that no query can be learned by heart."
        },
    )
    cost_weight: float = field(
        default=0.2, metadata={"help": "lambda in reward = correct - lambda * cost / dearest cost of the table."}
    )
    cost_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Several weights for one checkpoint: each training query draws one, which its prompt states and "
            "its reward takes. The policy is evaluated at each. Instead of cost_weight."
        },
    )
    abstain_reward: float | None = field(
        default=None,
        metadata={"help": "encoder: what it earns by asking nobody; default: it always asks somebody."},
    )
    exact_credit: bool = field(
        default=False,
        metadata={
            "help": "objective: grpo: the expected reward over all members, which the table knows, in place of that "
            "of members that are drawn. A language model's group holds each member after each of two thoughts or "
            "more: num_generations is at least twice the number of members."
        },
    )
    format_weight: float = field(default=0.2, metadata={"help": "Penalty for a completion without a valid route."})
    rewards: list[dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Parts of the reward by name (rewards/registry.py), in place of correctness 1, format_weight and "
            "cost_weight: [{correctness: 1.0}, {cost: 0.2}]. The evaluation's reward knows these three only."
        },
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choices(self)
        if self.cost_weights is not None and not self.cost_weights:
            raise ValueError("cost_weights needs at least one weight")
        self.reward_weights()

    def reward_weights(self) -> dict[str, float]:
        """Name of a part -> its weight; that of the cost is 1 where every query brings its own."""
        if self.rewards is not None:
            weights = check_rewards(self.rewards)
            if self.cost_weights is not None and "cost" not in weights:
                raise ValueError("cost_weights needs the part `cost` among rewards")
            return {**weights, **({"cost": 1.0} if self.cost_weights else {})}
        parts = {"correctness": 1.0, "format": self.format_weight, "cost": self.cost_weight}
        if self.cost_weights:
            parts["cost"] = 1.0
        return parts
