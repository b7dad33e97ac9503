"""Routers that cost nothing to have: what a trained policy must beat. To add one, write it here and give it a line in
`BASELINES`.

Each is a function of what is known of the training items and of the items to route, and returns whom it asks. Learned
ones see the training items only; their settings are those with the highest reward of leave-one-out routes there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from routers.data.table import ReplyTable, check_split, spread
from routers.evaluation.episodes import Episodes, Kind, Outcomes, RewardRule

Chosen = np.ndarray
"""Member index per item ``[Q]``, or probabilities ``[Q, M]``."""
MOST_TRAINING_ITEMS = 3000
"""Baselines that compare texts are fitted on this many, spread evenly: their time grows with the cube."""


class Texts(NamedTuple):
    """Similarity of texts, by TF-IDF of words and of character n-grams (2 to 4): cosine of [train, train] and
    [items, train]. None where there are no texts."""

    train: np.ndarray
    items: np.ndarray


@dataclass(frozen=True)
class Baseline:
    """How items are routed: `routes(train, items, texts)`.

    Where `items is train`, routes of each training item are asked for as if it had been left out of the training.
    `fitted`: needs training items; `reads`: needs their texts; `told`: needs their families.
    """

    kind: Kind
    routes: Callable[[Outcomes, Outcomes, Texts], Chosen]
    fitted: bool = True
    reads: bool = False
    told: bool = False


def oracle(train: Outcomes, items: Outcomes, texts: Texts) -> Chosen:
    """The cheapest of the members that are most right; where nobody is right, the cheapest of all."""
    best = items.score.max(axis=1, keepdims=True)
    return np.argmin(np.where(items.score == best, items.usd, np.inf), axis=1)


def best_per_family(train: Outcomes, items: Outcomes, texts: Texts) -> Chosen:
    """The member that earned most on the item's family in training; for a new family, the best of all."""
    labels = np.array([item["family"] for item in train.items])
    own = train is items  # leave-one-out: without the item itself
    routes = []
    for i, item in enumerate(items.items):
        same = labels == item["family"]
        if own:
            same[i] = False
        routes.append(int((train.reward[same] if same.any() else train.reward).mean(axis=0).argmax()))
    return np.array(routes)


def nearest(train: Outcomes, items: Outcomes, texts: Texts) -> Chosen:
    """The member that earned most on the k nearest training texts (kNN)."""
    alike = texts.train.copy()
    np.fill_diagonal(alike, -np.inf)
    order = np.argsort(-alike, axis=1, kind="stable")
    sizes = [k for k in (5, 10, 20, 40, 80) if k < len(order)] or [1]
    k = max(sizes, key=lambda k: _earned(train, train.reward[order[:, :k]].mean(axis=1)))
    near = (order if train is items else np.argsort(-texts.items, axis=1, kind="stable"))[:, :k]
    return np.asarray(train.reward[near].mean(axis=1).argmax(axis=1))


def ridge(train: Outcomes, items: Outcomes, texts: Texts) -> Chosen:
    """The member with the highest reward foretold by a linear model of the text (ridge regression, in dual form)."""
    middle, best = train.reward.mean(axis=0), (-np.inf, np.zeros(0), np.zeros(0))
    for strength in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
        inverse = np.linalg.inv(texts.train + strength * np.eye(len(texts.train)))
        weights = inverse @ (train.reward - middle)
        left_out = train.reward - weights / np.diag(inverse)[:, None]  # what the others foretell of each, exactly
        best = max(best, (_earned(train, left_out), weights, left_out), key=lambda found: found[0])
    foretold = best[2] if train is items else middle + texts.items @ best[1]
    return np.asarray(foretold.argmax(axis=1))


BASELINES: dict[str, Baseline] = {
    "random": Baseline(
        "random", lambda _, items, __: np.full(items.score.shape, 1 / len(items.members)), fitted=False
    ),
    "best per family (told)": Baseline("told", best_per_family, told=True),
    "TF-IDF kNN": Baseline("learned", nearest, reads=True),
    "TF-IDF ridge": Baseline("learned", ridge, reads=True),
    "oracle": Baseline("oracle", oracle, fitted=False),
}
"""Every single member is played besides."""


