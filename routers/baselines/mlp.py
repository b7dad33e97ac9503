"""A small neural network for all members' correctness."""

from __future__ import annotations

import numpy as np

from routers.baselines.base import Data, Fitted

ENOUGH = 50
"""Queries of which a tenth can be spared to say when to stop."""


class MLP(Fitted):
    grid = tuple({"alpha": alpha} for alpha in (0.1, 1.0))

    def learn(self, data: Data, alpha: float) -> None:
        from sklearn.neural_network import MLPRegressor

        how = {
            "early_stopping": len(data) >= ENOUGH,
            "max_iter": 2000,
            "tol": 1e-3,
            "learning_rate_init": 3e-3,
            "random_state": self.seed,
        }
        score = data.score if data.score.shape[1] > 1 else data.score.ravel()
        self.net = MLPRegressor(hidden_layer_sizes=(64,), alpha=alpha, **how).fit(data.view("svd"), score)

    def foretell_score(self, data: Data) -> np.ndarray:
        return np.asarray(self.net.predict(data.view("svd"))).reshape(len(data), -1)
