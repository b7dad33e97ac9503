"""A policy on held-out queries of a reply table: whom it asks, greedily, and what the recorded replies make of it."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from routers.baselines.from_log import outcomes_of
from routers.baselines.play import spread_of, table_header
from routers.data.billing import token_usd
from routers.data.table import ReplyTable
from routers.evaluation.episodes import Episodes, Outcomes, RewardRule, named_as
from routers.router import Router
from routers.tasks.query_routing.router import routing
from routers.tasks.query_routing.settings import QuerySettings
from srpo.task import Share

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ABSTAIN = "(nobody)"
"""The member that an abstaining policy is shown to ask."""
OUT_OF_DOMAIN = "out_of_domain"
"""Family of the queries that nobody of the pool shall answer."""


def evaluate_policy(
    model: PreTrainedModel | Router,
    tokenizer: PreTrainedTokenizerBase,
    table: ReplyTable,
    settings: QuerySettings,
    *,
    name: str,
    rule: RewardRule,
    share: Share | None = None,
    limit: int | None = None,
    split: str = "heldout",
    places: np.ndarray | None = None,
    policy_price: tuple[float, float] = (0.0, 0.0),
    cost_weight: float | None = None,
    abstain_reward: float | None = None,
) -> Episodes:
    """Let the policy route the queries of a split, greedily, and compare its routes with the recorded outcomes.

    Args:
        model, tokenizer: the policy; its mode (train or eval) is left as it was, and no random number is drawn. A
            `Router` in place of a model decides as it is.
        table: the pool; on a log the outcomes are estimates.
        settings: how the policy is asked; a turn that does not end within its tokens is not valid.
        name: how tables call the policy (`routers.evaluation.episodes.named_as`).
        rule: the training reward.
        share: of the queries, for this process; None: all of them.
        limit: this many queries only, spread evenly over the split (which lists one family after the other).
        split: "heldout" or "train".
        places: of the queries of the split, in place of a `limit`.
        policy_price: USD per million prompt and completion tokens of the policy itself.
        cost_weight: the price sensitivity that prompts state, for policies that were trained with some.
        abstain_reward: of routing nobody, where that is an action; None: it is invalid.

    Raises:
        ValueError: the split has no queries.
    """
    chosen = (spread_of(table, split, limit) if places is None else places).tolist()
    known = outcomes_of(table, rule, split, chosen if share is None else share.of(chosen))
    deciding: Any = nullcontext(model) if isinstance(model, Router) else routing(model, tokenizer, settings)
    with deciding as router:
        decisions = router.route_all([query["query"] for query in known.items], cost_weight=cost_weight)
    routes = [decision.members[0] if decision.members else None for decision in decisions]
    if abstain_reward is not None:
        known, routes = with_abstaining(known, abstain_reward), [route or ABSTAIN for route in routes]
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


def with_abstaining(known: Outcomes, reward: float) -> Outcomes:
    """The same with a member `ABSTAIN`, who costs nothing and is right on what is `OUT_OF_DOMAIN` alone."""
    right = np.array([[float(item.get("family") == OUT_OF_DOMAIN)] for item in known.items])
    new = ((known.score, right), (known.usd, 0 * right), (known.reward, 0 * right + reward))
    score, usd, earned = (np.hstack(pair) for pair in new)
    return Outcomes(known.items, [*known.members, ABSTAIN], score, usd, earned, rule=known.rule)


def guarded(episodes: Episodes) -> str:
    """A line per router: accuracy in and out of domain, and their harmonic mean (GQR-Bench, arXiv 2505.14524); "": no
    item is of the family `OUT_OF_DOMAIN`."""
    frame, lines = episodes.frame, []
    outside = frame["family"] == OUT_OF_DOMAIN
    for name in episodes.routers if outside.any() and not outside.all() else ():
        own = frame["router"] == name
        means = [float(frame.loc[own & part, "score"].mean()) for part in (~outside, outside)]
        score = 2 * means[0] * means[1] / sum(means) if any(means) else 0.0
        lines.append(f"- {name}: in domain {means[0]:.1%}, out of domain {means[1]:.1%}, harmonic mean {score:.1%}")
    return "\n".join(["**Guarded routing**", "", *lines, ""]) if lines else ""
