"""Online routers against closed forms and counts by hand, on a stream, and saved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routers.baselines.online import (
    EMA,
    BetaThompson,
    EpsilonGreedy,
    Learner,
    LinearThompson,
    LinUCB,
    Pheromone,
    SharedLinUCB,
    learners,
)
from routers.baselines.optimist import Optimist
from routers.baselines.stream import (
    STREAM,
    chosen_settings,
    online_router,
    play_learners,
    play_online,
    play_stream,
    regret_picture,
)
from routers.data.catalogue import Member
from routers.evaluation.episodes import Episodes, Outcomes, RewardRule
from routers.router import CannotDo, Decision, load_router

RULE = RewardRule(cost_scale=2.0, cost_weight=0.2)


def taught(learner: Learner, count: int = 30, members: int = 3, width: int = 4) -> tuple[np.ndarray, ...]:
    """Contexts, choices and rewards that a learner was taught."""
    rng = np.random.default_rng(0)
    x = learner.reads(np.hstack([rng.standard_normal((count, width)), np.ones((count, 1))]))
    chosen, reward = rng.integers(0, members, count), rng.standard_normal(count)
    learner.start(x, members, 0)
    for row, member, earned in zip(x, chosen, reward, strict=True):
        learner.learn(row, int(member), float(earned), 1.0, 0.5, 1.0)
    return x, chosen, reward


def test_linucb_is_ridge_regression_per_member_and_its_width() -> None:
    learner = LinUCB(alpha=0.7, ridge=0.3)
    x, chosen, reward = taught(learner)
    for member in range(3):
        own = x[chosen == member]
        square = own.T @ own + 0.3 * np.eye(5)
        theta = np.linalg.solve(square, own.T @ reward[chosen == member])
        np.testing.assert_allclose(learner.theta[member], theta, atol=1e-10)
        width = np.sqrt(x[0] @ np.linalg.inv(square) @ x[0])
        assert learner.values(x[0], np.random.default_rng(0))[member] == pytest.approx(theta @ x[0] + 0.7 * width)
        assert learner.values(x[0], None)[member] == pytest.approx(theta @ x[0])


def test_shared_linucb_is_one_ridge_regression_of_all_pairs() -> None:
    learner = SharedLinUCB(ridge=0.5, directions=2)
    x, chosen, reward = taught(learner)
    pairs = np.array([learner.pairs(row)[member] for row, member in zip(x, chosen, strict=True)])
    np.testing.assert_array_equal(pairs[0][:3], [x[0, 0], x[0, 1], 1.0])
    theta = np.linalg.solve(pairs.T @ pairs + 0.5 * np.eye(12), pairs.T @ reward)
    np.testing.assert_allclose(learner.theta[0], theta, atol=1e-10)
    np.testing.assert_allclose(learner.values(x[3], None), learner.pairs(x[3]) @ theta)


def test_linear_thompson_draws_from_the_posterior_of_a_members_reward() -> None:
    learner = LinearThompson(alpha=0.5, ridge=1.0)
    x, *_ = taught(learner)
    rng = np.random.default_rng(1)
    drawn = np.array([learner.values(x[0], rng) for _ in range(4000)])
    spread = [0.5 * np.sqrt(x[0] @ inverse @ x[0]) for inverse in learner.inverse]
    np.testing.assert_allclose(drawn.mean(axis=0), learner.theta @ x[0], atol=0.02)
    np.testing.assert_allclose(drawn.std(axis=0), spread, rtol=0.06)


def test_beta_counts_by_hand() -> None:
    learner = BetaThompson(categories=2, blend=0.5)
    near, far = np.array([1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0])
    learner.start(np.array([near, far]), 2, 0)
    for x, member, score, usd in ((near, 0, 1.0, 0.5), (near, 0, 0.0, 0.3), (far, 0, 1.0, 0.1), (near, 1, 0.25, 1.0)):
        learner.learn(x, member, 0.0, score, usd, 1.0)
    here = learner.category(near)
    np.testing.assert_allclose(learner.beta[-1], [[3, 2], [1.25, 1.75]])  # of all queries, from (1, 1)
    np.testing.assert_allclose(learner.beta[here], [[2, 2], [1.25, 1.75]])
    # Half of both: (2.5, 2) and (1.25, 1.75); mean costs .3 and 1.
    np.testing.assert_allclose(learner.values(near, None), [2.5 / 4.5 * (1 + 0.2 * 0.7), 1.25 / 3 * 1.0])


def test_ema_and_pheromone_by_hand() -> None:
    near, far = np.array([1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0])
    average = EMA(categories=2, rate=0.5)
    average.start(np.array([near, far]), 2, 0)
    for reward in (1.0, 0.5):
        average.learn(near, 1, reward, 0.0, 0.0, 1.0)
    np.testing.assert_allclose(average.values(near, None), [0, 0.5])  # 0 -> .5 -> .5
    np.testing.assert_allclose(average.values(far, None), [0, 0])
    np.testing.assert_allclose(average.chances(near, np.random.default_rng(0), [0, 1]), [0.05, 0.95])
    trail = Pheromone(categories=2, rate=0.5, power=2)
    trail.start(np.array([near, far]), 2, 0)
    trail.learn(near, 1, 0.0, 1.0, 1.0, 1.0)  # right, and it cost one unit: tau goes half way to 1/2; it is there
    np.testing.assert_allclose(trail.trail, 0.5)
    trail.learn(near, 1, 0.0, 0.0, 1.0, 1.0)
    weight = 1 / (1 + np.exp(-20))  # squared distances 0 and 2
    values = np.array([0.5, weight * 0.5 * (1 - 0.5 * weight) + (1 - weight) * 0.5 * (1 - 0.5 * (1 - weight))]) ** 2
    np.testing.assert_allclose(trail.chances(near, np.random.default_rng(0), [0, 1]), values / values.sum())


def test_exploration_has_the_chances_that_it_says() -> None:
    learner = EpsilonGreedy(epsilon=0.3)
    x, *_ = taught(learner)
    found = learner.chances(x[0], np.random.default_rng(0), [0, 2])
    assert sorted(found) == pytest.approx([0.15, 0.85])
    assert sorted(learner.chances(x[0], None, [0, 2])) == [0, 1]
    with pytest.raises(ValueError, match="LinUCB has no setting 'beta'"):
        LinUCB(beta=1.0)
    with pytest.raises(ValueError, match="has no setting 'epsilon'"):  # it draws lots of its own
        Pheromone(epsilon=0.1)


def test_the_optimist_takes_an_outcome_in_exactly() -> None:
    """Mean and covariance of all weights after one outcome, against a sum over the posterior's density."""
    learner = Optimist(shared=0.5, own=1.5, level=0.4, member=0.7, middle=-0.3)
    x = np.array([0.8, 1.0])
    learner.start(np.array([x]), 2, 0)
    learner.learn(x, 1, 0.6, 1.0, 0.5, 1.0)
    prior = np.array([0.5, 0.4, 1.5, 0.7, 1.5, 0.7])  # of c, w_0, w_1
    along = prior * np.array([0.8, 1, 0, 0, 0.8, 1])  # what every weight has to do with f_1(x)
    spread = 0.8**2 * 2.0 + 1.1
    f = np.linspace(-15, 15, 20_001)
    density = np.exp(-((f + 0.3) ** 2) / (2 * spread)) / (1 + np.exp(-f))
    density /= density.sum()
    after = density @ f
    np.testing.assert_allclose(learner.mean.ravel(), along * (after + 0.3) / spread, atol=1e-6)
    shrunk = (spread - density @ (f - after) ** 2) / spread**2
    expected = np.diag(prior) - np.outer(along, along) * shrunk
    np.testing.assert_allclose(learner.covariance.reshape(6, 6), expected, atol=1e-6)
    right = 1 / (1 + np.exp(-f))
    penalty = learner.theta[1] @ x  # ridge regression of score - reward = .4: .4 * 1.64 / 2.64
    assert penalty == pytest.approx(0.4 * 1.64 / 2.64)
    assert learner.values(x, None)[1] == pytest.approx(density @ right - penalty, abs=1e-3)
    spread_of_right = (density @ right**2 - (density @ right) ** 2) ** 0.5
    explored = learner.values(x, np.random.default_rng(0))[1] - learner.values(x, None)[1]
    assert explored == pytest.approx(spread_of_right, abs=2e-3)


