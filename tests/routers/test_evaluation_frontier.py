"""Areas, recovered gaps and calibration against numbers worked by hand and against the published functions."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_evaluation import episodes
from test_evaluation_report import table_of

from routers.evaluation.episodes import Episodes
from routers.evaluation.frontier import aiq, apgr, brier, calibration_error, cpt, recovery
from routers.evaluation.plot import picture
from routers.evaluation.statistics import Paired
from routers.evaluation.tables import render, sections


@pytest.mark.parametrize(
    "cost, score, low, high, area",
    [
        # RouterBench's calc_AIQ finds .56, which it divides by the largest cost: .56 x 5 / 4.
        # By hand: 1..2 at mean .55, 2..5 at mean .75 (the third point lies below that line): (.55 + 2.25) / 4
        ([1, 2, 3, 5], [0.4, 0.7, 0.6, 0.8], 1, 5, 0.7),
        # theirs .44 x 5 / 4; the second point lies below the line from .2 to .6: (.4 x 2 + .7 x 2) / 4
        ([1, 2, 3, 5], [0.2, 0.3, 0.6, 0.8], 1, 5, 0.55),
        # Where their code is broken: the best is not the dearest (theirs ends at cost 3): (.65 x 2 + .9 x 2) / 4
        ([1, 3, 5], [0.4, 0.9, 0.5], 1, 5, 0.775),
        ([1, 2, 5], [0.9, 0.5, 0.6], 1, 5, 0.9),  # the cheapest dominates: flat (theirs: 0)
        ([1, 5], [0.4, 0.8], 1, 5, 0.6),  # theirs: an IndexError
        ([3], [0.6], 1, 5, 0.5),  # from (0, 0): .2 at cost 1; (.4 x 2 + .6 x 2) / 4
        ([0, 4], [0.2, 0.6], 0, 4, 0.4),  # a free member: no way from asking nobody
        ([8], [0.8], 1, 5, 0.3),  # dearer than every member: .1 at cost 1 to .5 at cost 5
        ([2, 2], [0.5, 0.7], 2, 2, math.nan),  # equal costs, or one member: there is no axis
        ([9, 1], [0.5, 0.7], 9, 1, math.nan),
    ],
)  # fmt: skip
def test_aiq(cost: list[float], score: list[float], low: float, high: float, area: float) -> None:
    assert aiq(np.array(cost, float), np.array(score), low, high) == pytest.approx(area, nan_ok=True)


def test_recovered_gaps_as_routellm_counts_them() -> None:
    """On a pair of one price each, where the share of the cost is the share of strong calls."""
    calls, score = np.array([0, 0.25, 0.5, 0.75, 1]), np.array([0.6, 0.7, 0.76, 0.78, 0.8])
    curve = recovery(1 + 9 * calls, score, (1, 0.6), (10, 0.8))
    # gaps recovered: 0 .5 .8 .9 1; trapezoids of width 1/4: .0625 + .1625 + .2125 + .2375
    assert apgr(curve) == pytest.approx(0.675)
    theirs = (np.trapezoid(score, calls) - np.trapezoid(np.full(5, 0.6), calls)) / (0.8 - 0.6)
    assert apgr(curve) == pytest.approx(theirs)
    found = [cpt(curve, share) for share in (0.5, 0.8, 0.95)]
    assert found == pytest.approx([0.25, 0.5, 0.875])
    assert found == pytest.approx([np.interp(0.6 + share * 0.2, score, calls) for share in (0.5, 0.8, 0.95)])
    assert apgr(recovery(np.array([]), np.array([]), (1, 0.6), (10, 0.8))) == 0.5  # a coin


def test_recovered_gaps_where_their_code_is_broken_or_says_nothing() -> None:
    # Scores that fall on the way: the gap is first half recovered at .25 on the way to .6 at .3 (interp needs a rise)
    curve = recovery(np.array([0.3, 0.5]), np.array([0.6, 0.4]), (0, 0), (1, 1))
    assert cpt(curve, 0.5) == pytest.approx(0.25) and cpt(curve, 0.8) == pytest.approx(0.5 + 0.5 * 0.4 / 0.6)
    assert apgr(curve) == pytest.approx(0.3 * 0.3 + 0.2 * 0.5 + 0.5 * 0.7)
    # Cheaper than the weak and dearer than the strong member: not on the way between them
    assert recovery(np.array([0.5, 4]), np.array([0.9, 0.9]), (1, 0.2), (3, 0.8)) == [(0, 0), (1, 1)]
    for weak, strong in (((1, 0.8), (3, 0.8)), ((1, 0.8), (3, 0.7)), ((2, 0.1), (2, 0.9)), ((3, 0.1), (2, 0.9))):
        assert math.isnan(apgr(recovery(np.array([2.0]), np.array([0.5]), weak, strong)))
        assert math.isnan(cpt(recovery(np.array([2.0]), np.array([0.5]), weak, strong), 0.5))


def test_calibration_by_hand() -> None:
    told, came = np.array([[0.15, 0.85, 0.95, 0.95, 1.0]]), np.array([[0, 1, 1, 0, 1]])
    # bins: .15 against 0; .85 against 1; .95 .95 1 against 2 of 3: (.15 + .15 + .9) / 5
    assert calibration_error(told, came) == pytest.approx(0.24)
    assert brier(told, came) == pytest.approx((0.0225 * 2 + 0.0025 + 0.9025) / 5)


MEMBERS: dict[Any, Any] = {("small", "member"): [0, 1, 0, 0], ("large", "member"): [1, 1, 1, 0]}
USD = {"small": 1.0, "large": 3.0, "ours": 1.0, "ours, price sensitivity 0": 2.0, "ridge": 1.0}


def swept(**columns: Any) -> Episodes:
    """Ours at two settings: .5 at cost 1, .75 at cost 2 (with an oracle and a ridge of one setting)."""
    played = {
        **MEMBERS, "ours": [0, 1, 1, 0], "ours, price sensitivity 0": [1, 1, 1, 0],
        ("ridge", "learned"): [0, 1, 0.6, 0], ("oracle", "oracle"): [1, 1, 1, 0],
    }  # fmt: skip
    frame = episodes(played, usd=USD | {"oracle": 2.0}, **columns).frame
    frame["curve"] = np.where(frame["router"].str.contains(","), "ours", "")
    return Episodes(frame, {"item": "query", "score": "right answers"})


def frontier(found: Episodes) -> dict[str, dict[str, str]]:
    [section] = [section for section in sections(Paired(found)) if section.title == "Frontier"]
    return {row[0]: dict(zip(section.rows[0], row, strict=True)) for row in section.rows[1:]}


def test_a_swept_router_is_one_frontier() -> None:
    paired = Paired(swept())
    assert paired.curves_of["ours"] == ["ours", "ours, price sensitivity 0"]
    # members: .25 at 1 to .75 at 3: mean .5. Ours: .5 to .75 at cost 2, then flat: (.625 + .75) / 2
    assert paired.aiq("mixing members").value == pytest.approx(0.5)
    assert paired.aiq("ours").value == pytest.approx(0.6875)
    assert paired.aiq("ours", "mixing members").value == pytest.approx(0.1875)
    assert paired.aiq("ours", "ridge").value == pytest.approx(0.2875)
    assert "ours, price sensitivity 0" not in table_of(swept())  # a setting is no line of its own
    assert [one.router for one in paired.references] == ["ridge", "large"] and paired.policies == ["ours"]
    rows = frontier(swept())
    ours = rows["ours"]
    assert ours["settings"] == "2" and ours["AIQ (right answers)"] == "68.8%" and ours["above ours"] == "-"
    # gap .25 -> .75: ours recovers .5 at 0, 1 at .5 of the cost: .75 x .5 + .5; 80 % at .3, 95 % at .45
    assert [ours[name] for name in ("APGR", "CPT 50%", "CPT 80%", "CPT 95%")] == ["0.875", "0%", "30%", "45%"]
    assert rows["mixing members"]["APGR"] == "0.500" and rows["ridge"]["above ours"] == "-28.8 pt"
    assert ours["regret (right answers)"] == "25.0 pt" and ours["regret (reward)"] == "0.250"
    assert "ECE" not in ours and "ms" not in ours  # nobody foretells, nobody was timed
    assert len(picture(swept())) > 5000


def test_areas_are_paired_by_item_and_seed() -> None:
    """A constant gain on very uneven items and seeds: the difference has an interval of width 0."""
    base = np.random.default_rng(0).uniform(0, 0.5, (3, 40))
    played = {("small", "member"): base[0], ("large", "member"): 2 * base[0], ("b", "learned"): base, "a": base + 0.25}
    paired = Paired(episodes(played, usd={"small": 1, "large": 3, "a": 1, "b": 1}))
    gap, own = paired.aiq("a", "b"), paired.aiq("a")
    assert (gap.low, gap.value, gap.high) == pytest.approx((0.25, 0.25, 0.25))
    assert own.high - own.low > 0.05
    # the cheapest is the best of a router at cost 1: flat at its mean, as any mean's interval
    plain = paired.estimate("a", "score")
    assert (own.low, own.value, own.high) == pytest.approx((plain.low, plain.value, plain.high))


def test_calibration_and_time_stand_where_a_router_has_them() -> None:
    found = swept().frame.assign(expected=math.nan)
    ridge = found["router"] == "ridge"
    found.loc[ridge, ["expected", "seconds"]] = [0.4, 0.002]
    rows = frontier(Episodes(found))
    # foretold .4; came 0 1 .6 0: one bin, mean .4; (.16 + .36 + .04 + .16) / 4
    assert [rows["ridge"][name] for name in ("ECE", "Brier", "ms")] == ["0.000", "0.180", "2.00"]
    assert [rows["ours"][name] for name in ("ECE", "Brier", "ms")] == ["-", "-", "-"]


@pytest.mark.parametrize(
    "scores, usd, dashes",
    [
        (([0, 1], [1, 1]), (2, 2), {"AIQ (score)", "above mixing members", "APGR", "CPT 50%"}),  # equal costs
        (([0, 1], [0, 1]), (1, 3), {"APGR", "CPT 80%"}),  # nothing to recover
        (([1, 1], [0, 1]), (1, 3), {"APGR", "CPT 95%"}),  # the dearer one is dominated
        (([0, 1], [1, 1]), (3, 1), {"APGR"}),  # always-small dearer than always-large, which dominates it
    ],
)
def test_what_is_not_defined_is_a_dash(scores: Any, usd: tuple[float, float], dashes: set[str]) -> None:
    members = {("small", "member"): scores[0], ("large", "member"): scores[1], ("kNN", "learned"): [1, 1]}
    found = episodes(members, usd={"small": usd[0], "large": usd[1], "kNN": 2}).frame
    other = episodes({"ours": [0.5, 1]}, usd={"ours": 2}).frame
    rows = frontier(Episodes(pd.concat([found, other])))
    assert {name for name in dashes if rows["ours"].get(name, "-") == "-"} == dashes
    assert "regret (score)" not in rows["ours"]  # no oracle was played
    assert len(picture(Episodes(pd.concat([found, other])))) > 5000


def test_regret_is_to_the_best_for_each_item_in_score_and_in_reward() -> None:
    """The oracle takes the cheapest of the most right: here a little more right, and dearer than that is worth."""
    members = {("small", "member"): [0.5, 0.0], ("large", "member"): [0.6, 1.0], ("oracle", "oracle"): [0.6, 1.0]}
    found = episodes(members | {("kNN", "learned"): [0.5, 1.0]}, usd={"small": 0, "large": 1, "oracle": 1, "kNN": 0.5})
    frame = found.frame.assign(reward=found.frame["score"] - 0.3 * found.frame["usd"])
    frame.loc[frame["router"] == "kNN", "reward"] = [0.5, 0.7]  # small, then large: the best in reward
    rows = frontier(Episodes(frame, found.header))
    assert [rows[name]["regret (reward)"] for name in ("kNN", "oracle")] == ["0.000", "0.100"]
    assert [rows[name]["regret (score)"] for name in ("kNN", "oracle")] == ["5.0 pt", "0.0 pt"]


def test_the_axis_of_the_auc_does_not_depend_on_the_order_of_two_members() -> None:
    """Of the area under the steps; of all wrong it is 0, which is a number. Executors of steps keep their order."""
    told = {("cheap", "member"): [0, 1], ("dear", "member"): [1, 1], ("kNN", "learned"): [1, 0]}
    usd = {"cheap": 1, "dear": 3, "kNN": 2}
    found = [episodes(dict(some), usd=usd).frame for some in (told.items(), reversed(told.items()))]
    rows = [frontier(Episodes(frame, {"task": "query_routing"}))["kNN"]["AUC"] for frame in found]
    assert rows == ["0.500", "0.500"]  # .5 from cheap (0) to dear (1)
    steps = Paired(Episodes(found[1], {"task": "step_routing"}))
    assert steps.ends == ("dear", "cheap") and steps.auc(["kNN"]) == pytest.approx(0.5 * 2 / 3)
    wrong = episodes({name: [0, 0] for name in told}, usd=usd)
    assert frontier(wrong)["kNN"]["AUC"] == "0.000"


def test_one_member_has_no_frontier() -> None:
    found = episodes({("only", "member"): [0, 1], "ours": [0, 1]})
    assert "Frontier" not in render(found)


def test_the_best_of_each_column_is_bold_whoever_it_is() -> None:
    text = render(swept(), markdown=True)
    [large] = [line for line in text.split("**Beyond")[0].splitlines() if line.startswith("| large")]
    assert "**75.0%**" in large
    areas = text.split("**Frontier**")[1]
    assert "**68.8%**" in areas and "**75.0%**" not in areas.split("oracle")[1].splitlines()[0]
    assert "**" not in render(swept())
