"""How members do on a query's family: its data set or type."""

from __future__ import annotations

import numpy as np

from routers.baselines.base import Data, Fitted, Told


class FamilyTold(Fitted):
    """The family is given with the query; on a new one members do as on all."""

    def learn(self, data: Data) -> None:
        both = np.hstack([data.score, data.usd])
        self.names = sorted(set(data.families.tolist()))
        self.means = np.stack([*(both[data.families == name].mean(axis=0) for name in self.names), both.mean(axis=0)])

    def family_of(self, data: Data) -> np.ndarray:
        places = {name: i for i, name in enumerate(self.names)}
        return np.array([places.get(name, -1) for name in data.families.tolist()], dtype=int)

    def foretell(self, data: Data) -> Told:
        return Told.of(self.means[self.family_of(data)])


class FamilyGuessed(FamilyTold):
    """The family is guessed from the text by logistic regression."""

    def learn(self, data: Data) -> None:
        from sklearn.linear_model import LogisticRegression

        super().learn(data)
        self.guess = None
        if len(self.names) > 1:
            self.guess = LogisticRegression(C=0.1, max_iter=2000).fit(data.view("svd"), data.families)

    def family_of(self, data: Data) -> np.ndarray:
        if self.guess is None:
            return np.zeros(len(data), dtype=int)
        return np.searchsorted(self.names, self.guess.predict(data.view("svd")))
