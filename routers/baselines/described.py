"""Routers that know a member by what it did on some queries, and so take members that training never saw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import numpy as np

from routers.baselines.base import Data, Fitted, Told
from routers.baselines.descent import logistic, minimised, sigmoid
from routers.data.catalogue import Member
from routers.evaluation.episodes import Outcomes

CLUSTERS = 16
PRIOR = 5.0
"""Queries of the member's overall mean that every cluster begins with."""
MOST_PAIRS = 100_000


class Described(Fitted):
    """A member is its mean correctness and USD on `CLUSTERS` clusters of queries."""

    def learn(self, data: Data, **settings: Any) -> None:
        from sklearn.cluster import KMeans

        count = min(CLUSTERS, len(np.unique(data.view("svd"), axis=0)))
        self.clusters = KMeans(count, n_init=1, random_state=self.seed).fit(data.view("svd"))
        self.describe(data)
        self.learn_pairs(data, **settings)

    def describe(self, probes: Data) -> None:
        both = np.hstack([probes.score, probes.usd])
        own = np.eye(self.clusters.n_clusters)[self.clusters.predict(probes.view("svd"))]
        sums = own.T @ both + PRIOR * both.mean(axis=0)
        self.score_in, self.usd_in = np.hsplit(sums / (own.sum(axis=0)[:, None] + PRIOR), 2)  # [C, M]

    def learn_pairs(self, *data: Any, **settings: Any) -> None:
        raise NotImplementedError

    def introduce(self, probes: Outcomes) -> Self:
        """Change the pool to the members of `probes`, old and new: what each did on queries like the training's.

        Nothing else is learned anew, and no query of an evaluation may be among them.
        """
        scale = self.settings.cost_scale
        self.describe(Data(list(probes.items), self.features, probes.score, probes.usd / scale, probes.members))
        known = {member.name: member for member in self.settings.members}
        self.members = tuple(known.get(name, Member(name, descriptor=name)) for name in probes.members)
        self.settings = replace(self.settings, members=self.members)
        return self

    def foretell(self, data: Data) -> Told:
        return Told(self.foretell_score(data), self.usd_in[self.clusters.predict(data.view("svd"))])


class Capabilities(Described):
    """P(right) is the sigmoid of a bilinear form of the query and the member's capability vector.

    INFERRED after Model-SAT (arXiv 2502.17282), which writes the member's scores on core tasks into an LLM's prompt.
    """

    grid = tuple({"strength": strength} for strength in (3.0, 1.0, 10.0, 30.0))

    def learn_pairs(self, data: Data, strength: float) -> None:
        x, members, score = self.queries(data), self.vectors(), data.score

        def loss(form: np.ndarray) -> tuple[float, list[np.ndarray]]:
            value, slope = logistic(x @ form @ members.T, score)
            return value, [x.T @ slope @ members]

        [self.form] = minimised(loss, [np.zeros((x.shape[1], members.shape[1]))], strength)

    def queries(self, data: Data) -> np.ndarray:
        return np.hstack([data.view("svd"), np.ones((len(data), 1))])

    def vectors(self) -> np.ndarray:
        """``[M, C + 1]``: log-odds in each cluster, and 1."""
        odds = np.clip(self.score_in.T, 0.01, 0.99)
        return np.hstack([np.log(odds / (1 - odds)), np.ones((len(odds), 1))])

    def foretell_score(self, data: Data) -> np.ndarray:
        return sigmoid(self.queries(data) @ self.form @ self.vectors().T)


class LossPrediction(Described):
    """Boosted trees foretell a member's loss (1 - score) from query and member together.

    INFERRED after Tryage (arXiv 2308.11601), whose router regresses every expert's loss on the prompt and asks for the
    least loss plus weighted constraints; the member's features stand here in place of an output per expert.
    """

    grid = ({"leaves": 16}, {"leaves": 6})

    def learn_pairs(self, data: Data, leaves: int) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor

        rng = np.random.default_rng(self.seed)
        count = data.score.size
        some = np.sort(rng.choice(count, min(count, MOST_PAIRS), replace=False))
        query, member = np.divmod(some, data.score.shape[1])
        how = {"learning_rate": 0.05, "max_leaf_nodes": leaves, "early_stopping": False, "random_state": self.seed}
        loss = 1 - data.score[query, member]
        self.trees = HistGradientBoostingRegressor(**how).fit(self.pairs(data, query, member), loss)

    def pairs(self, data: Data, query: np.ndarray, member: np.ndarray) -> np.ndarray:
        own = self.score_in[self.clusters.predict(data.view("svd"))]
        return np.hstack([data.view("svd")[query], self.score_in.T[member], own[query, member][:, None]])

    def foretell_score(self, data: Data) -> np.ndarray:
        everyone = range(self.score_in.shape[1])
        query = np.arange(len(data))
        return np.stack([1 - self.trees.predict(self.pairs(data, query, query * 0 + m)) for m in everyone], axis=1)
