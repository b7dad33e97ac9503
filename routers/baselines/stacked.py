"""A weighted sum of what other baselines foretell, for they err differently (stacking).

    u = sum_k a_k u_k        a = argmin_{a >= 0} sum_{q, m} (y_qm - sum_k a_k u_k(q, m; learned without q's fold))^2

y and u_k are scores; USD are the mean of the parts', weighted by a. (Wolpert 1992; the weights: Breiman 1996.)
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from routers.baselines.base import Data, Fitted, Told
from routers.baselines.families import FamilyGuessed
from routers.baselines.mlp import MLP
from routers.baselines.neighbours import Neighbours
from routers.baselines.ridge import Ridge


class Stacked(Fitted):
    kinds: ClassVar[tuple[type[Fitted], ...]] = (Ridge, FamilyGuessed, MLP, Neighbours)

    def learn(self, data: Data) -> None:
        self.left_out(data)
        self.parts = [kind().learn_with(data, kind().tuned(data)) for kind in self.kinds]

    def foretell(self, data: Data) -> Told:
        told = [part.foretell(data) for part in self.parts]
        return self._summed(np.array([[one.score, one.usd] for one in told]))

    def left_out(self, data: Data) -> Told:
        """Sets the parts' `weights` ``[K]``. Returns what is foretold of each training query by learners that have not
        seen its fold (a part's settings are chosen once, on the first fold, as everywhere)."""
        found = np.zeros((len(self.kinds), 2, *data.score.shape))
        for row, kind in zip(found, self.kinds, strict=True):
            settings = kind().tuned(data)
            for places, others, own in data.folds:
                told = kind().learn_with(others, settings).foretell(own)
                row[:, places] = told.score, told.usd
        self.weights = _weights(found[:, 0], data.score)
        return self._summed(found)

    def _summed(self, told: np.ndarray) -> Told:
        """Of ``[K, 2, Q, M]``."""
        score = np.einsum("k,kqm->qm", self.weights, told[:, 0])
        usd = np.einsum("k,kqm->qm", self.weights / self.weights.sum(), told[:, 1])
        return Told(score, usd)


def _weights(told: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Non-negative least squares; all alike where nothing that is foretold helps."""
    from scipy.optimize import nnls

    found = nnls(told.reshape(len(told), -1).T, score.ravel())[0]
    return found if found.any() else np.full(len(told), 1 / len(told))