def play_baselines(items: Outcomes, train: Outcomes | None, header: Mapping[str, Any] | None = None) -> Episodes:
    """Every single member and all of `BASELINES` for which enough is known, on the same items.

    Args:
        items: to route.
        train: training items; None: nothing is fitted.
        header: of the evaluation; `train_reward` is added: of every baseline but the oracle its mean reward on the
            training items, of fitted ones by leave-one-out.
    """
    texts = Texts(np.zeros(0), np.zeros(0))
    has_families = train is not None and any(item.get("family") for item in train.items)
    reads = train is not None and all(item.get("query") for item in (*train.items, *items.items))
    if train is not None:
        train = _spread(train)
    if train is not None and reads:
        texts = similarity([item["query"] for item in train.items], [item["query"] for item in items.items])
    chosen = {member: np.full(len(items.items), i) for i, member in enumerate(items.members)}
    parts = [items.play(name, "member", _weights(routes, items)) for name, routes in chosen.items()]
    rewards: dict[str, float] = {}
    if train is not None:
        rewards = dict(zip(items.members, map(float, train.reward.mean(axis=0)), strict=True))
    for name, one in BASELINES.items():
        if (one.fitted and train is None) or (one.reads and not reads) or (one.told and not has_families):
            continue
        routes = one.routes(train or items, items, texts)
        parts.append(items.play(name, one.kind, _weights(routes, items)))
        if train is not None and one.kind != "oracle":
            on_train = one.routes(train, train, Texts(texts.train, texts.train))
            rewards[name] = float((_weights(on_train, train) * train.reward).sum(axis=1).mean())
    told = {"train_reward": {name: round(value, 6) for name, value in rewards.items()}} if rewards else {}
    merged = Episodes.merged(parts)
    return Episodes(merged.frame, {**(header or {}), **told})


def table_header(rule: RewardRule, split: str, name: str = "baselines") -> dict[str, Any]:
    """Of an evaluation on a table; `name`: whose rewards `rule` makes."""
    return {
        "task": "query_routing",
        "split": split,
        "item": "query",
        "score": "right answers",
        "rule": {name: asdict(rule)},
    }


def table_baselines(
    table: ReplyTable, rule: RewardRule, *, share: Any = None, limit: int | None = None, split: str = "heldout"
) -> Episodes:
    """`play_baselines` on the queries of a table, fitted on its training split.

    Args:
        table: recorded replies.
        rule: the training reward.
        share: `srpo.task.Share` of the queries; None: all of them.
        limit: this many queries, spread evenly over the split; None: all.
        split: whose queries are routed.

    Raises:
        ValueError: the split has no queries.
    """
    chosen = spread_of(table, split, limit)
    items = Outcomes.of_table(table, rule, split, chosen if share is None else share.of(chosen))
    train = Outcomes.of_table(table, rule, "train") if table.queries("train") else None
    return play_baselines(items, train, table_header(rule, split))


def spread_of(table: ReplyTable, split: str, limit: int | None) -> np.ndarray:
    """Places of the queries of a split that an evaluation takes."""
    check_split(table, split)
    return spread(len(table.queries(split)), limit)


def similarity(train: Sequence[str], items: Sequence[str], width: int = 1 << 13) -> Texts:
    """TF-IDF similarity of texts; features are hashed into `width` columns for words, and as many for n-grams."""
    found: list[np.ndarray] = []
    for features in (_words, _grams):
        counts = _hashed(train, features, width)
        idf = np.log((1 + len(train)) / (1 + (counts > 0).sum(axis=0, dtype=np.float32))) + 1
        known = _weighted(counts, idf)
        blocks = [items[i : i + 2000] for i in range(0, len(items), 2000)]
        found += [known @ known.T]
        found += [np.concatenate([_weighted(_hashed(block, features, width), idf) @ known.T for block in blocks])]
    return Texts(*(np.asarray(a + b, dtype=float) / 2 for a, b in zip(found[:2], found[2:], strict=True)))


def _words(text: str) -> list[str]:
    return re.findall(r"\w\w+", text.lower())


def _grams(text: str) -> list[str]:
    words = [f" {word} " for word in text.lower().split()]
    return [word[i : i + n] for word in words for n in (2, 3, 4) for i in range(max(1, len(word) - n + 1))]


def _hashed(texts: Sequence[str], features: Callable[[str], list[str]], width: int) -> np.ndarray:
    counts = np.zeros((len(texts), width), dtype=np.float32)
    for row, text in enumerate(texts):
        for feature, count in Counter(features(text)).items():
            counts[row, crc32(feature.encode()) % width] += count
    return counts


def _weighted(counts: np.ndarray, idf: np.ndarray) -> np.ndarray:
    """Rows of length 1 (0 where there is nothing): (1 + ln count) * idf."""
    rows = np.log1p(counts - 1, where=counts > 0, out=np.full_like(counts, -1)) + 1
    rows *= idf
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), dtype=np.float32)


def _earned(train: Outcomes, foretold: np.ndarray) -> float:
    """Mean reward of sending every training item to whom most is foretold for."""
    return float(np.take_along_axis(train.reward, foretold.argmax(axis=1)[:, None], axis=1).mean())


def _weights(routes: Chosen, items: Outcomes) -> np.ndarray:
    return routes if routes.ndim == 2 else np.eye(len(items.members))[routes]


def _spread(train: Outcomes) -> Outcomes:
    if len(train.items) <= MOST_TRAINING_ITEMS:
        return train
    some = spread(len(train.items), MOST_TRAINING_ITEMS)
    items = [train.items[i] for i in some]
    return Outcomes(items, train.members, train.score[some], train.usd[some], train.reward[some], rule=train.rule)
