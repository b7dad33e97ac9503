"""What the encoder policy reads: of a query its n-grams and the family that they speak of, of a member what it earned
on the training queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from scipy.special import softmax

from routers.baselines.features import hashed
from routers.data.folds import folds

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


RARE, MOST_FAMILIES = 10, 64
"""A family of fewer training queries is no family, nor are those beyond the most frequent."""


def guessed(
    embedded: np.ndarray, families: Sequence[str], texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Probability of each family of the training queries, by logistic regression on the embedding.

    Args:
        embedded: ``[rows, width]``.
        families, texts: of the rows.

    Returns:
        Weights ``[families, width]``, biases ``[families]``, and ``[rows, families]``: of each row by those who have
        not seen its fold. None where there are not two families.
    """
    from sklearn.linear_model import LogisticRegression

    names, place, count = np.unique(np.array(families), return_inverse=True, return_counts=True)
    frequent = [name for name in np.argsort(-count, kind="stable")[:MOST_FAMILIES] if count[name] >= RARE]
    rest = len(frequent)
    code = np.full(len(names), rest)
    code[frequent] = np.arange(rest)
    code = code[place]
    total = rest + bool((code == rest).any())
    if rest < 2:
        return None

    def learn(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        model = LogisticRegression(C=10.0, max_iter=300).fit(embedded[rows], code[rows])
        own, bias = model.coef_, model.intercept_
        if len(own) == 1:  # of two, scikit-learn keeps that of the second alone
            own, bias = np.vstack([0 * own, own]), np.append(0.0, bias)
        weights, biases = np.zeros((total, embedded.shape[1])), np.full(total, -30.0)  # not seen: not guessed
        weights[model.classes_], biases[model.classes_] = own, bias
        return weights, biases

    every, left_out = np.arange(len(code)), np.zeros((len(code), total))
    for part in folds(texts):
        rows = np.setdiff1d(every, part)
        if len({*code[rows].tolist()}) < 2:
            return None
        weights, biases = learn(rows)
        left_out[part] = softmax(embedded[part] @ weights.T + biases, axis=1)
    return *learn(every), left_out


STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def ridge(embedded: np.ndarray, *parts: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Linear models of values by the embedding, each part regularised so that what is left out is foretold best.

    Args:
        embedded: ``[rows, width]``.
        parts: values, ``[rows, columns]`` each.

    Returns:
        Of each part weights ``[columns, width]``, biases ``[columns]``, and ``[rows, columns]``: what the other rows
        foretell of each row (leave-one-out, in closed form).
    """
    middle = embedded.mean(axis=0)
    rows = embedded - middle
    if len(rows) < rows.shape[1]:
        _, s, vt = np.linalg.svd(rows, full_matrices=False)
        square, axes = s**2, vt.T
    else:
        square, axes = np.linalg.eigh(rows.T @ rows)
    square, turned = np.maximum(square, 0), rows @ axes
    leverage = {strength: turned**2 @ (1 / (square + strength)) + 1 / len(rows) for strength in STRENGTHS}

    def fitted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mean = values.mean(axis=0)
        along = turned.T @ (values - mean)
        solved = {strength: along / (square + strength)[:, None] for strength in STRENGTHS}
        errors = {
            strength: (values - mean - turned @ solved[strength]) / np.maximum(1 - leverage[strength], 1e-6)[:, None]
            for strength in STRENGTHS
        }
        best = min(STRENGTHS, key=lambda strength: float((errors[strength] ** 2).mean()))
        weights = (axes @ solved[best]).T
        return weights, mean - weights @ middle, values - errors[best]

    return [fitted(values) for values in parts]
