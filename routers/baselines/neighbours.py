"""The nearest training queries say how members do (kNN)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from routers.baselines.base import Data, Fitted, Told
from routers.data.table import spread

BLOCK = 1 << 24
"""Entries of a block of similarities."""
MOST_KNOWN = 20_000
"""Training queries that others are compared with, spread evenly, so that time is linear in the training, too."""


def remembered(data: Data) -> Data:
    """At most `MOST_KNOWN` of the queries."""
    return data if len(data) <= MOST_KNOWN else data.rows(spread(len(data), MOST_KNOWN))


def similarities(items: Any, known: Any) -> Iterator[np.ndarray]:
    """Products of rows ``[block, K]``, block by block, so that no matrix of all pairs is held."""
    step = max(1, BLOCK // max(1, known.shape[0]))
    for start in range(0, items.shape[0], step):
        block = items[start : start + step] @ known.T
        yield np.asarray(block if isinstance(block, np.ndarray) else block.toarray())


class Neighbours(Fitted):
    of = "tfidf"
    grid = tuple({"count": count} for count in (20, 5, 10, 40, 80))

    def learn(self, data: Data, count: int) -> None:
        data = remembered(data)
        self.known, self.outcomes = data.view(self.of), np.hstack([data.score, data.usd])
        self.count = min(count, len(data))

    def foretell(self, data: Data) -> Told:
        found = [np.zeros((0, self.outcomes.shape[1]))]
        for alike in similarities(data.view(self.of), self.known):
            nearest = np.argsort(-alike, axis=1, kind="stable")[:, : self.count]  # of equals the first
            found.append(self.outcomes[nearest].mean(axis=1))
        return Told.of(np.concatenate(found))


class MiniLMNeighbours(Neighbours):
    of = "minilm"
