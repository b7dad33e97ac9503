"""What members would earn, learned from rewards of those that were asked: one Bayesian linear regression for all.

    r = x'(c + w_m) + noise        noise ~ N(0, s),  c ~ N(0, s diag(shared, .., shared, LEVEL)),
                                   w_m ~ N(0, s diag(own, .., own, MEMBER))              the last entry of x is 1

`c` says how hard a query is, which every answer teaches; `w_m` who is better at it. How much of either there is
(`shared`, `own`, of `VARIANCES`) is chosen by the evidence, with `s` integrated out (an inverse gamma prior), so that
few outcomes give a ranking of members and many a ranking per query.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy.linalg import solve_triangular

VARIANCES = (0.01, 0.1, 1.0)
LEVEL, MEMBER = 10.0, 0.1
PRIOR_COUNT, PRIOR_VARIANCE = 4.0, 0.2
"""Of the noise: as if so many rewards with this variance had been seen."""
CHOSEN_AGAIN = 2.0
"""The variances are chosen anew when there are so many times as many rewards."""


class Critic:
    """See above. `width` counts the constant. Holds arrays and numbers only.

    Attributes:
        theta: ``[members, width]``, the posterior mean of ``c + w_m``, as of the last `fit`.
    """

    def __init__(self, width: int, members: int) -> None:
        self.width, self.members, self.count, self.due = width, members, 0, 1.0
        self.square = np.zeros((members + 1, width, members + 1, width))
        self.moment, self.power = np.zeros((members + 1, width)), 0.0
        self.variances = (VARIANCES[0], VARIANCES[0])
        self.fit()

    @classmethod
    def of(cls, x: np.ndarray, chosen: np.ndarray, reward: np.ndarray, members: int) -> Critic:
        """Fitted to rewards that were seen; arguments of `add`."""
        found = cls(x.shape[1], members)
        found.add(x, chosen, reward)
        found.fit()
        return found

    def add(self, x: np.ndarray, chosen: np.ndarray, reward: np.ndarray) -> None:
        """Rewards that were seen: ``[N, width]``, ``[N]``, ``[N]``; `fit` takes them in."""
        for member in np.unique(chosen):
            own = x[chosen == member]
            square, moment = own.T @ own, own.T @ reward[chosen == member]
            for i, j in product((0, member + 1), repeat=2):
                self.square[i, :, j] += square
            for i in (0, member + 1):
                self.moment[i] += moment
        self.count, self.power = self.count + len(x), self.power + float(reward @ reward)

    def fit(self) -> None:
        tried = [self.variances]
        if self.count >= self.due:
            tried, self.due = [(a, b) for a in VARIANCES for b in VARIANCES], CHOSEN_AGAIN * self.count
        found = [self._posterior(*variances) for variances in tried]
        best = max(range(len(tried)), key=lambda i: found[i][0])
        _, self.root, half, self.noise = found[best]
        self.variances = tried[best]
        self.mean = solve_triangular(self.root.T, half, lower=False, check_finite=False)
        self.theta = self._per_member(self.mean[None])[0]

    def _posterior(self, shared: float, own: float) -> tuple[float, np.ndarray, np.ndarray, float]:
        """Log evidence up to a constant, root of the precision times the noise, half the solution, the noise."""
        prior = np.full((self.members + 1, self.width), own)
        prior[0], prior[:, -1], prior[0, -1] = shared, MEMBER, LEVEL
        size = prior.size
        root = np.linalg.cholesky(self.square.reshape(size, size) + np.diag(1 / prior.ravel()))
        half = solve_triangular(root, self.moment.ravel(), lower=True, check_finite=False)
        left = (self.power - half @ half + PRIOR_COUNT * PRIOR_VARIANCE) / 2
        shape = (self.count + PRIOR_COUNT) / 2
        evidence = -np.log(np.diag(root)).sum() - np.log(prior).sum() / 2 - shape * np.log(left)
        return float(evidence), root, half, float(left / shape)

    def _per_member(self, weights: np.ndarray) -> np.ndarray:
        """``[K, members, width]`` of ``[K, (members + 1) * width]``."""
        parts = weights.reshape(len(weights), self.members + 1, self.width)
        return np.asarray(parts[:, :1] + parts[:, 1:])

    def draws(self, rng: np.random.Generator, number: int, scale: float = 1.0) -> np.ndarray:
        """``[number, members, width]`` from the posterior, its standard deviations times `scale`."""
        lots = rng.standard_normal((len(self.mean), number))
        moved = solve_triangular(self.root.T, lots, lower=False, check_finite=False)
        return self._per_member(self.mean + scale * self.noise**0.5 * moved.T)

    def left_out(self, x: np.ndarray, chosen: np.ndarray, reward: np.ndarray) -> np.ndarray:
        """``[N, members]``: what rows that are in the regression would be foretold without their own reward.

        In closed form, at the variances chosen: without row i the prediction of a at x_i moves by
        ``-cov(a, a_i) e_i / (1 - cov(a_i, a_i))``, cov the posterior's (over the noise), e_i the residual.
        """
        rows, found = np.arange(len(x)), x @ self.theta.T
        at = np.zeros((len(x), self.members + 1, self.width))
        at[:, 0] = at[rows, chosen + 1] = x
        solved = solve_triangular(self.root, at.reshape(len(x), -1).T, lower=True, check_finite=False)
        solved = solve_triangular(self.root.T, solved, lower=False, check_finite=False)
        cov = np.einsum("nd,nmd->nm", x, self._per_member(solved.T))
        step = (reward - found[rows, chosen]) / np.maximum(1 - cov[rows, chosen], 1e-6)
        return np.asarray(found - cov * step[:, None])
