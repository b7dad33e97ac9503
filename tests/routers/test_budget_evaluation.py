"""Metrics of budget-aware routing by hand: equal cost, areas, pairing; and the words of the compact state."""

import math

import numpy as np
import pandas as pd
import pytest

from routers.evaluation.budget_evaluation import (
    Played,
    by_group,
    chance_auc,
    difference,
    draws,
    estimate,
    gain_at_equal_cost,
    normalised_auc,
    ratio,
)
from routers.evaluation.budget_report import Episodes, render


def played(success: list[list[float]], cost: list[list[float]]) -> Played:
    s = np.array(success, dtype=float)
    return Played(s, np.array(cost, dtype=float), np.ones_like(s), 2 * np.ones_like(s))


def test_gain_at_equal_cost_by_hand() -> None:
    # The family: success .5 at cost 1 and 1.0 at cost 3 on each task. At cost 2 its mixture has .75.
    family = [played([[0.5, 0.5]], [[1, 1]]), played([[1, 1]], [[3, 3]])]
    method = played([[1, 1]], [[1, 3]])  # mean cost 2, success 1
    gain = gain_at_equal_cost(method, family, draws(2, 1))
    assert gain.value == pytest.approx(0.25)
    # A draw of the first task alone costs 1 (gain .5), of the second alone 3 (gain 0).
    assert (gain.low, gain.high) == (pytest.approx(0.0), pytest.approx(0.5))


def test_a_dominated_setting_does_not_lower_the_bar() -> None:
    family = [played([[0.5]], [[1]]), played([[0.4]], [[2]]), played([[1]], [[3]])]
    assert gain_at_equal_cost(played([[0.75]], [[2]]), family, draws(1, 1)).value == pytest.approx(0.0)


def test_pairing_takes_the_tasks_noise_out() -> None:
    rng = np.random.default_rng(0)
    hard = (rng.random(200) < 0.5).astype(float)[None]
    better = np.minimum(hard + (rng.random((1, 200)) < 0.1), 1.0)
    drawn = draws(200, 1)
    gap = difference(better, hard, drawn)
    assert gap.value > 0 and gap.low > 0
    own = estimate(better, drawn)
    assert own.high - own.low > 1.5 * (gap.high - gap.low)


def test_intervals_hold_95_percent_over_tasks_and_over_repetitions() -> None:
    coin = np.repeat([0.0, 1.0], 50)[None]  # se = .5 / 10
    drawn = draws(100, 1)
    family = [played([[0.0] * 100], [[1.0] * 100]), played([[1.0] * 100], [[3.0] * 100])]
    gain = gain_at_equal_cost(played(coin.tolist(), [[2.0] * 100]), family, drawn)
    for found, middle in ((estimate(coin, drawn), 0.5), (gain, 0.0), (difference(coin, 0 * coin, drawn), 0.5)):
        low, high = middle - 1.96 * 0.05, middle + 1.96 * 0.05
        assert (found.low, found.high) == (pytest.approx(low, abs=0.015), pytest.approx(high, abs=0.015))
    # Two seeds that differ on every task: a quarter of the draws holds the bad one only, a quarter the good one.
    seeds = estimate(np.array([[0.0] * 4, [1.0] * 4]), draws(4, 2))
    assert (seeds.value, seeds.low, seeds.high) == (0.5, 0.0, 1.0)


def test_a_ratio_is_paired_by_task() -> None:
    cost = np.array([[1.0, 10.0, 100.0]])
    found = ratio(2 * cost, cost, draws(3, 1))
    assert (found.value, found.low, found.high) == (2.0, pytest.approx(2.0), pytest.approx(2.0))


def test_ratio_groups_and_shapes() -> None:
    drawn = draws(2, 2)
    values = np.array([[1.0, 3.0], [3.0, 5.0]])
    assert ratio(values, np.array([[2.0, 2.0]]), drawn).value == 1.5
    assert by_group(values, ["a", "b"]) == {"a": 2.0, "b": 4.0}
    with pytest.raises(ValueError, match="one shape"):
        Played(np.ones((1, 2)), np.ones((1, 3)), np.ones((1, 2)), np.ones((1, 2)))


def test_auc_by_hand() -> None:
    # Axis: 10 -> 0, 110 -> 1. Points at .1 (.6) and .5 (.9): .4 x .6 + .5 x .9 = .69
    assert normalised_auc([(60, 0.9), (20, 0.6)], 10, 110) == pytest.approx(0.69)
    assert normalised_auc([(20, 0.6), (60, 0.5)], 10, 110) == pytest.approx(0.9 * 0.6)  # upper envelope
    assert normalised_auc([(5, 0.5), (500, 1.0)], 10, 110) == pytest.approx(0.5)  # clipped to the axis
    assert normalised_auc([(50, 1.0)], 100, 80) == pytest.approx(0.5)  # inverted boundaries: cost / 100
    assert chance_auc(0.6, 1.0) == 0.8


