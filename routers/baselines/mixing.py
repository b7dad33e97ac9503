"""A coin between two members."""

from __future__ import annotations

import numpy as np

from routers.baselines.base import Data, Fitted, Told
from routers.evaluation.frontier import pareto_hull


class Mixing(Fitted):
    """The two members whose mixture scores most, half way in cost between the cheapest and the best.

    Every other point of the members' hull is such a coin, too: the report's "mixing members" is all of them.
    """

    def learn(self, data: Data) -> None:
        self.score, self.usd = data.score.mean(axis=0), data.usd.mean(axis=0)
        hull = pareto_hull(self.usd, self.score)
        corners, half = np.eye(len(self.usd))[hull], (self.usd[hull[0]] + self.usd[hull[-1]]) / 2
        self.chances = np.array([np.interp(half, self.usd[hull], column) for column in corners.T])

    def foretell(self, data: Data) -> Told:
        shape = (len(data), 1)
        with np.errstate(divide="ignore"):
            logits = np.tile(np.log(self.chances), shape)
        return Told(np.tile(self.score, shape), np.tile(self.usd, shape), lambda _: logits, draws=True)
