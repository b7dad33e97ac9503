"""A softmax policy on TF-IDF, trained by its exact expected reward: policy gradient without its noise."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax

from routers.baselines.base import Data, Fitted, Told
from routers.baselines.descent import minimised
from routers.baselines.ridge import solve

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
TEMPERATURE = 0.1


class SoftmaxHead(Fitted):
    """Logits ``a(x) - cost_weight * usd(x) / TEMPERATURE``: `a` is linear in the text and trained at several cost
    weights at once, half of the time at its own; USD are those that ridge regression foretells.

    It begins at the ridge regression of correctness, over `TEMPERATURE`.
    """

    grid = tuple({"strength": strength} for strength in (0.3, 0.1, 1.0))

    def learn(self, data: Data, strength: float) -> None:
        x = data.view("tfidf")
        self.usd_model = data.usd_model
        usd = np.minimum(self.foretell_usd(data), 1) / TEMPERATURE
        shares = [*((weight, 0.5 / len(WEIGHTS)) for weight in WEIGHTS), (data.cost_weight, 0.5)]
        rewards = [(weight, share * data.reward(weight)) for weight, share in shares]

        def loss(matrix: np.ndarray, middle: np.ndarray) -> tuple[float, list[np.ndarray]]:
            a, earned, slope = x @ matrix.astype(x.dtype) + middle, 0.0, np.zeros(usd.shape)
            for weight, reward in rewards:
                chances = softmax(a - weight * usd, axis=1)
                own = (chances * reward).sum(axis=1, keepdims=True)
                earned += float(own.sum())
                slope -= chances * (reward - own)
            return -earned, [x.T @ slope.astype(x.dtype), slope.sum(axis=0)]

        middle = data.score.mean(axis=0)
        start = [solve(x, data.score - middle, 1.0) / TEMPERATURE, middle / TEMPERATURE]
        self.matrix, self.middle = minimised(loss, start, strength)

    def foretell(self, data: Data) -> Told:
        worth = TEMPERATURE * (data.view("tfidf") @ self.matrix + self.middle)
        usd = self.foretell_usd(data)
        return Told(None, usd, lambda weight: worth - weight * np.minimum(usd, 1))