def test_the_optimist_shares_how_hard_queries_are_as_much_as_it_is_told() -> None:
    x, found = np.array([1.0, 1.0]), []
    for shared in (0.0, 1.0):
        learner = Optimist(shared=shared, level=shared, own=2)  # whole numbers too: files have them
        learner.start(np.array([x]), 2, 0)
        for _ in range(20):
            learner.learn(x, 0, 0.0, 0.0, 0.0, 1.0)
        found.append(learner.values(x, None))
    assert found[0][0] < 0.1 and found[0][1] == pytest.approx(0.41, abs=0.01)  # nothing was seen of the second
    assert found[1][0] < 0.1 and found[1][1] < 0.3


def test_the_optimist_comes_near_the_truth_of_many_outcomes() -> None:
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.standard_normal(3000), np.ones(3000)])
    chosen = rng.integers(0, 2, 3000)
    z = np.where(chosen == 0, 1.5 * x[:, 0] - 0.5, -1.0 * x[:, 0])
    score = (rng.random(3000) < 1 / (1 + np.exp(-z))).astype(float)
    learner = Optimist()
    learner.start(x, 2, 0)
    for row, member, right in zip(x, chosen, score, strict=True):
        learner.learn(row, int(member), float(right), float(right), 0.0, 1.0)
    at = np.array([[1.0, 1.0], [-1.0, 1.0], [0.0, 1.0]])
    told = [learner.values(row, None) for row in at]
    truth = 1 / (1 + np.exp(-np.array([[1.0, -1.0], [-2.0, 1.0], [-0.5, 0.0]])))
    np.testing.assert_allclose(told, truth, atol=0.05)


