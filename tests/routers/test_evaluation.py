"""Scores, frontiers and intervals against numbers worked by hand."""

import json
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from routers.evaluation.compare import main as compare
from routers.evaluation.report import Evaluation, compare_runs, evaluate_routes, render_gains, render_table
from routers.evaluation.statistics import (
    Estimate,
    Outcomes,
    RewardRule,
    difference,
    estimate,
    expect,
    family_routes,
    mixing_accuracy,
    oracle_routes,
    pareto_hull,
    play,
    resamples,
    route_entropy,
    summarise_seeds,
)

MEMBERS = ["cheap", "dear"]
# Four queries: both right, only the cheap one, only the dear one, nobody.
CORRECT = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
COST = np.array([[1.0, 4.0], [1.0, 4.0], [2.0, 8.0], [1.0, 4.0]]) * 1e-6
RULE = RewardRule(cost_scale=5e-6, cost_weight=0.2, format_weight=0.1)
QUERIES = [{"query_id": f"q{i}", "family": "sums" if i < 2 else "facts"} for i in range(4)]


def evaluate(routes: list[str | None], own_cost: np.ndarray | None = None) -> Evaluation:
    return evaluate_routes("ours", routes, QUERIES, MEMBERS, CORRECT, COST, RULE, own_cost)


def random_pool(seed: int, queries: int = 60, members: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, (queries, members)).astype(float), rng.uniform(0, 1e-5, (queries, members))


def test_play_by_hand() -> None:
    own = np.array([1.0, 0.0, 0.0, 1.0]) * 1e-6
    outcomes = play(np.array([0, 1, 1, -1]), CORRECT, COST, own, RULE)
    assert outcomes.correct.tolist() == [1, 0, 1, 0]
    assert outcomes.cost == pytest.approx([2e-6, 4e-6, 8e-6, 1e-6])  # an invalid action still costs its own tokens
    # 1 - 0.2*2/5 ; 0 - 0.2*4/5 ; 1 - 0.2*min(8/5, 1) ; 0 - 0.2*1/5 - 0.1
    assert outcomes.reward == pytest.approx([0.92, -0.16, 0.8, -0.14])


def test_random_is_the_exact_expectation() -> None:
    outcomes = expect(CORRECT, COST, RULE)
    assert outcomes.correct.tolist() == [1.0, 0.5, 0.5, 0.0]
    assert outcomes.cost == pytest.approx([2.5e-6, 2.5e-6, 5e-6, 2.5e-6])
    # third query: (0 - 0.2*2/5 + 1 - 0.2*1) / 2: the clip acts on each member, not on the mean cost
    assert outcomes.reward[2] == pytest.approx(0.36)
    correct, cost = random_pool(0)
    rng, free = np.random.default_rng(1), np.zeros(len(correct))
    played = [play(rng.integers(0, 4, len(correct)), correct, cost, free, RULE).reward.mean() for _ in range(4000)]
    assert expect(correct, cost, RULE).reward.mean() == pytest.approx(np.mean(played), abs=0.004)


def test_the_oracle_is_the_cheapest_that_is_right() -> None:
    assert oracle_routes(CORRECT, COST).tolist() == [0, 0, 1, 0]
    assert oracle_routes(np.array([[0.5, 1.0, 1.0]]), np.array([[0.0, 3.0, 2.0]])).tolist() == [2]


@pytest.mark.parametrize("seed", range(20))
def test_nobody_beats_the_oracle(seed: int) -> None:
    correct, cost = random_pool(seed)
    free, rng = np.zeros(len(correct)), np.random.default_rng(seed)
    rule = RewardRule(5e-6, cost_weight=0.2, format_weight=0.2)  # a lighter format term would let silence pay
    best = play(oracle_routes(correct, cost), correct, cost, free, rule)
    for routes in (*(np.full(60, m) for m in range(4)), rng.integers(-1, 4, 60), correct.argmax(1)):
        outcomes = play(routes, correct, cost, free, rule)
        assert (best.correct >= outcomes.correct).all() and (best.reward >= outcomes.reward - 1e-12).all()


