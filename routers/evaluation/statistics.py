"""How good is a routing policy? Accuracy, cost and reward of its routes beside every single member, random and oracle.

Everything here is a pure function of arrays: what each member's reply to each held-out query scored and cost, and whom
the policy chose. Intervals are 95 % percentile bootstraps over queries; all rows of one evaluation share the same
resamples, so differences are paired. The same arguments always give the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from routers.evaluation.episodes import RewardRule

RESAMPLES = 2000
PER_QUERIES = 1000
"""Costs are reported in USD per this many queries."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcomes:
    """What happened on each query, arrays ``[Q]``; ``cost`` is USD per query, the policy's own tokens included."""

    correct: np.ndarray
    cost: np.ndarray
    reward: np.ndarray


@dataclass(frozen=True)
class Score:
    """One row of the result; costs are USD per 1,000 queries.

    ``kind`` is "policy", "member", "random", "baseline" or "oracle".
    ``share`` is the fraction of all queries that went to each member (the rest had no valid action), ``entropy`` that
    of the valid routes in nats, ``families`` the accuracy per task family.
    """

    name: str
    kind: str
    accuracy: Estimate
    cost: Estimate
    reward: Estimate
    format_rate: float
    entropy: float
    share: dict[str, float]
    families: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """Policy minus the best single member (by held-out reward, the choice that favours the member), paired by query.

    ``mixing`` is the accuracy that tossing a coin between members reaches at the policy's cost.
    """

    member: str
    accuracy: Estimate
    cost: Estimate
    reward: Estimate
    mixing: float


def resamples(queries: int, seed: int = 0, count: int = RESAMPLES) -> np.ndarray:
    """How often each query is drawn in each bootstrap resample, ``[count, queries]``; rows sum to ``queries``."""
    if queries < 1:
        raise ValueError("there are no queries to evaluate")
    return np.random.default_rng(seed).multinomial(queries, np.full(queries, 1 / queries), size=count)


