"""Baselines by hand: who asks whom, learned from the training split only, and level with scikit-learn's."""

from typing import Any

import numpy as np
import pytest

from routers.data.table import quickstart_table
from routers.evaluation.baselines import (
    BASELINES,
    Baseline,
    Texts,
    best_per_family,
    nearest,
    oracle,
    play_baselines,
    ridge,
    similarity,
    table_baselines,
)
from routers.evaluation.episodes import Episodes, Outcomes, RewardRule
from routers.evaluation.statistics import Paired
from srpo.task import Share

NONE = Texts(np.zeros(0), np.zeros(0))


def outcomes(reward: Any, families: str = "", usd: Any = None, texts: list[str] | None = None) -> Outcomes:
    scores = np.array(reward, dtype=float)
    names = families or "f" * len(scores)
    items = [{"query_id": f"q{i}", "family": f, "query": (texts or names)[i]} for i, f in enumerate(names)]
    paid = np.ones_like(scores) if usd is None else np.array(usd, dtype=float)
    return Outcomes(items, ["x", "y"], scores, paid, scores)


def test_the_oracle_is_the_cheapest_that_is_right() -> None:
    known = outcomes([[1, 1], [1, 0], [0, 1], [0, 0], [0.5, 1]], usd=[[1, 4], [1, 4], [2, 8], [1, 4], [1, 2]])
    assert oracle(known, known, NONE).tolist() == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_nobody_beats_the_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    correct, cost = rng.integers(0, 2, (60, 4)).astype(float), rng.uniform(0, 1e-5, (60, 4))
    rule = RewardRule(5e-6, cost_weight=0.2, format_weight=0.2)  # a lighter format term would let silence pay
    items = [{"query_id": str(i), "family": "", "query": ""} for i in range(60)]
    known = Outcomes(items, list("abcd"), correct, cost, rule(correct, cost), rule=rule)
    best = known.play("best", "oracle", np.eye(4)[oracle(known, known, NONE)]).frame
    silent = known.play("silent", "policy", [None] * 60).frame
    others = [known.play(name, "member", [name] * 60).frame for name in "abcd"]
    for frame in (silent, *others, known.play("r", "random", np.full((60, 4), 0.25)).frame):
        assert (best["score"] >= frame["score"] - 1e-12).all() and (best["reward"] >= frame["reward"] - 1e-12).all()


def test_best_per_family_is_the_trainings_and_falls_back_on_the_best_of_all() -> None:
    # Training: family a earns 1.0 / 0.0 (x), family b 0.0 / 0.5 and 0.2 / 0.9 (y); over all rows x earns .55, y .35.
    train = outcomes([[1, 0], [1, 0], [0, 0.5], [0.2, 0.9]], "aabb")
    assert best_per_family(train, outcomes([[0, 0]] * 3, "bac"), NONE).tolist() == [1, 0, 0]
    # Leave-one-out: without itself, the only c falls back on the best of all others.
    assert best_per_family(*[outcomes([[1, 0], [1, 0], [0, 1]], "aac")] * 2, NONE).tolist() == [0, 0, 0]


def test_ridge_by_hand() -> None:
    """Dual form against the primal normal equations, and leave-one-out against fits that really leave one out."""
    rng = np.random.default_rng(0)
    features, items = rng.normal(size=(12, 3)), rng.normal(size=(5, 3))
    train = outcomes(features @ rng.normal(size=(3, 2)) + rng.normal(size=(12, 2)))
    known = Texts(features @ features.T, items @ features.T)
    found = ridge(train, outcomes(np.zeros((5, 2))), known)
    middle, choices, left_out = train.reward.mean(0), [], []

    def fit(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
        return np.linalg.solve(x.T @ x + strength * np.eye(3), x.T @ (y - middle))

    for strength in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
        without = [(np.delete(features, i, 0), np.delete(train.reward, i, 0)) for i in range(12)]
        rows = [middle + features[i] @ fit(*without[i], strength) for i in range(12)]
        routes = np.array(rows).argmax(1)
        left_out.append(routes)
        choices.append(
            (
                train.reward[range(12), routes].mean(),
                (middle + items @ fit(features, train.reward, strength)).argmax(1),
            )
        )
    best = max(range(6), key=lambda i: choices[i][0])
    assert found.tolist() == choices[best][1].tolist()
    assert ridge(train, train, Texts(known.train, known.train)).tolist() == left_out[best].tolist()


def test_nearest_asks_whom_the_neighbours_ask() -> None:
    texts = [f"add {n} and {n + 1}" for n in range(20)] + [f"capital of country {n}" for n in range(20)]
    train = outcomes([[1, 0]] * 20 + [[0, 1]] * 20, texts=texts)
    asked = ["add 99 and 98", "the capital of country 99"]
    for rule in (nearest, ridge):
        found = rule(train, outcomes([[0, 0]] * 2, texts=asked), similarity(texts, asked))
        assert found.tolist() == [0, 1], rule


def test_similarity_is_a_cosine_and_reads_words_and_pieces() -> None:
    found = similarity(["what is two plus two", "name the capital"], ["what is two plus two", "captial", ""])
    assert np.diag(found.train) == pytest.approx(np.ones(2))
    assert found.items[0] == pytest.approx(found.train[0])
    assert found.items[1, 1] > found.items[1, 0]  # a slip of the pen shares pieces of words
    assert found.items[2].tolist() == [0, 0]


def test_all_baselines_on_the_shipped_pool() -> None:
    """TF-IDF ridge and kNN are level with scikit-learn's (reward .517 and .511 on this split)."""
    table = quickstart_table()
    rule = RewardRule(table.max_cost)
    found = table_baselines(table, rule)
    assert list(found.routers) == [*table.members, *BASELINES]
    paired = Paired(found)
    assert paired.mean("TF-IDF ridge", "reward") > 0.505 and paired.mean("TF-IDF kNN", "reward") > 0.49
    trained = found.header["train_reward"]
    assert list(trained) == [*table.members, *(name for name in BASELINES if name != "oracle")]
    # what they foretell of themselves on training data holds on held-out data
    for name in ("TF-IDF ridge", "TF-IDF kNN", "best per family (told)"):
        assert trained[name] == pytest.approx(paired.mean(name, "reward"), abs=0.06)
    assert paired.references[0].router == "python"
    # shares of two processes are what one makes
    parts = [table_baselines(table, rule, share=Share(rank, 2), limit=40) for rank in range(2)]
    whole = table_baselines(table, rule, limit=40)
    merged = Episodes.merged(parts)
    assert merged.frame.equals(whole.frame) and merged.header == whole.header


def test_what_is_not_known_is_not_played(monkeypatch: pytest.MonkeyPatch) -> None:
    items = outcomes([[1, 0], [0, 1]], "ab")
    assert list(play_baselines(items, None).routers) == ["x", "y", "random", "oracle"]
    bare = Outcomes([{"query_id": "q0"}, {"query_id": "q1"}], ["x", "y"], items.score, items.usd, items.reward)
    assert list(play_baselines(bare, bare).routers) == ["x", "y", "random", "oracle"]
    assert play_baselines(bare, bare).header["train_reward"] == {"x": 0.5, "y": 0.5, "random": 0.5}
    monkeypatch.setitem(
        BASELINES, "never y", Baseline("rule", lambda _, some, __: np.zeros(len(some.items), int), False)
    )
    assert play_baselines(items, None).of(router="never y").frame["member"].tolist() == ["x", "x"]
