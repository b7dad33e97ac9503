"""Linear models of each member's correctness: logistic regression, and a support vector machine."""

from __future__ import annotations

import numpy as np

from routers.baselines.base import Data, Fitted
from routers.baselines.descent import logistic, minimised, sigmoid


class Logistic(Fitted):
    """One per member, all at once; a score between 0 and 1 counts as that share of a right answer."""

    of = "tfidf"
    grid = tuple({"strength": strength} for strength in (0.3, 0.1, 1.0))

    def loss(self, z: np.ndarray, score: np.ndarray) -> tuple[float, np.ndarray]:
        return logistic(z, score)

    def expected(self, z: np.ndarray) -> np.ndarray:
        return sigmoid(z)

    def margin(self, expected: np.ndarray) -> np.ndarray:
        """Inverse of `expected`."""
        return np.log(expected / (1 - expected))

    def learn(self, data: Data, strength: float) -> None:
        x, score = data.view(self.of), data.score

        def loss(weights: np.ndarray, middle: np.ndarray) -> tuple[float, list[np.ndarray]]:
            value, slope = self.loss(x @ weights.astype(x.dtype) + middle, score)
            return value, [x.T @ slope.astype(x.dtype), slope.sum(axis=0)]

        start = [np.zeros((x.shape[1], score.shape[1])), self.margin(np.clip(score.mean(axis=0), 0.01, 0.99))]
        self.weights, self.middle = minimised(loss, start, strength)

    def foretell_score(self, data: Data) -> np.ndarray:
        return self.expected(data.view(self.of) @ self.weights + self.middle)


class SVM(Logistic):
    """Squared hinge loss, whose minimiser is ``2 p - 1`` (Zhang, 2004), so that margins need no calibration."""

    grid = tuple({"strength": strength} for strength in (1.0, 0.3, 3.0))

    def loss(self, z: np.ndarray, score: np.ndarray) -> tuple[float, np.ndarray]:
        right, wrong = np.maximum(1 - z, 0), np.maximum(1 + z, 0)
        return float((score * right**2 + (1 - score) * wrong**2).sum()), 2 * ((1 - score) * wrong - score * right)

    def expected(self, z: np.ndarray) -> np.ndarray:
        return np.clip((z + 1) / 2, 0, 1)

    def margin(self, expected: np.ndarray) -> np.ndarray:
        return 2 * expected - 1


class MiniLMLogistic(Logistic):
    """A head on a frozen encoder of BERT's kind."""

    of = "minilm"
    grid = tuple({"strength": strength} for strength in (0.1, 0.01, 1.0))