def estimate(values: np.ndarray, draws: np.ndarray) -> Estimate:
    """Mean of ``values [Q]`` with the 95 % interval of its mean over ``draws [B, Q]``."""
    low, high = np.quantile(draws @ values / len(values), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def play(
    routes: np.ndarray, correct: np.ndarray, cost: np.ndarray, own_cost: np.ndarray, rule: RewardRule
) -> Outcomes:
    """Outcomes of ``routes [Q]`` (member index, -1 = no valid action) on ``correct`` and ``cost [Q, M]``.

    ``own_cost [Q]`` is what the policy's own tokens cost, USD; it is paid for invalid actions too.

    Raises:
        ValueError: shapes differ, or a route that is no member.
    """
    queries, members = correct.shape
    if cost.shape != correct.shape or routes.shape != (queries,) or own_cost.shape != (queries,):
        raise ValueError(f"shapes differ: {routes.shape}, {correct.shape}, {cost.shape}, {own_cost.shape}")
    if ((routes < -1) | (routes >= members)).any():
        raise ValueError(f"a route is outside -1..{members - 1}")
    valid = routes >= 0
    index = np.maximum(routes, 0)[:, None]
    right = np.where(valid, np.take_along_axis(correct, index, 1)[:, 0], 0.0)
    paid = np.where(valid, np.take_along_axis(cost, index, 1)[:, 0], 0.0) + own_cost
    return Outcomes(right, paid, rule(right, paid, valid))


def expect(correct: np.ndarray, cost: np.ndarray, rule: RewardRule) -> Outcomes:
    """Exact expectation of choosing a member uniformly at random for each query."""
    return Outcomes(correct.mean(1), cost.mean(1), rule(correct, cost).mean(1))


def oracle_routes(correct: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """The cheapest of the members that are most right, per query; where nobody is right, the cheapest of all."""
    best = correct.max(axis=1, keepdims=True)
    return np.argmin(np.where(correct == best, cost, np.inf), axis=1)


def family_routes(train_families: Sequence[str], train_rewards: np.ndarray, families: Sequence[str]) -> np.ndarray:
    """The member that earned most on a query's family in training, ``[Q]``; for a new family, the best of all.

    A bar for policies: it is *told* the family of every query, which a policy has to read off the text.

    Args:
        train_families: family of each training query.
        train_rewards: ``[train queries, M]``.
        families: family of each query to route.
    """
    labels = np.array(train_families)
    best = {family: int(train_rewards[labels == family].mean(0).argmax()) for family in dict.fromkeys(train_families)}
    overall = int(train_rewards.mean(0).argmax())
    return np.array([best.get(family, overall) for family in families], dtype=int)


def pareto_hull(cost: np.ndarray, accuracy: np.ndarray) -> list[int]:
    """Points that random mixing cannot beat: the upper concave hull from the cheapest to the most accurate point.

    Args:
        cost, accuracy: ``[N]``. Of equal points the first counts.

    Returns:
        Indices in order of rising cost; accuracy rises along them, and the slope falls.
    """
    hull: list[int] = []
    for i in sorted(range(len(cost)), key=lambda j: (cost[j], -accuracy[j], j)):
        if hull and accuracy[i] <= accuracy[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (accuracy[b] - accuracy[a]) * (cost[i] - cost[a]) > (accuracy[i] - accuracy[a]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def mixing_accuracy(cost: np.ndarray, accuracy: np.ndarray, at: float) -> float:
    """Accuracy on the points' mixing line at cost ``at``; below the cheapest, on the way from asking nobody (0, 0)."""
    hull = pareto_hull(cost, accuracy)
    if cost[hull[0]] > 0:
        return float(np.interp(at, [0.0, *cost[hull]], [0.0, *accuracy[hull]]))
    return float(np.interp(at, cost[hull], accuracy[hull]))


def route_entropy(share: np.ndarray) -> float:
    """Entropy in nats of shares or counts; 0 for none."""
    share = share[share > 0]
    return float(-(share / share.sum() * np.log(share / share.sum())).sum()) + 0.0 if len(share) else 0.0


def score(
    name: str,
    kind: str,
    outcomes: Outcomes,
    share: np.ndarray,
    draws: np.ndarray,
    members: Sequence[str],
    families: Sequence[str],
) -> Score:
    """Summarise one way of routing. ``share [M]``: fraction of all queries per member; ``families [Q]``: names."""
    labels = np.array(families)
    return Score(
        name=name,
        kind=kind,
        accuracy=estimate(outcomes.correct, draws),
        cost=estimate(outcomes.cost * PER_QUERIES, draws),
        reward=estimate(outcomes.reward, draws),
        format_rate=float(share.sum()),
        entropy=route_entropy(share),
        share={member: float(part) for member, part in zip(members, share, strict=True)},
        families={f: float(outcomes.correct[labels == f].mean()) for f in dict.fromkeys(families)},
    )


def reference_scores(
    correct: np.ndarray,
    cost: np.ndarray,
    members: Sequence[str],
    families: Sequence[str],
    rule: RewardRule,
    draws: np.ndarray,
    baselines: Mapping[str, np.ndarray] | None = None,
) -> list[Score]:
    """Every single member, random, baselines (name -> member index ``[Q]``) and the oracle, in this order.

    ``correct`` and ``cost`` are ``[Q, M]``.
    """
    queries, count = correct.shape
    free, one_hot = np.zeros(queries), np.eye(count)
    scores = []
    for i, member in enumerate(members):
        outcomes = play(np.full(queries, i), correct, cost, free, rule)
        scores.append(score(member, "member", outcomes, one_hot[i], draws, members, families))
    uniform = np.full(count, 1 / count)
    scores.append(score("random", "random", expect(correct, cost, rule), uniform, draws, members, families))
    for name, routes in [*(baselines or {}).items(), ("oracle", oracle_routes(correct, cost))]:
        outcomes = play(routes, correct, cost, free, rule)
        share = np.bincount(routes, minlength=count) / queries
        kind = "oracle" if name == "oracle" else "baseline"
        scores.append(score(name, kind, outcomes, share, draws, members, families))
    return scores


def difference(policy: Outcomes, member: Outcomes, name: str, mixing: float, draws: np.ndarray) -> Difference:
    """Paired bootstrap of policy minus member on the same queries."""
    return Difference(
        member=name,
        accuracy=estimate(policy.correct - member.correct, draws),
        cost=estimate((policy.cost - member.cost) * PER_QUERIES, draws),
        reward=estimate(policy.reward - member.reward, draws),
        mixing=mixing,
    )


@dataclass(frozen=True)
class SeedSummary:
    """Several seeds of one recipe: per metric the mean with its interval, and the value of each seed."""

    estimates: dict[str, Estimate]
    per_seed: dict[str, list[float]]


def summarise_seeds(runs: Sequence[Mapping[str, np.ndarray]], seed: int = 0, count: int = RESAMPLES) -> SeedSummary:
    """Mean over seeds, with a bootstrap that draws both seeds and queries.

    Args:
        runs: one mapping per seed, metric -> values per query ``[Q]``; all on the same queries in the same order.
        seed, count: of the bootstrap.

    Raises:
        ValueError: no run, or runs of different metrics or lengths.
    """
    if not runs:
        raise ValueError("there are no runs to summarise")
    shapes = [{metric: np.shape(values) for metric, values in run.items()} for run in runs]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"the runs are not on the same queries: {shapes}")
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=count) / len(runs)
    estimates, per_seed = {}, {}
    for metric, shape in shapes[0].items():
        values = np.stack([run[metric] for run in runs])
        draws = resamples(shape[0], seed, count)
        means = np.einsum("bs,bs->b", seeds, draws @ values.T / shape[0])
        low, high = np.quantile(means, [0.025, 0.975])
        estimates[metric] = Estimate(float(values.mean()), float(low), float(high))
        per_seed[metric] = [float(mean) for mean in values.mean(1)]
    return SeedSummary(estimates, per_seed)
