"""Baselines by hand: who asks whom, learned from the training split only."""

from typing import Any

import numpy as np
import pytest

from routers.baselines import BASELINES, Baseline, oracle
from routers.baselines.base import Data, Fitted
from routers.baselines.families import FamilyTold
from routers.baselines.features import Features
from routers.baselines.neighbours import Neighbours
from routers.baselines.play import play_baselines, table_baselines
from routers.baselines.ridge import Ridge, solve
from routers.data.table import quickstart_table
from routers.evaluation.episodes import Episodes, Outcomes, RewardRule
from routers.evaluation.statistics import Paired
from srpo.task import Share

RULE = RewardRule(1.0, cost_weight=0.2)


def outcomes(score: Any, families: str = "", usd: Any = None, texts: list[str] | None = None) -> Outcomes:
    scores = np.array(score, dtype=float)
    names = families or "f" * len(scores)
    items = [{"query_id": f"q{i}", "family": f, "query": (texts or names)[i]} for i, f in enumerate(names)]
    paid = np.ones_like(scores) if usd is None else np.array(usd, dtype=float)
    members = ["x", "y", "z"][: scores.shape[1]]
    return Outcomes(items, members, scores, paid, RULE(scores, paid), rule=RULE)


def asked(router: Fitted, items: Outcomes) -> list[str | None]:
    return [decision.member for decision in router.route_all(list(items.items))]


def test_the_oracle_is_the_cheapest_that_is_right() -> None:
    known = outcomes([[1, 1], [1, 0], [0, 1], [0, 0], [0.5, 1]], usd=[[1, 4], [1, 4], [2, 8], [1, 4], [1, 2]])
    assert oracle(None, known).tolist() == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_nobody_beats_the_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    correct, cost = rng.integers(0, 2, (60, 4)).astype(float), rng.uniform(0, 1e-5, (60, 4))
    rule = RewardRule(5e-6, cost_weight=0.2, format_weight=0.2)  # a lighter format term would let silence pay
    items = [{"query_id": str(i), "family": "", "query": ""} for i in range(60)]
    known = Outcomes(items, list("abcd"), correct, cost, rule(correct, cost), rule=rule)
    best = known.play("best", "oracle", np.eye(4)[oracle(None, known)]).frame
    silent = known.play("silent", "policy", [None] * 60).frame
    others = [known.play(name, "member", [name] * 60).frame for name in "abcd"]
    for frame in (silent, *others, known.play("r", "random", np.full((60, 4), 0.25)).frame):
        assert (best["score"] >= frame["score"] - 1e-12).all() and (best["reward"] >= frame["reward"] - 1e-12).all()


def test_best_per_family_is_the_trainings_and_falls_back_on_the_best_of_all() -> None:
    # Training: family a scores 1.0 / 0.0 (x), family b 0.1 / 0.7 (y); over all rows x scores .55, y .35.
    train = outcomes([[1, 0], [1, 0], [0, 0.5], [0.2, 0.9]], "aabb")
    router = FamilyTold().fit(train)
    assert asked(router, outcomes([[0, 0]] * 3, "bac")) == ["y", "x", "x"]
    score, usd = router.foretold([{"query": "?", "family": "b"}, "?"])
    assert score == pytest.approx(np.array([[0.1, 0.7], [0.55, 0.35]])) and usd == pytest.approx(np.ones((2, 2)))
    assert router.route("?", context="b").member == "y"


def test_ridge_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 8)), rng.normal(size=(30, 3))
    for strength in (0.03, 1.0, 10.0):
        exact = np.linalg.solve(x.T @ x + strength * np.eye(8), x.T @ y)
        assert solve(x, y, strength, tolerance=1e-8) == pytest.approx(exact, abs=1e-7)
    texts = [f"add {n} and {n + 1}" for n in range(20)] + [f"capital of country {n}" for n in range(20)]
    train = outcomes([[1, 0]] * 20 + [[0, 1]] * 20, texts=texts)
    router = Ridge().fit(train, settings={"strength": 0.3})
    tfidf = router.features.view("tfidf", texts).toarray().astype(float)
    dual = np.linalg.solve(tfidf @ tfidf.T + 0.3 * np.eye(40), train.score - 0.5)
    assert router.foretold(texts)[0] == pytest.approx(0.5 + tfidf @ tfidf.T @ dual, abs=1e-3)


