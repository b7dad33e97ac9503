"""Ridge regression of correctness and cost on TF-IDF."""

from __future__ import annotations

from typing import Any

import numpy as np

from routers.baselines.base import Data, Fitted, Told


def solve(x: Any, y: np.ndarray, strength: float, tolerance: float = 1e-4, most: int = 300) -> np.ndarray:
    """``(x' x + strength I)^-1 x' y`` by conjugate gradients; linear in the entries of a sparse `x`.

    All columns of `y` at once, for a pass over `x` costs about the same for one as for ten (scikit-learn's
    "sparse_cg" takes them one by one).

    Args:
        x: ``[Q, F]``, sparse or dense.
        y: ``[Q, T]``.
        tolerance: of a column's residual, as a share of its start.
        most: iterations.

    Returns:
        ``[F, T]``
    """
    residual = x.T @ y.astype(x.dtype)
    found, step = np.zeros_like(residual), residual.copy()
    square = (residual**2).sum(axis=0)
    enough = np.maximum(tolerance**2 * square, 1e-12)  # a column that is constant, as prices per call are, is noise
    for _ in range(most):
        if (square <= enough).all():
            break
        along = x.T @ (x @ step) + strength * step
        length = np.where(square > enough, square / np.maximum((step * along).sum(axis=0), 1e-30), 0)
        found += length * step
        residual -= length * along
        before, square = square, (residual**2).sum(axis=0)
        step = residual + square / np.maximum(before, 1e-30) * step
    return np.asarray(found)


class Ridge(Fitted):
    grid = tuple({"strength": strength} for strength in (1.0, 0.1, 0.3, 3.0, 10.0))

    def learn(self, data: Data, strength: float) -> None:
        both = np.hstack([data.score, data.usd])
        self.middle = both.mean(axis=0)
        self.weights = solve(data.view("tfidf"), both - self.middle, strength)

    def foretell(self, data: Data) -> Told:
        score, usd = np.hsplit(self.middle + data.view("tfidf") @ self.weights, 2)
        return Told(score, np.maximum(usd, 0))
