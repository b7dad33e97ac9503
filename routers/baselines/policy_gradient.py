"""A routing policy trained by policy gradient on bandit feedback, online or from a log.

The policy is a small ensemble of networks over the query's features. It climbs the doubly robust value of all that
was logged so far (`doubly_robust`): a regression per member foretells what everybody would have earned, and what the
member that was asked earned instead corrects it by its propensity. On the stream its logits start from the
regression's upper confidence bounds, so that it explores as LinUCB does and learns what a linear model cannot say.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import softmax

from routers.baselines.online import LinUCB

HEADS, HIDDEN = 4, 32
MOST = 20_000
"""Outcomes that are kept to learn from: the last ones."""


def doubly_robust(
    foretold: np.ndarray, chosen: np.ndarray, reward: np.ndarray, propensity: np.ndarray, clip: float = np.inf
) -> np.ndarray:
    """``[N, M]`` whose expectation over the logging policy is every member's true reward (Dudik et al. 2011).

    A matrix of rewards like that of a complete table: what is trained or evaluated on one is on the other. With
    `foretold` 0 it is inverse propensity scoring; with a finite `clip` it is biased towards `foretold`, and steadier.

    Args:
        foretold: ``[N, M]`` any guess of the rewards that does not depend on the row's own `chosen`.
        chosen: ``[N]`` the member that was asked.
        reward, propensity: ``[N]`` what it earned, and the probability with which it was chosen.
        clip: greatest weight ``1 / propensity``.
    """
    rows = np.arange(len(chosen))
    found = np.array(foretold, dtype=float)
    found[rows, chosen] += (reward - found[rows, chosen]) * np.minimum(1 / propensity, clip)
    return found


class Actor:
    """`heads` networks of one hidden layer, trained by Adam on bootstrap samples; the policy is their mean.

    Args:
        width, members: of contexts and logits.
    """

    def __init__(self, width: int, members: int, seed: int, heads: int = HEADS, hidden: int = HIDDEN) -> None:
        rng = np.random.default_rng(seed)
        first = rng.standard_normal((heads, width, hidden)) / np.sqrt(width)
        self.weights = [first.astype(np.float32), np.zeros((heads, hidden, members), np.float32)]
        self.moments = [np.zeros_like(w) for w in self.weights for _ in (0, 1)]
        self.steps = 0

    def logits(self, x: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``[heads, N, M]``, and the hidden layer."""
        hidden = np.maximum(x @ self.weights[0], 0)
        return hidden @ self.weights[1] + prior, hidden

    def chances(self, x: np.ndarray, prior: np.ndarray) -> np.ndarray:
        """``[N, M]``"""
        return np.asarray(softmax(self.logits(x, prior)[0], axis=-1).mean(axis=0))

    def climb(
        self, x: np.ndarray, prior: np.ndarray, value: np.ndarray, drawn: np.ndarray, rate: float, decay: float
    ) -> None:
        """One step up the expected value ``sum_a pi(a|x) value[a]``.

        Args:
            x, prior, value: ``[B, d]``, ``[B, M]``, ``[B, M]``.
            drawn: ``[heads, B]`` how often each row is in a head's bootstrap sample.
        """
        logits, hidden = self.logits(x, prior)
        pi = softmax(logits, axis=-1)
        slope = pi * (value - (pi * value).sum(axis=2, keepdims=True)) * drawn[:, :, None] / len(x)
        behind = (slope @ self.weights[1].transpose(0, 2, 1)) * (hidden > 0)
        self.steps += 1
        for i, gradient in enumerate((x.T @ behind, hidden.transpose(0, 2, 1) @ slope)):
            mean, square = self.moments[2 * i], self.moments[2 * i + 1]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            scaled = (mean / (1 - 0.9**self.steps)) / (np.sqrt(square / (1 - 0.999**self.steps)) + 1e-8)
            self.weights[i] += (rate * (scaled - decay * self.weights[i])).astype(np.float32)


class PolicyGradient(LinUCB):
    """The actor online: REINFORCE's gradient with a control variate, replayed over all that was logged."""

    grid = ({},)
    alpha, ridge, temperature = 0.3, 0.3, 0.1
    epsilon, rate, decay, clip = 0.0, 0.005, 0.01, 5.0
    every, growth, passes, batch = 16, 0.05, 30, 128
    """Updates after so many outcomes, or this share of all so far, of so many steps of so many rows."""

    def start(self, contexts: np.ndarray, members: int, seed: int) -> None:
        super().start(contexts, members, seed)
        self.actor = Actor(contexts.shape[1], members, seed)
        self.seed = seed
        self.seen = np.zeros((0, contexts.shape[1] + 3))
        """Rows of context, who was asked, what it earned, and with what probability it was chosen."""
        self.recent: list[np.ndarray] = []

    def prior(self, x: np.ndarray, explore: bool) -> np.ndarray:
        """Logits that the actor adds to: ``[N, M]`` of contexts ``[N, d]``."""
        mean = x @ self.theta.T
        if explore:
            mean = mean + self.alpha * np.sqrt(np.maximum(((x @ self.inverse) * x).sum(axis=2).T, 0))
        return np.asarray(mean / self.temperature)

    def chances(self, x: np.ndarray, rng: np.random.Generator | None, columns: Sequence[int]) -> np.ndarray:
        chances = self.actor.chances(x[None], self.prior(x[None], rng is not None))[0, columns]
        if rng is None:
            return np.eye(len(columns))[chances.argmax()]
        return (1 - self.epsilon) * chances / chances.sum() + self.epsilon / len(columns)

    def learn(self, x: np.ndarray, chosen: int, reward: float, score: float, usd: float, chance: float) -> None:
        self.regress(x, chosen, reward)
        self.recent.append(np.append(x, (chosen, reward, chance)))
        if len(self.recent) >= max(self.every, self.growth * len(self.seen)):
            self.improve()

    def improve(self) -> None:
        """Climb the value of what is logged."""
        self.seen, self.recent = np.vstack([self.seen, *self.recent])[-MOST:], []
        x, (chosen, reward, chance) = self.seen[:, :-3], self.seen[:, -3:].T
        value = doubly_robust(x @ self.theta.T, chosen.astype(int), reward, chance, self.clip)
        prior, rng = self.prior(x, False), np.random.default_rng([self.seed, self.actor.steps])
        drawn = np.random.default_rng(self.seed).poisson(1.0, (len(x), HEADS)).T
        small = x.astype(np.float32)
        for _ in range(int(self.passes)):
            rows = rng.integers(0, len(x), min(int(self.batch), len(x)))
            self.actor.climb(small[rows], prior[rows], value[rows], drawn[:, rows], self.rate, self.decay)
