"""Learned baselines by hand, on odd data, for members that they never saw, and at a size that allows no square."""

import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest

from routers.baselines import BASELINES, neighbours, softmax_head
from routers.baselines.base import Data, Fitted
from routers.baselines.descent import minimised
from routers.baselines.described import Capabilities, Described, LossPrediction
from routers.baselines.elo import Elo
from routers.baselines.factors import Factors
from routers.baselines.families import FamilyGuessed
from routers.baselines.linear import SVM, Logistic
from routers.baselines.mixing import Mixing
from routers.baselines.neighbours import Neighbours
from routers.baselines.play import play_baselines
from routers.baselines.ridge import Ridge
from routers.baselines.softmax_head import SoftmaxHead
from routers.baselines.stacked import Stacked
from routers.baselines.state_zero import StateZero
from routers.evaluation.episodes import Outcomes, RewardRule
from routers.router import CannotDo

RULE = RewardRule(1.0, cost_weight=0.2)
FITTED = {name: one.how for name, one in BASELINES.items() if isinstance(one.how, type)}
TEXT_ONLY = {name: make for name, make in FITTED.items() if not name.startswith("MiniLM")}
FAST = [name for name, one in BASELINES.items() if not one.slow]


def outcomes(score: Any, texts: list[str], usd: Any = 0.1, families: list[str] | None = None) -> Outcomes:
    scores = np.array(score, dtype=float)
    names = families or ["f"] * len(texts)
    items = [{"query_id": f"q{i}", "family": f, "query": t} for i, (f, t) in enumerate(zip(names, texts, strict=True))]
    paid = np.broadcast_to(np.array(usd, dtype=float), scores.shape).copy()
    return Outcomes(items, list("vwxyz")[: scores.shape[1]], scores, paid, RULE(scores, paid), rule=RULE)


def two_kinds(rows: int = 80, members: int = 3, seed: int = 0) -> Outcomes:
    """Sums, which v does right and cheaply, and capitals, which w does right; others are right half the time."""
    rng = np.random.default_rng(seed)
    sums = np.arange(rows) % 2 == 0
    texts = [f"add {n} and {n + 1}" if s else f"capital of country {n}" for n, s in enumerate(sums)]
    right = np.full((rows, members), 0.5)
    right[:, 0], right[:, 1] = np.where(sums, 0.95, 0.1), np.where(sums, 0.2, 0.9)
    usd = np.linspace(0.1, 0.9, members) * rng.uniform(0.8, 1.2, (rows, members))
    return outcomes(rng.random((rows, members)) < right, texts, usd, ["sum" if s else "place" for s in sums])


def test_elo_by_hand() -> None:
    """Two training queries, one like the query: it weighs base^(1 + 1), the other base^(1 + 0)."""
    router = Elo().fit(outcomes([[1, 0], [0, 1]], ["abc", "xyz"]), settings={"base": 3.0})
    rate = 9 / (9 + 3)  # v wins the first, w the second
    score, _ = router.foretold(["abc"])
    # Each is right on the share of the weight that it wins: that is the rate itself, around the mean score of a half.
    assert score[0] == pytest.approx([rate, 1 - rate])
    elo = 400 * np.log10(rate / (1 - rate))  # the rating that RouteLLM's logistic regression finds
    assert 1 / (1 + 10 ** (-elo / 400)) == pytest.approx(rate)


def test_matrix_factorisation_by_hand() -> None:
    """The form is a bilinear one, and it fits a 2 x 2 table that no ranking of members explains."""
    data = Data.of(outcomes([[1, 0], [0, 1]], ["abc", "xyz"]))
    router = Factors().fit(data, settings={"strength": 1e-3, "size": 2})
    x = data.view("svd")
    by_hand = [[sum(router.vectors[m] * (router.project.T @ x[q])) + router.bias[m] for m in (0, 1)] for q in (0, 1)]
    found = router.foretold(["abc", "xyz"])[0]
    assert found == pytest.approx(1 / (1 + np.exp(-np.array(by_hand)))) and found.round(1).tolist() == [[1, 0], [0, 1]]


class MeanScore(Fitted):
    """Foretells what it has seen on the average."""

    def learn(self, data: Data) -> None:
        self.mean = data.score.mean(axis=0)

    def foretell_score(self, data: Data) -> np.ndarray:
        return np.tile(self.mean, (len(data), 1))


class Wrong(MeanScore):
    def foretell_score(self, data: Data) -> np.ndarray:
        return -super().foretell_score(data)