def test_minilm_is_one_of_the_settings_and_its_directions_are_fitted_on_all_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def embedded(texts: tuple[str, ...]) -> np.ndarray:
        return np.array([[float("add" in text), float("name" in text), 1.0] for text in texts])

    monkeypatch.setattr("routers.baselines.features.embedded", embedded)
    monkeypatch.setattr("routers.baselines.stream.has_minilm", lambda: True)
    monkeypatch.setattr(LinUCB, "grid", ({"directions": 1},))  # the first of TF-IDF alone tells the kinds less well
    known = outcomes()
    _, _, chosen = play_learners(known, outcomes(40, 1), (0,), ["LinUCB"], lambda name: None)
    assert chosen["LinUCB"] in ({"directions": 1}, {"directions": 1, "minilm": 1})
    router = online_router("LinUCB", known, {"minilm": 1})
    texts = [item["query"] for item in known.items]
    rows = router.contexts(texts)
    assert np.allclose(np.linalg.norm(rows[:, :-1], axis=1), 1) and (rows[:, -1] == 1).all()
    kinds = np.array(["add" in text for text in texts])
    sentences = embedded(tuple(texts)) - embedded(tuple(texts)).mean(axis=0)
    np.testing.assert_allclose(router.features.middle, embedded(tuple(texts)).mean(axis=0))
    assert (sentences[kinds][0] == sentences[kinds][1]).all()
    near = rows[:, :-1] @ rows[:, :-1].T  # half of it MiniLM's, by which queries of a kind are the same
    assert near[np.ix_(kinds, kinds)].min() > near[np.ix_(kinds, ~kinds)].max()


