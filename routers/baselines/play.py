"""Plays baselines on the items of an evaluation, beside every single member."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from routers.baselines import BASELINES, Baseline
from routers.baselines.base import Data, Fitted, Told, text_of
from routers.baselines.from_log import outcomes_of
from routers.data.folds import folds
from routers.data.table import ReplyTable, check_split, spread
from routers.evaluation.episodes import Episodes, Outcomes, RewardRule

TIMED = 20
"""Decisions whose median time a frontier shows."""


def play_baselines(
    items: Outcomes,
    train: Outcomes | None,
    header: Mapping[str, Any] | None = None,
    *,
    names: Collection[str] | None = None,
    sweep: Sequence[float] = (),
    seed: int = 0,
    tell: Callable[[str], object] | None = None,
) -> Episodes:
    """Every single member and those of `BASELINES` for which enough is known, on the same items.

    Args:
        items: to route.
        train: training items; None: nothing is fitted.
        header: of the evaluation; `train_reward` is added: of every baseline but the oracle its mean reward on the
            training items, of fitted ones out of fold.
        names: of `BASELINES`; None: all that are not slow.
        sweep: cost weights at which fitted ones are played besides, as `NAME, price sensitivity WEIGHT` (curve NAME).
        seed: of fitted ones.
        tell: is told the name of each before it is played.
    """
    rewards: dict[str, float] = {}
    if train is not None:
        rewards = dict(zip(items.members, map(float, train.reward.mean(axis=0)), strict=True))
    singles = zip(items.members, np.eye(len(items.members)), strict=True)
    parts = [items.play(name, "member", np.tile(row, (len(items.items), 1))) for name, row in singles]
    data = Data.of(train) if train is not None and train.items else None
    queries = None if data is None else Data(list(items.items), data.features)
    for name, one in BASELINES.items():
        if (one.slow if names is None else name not in names) or not _possible(one, items, train):
            continue
        if tell:
            tell(name)
        if not isinstance(one.how, type):
            routes = one.how(train, items)
            parts.append(items.play(name, one.kind, _chances(routes, items)))
            if train is not None and one.kind != "oracle":
                rewards[name] = float((_chances(one.how(train, train), train) * train.reward).sum(axis=1).mean())
            continue
        assert data is not None and queries is not None and train is not None
        settings, left_out = out_of_fold(one.how(), data, seed)
        router = one.how().fit(data, seed=seed, settings=settings)
        told = router.foretell(queries)
        own: dict[str, Any] = {"expected": told.score if train.rule and not told.draws else None}
        own["seconds"] = seconds_of(router, items.items) if sweep else 0.0
        weights = {name: (data.cost_weight, "")}
        if not told.draws and train.rule is not None:
            weights |= {f"{name}, price sensitivity {weight:g}": (weight, name) for weight in sweep}
        for label, (weight, curve) in weights.items():
            parts.append(items.play(label, one.kind, told.chances(weight), curve=curve, **own))
            earned = sum((t.chances(weight) * train.reward[rows]).sum() for rows, t in left_out)
            rewards[label] = float(earned / sum(len(rows) for rows, _ in left_out))
    told_rewards = {"train_reward": {name: round(value, 6) for name, value in rewards.items()}} if rewards else {}
    return Episodes(Episodes.merged(parts).frame, {**(header or {}), **told_rewards})


def seconds_of(router: Any, queries: Sequence[Any]) -> float:
    """Median time of a decision on one query alone."""
    spent = []
    for query in queries[:TIMED]:
        start = time.perf_counter()
        router.route_all([query])
        spent.append(time.perf_counter() - start)
    return float(np.median(spent))


def out_of_fold(router: Fitted, data: Data, seed: int = 0) -> tuple[Mapping[str, Any], list[tuple[np.ndarray, Told]]]:
    """The settings that are chosen for a baseline, and what it foretells of each fold, learned from the others."""
    router.seed = seed
    settings = router.tuned(data)
    folds = data.folds
    return settings, [(rows, router.learn_with(known, settings).foretell(fold)) for rows, known, fold in folds]


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
    table: ReplyTable,
    rule: RewardRule,
    *,
    share: Any = None,
    limit: int | None = None,
    split: str = "heldout",
    **how: Any,
) -> Episodes:
    """`play_baselines` on the queries of a table, fitted on its training split.

    Args:
        table: recorded replies.
        rule: the training reward.
        share: `srpo.task.Share` of the queries; None: all of them.
        limit: this many queries, spread evenly over the split; None: all.
        split: whose queries are routed.
        how: `names`, `sweep`, `seed` and `tell` of `play_baselines`.

    Raises:
        ValueError: the split has no queries.
    """
    chosen = spread_of(table, split, limit)
    items = outcomes_of(table, rule, split, chosen if share is None else share.of(chosen))
    if table.log:  # nothing is fitted, and who is best of estimates is nobody
        return play_baselines(items, None, table_header(rule, split), names=["random"])
    train = Outcomes.of_table(table, rule, "train") if table.queries("train") else None
    return play_baselines(items, train, table_header(rule, split), **how)


def spread_of(table: ReplyTable, split: str, limit: int | None) -> np.ndarray:
    """Places of the queries of a split that an evaluation takes."""
    check_split(table, split)
    return spread(len(table.queries(split)), limit)


def _possible(one: Baseline, items: Outcomes, train: Outcomes | None) -> bool:
    """Whether enough is known: a fitted baseline needs two different training items, for a fold and its rest."""
    if isinstance(one.how, type) and (train is None or len(folds([text_of(item) for item in train.items])) < 2):
        return False
    if not one.needs():
        return False
    known = [*items.items, *(train.items if train is not None else ())]
    if one.reads and not all(str(item.get("query") or "").strip() for item in known):
        return False
    return not one.told or any(item.get("family") for item in known)


def _chances(routes: np.ndarray, items: Outcomes) -> np.ndarray:
    return routes if routes.ndim == 2 else np.eye(len(items.members))[routes]
