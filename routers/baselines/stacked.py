"""A weighted sum of what other baselines foretell, for they err differently (stacking).

    u = sum_k a_k u_k        a = argmin_{a >= 0} sum_{q, m} (y_qm - sum_k a_k u_k(q, m))^2

over the queries of the first fold, whose scores y the parts have not seen when they foretell them by u_k; then the
parts are learned anew from all. USD are the parts' mean, weighted by a. (Wolpert 1992; the weights: Breiman 1996.)
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
        from scipy.optimize import nnls

        settings = [kind().tuned(data) for kind in self.kinds]

        def learned(some: Data) -> list[Fitted]:
            return [kind().learn_with(some, how) for kind, how in zip(self.kinds, settings, strict=True)]

        self.weights = np.full(len(self.kinds), 1 / len(self.kinds))
        if data.folds:
            _, known, held_out = data.folds[0]
            told = np.array([part.foretell(held_out).score for part in learned(known)])
            found = nnls(told.reshape(len(told), -1).T, held_out.score.ravel())[0]
            self.weights = found if found.any() else self.weights  # none helps: all alike
        self.parts = learned(data)

    def foretell(self, data: Data) -> Told:
        told = [part.foretell(data) for part in self.parts]
        score, usd = (np.array([getattr(one, name) for one in told]) for name in ("score", "usd"))
        share = self.weights / self.weights.sum()
        return Told(np.einsum("k,kqm->qm", self.weights, score), np.einsum("k,kqm->qm", share, usd))
