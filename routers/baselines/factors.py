"""Matrix factorisation of correctness (RouteLLM, arXiv 2406.18665)."""

from __future__ import annotations

import numpy as np

from routers.baselines.base import Data, Fitted
from routers.baselines.descent import logistic, minimised, sigmoid


class Factors(Fitted):
    """``s(m, q) = w . (v_m * (W x_q))`` plus a bias per member; P(right) is its sigmoid.

    `w` and the length of `v_m` are one vector here. INFERRED: RouteLLM has two members and fits the sigmoid of the
    difference to which of them won; for M members with scores the sigmoid of each is fitted to its score.
    """

    grid = tuple({"strength": strength, "size": size} for size in (16, 4) for strength in (3.0, 1.0, 10.0))

    def learn(self, data: Data, strength: float, size: int) -> None:
        x, score = data.view("svd"), data.score
        rng = np.random.default_rng(self.seed)

        def loss(project: np.ndarray, members: np.ndarray, bias: np.ndarray) -> tuple[float, list[np.ndarray]]:
            hidden = x @ project
            value, slope = logistic(hidden @ members.T + bias, score)
            return value, [x.T @ (slope @ members), slope.T @ hidden, slope.sum(axis=0)]

        shapes = [(x.shape[1], size), (score.shape[1], size)]
        start = [*(rng.normal(0, 0.1, shape) for shape in shapes), np.zeros(score.shape[1])]
        self.project, self.vectors, self.bias = minimised(loss, start, strength)

    def foretell_score(self, data: Data) -> np.ndarray:
        return sigmoid(data.view("svd") @ self.project @ self.vectors.T + self.bias)
