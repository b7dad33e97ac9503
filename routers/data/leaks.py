"""Held-out queries that a router has almost seen: the text of a training query with a few words changed.

Equal texts are no matter of this report, for a table holds none (``routers.data.table``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from routers.data.table import ReplyTable, normalise_query

SIMILAR = 0.9
"""Cosine of TF-IDF vectors of words and pairs of words. Of the 23 such pairs in MMLU some are one question in other
words, most one passage with another question or two questions a word apart; at .85 many share their options alone."""
_FEATURES, _DRAWS, _LOOKED_AT = 1 << 16, 24, 8
_EXAMPLES = 3
_NUMBER = re.compile(r"(?<!\w)\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Leaks:
    """What of a table's held-out queries stands nearly in its training split."""

    heldout: int
    near: int
    """Held-out queries with a training query that is as similar as `SIMILAR`, or more: those that were found."""
    same_but_numbers: int
    """Held-out queries that are a training query with other numbers: one template made both."""
    examples: list[dict[str, Any]]
    """Of the most similar pairs: heldout, train (texts), similarity."""

    def __str__(self) -> str:
        shares = [f"{count / max(self.heldout, 1):.1%}" for count in (self.near, self.same_but_numbers)]
        pairs = "".join(f"; {e['heldout'][:80]!r} is like {e['train'][:80]!r}" for e in self.examples)
        return (
            f"{shares[0]} of {self.heldout} held-out queries nearly repeat a training query, and {shares[1]} differ "
            f"from one in numbers alone{pairs}"
        )


def leaks(table: ReplyTable) -> Leaks:
    """Look for near repetitions, in time and memory linear in the number of queries.

    A held-out query is compared with training queries on the same side of each of about log2(n) random planes, in one
    of `_DRAWS` draws of them (Charikar 2002), and with `_LOOKED_AT` of each draw: at 75,000 training queries nine in
    ten pairs at cosine .9 are seen, and nearly all at .95.
    """
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    texts = {
        split: [normalise_query(query["query"]) for query in table.queries(split)] for split in ("train", "heldout")
    }
    train, heldout = texts["train"], texts["heldout"]
    if not train or not heldout:
        return Leaks(len(heldout), 0, 0, [])
    seen = {_NUMBER.sub("0", text) for text in train}
    same_but_numbers = sum(_NUMBER.sub("0", text) in seen for text in heldout)
    words = HashingVectorizer(
        token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), n_features=_FEATURES, norm=None, alternate_sign=False
    )
    vectors = TfidfTransformer(sublinear_tf=True).fit_transform(words.transform([*train, *heldout])).astype(np.float32)
    bits = int(np.clip(np.log2(len(train)) - 1, 4, 16))
    planes = np.random.default_rng(0).standard_normal((_FEATURES, _DRAWS * bits), dtype=np.float32)
    sides = (vectors @ planes > 0).reshape(-1, _DRAWS, bits)
    keys = sides @ (1 << np.arange(bits))
    best, partner = np.zeros(len(heldout), np.float32), np.zeros(len(heldout), np.int64)
    for band in keys.T:  # of one draw
        order = np.argsort(band[: len(train)], kind="stable")
        sorted_keys, asked = band[order], band[len(train) :]
        start, end = (np.searchsorted(sorted_keys, asked, side) for side in ("left", "right"))
        for k in range(_LOOKED_AT):
            some = np.flatnonzero((start + k < end) & (best < 1 - 1e-6))
            found = order[start[some] + k]
            cosine = np.asarray(vectors[len(train) + some].multiply(vectors[found]).sum(axis=1)).ravel()
            better = cosine > best[some]
            best[some[better]], partner[some[better]] = cosine[better], found[better]
    closest = np.argsort(-best)[:_EXAMPLES]
    examples = [
        {"heldout": heldout[i], "train": train[partner[i]], "similarity": round(float(best[i]), 3)}
        for i in closest
        if best[i] >= SIMILAR
    ]
    return Leaks(len(heldout), int((best >= SIMILAR).sum()), same_but_numbers, examples)
