"""A value at state zero: P(right | query, what a member did on other queries) (V_0, arXiv 2602.03584)."""

from __future__ import annotations

from typing import Any

import numpy as np

from routers.baselines.base import Data, Told
from routers.baselines.descent import logistic, minimised, sigmoid
from routers.baselines.described import Described
from routers.baselines.neighbours import similarities

CONTEXT = 256
"""(query, outcome) pairs that describe a member, as in the paper."""
WIDTHS = (0.02, 0.05, 0.15)
"""Temperatures of the attention on the context."""


class StateZero(Described):
    """Log-odds are a linear function, one for all members, of the log-odds among like queries of the context.

    The small form (INFERRED): attention by TF-IDF cosine at `WIDTHS` stands in place of the paper's embedding, adapter
    and TabPFN head. It is fitted on queries outside the context.
    """

    grid = ({},)

    def learn(self, data: Data, **settings: Any) -> None:
        order = np.random.default_rng(self.seed).permutation(len(data))
        count = max(1, min(CONTEXT, len(data) // 2))
        self.describe(data.rows(np.sort(order[:count])))
        rest = data.rows(np.sort(order[count:])) if len(data) > 1 else data
        x, score = self.odds(rest)[0], rest.score

        def loss(weights: np.ndarray, bias: np.ndarray) -> tuple[float, list[np.ndarray]]:
            value, slope = logistic(x @ weights + bias, score[:, :, None])
            return value, [np.einsum("qmf,qmo->fo", x, slope), slope.sum(axis=(0, 1))]

        start = [np.full((x.shape[2], 1), 1 / x.shape[2]), np.zeros(1)]
        self.weights, self.bias = minimised(loss, start, 1.0)

    def describe(self, probes: Data) -> None:
        self.context, self.outcomes = probes.view("tfidf"), np.hstack([probes.score, probes.usd])

    def odds(self, data: Data) -> tuple[np.ndarray, np.ndarray]:
        """Log-odds at every width and without attention ``[Q, M, F]``, and USD at the middle width ``[Q, M]``."""
        found = [np.zeros((0, len(WIDTHS) + 1, self.outcomes.shape[1]))]
        for alike in similarities(data.view("tfidf"), self.context):
            scaled = np.stack(
                [*((alike - alike.max(axis=1, keepdims=True)) / width for width in WIDTHS), 0 * alike], 1
            )
            weights = np.exp(scaled)
            found.append(weights / weights.sum(axis=2, keepdims=True) @ self.outcomes)
        score, usd = np.split(np.concatenate(found), 2, axis=2)
        score = np.clip(score, 0.02, 0.98)
        return np.log(score / (1 - score)).transpose(0, 2, 1), usd[:, 1]

    def foretell(self, data: Data) -> Told:
        odds, usd = self.odds(data)
        return Told(sigmoid(odds @ self.weights + self.bias)[:, :, 0], usd)
