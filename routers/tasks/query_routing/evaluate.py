"""A policy on held-out queries of a reply table: whom it asks, greedily, and what the recorded replies make of it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from routers.baselines.play import spread_of, table_header
from routers.data.billing import token_usd
from routers.data.table import ReplyTable
from routers.evaluation.episodes import Episodes, Outcomes, RewardRule, named_as
from routers.tasks.query_routing.router import routing
from routers.tasks.query_routing.settings import QuerySettings
from srpo.task import Share

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    table: ReplyTable,
    settings: QuerySettings,
    *,
    name: str,
    rule: RewardRule,
    share: Share | None = None,
    limit: int | None = None,
    split: str = "heldout",
    policy_price: tuple[float, float] = (0.0, 0.0),
    cost_weight: float | None = None,
) -> Episodes:
    """Let the policy route the queries of a split, greedily, and compare its routes with the recorded outcomes.

    Args:
        model, tokenizer: the policy; its mode (train or eval) is left as it was, and no random number is drawn.
        table: the pool.
        settings: how the policy is asked; a turn that does not end within its tokens is not valid.
        name: how tables call the policy (`routers.evaluation.episodes.named_as`).
        rule: the training reward.
        share: of the queries, for this process; None: all of them.
        limit: this many queries only, spread evenly over the split (which lists one family after the other).
        split: "heldout" or "train".
        policy_price: USD per million prompt and completion tokens of the policy itself.
        cost_weight: the price sensitivity that prompts state, for policies that were trained with some.

    Raises:
        ValueError: the split has no queries.
    """
    chosen = spread_of(table, split, limit).tolist()
    known = Outcomes.of_table(table, rule, split, chosen if share is None else share.of(chosen))
    with routing(model, tokenizer, settings) as router:
        decisions = router.route_all([query["query"] for query in known.items], cost_weight=cost_weight)
    routes = [decision.members[0] if decision.members else None for decision in decisions]
    if routes and not any(routes):
        print(
            f"warning: none of {len(routes)} turns names a member of this pool ({', '.join(table.members)}). Was the "
            f"policy trained on another pool, or are {settings.completion_tokens} new tokens too few? The first turn: "
            f"{decisions[0].text!r}",
            file=sys.stderr,
        )
    kind, curve = named_as(name)
    own_usd = np.array([token_usd(d.prompt_tokens, d.completion_tokens, *policy_price) for d in decisions])
    return known.play(name, kind, routes, own_usd=own_usd, curve=curve, header=table_header(rule, split, name))
