"""What members would earn, learned from rewards of those that were asked: one Bayesian linear regression for all.

    r = x'(c + w_m) + noise        noise ~ N(0, s),  c ~ N(0, s diag(shared, .., shared, LEVEL)),
                                   w_m ~ N(0, s diag(own, .., own, MEMBER))              the last entry of x is 1

`c` says how hard a query is, which every answer teaches; `w_m` who is better at it. How much of either there is
(`shared`, `own`, of `VARIANCES`) is chosen by the evidence, with `s` integrated out (an inverse gamma prior), so that
few outcomes give a ranking of members and many a ranking per query.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy.linalg import solve_triangular

VARIANCES = (0.01, 0.1, 1.0)
LEVEL, MEMBER = 10.0, 0.1
PRIOR_COUNT, PRIOR_VARIANCE = 4.0, 0.2
"""Of the noise: as if so many rewards with this variance had been seen."""


class Critic:
    """See above, fitted to rewards that were seen.

    Args:
        x: ``[N, width]``, the constant in its last column.
        chosen, reward: ``[N]`` who was asked, as a column, and what it earned.
        members: how many there are.
        tried: (`shared`, `own`) to choose from.

    Attributes:
        theta: ``[members, width]``, the posterior mean of ``c + w_m``.
        variances: that were chosen.
    """

    def __init__(
        self,
        x: np.ndarray,
        chosen: np.ndarray,
        reward: np.ndarray,
        members: int,
        tried: Sequence[tuple[float, float]] = tuple(product(VARIANCES, VARIANCES)),
    ) -> None:
        self.width, self.members = x.shape[1], members
        square = np.zeros((members + 1, self.width, members + 1, self.width))
        moment = np.zeros((members + 1, self.width))
        for member in np.unique(chosen):
            own = x[chosen == member]
            for i, j in product((0, member + 1), repeat=2):
                square[i, :, j] += own.T @ own
            for i in (0, member + 1):
                moment[i] += own.T @ reward[chosen == member]
        found = [self._posterior(square, moment, float(reward @ reward), len(x), *variances) for variances in tried]
        best = max(range(len(found)), key=lambda i: found[i][0])
        self.variances, (_, self.root, half) = tried[best], found[best]
        mean = solve_triangular(self.root.T, half, lower=False, check_finite=False)
        self.theta = self._per_member(mean[None])[0]

    def _posterior(
        self, square: np.ndarray, moment: np.ndarray, power: float, count: int, shared: float, own: float
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Log evidence up to a constant, root of the precision times the noise, half the solution."""
        prior = np.full((self.members + 1, self.width), own)
        prior[0], prior[:, -1], prior[0, -1] = shared, MEMBER, LEVEL
        size = prior.size
        root = np.linalg.cholesky(square.reshape(size, size) + np.diag(1 / prior.ravel()))
        half = solve_triangular(root, moment.ravel(), lower=True, check_finite=False)
        left = (power - half @ half + PRIOR_COUNT * PRIOR_VARIANCE) / 2
        evidence = -np.log(np.diag(root)).sum() - np.log(prior).sum() / 2 - (count + PRIOR_COUNT) / 2 * np.log(left)
        return float(evidence), root, half

    def _per_member(self, weights: np.ndarray) -> np.ndarray:
        """``[K, members, width]`` of ``[K, (members + 1) * width]``."""
        parts = weights.reshape(len(weights), self.members + 1, self.width)
        return np.asarray(parts[:, :1] + parts[:, 1:])

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
