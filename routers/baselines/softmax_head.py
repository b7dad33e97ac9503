"""A softmax policy on TF-IDF, trained by its exact expected reward: policy gradient without its noise."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax

from routers.baselines.base import Data, Fitted, Told
from routers.baselines.descent import minimised

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
TEMPERATURE = 0.1


class SoftmaxHead(Fitted):
    """Logits ``a(x) - cost_weight * usd(x) / TEMPERATURE``: `a` is linear in the text and trained at several cost
    weights at once, half of the time at its own; USD are those that ridge regression foretells.

    It begins at the members' mean scores over `TEMPERATURE`, and what is penalised is the distance from there, of the
    intercepts too. So no step is paid for by a smaller penalty: what it earns in training never falls below what it
    began with. (Begun at a ridge regression and penalised towards 0, the penalty's slope was a hundred times the
    reward's, and steps of that length carried the intercepts to where the softmax is flat: one member for all.)
    """

    grid = tuple({"strength": strength} for strength in (0.03, 0.003, 0.01, 0.1, 0.3))

    def learn(self, data: Data, strength: float) -> None:
        x = data.view("tfidf")
        self.usd_model = data.usd_model
        usd = np.minimum(self.foretell_usd(data), 1) / TEMPERATURE
        shares = [*((weight, 0.5 / len(WEIGHTS)) for weight in WEIGHTS), (data.cost_weight, 0.5)]
        rewards = [(weight, share * data.reward(weight)) for weight, share in shares]

        start = data.score.mean(axis=0) / TEMPERATURE

        def loss(matrix: np.ndarray, moved: np.ndarray) -> tuple[float, list[np.ndarray]]:
            a, earned, slope = x @ matrix.astype(x.dtype) + moved + start, 0.0, np.zeros(usd.shape)
            for weight, reward in rewards:
                chances = softmax(a - weight * usd, axis=1)
                own = (chances * reward).sum(axis=1, keepdims=True)
                earned += float(own.sum())
                slope -= chances * (reward - own)
            return -earned, [x.T @ slope.astype(x.dtype), slope.sum(axis=0, keepdims=True)]

        begin = [np.zeros((x.shape[1], len(start))), np.zeros((1, len(start)))]  # a row, so that it is penalised
        self.matrix, moved = minimised(loss, begin, strength)
        self.middle = start + moved[0]

    def foretell(self, data: Data) -> Told:
        worth = TEMPERATURE * (data.view("tfidf") @ self.matrix + self.middle)
        usd = self.foretell_usd(data)
        return Told(None, usd, lambda weight: worth - weight * np.minimum(usd, 1))
