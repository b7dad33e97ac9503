"""The value of policies, and credit for their training, from a log that tells the outcome of who was asked only.

    w_ia = [a = a_i] min(1 / p_i, C)              p_i: the probability with which a_i was asked, C = CLIP
    R_ia = q_ia + w_ia (r_i - q_ia)               doubly robust: q_ia a guess that did not see r_i nor a_i
    V_dr    = 1/N sum_ia pi(a | x_i) R_ia
    V_ips   = 1/N sum_ia pi(a | x_i) w_ia r_i                     inverse propensity scoring: q = 0
    V_snips = V_ips / (1/N sum_ia pi(a | x_i) w_ia)               self-normalised

R is a matrix like a complete table's: whatever is linear in rewards, as an expected reward, an advantage over a mean
and a policy gradient are, has the same expectation under it as under the truth, if C never cuts or q is right. Where
C cuts, the bias of V_dr is ``-1/N sum_ia pi(a | x_i) max(0, 1 - C p(a | x_i)) (r_ia - q_ia)``: at most `cut`, the
share of pi's choices that it takes away, times the largest error of q. A member with propensity 0 may never be asked.

Sources: Dudik, Langford, Li (ICML 2011, arXiv 1103.4601); Swaminathan, Joachims (NeurIPS 2015, self-normalised). The
clip is of 1/p and not of pi/p, as most clip, so that R is one matrix for every policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from routers.data.table import ReplyTable
from routers.evaluation.episodes import Outcomes, RewardRule

if TYPE_CHECKING:  # pandas is slow to import
    from routers.evaluation.statistics import Estimate, Paired

CLIP = 100.0
"""Greatest weight."""
IPS, WEIGHT, CUT = "reward by IPS", "weight in the log", "weight that was cut"
"""Columns of episodes on a log: of the members asked `w r`, `w`, and an unbiased estimate of what the clip cut."""


@dataclass(frozen=True)
class Logged:
    """Decisions and what came of them.

    Args:
        items: dicts with query_id and query.
        members: names of the columns.
        chosen, propensity: ``[N]`` who was asked, as a column, and the probability with which it was, in (0, 1].
        score, usd: ``[N]`` of that member.
        rule: of the reward.
    """

    items: Sequence[Mapping[str, Any]]
    members: Sequence[str]
    chosen: np.ndarray
    propensity: np.ndarray
    score: np.ndarray
    usd: np.ndarray
    rule: RewardRule

    def __post_init__(self) -> None:
        if not ((self.propensity > 0) & (self.propensity <= 1)).all():
            raise ValueError("propensities must be above 0, and at most 1")

    @classmethod
    def of_table(
        cls,
        table: ReplyTable,
        rule: RewardRule,
        split: str = "heldout",
        some: Sequence[int] | np.ndarray | None = None,
    ) -> Logged:
        """Of the queries of a split; `some`: of these, by place in `table.queries(split)`."""
        queries = table.queries(split)
        rows = np.arange(len(queries)) if some is None else np.asarray(some, dtype=int)
        propensity, score, usd = (table.told(name, split)[rows] for name in ("propensity", "correct", "cost"))
        items = [queries[i] for i in rows]
        return cls(items, table.members, table.asked(split)[rows], propensity, score, usd, rule)

    @property
    def costs(self) -> np.ndarray:
        """``[N]`` in cost scales, at most 1: what rewards subtract."""
        return np.minimum(self.usd / self.rule.cost_scale, 1.0)

    def rows(self, rows: np.ndarray) -> Logged:
        """These, by place."""
        own = {name: getattr(self, name)[rows] for name in ("chosen", "propensity", "score", "usd")}
        return replace(self, items=[self.items[i] for i in rows], **own)

    def credit(self, foretold: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """R of the file's head for one number per row, `seen`, and its guesses ``[N, M]``."""
        return doubly_robust(foretold, self.chosen, seen, self.propensity)

    def outcomes(self, score: np.ndarray, cost: np.ndarray) -> Outcomes:
        """Estimated outcomes of all members, to play policies on: means of `Episodes` of it are estimates of values.

        Args:
            score, cost: ``[N, M]`` guesses that saw no outcome of these rows; cost in cost scales, at most 1.
        """
        usd = self.credit(cost * self.rule.cost_scale, self.usd)
        score, cost = self.credit(score, self.score), self.credit(cost, self.costs)
        none = np.zeros_like(score)
        weight = self.credit(none, np.ones(len(self.items)))
        earned = self.credit(none, self.rule(self.score, self.usd))
        reward = score - self.rule.cost_weight * cost
        cut = none.copy()
        cut[np.arange(len(cut)), self.chosen] = np.maximum(1 / self.propensity - CLIP, 0)
        return Outcomes(self.items, self.members, score, usd, reward, {IPS: earned, WEIGHT: weight, CUT: cut})


def doubly_robust(
    foretold: np.ndarray, chosen: np.ndarray, reward: np.ndarray, propensity: np.ndarray, clip: float = CLIP
) -> np.ndarray:
    """R of the file's head, ``[N, M]``; with `foretold` 0 it is that of inverse propensity scoring.

    Args:
        foretold: ``[N, M]`` any guess of the rewards that does not depend on the row's own.
        chosen: ``[N]`` the member that was asked.
        reward, propensity: ``[N]`` what it earned, and the probability with which it was chosen.
        clip: greatest weight.
    """
    rows = np.arange(len(chosen))
    found = np.array(foretold, dtype=float)
    found[rows, chosen] += (reward - found[rows, chosen]) * np.minimum(1 / propensity, clip)
    return found


@dataclass(frozen=True)
class Value:
    """What a policy would earn, by three estimators, and the share of its choices that the clip cut."""

    dr: Estimate
    ips: Estimate
    snips: Estimate
    cut: float


def value_of(episodes: Paired, router: str) -> Value:
    """Of a router that was played on `Logged.outcomes`."""
    reward, ips, weight, cut = (episodes.values(router, name) for name in ("reward", IPS, WEIGHT, CUT))
    draws = episodes.draws
    return Value(draws.estimate(reward), draws.estimate(ips), draws.estimate(ips, weight), float(cut.mean()))