def frame() -> pd.DataFrame:
    rows = []
    methods = {
        "random mixing 0": (0.5, 1.0),
        "random mixing 1": (1.0, 11.0),
        "first-large 1": (0.75, 4.0),
        "BoSFT": (0.5, 2.0),
        "policy": (1.0, 3.0),
    }
    for method, (success, cost) in methods.items():
        for repetition in range(2):
            for task in range(4):
                for cap in (math.inf, 2.0) if method in ("policy", "BoSFT") else (math.inf,):
                    won = float(task < success * 4)
                    rows.append(
                        {
                            "set": "s", "method": method, "repetition": repetition, "task": f"g{task}",
                            "task_type": "even" if task % 2 == 0 else "odd",
                            "difficulty": "easy" if task < 2 else "hard", "cap": cap, "success": won,
                            "executor_usd": (cost - 0.5) / 1000, "policy_usd": 0.5 / 1000, "large_calls": 1,
                            "steps": 4, "violated": False,
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)


def test_the_report_by_hand() -> None:
    episodes = Episodes(frame())
    methods = {m.name: m for m in episodes.methods()}
    policy = methods["policy"]
    # cost 3 of 11, the policy's own .5 included; random mixing at cost 3: .5 + .5 x 2/10 = .6
    assert policy.share_of_large.value == pytest.approx(3 / 11) and policy.usd.value == pytest.approx(0.003)
    assert policy.gains["random mixing"].value == pytest.approx(0.4)
    assert policy.by_class == {"easy": 1.0, "hard": 1.0} and methods["always-small"].by_class["hard"] == 0.0
    assert policy.large_share == 0.25
    assert episodes.against("policy", "BoSFT").value == pytest.approx(0.5)
    # AUC: axis 1 -> 0, 11 -> 1; always-small's .5 up to the policy's point at .2, then 1
    assert policy.auc == pytest.approx(0.2 * 0.5 + 0.8)
    assert [(c.name, c.cap, c.used, c.violations) for c in episodes.capped()][:2] == [
        ("BoSFT", 2.0, 0.5, 0), ("policy", 2.0, 0.5, 0)
    ]  # fmt: skip
    assert policy.kept.value == 1.0 and methods["always-small"].kept.value == 0.5
    assert policy.by_type == {"even": 1.0, "odd": 1.0} and methods["always-small"].by_type["even"] == 0.5
    text = render(episodes, "## s")
    assert "| always-large " in text and "+40.0 [" in text and "violations" in text


def test_the_order_of_rows_says_nothing() -> None:
    """Pairing, classes and types belong to tasks and repetitions, not to places in the file."""
    whole = frame()
    ordered, shuffled = Episodes(whole), Episodes(whole.sample(frac=1.0, random_state=0))
    assert (shuffled.types, shuffled.difficulty) == (ordered.types, ordered.difficulty)
    for name in ("policy", "BoSFT"):
        assert np.array_equal(shuffled.played(name).success, ordered.played(name).success)


def test_capped_settings_are_points_of_the_frontier_and_violations_are_counted() -> None:
    whole = frame()
    capped = (whole["method"] == "policy") & (whole["cap"] == 2)
    whole.loc[capped, "executor_usd"] = 0.0015  # with its own .0005: 2, at .1 of the axis
    whole.loc[capped & (whole["task"] == "g3"), "violated"] = True
    episodes = Episodes(whole)
    # always-small's .5 up to .1, then the policy's 1
    assert next(m for m in episodes.methods() if m.name == "policy").auc == pytest.approx(0.1 * 0.5 + 0.9)
    assert {c.name: c.violations for c in episodes.capped()} == {"BoSFT": 0, "policy": 2}


def test_caps_in_dollars_are_used_in_dollars() -> None:
    """One call is all of a cap of one call; of a cap of a dollar it is what it cost, and First-Large 1 is no peer."""
    calls, dollars = frame().replace({"cap": {2.0: 1.0}}), frame().replace({"cap": {2.0: 1.0}})
    dollars["used"] = 0.25
    dollars.loc[dollars["cap"] == math.inf, "used"] = None  # there was no cap
    for found, used, names in ((calls, 1.0, ["BoSFT", "policy", "first-large"]), (dollars, 0.25, ["BoSFT", "policy"])):
        capped = Episodes(found).capped()
        assert [c.name for c in capped] == names and {c.used for c in capped} == {used}


def test_the_report_refuses_holes() -> None:
    whole = frame()
    with pytest.raises(ValueError, match="steps"):
        Episodes(whole.drop(columns="steps"))
    torn = Episodes(whole.drop(whole[(whole["method"] == "policy") & (whole["task"] == "g3")].index))
    with pytest.raises(ValueError, match="policy at cap inf was not played on all 4 tasks"):
        torn.methods()
