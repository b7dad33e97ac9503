"""Routers that cost next to nothing to have: what a trained policy must beat.

To add one, write it in a file of its own and give it a line in `BASELINES`. All are fitted on training queries only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from routers.baselines.base import Fitted
from routers.baselines.families import FamilyTold
from routers.baselines.neighbours import Neighbours
from routers.baselines.ridge import Ridge
from routers.evaluation.episodes import Kind, Outcomes


@dataclass(frozen=True)
class Baseline:
    """How items are routed.

    Args:
        kind: how tables group it.
        how: a class that is fitted; or a function of the training items (None: there are none) and the items to route,
            which returns member indices ``[Q]`` or probabilities ``[Q, M]``.
        reads: needs the texts of all items.
        told: needs their families.
        slow: not part of an evaluation at the end of a training.
    """

    kind: Kind
    how: type[Fitted] | Callable[[Outcomes | None, Outcomes], np.ndarray]
    reads: bool = False
    told: bool = False
    slow: bool = False


def oracle(train: Outcomes | None, items: Outcomes) -> np.ndarray:
    """The cheapest of the members that are most right; where nobody is right, the cheapest of all."""
    best = items.score.max(axis=1, keepdims=True)
    return np.argmin(np.where(items.score == best, items.usd, np.inf), axis=1)


BASELINES: dict[str, Baseline] = {
    "random": Baseline("random", lambda _, items: np.full(items.score.shape, 1 / len(items.members))),
    "best per family (told)": Baseline("told", FamilyTold, told=True),
    "TF-IDF kNN": Baseline("learned", Neighbours, reads=True),
    "TF-IDF ridge": Baseline("learned", Ridge, reads=True),
    "oracle": Baseline("oracle", oracle),
}
"""Every single member is played besides."""
