"""Means, paired differences, intervals and frontiers against numbers worked by hand."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from routers.evaluation.episodes import LOST, Episodes
from routers.evaluation.frontier import mixing_score, normalised_auc, pareto_hull
from routers.evaluation.statistics import Bootstrap, Paired, sets


def episodes(played: dict[str, Any], header: dict[str, Any] | None = None, **columns: Any) -> Episodes:
    """Name or (name, kind) -> scores [items] or [seeds][items]; `usd` a number per router, reward is the score."""
    frames = []
    usd = columns.pop("usd", {})
    for key, scores in played.items():
        name, kind = key if isinstance(key, tuple) else (key, "policy")
        for seed, row in enumerate(np.atleast_2d(np.array(scores, dtype=float))):
            items = [f"q{i:03}" for i in range(len(row))]
            paid = usd.get(name, 0.001)
            frames.append(
                pd.DataFrame(
                    {
                        "router": name,
                        "kind": kind,
                        "seed": seed,
                        "item": items,
                        "score": row,
                        "reward": row,
                        "usd": paid,
                    }
                    | {"reward": row, **columns}
                )
            )
    return Episodes(pd.concat(frames), header or {})


@pytest.mark.parametrize(
    "cost, score, hull",
    [
        ([1, 2, 3], [0.1, 0.5, 0.6], [0, 1, 2]),  # slopes 0.4 and 0.1
        ([1, 2, 3], [0.1, 0.3, 0.7], [0, 2]),  # the middle one lies below the line (0.4 at cost 2)
        ([1, 2, 3], [0.25, 0.5, 0.75], [0, 2]),  # on the line: mixing does as well
        ([3, 1, 2], [0.2, 0.5, 0.4], [1]),  # the cheapest is the best
        ([1, 1, 1], [0.2, 0.6, 0.6], [1]),  # equal costs: the best, the first of equals
        ([5], [0.0], [0]),
        ([4, 0, 2, 1], [0.8, 0.0, 0.7, 0.5], [1, 3, 2, 0]),
    ],
)
def test_hulls_by_hand(cost: list[float], score: list[float], hull: list[int]) -> None:
    assert pareto_hull(np.array(cost, float), np.array(score)) == hull


@pytest.mark.parametrize("seed", range(20))
def test_no_mixture_lies_above_the_hull(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost, score = rng.uniform(0.1, 1, 6), rng.uniform(0, 1, 6)
    for _ in range(100):
        mix = rng.dirichlet(np.full(6, 0.3))
        assert score @ mix <= mixing_score(cost, score, cost @ mix) + 1e-12


def test_mixing_by_hand() -> None:
    cost, score = np.array([1.0, 3.0, 2.0]), np.array([0.4, 0.8, 0.5])
    # on the way from (0, 0) to the cheapest; between the first two; beyond the dearest
    found = [mixing_score(cost, score, at) for at in (0.5, 1.0, 2.0, 9.0)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert mixing_score(np.array([0.0, 1.0]), np.array([0.4, 0.8]), 0.5) == pytest.approx(0.6)


def test_auc_by_hand() -> None:
    # Axis: 10 -> 0, 110 -> 1. Points at .1 (.6) and .5 (.9): .4 x .6 + .5 x .9 = .69
    assert normalised_auc([(60, 0.9), (20, 0.6)], 10, 110) == pytest.approx(0.69)
    assert normalised_auc([(20, 0.6), (60, 0.5)], 10, 110) == pytest.approx(0.9 * 0.6)  # upper envelope
    assert normalised_auc([(5, 0.5), (500, 1.0)], 10, 110) == pytest.approx(0.5)  # clipped to the axis
    assert normalised_auc([(50, 1.0)], 100, 80) == pytest.approx(0.5)  # inverted ends: cost / 100
    assert normalised_auc([(0, 0.5)], 0, 0) == pytest.approx(0.5)  # a free pool has no axis


def test_intervals() -> None:
    """On n draws of a coin the interval is close to the normal one, and it covers the truth about 95 times in 100."""
    found = Bootstrap(400).estimate(np.repeat([1.0, 0.0], [120, 280])[None])
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=0.006)
    rng, covered, draws = np.random.default_rng(0), 0, Bootstrap(80, seed=1, count=500)
    for _ in range(300):
        sample = draws.estimate((rng.random((1, 80)) < 0.3).astype(float))
        covered += sample.low <= 0.3 <= sample.high
    assert 0.90 <= covered / 300 <= 0.98


def test_draws_are_reproducible_and_shared() -> None:
    assert (Bootstrap(50, seed=3).items == Bootstrap(50, seed=3).items).all()
    assert (Bootstrap(50, seed=3).items != Bootstrap(50, seed=4).items).any()
    assert Bootstrap(50).items.sum(1) == pytest.approx(np.ones(2000))
    assert Bootstrap(50).seeds(3).sum(1) == pytest.approx(np.ones(2000)) and (Bootstrap(50).seeds(1) == 1).all()
    with pytest.raises(ValueError, match="no items"):
        Bootstrap(0)


def test_seeds_are_drawn_too() -> None:
    """Seeds that differ widen the interval; those that agree do not."""
    one, two = np.array([[0.5, 0.7, 0.1, 0.3]]), np.array([[0.0] * 4, [1.0] * 4])
    draws = Bootstrap(4)
    alone, same = draws.estimate(one), draws.estimate(np.repeat(one, 3, axis=0))
    assert (same.value, same.low, same.high) == pytest.approx((alone.value, alone.low, alone.high))
    # Two seeds that differ on every item: a quarter of the draws holds the bad one only, a quarter the good one.
    found = draws.estimate(two)
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    steady = draws.estimate(np.array([[0.5] * 4, [0.6] * 4, [1.0] * 4]))
    assert (steady.low, steady.high) == pytest.approx((0.5, 1.0))  # 1 of 27 draws is all-lowest: above 2.5 %


def test_differences_are_paired_by_item_and_seed() -> None:
    """A constant gain on very uneven items has an interval of width 0, which unpaired intervals would not show."""
    base = np.random.default_rng(0).uniform(0, 0.5, 30)
    paired = Paired(episodes({"a": base + 0.25, ("b", "start"): base}))
    found = paired.difference("a", "b", "score")
    assert (found.low, found.value, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert paired.estimate("a", "score").high - paired.estimate("a", "score").low > 0.05
    seeds = np.stack([base, base[::-1] + 0.3])
    paired = Paired(episodes({"a": seeds + 0.1, ("b", "start"): seeds, ("c", "member"): base}))
    found = paired.difference("a", "b", "reward")
    assert (found.low, found.value, found.high) == pytest.approx((0.1, 0.1, 0.1))
    # against a router without seeds: each seed minus its mean, so seeds do not cancel
    assert paired.difference("a", "c", "score").value == pytest.approx((seeds + 0.1 - base).mean())
    ratio = Paired(episodes({"a": 2 * base, "b": base})).ratio("a", "b", "score")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_pairing_takes_the_items_noise_out() -> None:
    rng = np.random.default_rng(0)
    hard = (rng.random(200) < 0.5).astype(float)
    better = np.minimum(hard + (rng.random(200) < 0.1), 1.0)
    paired = Paired(episodes({"a": better, "b": hard}))
    gap, own = paired.difference("a", "b", "score"), paired.estimate("a", "score")
    assert gap.value > 0 and gap.low > 0
    assert own.high - own.low > 1.5 * (gap.high - gap.low)


def test_beyond_mixing_by_hand() -> None:
    # The members: .5 at cost 1 and 1.0 at cost 3 on each item. At cost 2 a coin between them has .75.
    members = {("small", "member"): [0.5, 0.5], ("large", "member"): [1, 1]}
    found = episodes({**members, "ours": [1, 1]}, usd={"small": 1, "large": 3, "ours": [1, 3]})
    gain = Paired(found).beyond_mixing("ours", ["small", "large"])
    assert gain.value == pytest.approx(0.25)
    # A draw of the first item alone costs 1 (gain .5), of the second alone 3 (gain 0).
    assert (gain.low, gain.high) == (pytest.approx(0.0), pytest.approx(0.5))
    # A dominated setting does not lower the bar.
    found = episodes({**members, ("bad", "rule"): [0.4, 0.4], "ours": [0.75, 0.75]},
                     usd={"small": 1, "large": 3, "ours": 2, "bad": 2})  # fmt: skip
    assert Paired(found).beyond_mixing("ours", ["small", "bad", "large"]).value == pytest.approx(0.0)


def test_frontiers_and_areas_of_rules_by_hand() -> None:
    played = {
        ("always-small", "member"): [1, 1, 0, 0], ("always-large", "member"): [1, 1, 1, 1],
        ("mix", "rule"): [1, 1, 1, 0], "ours": [[1, 1, 1, 1]] * 2,
    }  # fmt: skip
    frame = episodes(played, usd={"always-small": 1, "always-large": 11, "mix": 4, "ours": 3}).frame
    frame.loc[frame["router"] == "mix", "curve"] = "mixing"
    paired = Paired(Episodes(frame))
    assert paired.frontiers == {"mixing": ["always-small", "always-large", "mix"]}
    # at cost 3 between small (.5 at 1) and the setting (.75 at 4): .5 + .25 x 2/3
    assert paired.beyond_mixing("ours", paired.frontiers["mixing"]).value == pytest.approx(0.5 - 0.5 / 3)
    # AUC: axis 1 -> 0, 11 -> 1; always-small's .5 up to the policy's point at .2, then 1
    assert paired.auc(["ours"]) == pytest.approx(0.2 * 0.5 + 0.8)
    capped = frame[frame["router"] == "ours"].assign(cap=2.0, usd=2.0)
    paired = Paired(Episodes(pd.concat([frame, capped])))
    assert paired.caps("ours") == [2.0]
    assert paired.auc(["ours"]) == pytest.approx(0.1 * 0.5 + 0.9)  # at cap 2: 1 at .1 of the axis
    assert paired.ratio("ours", "always-large", "usd").value == pytest.approx(3 / 11)


def test_whom_a_policy_is_compared_with() -> None:
    played = {
        "ours": [1, 1, 0, 0], ("start", "start"): [0, 0, 0, 0], ("m1", "member"): [1, 0, 0, 0],
        ("m2", "member"): [1, 1, 0, 0], ("ridge", "learned"): [1, 1, 1, 0], ("family", "told"): [0, 0, 0, 0],
        ("oracle", "oracle"): [1, 1, 1, 1],
    }  # fmt: skip
    trained = {"m1": 0.5, "m2": 0.4, "ridge": 0.6, "family": 0.9}
    found = Paired(episodes(played, {"train_reward": trained}))
    assert [(r.label, r.router) for r in found.references] == [
        ("the best single member", "m1"), ("the best learned baseline", "ridge"),
        ("the strongest baseline of all", "family"),
    ]  # fmt: skip
    assert {r.how for r in found.references} == {"chosen on training data"}
    held = Paired(episodes(played)).references
    assert [(r.label, r.router) for r in held] == [
        ("the best single member", "m2"), ("the best learned baseline = the strongest baseline of all", "ridge")
    ]  # fmt: skip
    assert held[0].how == "chosen on these very items, which favours it"
    start = found.start_of("ours")
    assert start is not None and start.router == "start"


def test_shares_and_entropy_by_hand() -> None:
    found = Paired(episodes({"a": [1, 1, 1, 1]}, member=["x", "x > y", "", "x"]))
    assert found.asked("a") == {"x": 0.75, "y": 0.25}
    assert found.entropy("a") == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert Paired(episodes({"a": [1]})).entropy("a") is None
    assert Paired(episodes({"a": [1]}, member="x")).entropy("a") == 0.0
    assert found.by("a", ["f", "f", "g", "g"]) == {"f": 1.0, "g": 1.0}


def test_lost_items_are_left_out_of_every_router() -> None:
    frame = episodes({"a": [1, 0, 1, 0], "b": [1, 1, 0, 0]}).frame
    gone = (frame["router"] == "a") & (frame["item"] == "q001")
    frame.loc[gone, ["score", "usd", "reward"]] = math.nan
    frame.loc[gone, "stop"] = LOST
    paired = Paired(Episodes(frame))
    assert (len(paired), paired.lost) == (3, 1)
    assert paired.mean("b", "score") == pytest.approx(1 / 3)
    frame["stop"] = LOST
    with pytest.raises(ValueError, match="no item is left to evaluate: the pool lost 4 of 4"):
        Paired(Episodes(frame))


def test_holes_are_refused() -> None:
    frame = episodes({"a": [1, 0, 1], "b": [1, 1, 0]}).frame
    paired = Paired(Episodes(frame.drop(frame[(frame["router"] == "b") & (frame["item"] == "q002")].index)))
    with pytest.raises(ValueError, match=r"b \(cap inf\) was not played on all 3 items"):
        paired.difference("a", "b", "score")


def test_sets_are_taken_apart() -> None:
    first, second = episodes({"a": [1, 0]}, set="seen"), episodes({"a": [1, 1, 1]}, set="unseen")
    found = sets(Episodes.merged([first, second]))
    assert {name: (len(paired), paired.mean("a", "score")) for name, paired in found.items()} == {
        "seen": (2, 0.5), "unseen": (3, 1.0)
    }  # fmt: skip