@pytest.mark.parametrize(
    "cost, accuracy, hull",
    [
        ([1, 2, 3], [0.1, 0.5, 0.6], [0, 1, 2]),  # slopes 0.4 and 0.1
        ([1, 2, 3], [0.1, 0.3, 0.7], [0, 2]),  # the middle one lies below the line (0.4 at cost 2)
        ([1, 2, 3], [0.25, 0.5, 0.75], [0, 2]),  # on the line: mixing does as well
        ([3, 1, 2], [0.2, 0.5, 0.4], [1]),  # the cheapest is the best
        ([1, 1, 1], [0.2, 0.6, 0.6], [1]),  # equal costs: the most accurate, the first of equals
        ([5], [0.0], [0]),
        ([4, 0, 2, 1], [0.8, 0.0, 0.7, 0.5], [1, 3, 2, 0]),
    ],
)
def test_hulls_by_hand(cost: list[float], accuracy: list[float], hull: list[int]) -> None:
    assert pareto_hull(np.array(cost, float), np.array(accuracy)) == hull


@pytest.mark.parametrize("seed", range(20))
def test_no_mixture_lies_above_the_hull(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost, accuracy = rng.uniform(0.1, 1, 6), rng.uniform(0, 1, 6)
    for _ in range(100):
        mix = rng.dirichlet(np.full(6, 0.3))
        assert accuracy @ mix <= mixing_accuracy(cost, accuracy, cost @ mix) + 1e-12


def test_mixing_by_hand() -> None:
    cost, accuracy = np.array([1.0, 3.0, 2.0]), np.array([0.4, 0.8, 0.5])
    # on the way from (0, 0) to the cheapest; between the first two; beyond the dearest
    found = [mixing_accuracy(cost, accuracy, at) for at in (0.5, 1.0, 2.0, 9.0)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert mixing_accuracy(np.array([0.0, 1.0]), np.array([0.4, 0.8]), 0.5) == pytest.approx(0.6)


def test_entropy_by_hand() -> None:
    assert route_entropy(np.array([0.25, 0.25, 0.25, 0.25])) == pytest.approx(np.log(4))
    assert route_entropy(np.array([3.0, 1.0])) == pytest.approx(0.75 * np.log(4 / 3) + 0.25 * np.log(4))
    assert [route_entropy(np.array(share)) for share in ([0.0, 0.7], [0.0, 0.0], [])] == [0.0, 0.0, 0.0]


def test_intervals() -> None:
    """On n draws of a coin the interval is close to the normal one, and it covers the truth about 95 times in 100."""
    values = np.repeat([1.0, 0.0], [120, 280])
    found = estimate(values, resamples(400))
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=0.006)
    rng, covered = np.random.default_rng(0), 0
    draws = resamples(80, seed=1, count=500)
    for _ in range(300):
        sample = estimate((rng.random(80) < 0.3).astype(float), draws)
        covered += sample.low <= 0.3 <= sample.high
    assert 0.90 <= covered / 300 <= 0.98


def test_resamples_are_reproducible_by_seed() -> None:
    assert (resamples(50, seed=3) == resamples(50, seed=3)).all()
    assert (resamples(50, seed=3) != resamples(50, seed=4)).any()
    assert (resamples(50).sum(1) == 50).all()
    with pytest.raises(ValueError, match="no queries"):
        resamples(0)


def test_differences_are_paired() -> None:
    """A constant gain on very uneven queries has an interval of width 0, which unpaired intervals would not show."""
    base = np.random.default_rng(0).uniform(0, 100, 30)
    found = difference(
        Outcomes(base + 1, base, base), Outcomes(base, base, base), "cheap", 0.0, resamples(30)
    ).accuracy
    assert (found.low, found.value, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_an_evaluation_by_hand() -> None:
    found = evaluate(["cheap", "cheap", "dear", None])
    ours, (cheap, dear, random, oracle) = found.policy, found.references
    assert [entry.name for entry in found.references] == ["cheap", "dear", "random", "oracle"]
    assert [entry.accuracy.value for entry in (ours, cheap, dear, random, oracle)] == [0.75, 0.5, 0.5, 0.5, 0.75]
    # USD per 1,000 queries: 250 * the sum over the four queries
    costs = [entry.cost.value for entry in (ours, cheap, dear, random, oracle)]
    assert costs == pytest.approx([2.5e-3, 1.25e-3, 5e-3, 3.125e-3, 2.75e-3])
    # ours: (0.96 + 0.96 + 0.8 - 0.1) / 4 ; cheap: (0.96 + 0.96 - 0.08 - 0.04) / 4
    assert (ours.reward.value, cheap.reward.value) == pytest.approx((0.655, 0.45))
    assert ours.share == {"cheap": 0.5, "dear": 0.25}
    assert (ours.format_rate, cheap.format_rate) == (0.75, 1.0)
    assert ours.entropy == pytest.approx(np.log(3) - np.log(4) / 3)  # of 2/3 and 1/3: the invalid one is no route
    assert (ours.families, dear.families) == ({"sums": 1.0, "facts": 0.5}, {"sums": 0.5, "facts": 0.5})
    assert (found.difference.member, found.difference.reward.value) == ("cheap", pytest.approx(0.205))
    # cheap is the whole hull, since dear is no better
    assert found.difference.mixing == 0.5
    assert [query["route"] for query in found.queries] == ["cheap", "cheap", "dear", None]


def test_the_policys_own_tokens_are_paid_for() -> None:
    free, priced = evaluate(["cheap"] * 4), evaluate(["cheap"] * 4, own_cost=np.full(4, 1e-6))
    assert priced.policy.cost.value - free.policy.cost.value == pytest.approx(1e-3)
    assert free.policy.reward.value - priced.policy.reward.value == pytest.approx(0.2 / 5)
    assert priced.references == free.references


def test_degenerate_pools() -> None:
    """One member: every way of routing is that member. All wrong: nobody is better than 0, and cheap is best."""
    one = evaluate_routes("ours", ["cheap"] * 4, QUERIES, ["cheap"], CORRECT[:, :1], COST[:, :1], RULE)
    rows = [one.policy, *one.references]
    assert len({(entry.accuracy, entry.cost, entry.reward) for entry in rows}) == 1
    assert one.difference.reward == Estimate(0.0, 0.0, 0.0)
    wrong = evaluate_routes("ours", ["dear"] * 4, QUERIES, MEMBERS, CORRECT * 0, COST, RULE)
    assert [entry.accuracy.value for entry in (wrong.policy, *wrong.references)] == [0.0] * 5
    assert wrong.references[-1].cost == wrong.references[0].cost
    equal = evaluate_routes("ours", ["dear"] * 4, QUERIES, MEMBERS, CORRECT, COST * 0, RULE)
    assert equal.difference.mixing == 0.5 and equal.references[-1].accuracy.value == 0.75
    nothing = evaluate_routes("ours", [None] * 4, QUERIES, MEMBERS, CORRECT, COST, RULE)
    assert (nothing.policy.format_rate, nothing.policy.entropy, nothing.policy.reward.value) == (
        0,
        0,
        pytest.approx(-0.1),
    )


@pytest.mark.parametrize("routes", [["cheap"] * 3, ["elsewhere"] * 4, []])
def test_bad_routes_are_refused(routes: list[str | None]) -> None:
    with pytest.raises(ValueError, match=r"shapes differ|'elsewhere'"):
        evaluate(routes)


def test_bad_rules_are_refused() -> None:
    for bad in ((0.0, 0.2, 0.2), (1.0, -0.1, 0.2), (1.0, 0.2, float("nan")), (float("inf"), 0.2, 0.2)):
        with pytest.raises(ValueError, match="must be"):
            RewardRule(*bad)


def test_seeds() -> None:
    runs = [{"reward": np.array([1.0, 0.0, 1.0, 0.0]) + gain} for gain in (0.0, 0.1, 0.5)]
    found = summarise_seeds(runs)
    assert found.per_seed["reward"] == pytest.approx([0.5, 0.6, 1.0])
    assert found.estimates["reward"].value == pytest.approx(0.7)
    assert found == summarise_seeds(runs) != summarise_seeds(runs, seed=1)
    # Seeds that differ widen the interval; a single seed has the interval over queries.
    same = astuple(summarise_seeds([runs[1]] * 3).estimates["reward"])
    assert same == pytest.approx(astuple(summarise_seeds([runs[1]]).estimates["reward"]))
    assert same == pytest.approx(astuple(estimate(runs[1]["reward"], resamples(4))))
    steady = [{"reward": np.full(4, value)} for value in (0.5, 0.6, 1.0)]
    between = summarise_seeds(steady).estimates["reward"]
    assert (between.low, between.high) == pytest.approx((0.5, 1.0))  # 1 of 27 resamples is all-lowest: above 2.5 %
    with pytest.raises(ValueError, match="not on the same queries"):
        summarise_seeds([runs[0], {"reward": np.zeros(3)}])
    with pytest.raises(ValueError, match="no runs"):
        summarise_seeds([])


def test_written_and_read_again(tmp_path: Path) -> None:
    found, before = evaluate(["cheap", "cheap", "dear", None]), evaluate(["dear"] * 4)
    numbers, picture = found.write(tmp_path / "new", before)
    assert Evaluation.read(tmp_path / "new") == found
    assert json.loads(numbers.read_text())["policy"]["share"] == {"cheap": 0.5, "dear": 0.25}
    from matplotlib.image import imread

    pixels = imread(picture)
    assert pixels.shape[:2] == (780, 1200)
    # The policy's colour (#D55E00) and the start's (#0072B2) are drawn.
    for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)):
        assert (np.abs(pixels[..., :3] * 255 - colour).max(-1) < 2).sum() > 50
    assert found.values()["cost"].tolist() == pytest.approx([1e-3, 1e-3, 8e-3, 0.0])


