"""A softmax policy on TF-IDF, trained by its exact expected reward: policy gradient without its noise."""

from __future__ import annotations

import numpy as np

from routers.baselines.base import Data, Fitted, Told, softmax
from routers.baselines.descent import minimised
from routers.baselines.ridge import solve

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
TEMPERATURE = 0.1


class SoftmaxHead(Fitted):
    """Logits ``a(x) - cost_weight * b(x)``, linear in the text; trained at several cost weights, mostly its own.

    It begins at the ridge regression of correctness and cost, over `TEMPERATURE`.
    """

    grid = tuple({"strength": strength} for strength in (0.3, 0.1, 1.0))

    def learn(self, data: Data, strength: float) -> None:
        x, m = data.view("tfidf"), len(data.members)
        self.usd_model = data.usd_model
        weights = [*WEIGHTS, *[data.cost_weight] * len(WEIGHTS)]
        rewards = [data.reward(weight) / len(weights) for weight in weights]

        def loss(matrix: np.ndarray, middle: np.ndarray) -> tuple[float, list[np.ndarray]]:
            z, earned, slope = x @ matrix.astype(x.dtype) + middle, 0.0, np.zeros((len(data), 2 * m))
            for weight, reward in zip(weights, rewards, strict=True):
                chances = softmax(z[:, :m] - weight * z[:, m:])
                own = (chances * reward).sum(axis=1, keepdims=True)
                rising = chances * (reward - own)
                earned += float(own.sum())
                slope += np.hstack([-rising, weight * rising])
            return -earned, [x.T @ slope.astype(x.dtype), slope.sum(axis=0)]

        both = np.hstack([data.score, data.usd])
        middle = both.mean(axis=0)
        start = [solve(x, both - middle, 1.0) / TEMPERATURE, middle / TEMPERATURE]
        self.matrix, self.middle = minimised(loss, start, strength)

    def foretell(self, data: Data) -> Told:
        score, usd = np.hsplit(data.view("tfidf") @ self.matrix + self.middle, 2)
        return Told(None, self.foretell_usd(data), lambda weight: score - weight * usd)