def test_neighbours_and_ridge_ask_whom_like_queries_asked() -> None:
    texts = [f"add {n} and {n + 1}" for n in range(20)] + [f"capital of country {n}" for n in range(20)]
    train = outcomes([[1, 0]] * 20 + [[0, 1]] * 20, texts=texts)
    items = outcomes([[0, 0]] * 2, texts=["add 99 and 98", "the capital of country 99"])
    for make in (Neighbours, Ridge):
        assert asked(make().fit(train), items) == ["x", "y"], make


def test_tfidf_rows_are_unit_and_read_words_and_pieces() -> None:
    texts = ["what is two plus two", "name the capital"]
    features = Features().fit(texts)
    known = features.view("tfidf", texts)
    alike = (features.view("tfidf", ["what is two plus two", "captial", ""]) @ known.T).toarray()
    assert alike[0, 0] == pytest.approx(1) and (known @ known.T).toarray()[0] == pytest.approx(alike[0])
    assert alike[1, 1] > alike[1, 0]  # a slip of the pen shares pieces of words
    assert alike[2].tolist() == [0, 0]


def test_a_view_of_rows_is_rows_of_the_view() -> None:
    data = Data.of(outcomes([[1, 0]] * 4, texts=["a b c", "d e f", "add one", "name it"]))
    part = data.rows(np.array([2, 0]))
    assert (part.view("svd") == data.view("svd")[[2, 0]]).all() and part.view("tfidf").shape[0] == 2


def test_fast_baselines_on_the_shipped_pool() -> None:
    """TF-IDF ridge and kNN are level with scikit-learn's (reward .517 and .511 on this split)."""
    table = quickstart_table()
    rule = RewardRule(table.max_cost)
    found = table_baselines(table, rule)
    fast = [name for name, one in BASELINES.items() if not one.slow]
    assert list(found.routers) == [*table.members, *fast]
    paired = Paired(found)
    assert paired.mean("TF-IDF ridge", "reward") > 0.505 and paired.mean("TF-IDF kNN", "reward") > 0.48
    trained = found.header["train_reward"]
    assert list(trained) == [*table.members, *(name for name in fast if name != "oracle")]
    # what they earn on folds that they were not fitted on holds on held-out data
    for name in ("TF-IDF ridge", "TF-IDF kNN", "best per family (told)"):
        assert trained[name] == pytest.approx(paired.mean(name, "reward"), abs=0.06)
    assert paired.references[0].router == "python"
    # shares of two processes are what one makes
    some = {"names": ["TF-IDF kNN", "TF-IDF ridge", "best per family (told)", "random"], "limit": 40}
    parts = [table_baselines(table, rule, share=Share(rank, 2), **some) for rank in range(2)]
    whole = table_baselines(table, rule, **some)
    merged = Episodes.merged(parts)
    assert merged.frame.equals(whole.frame) and merged.header == whole.header


def test_dearer_prices_are_paid_less_the_more_they_matter() -> None:
    rng = np.random.default_rng(0)
    families = "ab" * 30
    score = np.where(np.array(list(families))[:, None] == "a", [0.2, 0.9], [0.6, 0.7]) + rng.normal(0, 0.05, (60, 2))
    train = outcomes(score, families, usd=[[0.1, 0.8]] * 60)
    found = play_baselines(train, train, names=["best per family (told)"], sweep=[0, 0.2, 2])
    # a: y is worth .7 more and costs .7 more; b: .1 more.
    paid = found.frame.groupby("router", sort=False)["usd"].mean()
    name = "best per family (told)"
    assert paid[name] == pytest.approx(0.45)
    assert [paid[f"{name}, price sensitivity {w}"] for w in ("0", "0.2", "2")] == pytest.approx([0.8, 0.45, 0.1])
    assert set(found.of(curve=name).routers) == {f"{name}, price sensitivity {w}" for w in ("0", "0.2", "2")}


def test_what_is_not_known_is_not_played(monkeypatch: pytest.MonkeyPatch) -> None:
    items = outcomes([[1, 0], [0, 1]], "ab")
    assert list(play_baselines(items, None).routers) == ["x", "y", "random", "oracle"]
    bare = Outcomes([{"query_id": "q0"}, {"query_id": "q1"}], ["x", "y"], items.score, items.usd, items.score)
    assert list(play_baselines(bare, bare).routers) == ["x", "y", "random", "mixing", "oracle"]
    trained = play_baselines(bare, bare).header["train_reward"]
    assert {name: trained[name] for name in ("x", "y", "random")} == {"x": 0.5, "y": 0.5, "random": 0.5}
    monkeypatch.setitem(BASELINES, "never y", Baseline("rule", lambda _, some: np.zeros(len(some.items), int)))
    assert play_baselines(items, None).of(router="never y").frame["member"].tolist() == ["x", "x"]