@pytest.mark.parametrize("accuracy, cost", [(CORRECT, COST), (CORRECT * 0, COST * 0), (CORRECT * 0 + 1, COST * 0 + 1)])
def test_pictures_of_degenerate_pools(accuracy: np.ndarray, cost: np.ndarray, tmp_path: Path) -> None:
    evaluate_routes("ours", ["dear"] * 4, QUERIES, MEMBERS, accuracy, cost, RULE).write(tmp_path)
    assert (tmp_path / "frontier.png").stat().st_size > 5000


def test_tables() -> None:
    found = evaluate(["cheap", "cheap", "dear", None])
    lines = render_table([found.policy, *found.references]).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["ours", "cheap", "dear", "random", "oracle"]
    cells = lines[2].split()
    assert (cells[1], cells[4], cells[5], cells[-2]) == ("75.0%", "0.0025", "0.655", "75.0%")
    assert len({len(line) for line in lines[1:]}) == 1  # aligned
    markdown = render_table([found.policy], markdown=True).splitlines()
    assert {line.count("|") for line in markdown} == {9}
    assert set(markdown[1]) == set("|-: ")
    text = found.text(evaluate(["dear"] * 4))
    assert "ours asked: cheap 50.0%, dear 25.0%" in text
    assert "best single member (cheap)" in text and "reward +0.205 [" in text


