"""Parts of the training items, by lot, and always the same ones: on one is chosen what was learned on the others.

Items of one text (`normalise_query`) lie in one part. A fifth decides on the settings of baselines
(`routers.baselines.base`), and, where `eval_strategy` asks for it, on the best checkpoint of a training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from routers.data.distinct import distinct
from routers.data.table_rows import normalise_query

FOLDS = 5


def folds(texts: Sequence[str]) -> list[np.ndarray]:
    """Places of the items of each part; of fewer than `FOLDS` different texts as many parts as there are texts. Items
    without a text are all different."""
    codes, several = distinct([normalise_query(text) or i for i, text in enumerate(texts)])
    order = np.random.default_rng(0).permutation(len(several))
    if len(several) == len(texts):
        return np.array_split(order, min(FOLDS, len(order))) if len(order) else []
    parts = np.array_split(order, min(FOLDS, len(order)))
    return [np.flatnonzero(np.isin(codes, part)) for part in parts]


def parted(texts: Sequence[str], aside: bool) -> tuple[np.ndarray, np.ndarray]:
    """Places of the items to learn from, and of the fifth that is set aside (not `aside`: none), in their order.

    Raises:
        ValueError: there are not two different texts.
    """
    every = np.arange(len(texts))
    if not aside:
        return every, every[:0]
    parts = folds(texts)
    if len(parts) < 2:
        raise ValueError(
            "eval_strategy sets a fifth of the training items aside, to choose the best checkpoint on, and these are "
            'too few: set eval_strategy: "no", or give more'
        )
    return np.setdiff1d(every, parts[0]), np.sort(parts[0])
