"""Gradient boosting of each member's correctness."""

from __future__ import annotations

import numpy as np

from routers.baselines.base import Data, Fitted


class Boosting(Fitted):
    grid = ({"leaves": 4}, {"leaves": 12})

    def learn(self, data: Data, leaves: int) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor

        how = {"learning_rate": 0.05, "max_leaf_nodes": leaves, "early_stopping": False, "random_state": self.seed}
        x = data.view("svd")
        self.trees = [HistGradientBoostingRegressor(**how).fit(x, column) for column in data.score.T]

    def foretell_score(self, data: Data) -> np.ndarray:
        return np.stack([trees.predict(data.view("svd")) for trees in self.trees], axis=1)