def test_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    routes: dict[str, list[str | None]] = {"a-seed0": ["cheap"] * 4, "a-seed1": ["cheap", "cheap", "dear", "cheap"]}
    for name, chosen in routes.items():
        evaluate(chosen).write(tmp_path / name)
    start = tmp_path / "a-seed0" / "warm_start"
    evaluate_routes("warm start", ["dear"] * 4, QUERIES, MEMBERS, CORRECT, COST, RULE).write(start)
    table = compare([str(tmp_path / name) for name in routes])
    assert table in capsys.readouterr().out
    lines = {line[:10].strip(): line for line in table.splitlines()}
    assert list(lines)[2:] == ["ours", "warm start", "cheap", "dear", "random", "oracle"]
    # rewards: cheap everywhere (0.96 + 0.96 - 0.08 - 0.04)/4; with dear on the third (0.96 + 0.96 + 0.8 - 0.04)/4
    assert lines["ours"].endswith("0.450 0.670") and "62.5%" in lines["ours"] and "  0.560  " in lines["ours"]
    assert lines["warm start"].endswith("0.330")  # (0.84 - 0.16 + 0.8 - 0.16)/4
    markdown = compare([str(tmp_path / "a-seed0"), "--markdown"])
    assert markdown.count("|\n") == 8 and "\n\nours minus warm start: reward +0.120" in markdown  # 0.450 - 0.330


