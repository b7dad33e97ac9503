"""Similarity-weighted Elo ratings (RouteLLM's `sw_ranking`, arXiv 2406.18665)."""

from __future__ import annotations

import numpy as np

from routers.baselines.base import Data, Fitted
from routers.baselines.neighbours import remembered, similarities


class Elo(Fitted):
    """Bradley-Terry ratings for every query, in which a training query weighs ``base ** (1 + cos / max cos)``.

    Every member plays every other on every training query (ties are half a win), and then the likelihood equations say
    that expected wins are the weighted wins: the rate at which a member beats the others is known without the ratings.

    INFERRED, to have a score for M members: a rate of ``(1 + s_m - s_other) / 2`` is solved for `s_m`, at the weighted
    mean score of all.
    """

    grid = tuple({"base": base} for base in (10.0, 100.0, 1e4))

    def learn(self, data: Data, base: float) -> None:
        data = remembered(data)
        ranks = data.score[:, :, None], data.score[:, None, :]
        wins = (ranks[0] > ranks[1]).sum(axis=2) + 0.5 * ((ranks[0] == ranks[1]).sum(axis=2) - 1)
        self.known, self.base = data.view("tfidf"), base
        others = max(1, data.score.shape[1] - 1)
        self.outcomes = np.hstack([wins / others, data.score.mean(axis=1, keepdims=True)])

    def foretell_score(self, data: Data) -> np.ndarray:
        members = self.outcomes.shape[1] - 1
        found = [np.zeros((0, members))]
        for alike in similarities(data.view("tfidf"), self.known):
            weights = self.base ** (1 + alike / np.maximum(alike.max(axis=1, keepdims=True), 1e-9))
            means = weights @ self.outcomes / weights.sum(axis=1, keepdims=True)
            found.append(means[:, -1:] + (members - 1) / members * (2 * means[:, :-1] - 1) * (members > 1))
        return np.concatenate(found)
