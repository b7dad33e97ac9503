"""Smooth losses of several arrays, minimised together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Slopes = tuple[float, Sequence[np.ndarray]]


def minimised(
    loss: Callable[..., Slopes], start: Sequence[np.ndarray], strength: float = 0.0, most: int = 100
) -> list[np.ndarray]:
    """Arrays at which `loss(*arrays) -> (value, gradients)` is least (L-BFGS from `start`, at most `most` steps).

    Args:
        strength: of an L2 penalty ``strength / 2 * |array|^2`` on all matrices; vectors (intercepts) are free.
    """
    from scipy.optimize import minimize

    ends = np.cumsum([array.size for array in start])[:-1]

    def split(flat: np.ndarray) -> list[np.ndarray]:
        return [part.reshape(a.shape) for part, a in zip(np.split(flat, ends), start, strict=True)]

    def flat_loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        arrays = split(flat)
        value, slopes = loss(*arrays)
        held = [strength * (a.ndim > 1) for a in arrays]
        value += sum(h * float((a**2).sum()) / 2 for h, a in zip(held, arrays, strict=True))
        return float(value), np.concatenate(
            [(s + h * a).ravel() for s, h, a in zip(slopes, held, arrays, strict=True)]
        ).astype(float)

    first = np.concatenate([array.ravel() for array in start]).astype(float)
    return split(minimize(flat_loss, first, jac=True, method="L-BFGS-B", options={"maxiter": most, "ftol": 1e-5}).x)


def logistic(z: np.ndarray, score: np.ndarray) -> tuple[float, np.ndarray]:
    """Cross-entropy of scores in [0, 1] under ``sigmoid(z)``, summed, and its slope in z."""
    return float((np.logaddexp(0, z) - score * z).sum()), sigmoid(z) - score


def sigmoid(z: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return np.asarray(expit(z))