def test_only_runs_on_the_same_queries_and_rewards_are_compared(tmp_path: Path) -> None:
    other_rule = evaluate_routes("b", ["cheap"] * 4, QUERIES, MEMBERS, CORRECT, COST, RewardRule(1.0))
    with pytest.raises(ValueError, match="'b' has other reward than one of 'ours'"):
        compare_runs([evaluate(["cheap"] * 4), other_rule])
    fewer = evaluate_routes("b", ["cheap"] * 3, QUERIES[:3], MEMBERS, CORRECT[:3], COST[:3], RULE)
    with pytest.raises(ValueError, match="'b' has other queries"):
        compare_runs([evaluate(["cheap"] * 4), fewer])
    with pytest.raises(SystemExit):
        compare([str(tmp_path)])


def test_family_routes_take_the_training_best_and_fall_back_on_the_best_of_all() -> None:
    # Training: family a earns 1.0 / 0.0 (member 0), family b 0.0 / 0.5 and 0.2 / 0.9 (member 1).
    # Over all rows member 0 earns (1 + 1 + 0 + 0.2) / 4 = 0.55, member 1 (0 + 0 + 0.5 + 0.9) / 4 = 0.35.
    rewards = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.5], [0.2, 0.9]])
    routes = family_routes(["a", "a", "b", "b"], rewards, ["b", "a", "new"])
    assert routes.tolist() == [1, 0, 0]


def test_a_baseline_is_scored_between_random_and_the_oracle() -> None:
    correct, cost = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1e-3, 3e-3], [1e-3, 3e-3]])
    queries = [{"query_id": str(i), "family": "f"} for i in range(2)]
    found = evaluate_routes(
        "p", ["x", "x"], queries, ["x", "y"], correct, cost, RewardRule(3e-3), baselines={"other": np.array([1, 1])}
    )
    assert [entry.name for entry in found.references] == ["x", "y", "random", "other", "oracle"]
    other = found.references[3]
    # One of two right, always the dear member: 3e-3 USD x 1,000; reward 0.5 - 0.2 x 1.
    assert (other.kind, other.accuracy.value, other.cost.value) == ("baseline", 0.5, pytest.approx(3.0))
    assert other.reward.value == pytest.approx(0.3)


def test_gains_are_paired_by_seed_and_query() -> None:
    def run(name: str, routes: list[str]) -> Evaluation:
        return evaluate_routes(name, routes, QUERIES, MEMBERS, CORRECT, COST, RULE)

    # Started with the dear member everywhere (right: 1, 0, 1, 0), ended with the cheap one (1, 1, 0, 0): the same
    # accuracy, 20 - 5 = 15 millionths of a dollar less over four queries, so 3.75e-6 USD less per query.
    line = render_gains([run("srpo", ["cheap"] * 4)], [run("warm start", ["dear"] * 4)])
    assert line.startswith("srpo minus warm start: reward ")
    assert "accuracy +0.000 [" in line and "cost -0.0037" in line
