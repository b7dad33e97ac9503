"""Routers that cost next to nothing to have: what a trained policy must beat.

To add one, write it in a file of its own and give it a line in `BASELINES`. All are fitted on training queries only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from routers.baselines.base import Fitted
from routers.baselines.described import Capabilities, LossPrediction
from routers.baselines.elo import Elo
from routers.baselines.factors import Factors
from routers.baselines.families import FamilyGuessed, FamilyTold
from routers.baselines.features import has_minilm
from routers.baselines.linear import SVM, Logistic, MiniLMLogistic
from routers.baselines.mixing import Mixing
from routers.baselines.mlp import MLP
from routers.baselines.neighbours import MiniLMNeighbours, Neighbours
from routers.baselines.ridge import Ridge
from routers.baselines.softmax_head import SoftmaxHead
from routers.baselines.stacked import Stacked
from routers.baselines.state_zero import StateZero
from routers.baselines.trees import Boosting
from routers.evaluation.episodes import Kind, Outcomes


@dataclass(frozen=True)
class Baseline:
    """How items are routed.

    Args:
        kind: how tables group it.
        how: a class that is fitted; or a function of the training items (None: there are none) and the items to route,
            which returns member indices ``[Q]`` or probabilities ``[Q, M]``.
        reads: needs the texts of all items.
        told: needs the families of training items (and a class that is told, of those to route).
        slow: not part of the evaluation at the end of a training.
        needs: whether what it needs is installed.
    """

    kind: Kind
    how: type[Fitted] | Callable[[Outcomes | None, Outcomes], np.ndarray]
    reads: bool = False
    told: bool = False
    slow: bool = False
    needs: Callable[[], bool] = lambda: True


def oracle(train: Outcomes | None, items: Outcomes) -> np.ndarray:
    """The cheapest of the members that are most right; where nobody is right, the cheapest of all."""
    best = items.score.max(axis=1, keepdims=True)
    return np.argmin(np.where(items.score == best, items.usd, np.inf), axis=1)


BASELINES: dict[str, Baseline] = {
    "random": Baseline("random", lambda _, items: np.full(items.score.shape, 1 / len(items.members))),
    "mixing": Baseline("random", Mixing),
    "best per family (told)": Baseline("told", FamilyTold, told=True),
    "best per family (guessed)": Baseline("learned", FamilyGuessed, reads=True, told=True),
    "TF-IDF kNN": Baseline("learned", Neighbours, reads=True),
    "TF-IDF ridge": Baseline("learned", Ridge, reads=True),
    "TF-IDF logistic": Baseline("learned", Logistic, reads=True),
    "TF-IDF SVM": Baseline("learned", SVM, reads=True, slow=True),
    "softmax head": Baseline("learned", SoftmaxHead, reads=True, slow=True),
    "matrix factorisation": Baseline("learned", Factors, reads=True),
    "stacked": Baseline("learned", Stacked, reads=True, told=True, slow=True),
    "Elo": Baseline("learned", Elo, reads=True),
    "MLP": Baseline("learned", MLP, reads=True, slow=True),
    "gradient boosting": Baseline("learned", Boosting, reads=True, slow=True),
    "capability vectors": Baseline("learned", Capabilities, reads=True),
    "loss prediction": Baseline("learned", LossPrediction, reads=True, slow=True),
    "state-zero value": Baseline("learned", StateZero, reads=True),
    "MiniLM kNN": Baseline("learned", MiniLMNeighbours, reads=True, slow=True, needs=has_minilm),
    "MiniLM logistic": Baseline("learned", MiniLMLogistic, reads=True, slow=True, needs=has_minilm),
    "oracle": Baseline("oracle", oracle),
}
"""Every single member is played besides."""
