"""What the encoder policy reads: of a query its n-grams, of a member what it earned on the training queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from routers.baselines.features import hashed

WIDTH = 1 << 13
"""Columns for words; character n-grams (2 to 4, within words) have as many."""
CHARACTERS = 3000
"""Of a query that are read: the first half from its beginning, the other from its end."""


def counted(texts: Sequence[str]) -> list[sp.csr_matrix]:
    """`hashed` beginnings and ends of texts: two of ``[texts, WIDTH]``."""
    half = CHARACTERS // 2
    short = [text if len(text) <= CHARACTERS else f"{text[:half]} {text[-half:]}" for text in texts]
    return hashed(short, WIDTH, WIDTH)


def tfidf(parts: Sequence[sp.csr_matrix], idf: np.ndarray) -> sp.csr_matrix:
    """``[texts, 2 * WIDTH]``, each half of a row of length 1/sqrt(2) (0 where it is empty); `idf`: ``[2 * WIDTH]``."""
    halves = []
    for part, weights in zip(parts, np.split(idf, 2), strict=True):  # products of sparse matrices take a ms
        row = np.repeat(np.arange(part.shape[0]), np.diff(part.indptr))
        data = part.data * weights[part.indices]
        lengths = np.sqrt(np.bincount(row, data.astype(np.float64) ** 2, part.shape[0]))
        data = data * (0.5**0.5 / np.maximum(lengths, 1e-9))[row]
        halves.append(sp.csr_matrix((data, part.indices, part.indptr), part.shape))
    return sp.hstack(halves, format="csr", dtype=np.float32)


STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def ridge(embedded: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Linear models of values by the embedding, regularised so that what is left out is foretold best.

    Args:
        embedded: ``[rows, width]``.
        values: ``[rows, columns]``.

    Returns:
        Weights ``[columns, width]``, biases ``[columns]``, and ``[rows, columns]``: what the other rows foretell of
        each row (leave-one-out, in closed form).
    """
    middle, mean = embedded.mean(axis=0), values.mean(axis=0)
    u, s, vt = np.linalg.svd(embedded - middle, full_matrices=False)
    along = u.T @ (values - mean)

    def left_out(strength: float) -> np.ndarray:
        kept = s**2 / (s**2 + strength)
        leverage = (u**2 @ kept)[:, None] + 1 / len(u)
        return np.asarray(values - (values - mean - u @ (kept[:, None] * along)) / np.maximum(1 - leverage, 1e-6))

    found = {strength: left_out(strength) for strength in STRENGTHS}
    best = min(found, key=lambda strength: float(((found[strength] - values) ** 2).mean()))
    weights = (vt.T @ ((s / (s**2 + best))[:, None] * along)).T
    return weights, mean - weights @ middle, found[best]