def outcomes(count: int = 200, seed: int = 0) -> Outcomes:
    """Two kinds of queries, each with a member that is right; the third is right by chance and dear."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 2, count)
    texts = [f"add {i} and {i + 3}" if kind else f"name the capital of land {i}" for i, kind in enumerate(kinds)]
    score = np.column_stack([kinds == 0, kinds == 1, rng.random(count) < 0.5]).astype(float)
    usd = np.tile([0.2, 0.2, 2.0], (count, 1))
    items = [{"query_id": f"{seed}-{i}", "query": text} for i, text in enumerate(texts)]
    return Outcomes(items, ["place", "sum", "dear"], score, usd, RULE(score, usd), rule=RULE)


@pytest.mark.parametrize(
    "name", ["LinUCB", "LinUCB, shared", "Thompson, linear", "epsilon-greedy", "logistic, optimistic"]
)
def test_contextual_learners_find_whom_to_ask(name: str) -> None:
    episodes, streams = play_online(name, outcomes(), outcomes(80, 1), (0, 1), {})
    after = episodes.of(set="").frame["reward"].mean()
    assert after > 0.9  # always right would be .98; the best single member about .48
    assert streams[0].regret("single")[-1] < 0  # better than the best single one while it learned
    assert len(episodes.of(set=STREAM)) == 400


def test_a_stream_shows_the_chosen_outcome_only_and_counts_regret() -> None:
    known = outcomes(6)
    told: list[Any] = []

    class Fixed:
        name = "fixed"

        def route(self, query: str) -> Decision:
            return Decision(("dear",), {})

        def update(self, query: str, decision: Decision, outcome: Any) -> None:
            told.append((query, dict(outcome)))

    stream = play_stream(Fixed(), known, 3)  # type: ignore[arg-type]
    order = np.random.default_rng(3).permutation(6)
    assert told == [
        (known.items[i]["query"], {"score": known.score[i, 2], "usd": 2.0}) for i in order
    ]  # in the stream's order, nothing of the others
    np.testing.assert_allclose(stream.regret(), np.cumsum(0.98 - (known.score[order, 2] - 0.2)))
    assert (stream.chance == 1).all()
    assert regret_picture({"fixed": [stream]})[:4] == b"\x89PNG"


def test_settings_are_chosen_on_other_queries_than_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these two LinUCBs one reads no word of the query; every learner has the same quarter to find out which."""
    grid = ({"directions": 0, "alpha": 0.3}, {"directions": 16, "alpha": 0.3})
    monkeypatch.setattr(LinUCB, "grid", grid)
    monkeypatch.setattr("routers.baselines.stream.has_minilm", lambda: False)
    known = outcomes()
    assert chosen_settings("LinUCB", known) == grid[1]
    told: list[Any] = []
    episodes, streams, chosen = play_learners(known, outcomes(40, 1), (0, 1), ["EMA", "LinUCB"], told.append)
    assert told == list(chosen) == list(streams) == ["EMA", "LinUCB"] and chosen["LinUCB"] == grid[1]
    shown = [set(episodes.of(set=STREAM, router=name).frame["item"]) for name in streams]
    other = {item["query_id"] for item in known.items} - shown[0]
    assert shown[0] == shown[1] and len(shown[0]) == 150 and len(other) == 50

    def chosen_on(name: str, known: Outcomes, like: Any) -> dict[str, float]:
        assert {item["query_id"] for item in known.items} == other
        return {"rate": 0.5}

    monkeypatch.setattr("routers.baselines.stream.chosen_settings", chosen_on)
    assert play_learners(known, outcomes(40, 1), (0,), ["EMA"], told.append)[2] == {"EMA": {"rate": 0.5}}


@pytest.mark.parametrize("name", learners())
def test_saved_routers_go_on_where_they_stood(name: str, tmp_path: Path) -> None:
    known, later = outcomes(60), outcomes(40, 1)
    router = online_router(name, known, {})
    play_stream(router, known)
    router.save(tmp_path)
    with pytest.raises(ValueError, match="new is a member that this router does not know"):
        load_router(tmp_path, catalogue={one: Member(one, one) for one in ("sum", "new")})
    with load_router(tmp_path) as again:
        assert again.explores is False
        again.explores = True
        first, second = (play_stream(one, later, 5) for one in (router, again))
        np.testing.assert_array_equal(first.chosen, second.chosen)
        np.testing.assert_allclose(first.chance, second.chance)
        again.explores = False
        assert again.route("add 1 and 2", members=["dear"]).member == "dear"
        assert again.route("add 1 and 2").member == again.route("add 1 and 2").member
        with pytest.raises(CannotDo, match=r"cost weight than 0\.2"):
            again.route("add 1 and 2", cost_weight=0.5)
        with pytest.raises(ValueError, match="usd of the outcome is nan"):
            again.update("add 1 and 2", again.route("add 1 and 2"), {"score": 1.0, "usd": float("nan")})


def test_one_command_plays_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from routers.tasks.query_routing.frontier import main

    monkeypatch.setattr("routers.baselines.stream.has_minilm", lambda: False)
    monkeypatch.setattr(Optimist, "grid", ({"alpha": 0.5, "directions": 16},))
    monkeypatch.setattr(EMA, "grid", EMA.grid[3:5])
    how = ["--table", "quickstart", "--online", "--heldout_limit", "20", "--seeds", "2", "--output", str(tmp_path)]
    text = main([*how, "--baselines", "EMA"])
    assert "| EMA |" in text and "| alpha 0.5, directions 16" in text and "LinUCB" not in text
    assert (tmp_path / "regret.png").read_bytes()[:4] == b"\x89PNG"
    assert set(Episodes.read(tmp_path).frame["set"]) == {STREAM, ""}
    with pytest.raises(ValueError, match="--members_left_out is not of --online"):
        main([*how, "--members_left_out"])
    with pytest.raises(ValueError, match="no online router is called 'mixing'"):
        main([*how, "--baselines", "mixing"])


def test_the_same_seed_plays_the_same_stream() -> None:
    known = outcomes(80)
    one, other = (play_stream(online_router("logistic, optimistic", known, {}, 7), known, 7) for _ in range(2))
    np.testing.assert_array_equal(one.chosen, other.chosen)
    assert isinstance(online_router("logistic, optimistic", known, {}).learner, Optimist)
