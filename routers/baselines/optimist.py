"""Who is right, learned online by Bayesian logistic regression, what it costs learned apart, and optimism.

    score ~ Bernoulli(sigmoid(f_m(x)))         f_m(x) = x'(c + w_m) + `middle`           the last entry of x is 1
    c ~ N(0, diag(shared, .., shared, level)),  w_m ~ N(0, diag(own, .., own, member))
    asked is the m of the largest   E sigmoid(f_m(x)) + alpha * SD sigmoid(f_m(x)) - penalty_m(x)

`c` says how hard a query is, which every answer teaches; `w_m` who is better at it. The posterior is kept Gaussian;
each outcome is taken in exactly along f_m(x), and the Gaussian with the mean and covariance of what comes of it stands
for it (assumed density filtering: Opper 1998). So where a member never errs, or is never right, it is soon known to
be so, which least squares, with one noise for all, is slow to see. The penalty is linear: ridge regression per member.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg.blas import dger

from routers.baselines.descent import sigmoid
from routers.baselines.online import LinUCB

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(21)
"""Of Gauss and Hermite's rule for means over a standard normal."""
WEIGHTS = WEIGHTS / WEIGHTS.sum()


class Optimist(LinUCB):
    """See above. Its regressions, as `LinUCB`, are of the penalty: of what the reward is less than the score."""

    grid = tuple(
        {**prior, "alpha": alpha}
        for prior in (
            {"shared": 0.05, "own": 4.0, "level": 0.05, "member": 2.0},  # what one member teaches is of no other
            {"shared": 1.0, "own": 2.0, "level": 1.0, "member": 1.0},
        )
        for alpha in (0.5, 1.0, 2.0)
    )
    directions = 48
    shared, own, level, member = 1.0, 2.0, 1.0, 1.0
    """Variances of the prior."""
    middle, alpha, ridge = -0.5, 1.0, 1.0

    def start(self, contexts: np.ndarray, members: int, seed: int) -> None:
        super().start(contexts, members, seed)
        prior = np.full((members + 1, contexts.shape[1]), float(self.own))
        prior[0], prior[:, -1], prior[0, -1] = self.shared, self.member, self.level
        self.mean = np.zeros(prior.shape)
        self.covariance = np.diag(prior.ravel()).reshape(prior.shape * 2)

    def foretold(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean and variance of f ``[M]``, and its covariance with all weights ``[M + 1, d, M]``."""
        parts = self.covariance @ x  # with x'c, and with every x'w_m
        along = parts[:, :, :1] + parts[:, :, 1:]
        own = np.einsum("d,jdm->jm", x, along)
        return (self.mean[0] + self.mean[1:]) @ x + self.middle, own[0] + np.diag(own[1:]), along

    def values(self, x: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        mean, variance, _ = self.foretold(x)
        right = sigmoid(mean[:, None] + np.sqrt(np.maximum(variance, 0))[:, None] * NODES)
        expected = right @ WEIGHTS
        spread = np.sqrt(np.maximum(right**2 @ WEIGHTS - expected**2, 0))
        return np.asarray(expected + (0 if rng is None else self.alpha * spread) - self.theta @ x)

    def learn(self, x: np.ndarray, chosen: int, reward: float, score: float, usd: float, chance: float) -> None:
        """A graded score counts as that share of a right answer."""
        self.regress(x, chosen, score - reward)
        mean, variance, along = self.foretold(x)
        before, spread, step = mean[chosen], max(float(variance[chosen]), 1e-12), along[:, :, chosen]
        f = before + spread**0.5 * NODES
        told = WEIGHTS * np.exp(score * f - np.logaddexp(0, f))
        told /= told.sum()
        after = told @ f
        self.mean += step * ((after - before) / spread)
        shrunk = (spread - told @ (f - after) ** 2) / spread**2
        square, flat = self.covariance.reshape(step.size, -1), step.ravel()
        self.covariance = dger(-shrunk, flat, flat, a=square.T, overwrite_a=1).T.reshape(self.covariance.shape)