def test_stacked_weights_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a part that helps the weight is y u / u u on the fold that it has not seen; one that only harms has none."""
    monkeypatch.setattr(Stacked, "kinds", (MeanScore, Wrong))
    data = Data.of(two_kinds(rows=60))
    _, others, own = data.folds[0]
    told = np.tile(others.score.mean(axis=0), (len(own), 1))
    weight = (own.score * told).sum() / (told**2).sum()
    router = Stacked().fit(data)
    assert router.weights == pytest.approx([weight, 0.0])
    assert router.foretold(["add 1 and 2"])[0][0] == pytest.approx(weight * data.score.mean(axis=0))


def test_stacked_parts_know_the_kinds_of_queries() -> None:
    train = two_kinds(rows=200)
    router = Stacked().fit(train)
    asked = [router.route(text).member for text in ("add 7 and 8", "capital of country 7")]
    assert asked == ["v", "w"] and router.weights.sum() == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize(("make", "least"), [(Logistic, 0.75), (SVM, 0.75)])
def test_without_features_a_linear_model_says_the_mean(make: type[Fitted], least: float) -> None:
    train = outcomes([[1.0, 0.25], [0.5, 0.25], [0.75, 0.25]], ["a", "b", "c"])  # texts without words or n-grams
    score = make().fit(train, settings={"strength": 1e3}).foretold(["d"])[0]
    assert score[0] == pytest.approx([least, 0.25], abs=0.01)


def test_the_slope_of_the_softmax_heads_loss() -> None:
    """It finds the rule that the rewards follow: v does sums, w capitals."""
    train = two_kinds()
    router = SoftmaxHead().fit(train, settings={"strength": 1e-3})
    told = router.foretell(Data(list(train.items), router.features))
    rule = np.eye(3)[np.arange(80) % 2]
    assert (told.chances(0.2) * train.reward).sum() >= (rule * train.reward).sum()
    # By hand: one query, two members, logits z: the slope of -sum(p r) is -p (r - sum(p r)).
    [z] = minimised(lambda z: (float(((z - [1.0, 2.0]) ** 2).sum()), [2 * (z - [1.0, 2.0])]), [np.zeros(2)])
    assert z == pytest.approx([1, 2], abs=1e-4)
    with pytest.raises(CannotDo, match="only says whom to ask"):
        router.foretold(["add 1 and 2"])


@pytest.mark.parametrize("strength", [0.3, 0.03])
def test_the_softmax_head_does_not_fall_onto_one_member(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many words, few queries: begun at a ridge regression it ended at one member for all, at every cost weight."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 300, 12)) for _ in range(200)]
    train = outcomes(rng.random((200, 4)) < [0.2, 0.37, 0.34, 0.42], texts, [0.002, 0.09, 0.02, 0.9])
    data, seen = Data.of(train), []

    def watched(loss: Any, start: Any, strength: float) -> Any:
        seen.extend([loss, start, minimised(loss, start, strength)])
        return seen[-1]

    monkeypatch.setattr(softmax_head, "minimised", watched)
    told = SoftmaxHead().fit(data, settings={"strength": strength}).foretell(data)
    for weight in (0.0, 0.2, 0.8):
        chances, reward = told.chances(weight), data.reward(weight)
        assert (chances * reward).sum(axis=1).mean() > reward.mean(axis=0).max() + 0.1
        assert chances.mean(axis=0).max() < 0.9
    loss, start, end = seen
    (before, steep), (after, slopes) = loss(*start), loss(*end)
    left = [slope + strength * part for slope, part in zip(slopes, end, strict=True)]
    assert after + strength / 2 * sum((part**2).sum() for part in end) < before  # so the expected reward has grown
    assert all(np.linalg.norm(a) < 0.05 * np.linalg.norm(b) for a, b in zip(left, steep, strict=True))


def test_mixing_is_half_way_on_the_hull() -> None:
    # Hull: (.1, .2), (.5, .8), (.9, 1); x at (.5, .3) is below it. Half way in cost is .5: all of w.
    router = Mixing().fit(outcomes([[0.2, 0.8, 0.3, 1.0]] * 4, list("abcd"), [[0.1, 0.5, 0.5, 0.9]]))
    assert router.chances == pytest.approx([0, 1, 0, 0])
    router = Mixing().fit(outcomes([[0.2, 1.0]] * 4, list("abcd"), [[0.1, 0.9]]))
    assert router.chances == pytest.approx([0.5, 0.5])
    asked = [router.route(f"query {n}") for n in range(400)]
    assert 160 < sum(decision.member == "v" for decision in asked) < 240
    assert asked[0].scores == pytest.approx({"v": 0.5, "w": 0.5}) and router.route("query 0") == asked[0]
    assert router.route("query 0", members=["w"]).scores == {"w": 1.0}


def test_the_random_row_is_the_expectation_of_random_routes() -> None:
    items = two_kinds(40)
    found = play_baselines(items, None, names=["random"]).of(router="random").frame
    assert found["reward"].mean() == pytest.approx(items.reward.mean())


def test_families_are_guessed_from_texts() -> None:
    router = FamilyGuessed().fit(two_kinds())
    assert [router.route(text).member for text in ("add 500 and 501", "the capital of country 700")] == ["v", "w"]


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_dearer_members_are_asked_less_where_price_matters_more(name: str) -> None:
    train = two_kinds(members=5)
    router = TEXT_ONLY[name]().fit(train)
    told = router.foretell(Data(list(train.items), router.features))
    if told.draws:
        assert (told.chances(0.0) == told.chances(9.0)).all()
        return
    paid = [(told.chances(weight) * np.minimum(told.usd, 1)).sum() for weight in (0, 0.1, 0.3, 1, 3, 1e6)]
    assert (np.diff(paid) <= 1e-9).all() and paid[-1] < paid[0]


def test_the_same_seed_makes_the_same_table() -> None:
    first, second = (play_baselines(two_kinds(20, seed=1), two_kinds(60), names=TEXT_ONLY, seed=3) for _ in range(2))
    assert first.frame.equals(second.frame) and first.header == second.header
    assert set(first.header["train_reward"]) == {"v", "w", "x", *TEXT_ONLY}


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_odd_training_data_is_learned_from_without_a_warning(name: str) -> None:
    texts = ["add one and two", "name it", "?"]
    odd = {
        "three rows": outcomes([[1, 0], [0, 1], [1, 1]], texts),
        "graded scores, one family": outcomes([[0.3, 0.25], [0.9, 0.25], [0.0, 0.25]], texts),
        "one member, always right": outcomes([[1], [1], [1]], texts),
        "one row": outcomes([[1, 0]], texts[:1]),
        "one text": outcomes([[1, 0], [0, 1], [1, 1]] * 20, ["the same"] * 60),
        "free": outcomes([[1, 0], [0, 1], [1, 1]], texts, 0.0),
    }
    no_rule = odd["three rows"]
    odd["a reward without a rule"] = Outcomes(
        no_rule.items, no_rule.members, no_rule.score, no_rule.usd, no_rule.reward - 3
    )
    for label, train in odd.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            router = TEXT_ONLY[name]().fit(train)
            decisions = router.route_all(["add three and four", "..."])
        assert {decision.member for decision in decisions} <= set(train.members), label
        if not isinstance(router, SoftmaxHead):
            found = router.foretold(["add three and four", "..."])
            assert all(np.isfinite(values).all() and values.shape == (2, len(train.members)) for values in found), (
                label
            )


@pytest.mark.parametrize("make", [Capabilities, LossPrediction, StateZero])
def test_a_member_that_training_never_saw_is_routed_to_by_what_it_did_on_probes(make: type[Described]) -> None:
    whole = two_kinds(300, members=5)
    some = whole.items[:100]
    part = Outcomes(
        whole.items, list("wxyz"), *(values[:, 1:] for values in (whole.score, whole.usd, whole.reward)), rule=RULE
    )
    router = make().fit(part)
    assert router.route("add 700 and 701").member != "v"
    probes = Outcomes(some, list("vwxyz"), whole.score[:100], whole.usd[:100], whole.reward[:100], rule=RULE)
    router.introduce(probes)
    assert [member.name for member in router.members] == list("vwxyz")
    assert [router.route(text).member for text in ("add 700 and 701", "capital of country 701")] == ["v", "w"]


def test_no_square_of_the_training_queries_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """6,000 queries x 50 members: a dense square of float32 is 144 MB."""
    monkeypatch.setattr(neighbours, "BLOCK", 1 << 18)
    train = two_kinds(6000, members=5)
    wide = {name: np.tile(getattr(train, name), (1, 10)) for name in ("score", "usd", "reward")}
    data = Data.of(Outcomes(train.items, [f"m{n}" for n in range(50)], **wide, rule=RULE))
    data.view("tfidf")
    monkeypatch.setattr(neighbours, "MOST_KNOWN", 5000)
    for router, settings in ((Ridge(), {"strength": 1.0}), (Neighbours(), {"count": 10}), (Elo(), {"base": 10.0})):
        tracemalloc.start()
        router.fit(data, settings=settings).foretell(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 60e6, (router, peak)
    assert router.known.shape[0] == 5000
