"""A routing policy trained by policy gradient on bandit feedback, while it decides.

    pi(a | x) = mean_k softmax( x'(theta_ak + U_a) / T )            theta_k: K draws from the critic's posterior
    J(U)      = sum_ia pi_U(a | x_i) R_ia - strength / 2 |U / B|^2,   pi_U = softmax( x'(theta_a + U_a) / B )

R is the doubly robust credit of all that was logged (`routers.evaluation.off_policy`): the critic's guess without the
row's own reward (`routers.baselines.critic`), corrected by what came of the choice over its propensity, which the
policy knows, as it drew the choice. U climbs the exact gradient of J, which is REINFORCE's with the critic as control
variate, averaged over actions; it counts only where it gains more than two standard errors on a fifth of the rows
that it did not climb, else it is 0. The draws explore, as much as the critic is unsure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import softmax

from routers.baselines.critic import Critic
from routers.baselines.descent import minimised
from routers.baselines.online import Learner
from routers.evaluation.off_policy import doubly_robust

MOST = 20_000
"""Outcomes that are kept to climb on: the last ones."""


class PolicyGradient(Learner):
    """See above. `seen` holds rows of context, who was asked, what it earned and its propensity.

    `scale` and `temperature` were chosen on RouteLLM-GSM8K, GSM8K's four models and LLMRouter's NQ pool, for all other
    sets.
    """

    grid = tuple({"scale": s, "directions": d} for s in (0.05, 0.1, 0.2, 0.5) for d in (16, 32, 64))
    epsilon = None
    directions, heads, scale, temperature = 32, 16, 0.5, 0.01
    """Of the query that are read; K; of the posterior's deviation (at 0.2 one of five streams starved members); T."""
    breadth, strength, clip = 0.1, 1.0, 10.0
    """B; of the penalty; greatest weight."""
    every, growth = 4, 0.05
    """The critic learns after so many outcomes, or this share of all so far; U after twice as many."""

    def start(self, contexts: np.ndarray, members: int, seed: int) -> None:
        width = contexts.shape[1]
        self.critic, self.seed = Critic(width, members), seed
        self.actor = np.zeros((members, width))
        self.seen, self.recent = np.zeros((0, width + 3)), np.zeros((0, width + 3))
        self.climbed = 0
        self.drawn = self.critic.draws(np.random.default_rng([seed, 0]), int(self.heads), self.scale)

    def values(self, x: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """``[M]`` without `rng`; else ``[K, M]``, of every draw."""
        theta = self.critic.theta if rng is None else self.drawn
        return np.asarray((theta + self.actor) @ x)

    def chances(self, x: np.ndarray, rng: np.random.Generator | None, columns: Sequence[int]) -> np.ndarray:
        values = self.values(x, rng)[..., columns]
        if rng is None:
            return np.eye(len(columns))[values.argmax()]
        return np.asarray(softmax(values / self.temperature, axis=1).mean(axis=0))

    def learn(self, x: np.ndarray, chosen: int, reward: float, score: float, usd: float, chance: float) -> None:
        row = np.append(x, (chosen, reward, chance))
        self.recent = np.vstack([self.recent, row])
        if len(self.recent) < max(self.every, self.growth * self.critic.count):
            return
        self.critic.add(self.recent[:, :-3], self.recent[:, -3].astype(int), self.recent[:, -2])
        self.critic.fit()
        self.seen, self.recent = np.vstack([self.seen, self.recent])[-MOST:], self.recent[:0]
        lots = np.random.default_rng([self.seed, self.critic.count])
        self.drawn = self.critic.draws(lots, int(self.heads), self.scale)
        if self.critic.count >= 2 * self.climbed:
            self.climbed = self.critic.count
            self.climb()

    def climb(self) -> None:
        """Train U anew on all that was seen."""
        x, chosen, (reward, chance) = self.seen[:, :-3], self.seen[:, -3].astype(int), self.seen[:, -2:].T
        credit = doubly_robust(self.critic.left_out(x, chosen, reward), chosen, reward, chance, self.clip)
        order = np.random.default_rng([self.seed, len(x)]).permutation(len(x))
        held, own = order[: len(x) // 5], order[len(x) // 5 :]
        before = x @ self.critic.theta.T / self.breadth

        def loss(actor: np.ndarray) -> tuple[float, list[np.ndarray]]:
            pi = softmax(before[own] + x[own] @ actor.T, axis=1)
            earned = (pi * credit[own]).sum(axis=1, keepdims=True)
            return -float(earned.sum()), [-(pi * (credit[own] - earned)).T @ x[own]]

        [actor] = minimised(loss, [np.zeros_like(self.actor)], self.strength, most=50)
        after = before[held] + x[held] @ actor.T
        gain = ((softmax(after, axis=1) - softmax(before[held], axis=1)) * credit[held]).sum(axis=1)
        sure = len(held) > 1 and gain.mean() > 2 * gain.std(ddof=1) / len(held) ** 0.5
        self.actor = self.breadth * actor if sure else np.zeros_like(actor)
