"""Episodes: the frame, its header, merging, files; and what routes on known outcomes make of it, by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from routers.evaluation.episodes import LOST, Episodes, Outcomes, RewardRule

MEMBERS = ["cheap", "dear"]
# Four queries: both right, only the cheap one, only the dear one, nobody.
CORRECT = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
COST = np.array([[1.0, 4.0], [1.0, 4.0], [2.0, 8.0], [1.0, 4.0]]) * 1e-6
RULE = RewardRule(cost_scale=5e-6, cost_weight=0.2, format_weight=0.1)
QUERIES = [{"query_id": f"q{i}", "family": "sums" if i < 2 else "facts", "query": f"what {i}?"} for i in range(4)]
KNOWN = Outcomes(QUERIES, MEMBERS, CORRECT, COST, RULE(CORRECT, COST), rule=RULE)


def rows(**columns: Any) -> pd.DataFrame:
    plain = {"router": "a", "kind": "policy", "item": ["x", "y"], "score": 1.0, "usd": 0.1, "reward": 0.5}
    return pd.DataFrame({**plain, **columns})


def test_routes_by_hand() -> None:
    own = np.array([1.0, 0.0, 0.0, 1.0]) * 1e-6
    frame = KNOWN.play("ours", "policy", ["cheap", "dear", "dear", None], own_usd=own, seed=3).frame
    assert frame["score"].tolist() == [1, 0, 1, 0]
    assert frame["usd"].tolist() == pytest.approx([2e-6, 4e-6, 8e-6, 1e-6])  # an invalid action costs its own tokens
    # 1 - 0.2*2/5 ; 0 - 0.2*4/5 ; 1 - 0.2*min(8/5, 1) ; 0 - 0.2*1/5 - 0.1
    assert frame["reward"].tolist() == pytest.approx([0.92, -0.16, 0.8, -0.14])
    assert frame["member"].tolist() == ["cheap", "dear", "dear", ""]
    assert frame["valid"].tolist() == frame["calls"].tolist() == [1, 1, 1, 0]
    assert frame["policy_usd"].tolist() == own.tolist() and set(frame["seed"]) == {3}
    assert frame["family"].tolist() == ["sums", "sums", "facts", "facts"] and frame["query"][1] == "what 1?"


def test_probabilities_are_exact_expectations() -> None:
    frame = KNOWN.play("random", "random", np.full((4, 2), 0.5)).frame
    assert frame["score"].tolist() == [1.0, 0.5, 0.5, 0.0]
    assert frame["usd"].tolist() == pytest.approx([2.5e-6, 2.5e-6, 5e-6, 2.5e-6])
    # third query: (0 - 0.2*2/5 + 1 - 0.2*1) / 2: the clip acts on each member, not on the mean cost
    assert frame["reward"][2] == pytest.approx(0.36)
    assert set(frame["member"]) == {""} and set(frame["valid"]) == {1.0}


def test_further_metrics_are_columns() -> None:
    known = Outcomes(QUERIES, MEMBERS, CORRECT, COST, CORRECT, {"f1": CORRECT / 2})
    assert known.play("dear", "member", ["dear"] * 4).frame["f1"].tolist() == [0.5, 0, 0.5, 0]
    with pytest.raises(ValueError, match="reward of an invalid action is not known"):
        known.play("ours", "policy", ["dear", None, "dear", "dear"])


@pytest.mark.parametrize("routes", [["cheap"] * 3, ["elsewhere"] * 4, []])
def test_bad_routes_are_refused(routes: list[str | None]) -> None:
    with pytest.raises(ValueError, match=r"shapes differ|'elsewhere'"):
        KNOWN.play("ours", "policy", routes)


def test_bad_rules_are_refused() -> None:
    for bad in ((0.0, 0.2, 0.2), (1.0, -0.1, 0.2), (1.0, 0.2, float("nan")), (float("inf"), 0.2, 0.2)):
        with pytest.raises(ValueError, match="must be"):
            RewardRule(*bad)


def test_what_is_left_out_has_a_value_and_the_order_of_rows_says_nothing() -> None:
    one = Episodes(rows())
    assert one.frame.loc[0, ["seed", "cap", "member", "valid", "calls"]].tolist() == [0, math.inf, "", 1.0, 1.0]
    assert one.routers == {"a": "policy"}
    other = Episodes(rows().iloc[::-1])
    pd.testing.assert_frame_equal(one.frame, other.frame)


def test_bad_episodes_are_refused() -> None:
    for bad, words in (
        (rows().drop(columns="usd"), "no column 'usd'"),
        (rows(kind="polity"), "kind 'polity' is unknown"),
        (rows(score=[1.0, math.nan]), "a on y: score, usd and reward must be finite"),
        (rows(item="x", score=[1.0, 0.0]), r"a played x \(seed 0\) twice, with two outcomes"),
    ):
        with pytest.raises(ValueError, match=words):
            Episodes(bad)
    lost = Episodes(rows(score=[1.0, math.nan], usd=[0.1, math.nan], reward=[1.0, math.nan], stop=["", LOST]))
    assert len(lost) == 2


def test_shares_of_processes_and_routers_are_merged() -> None:
    """Two processes that play every second item make what one makes; what two runs share counts once."""
    header = {"task": "t", "rule": {"cost_weight": 0.2}}
    whole = KNOWN.play("ours", "policy", ["cheap"] * 4, header=header)
    parts = [Episodes(whole.frame.iloc[rank::2], header) for rank in (1, 0)]
    base = Episodes(KNOWN.play("cheap", "member", ["cheap"] * 4).frame, {"train_reward": {"cheap": 0.5}})
    found = Episodes.merged([*parts, base, base])
    pd.testing.assert_frame_equal(found.of(router="ours").frame, whole.frame)
    assert found.header == {**header, "train_reward": {"cheap": 0.5}} and len(found) == 8
    with pytest.raises(ValueError, match=r"rule\.cost_weight is 0.2 in one part, 0.4 in another"):
        Episodes.merged([whole, Episodes(base.frame, {"rule": {"cost_weight": 0.4}})])
    with pytest.raises(ValueError, match="no episodes to merge"):
        Episodes.merged([])


def test_written_and_read_again(tmp_path: Path) -> None:
    made = Episodes(rows(em=[1.0, math.nan], cap=[2.0, math.inf]), {"task": "t", "train_reward": {"a": 0.25}})
    made.write(tmp_path / "run" / "evaluation.parquet")
    for place in (tmp_path / "run", tmp_path / "run" / "evaluation.parquet"):
        found = Episodes.read(place)
        pd.testing.assert_frame_equal(found.frame, made.frame)
        assert found.header == made.header
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["evaluation.parquet"]
    with pytest.raises(FileNotFoundError, match="no such file; srpo train"):
        Episodes.read(tmp_path)
    rows().to_parquet(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("hello, this is no table")
    with pytest.raises(ValueError, match="holds no evaluation of srpo"):
        Episodes.read(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="is no parquet file"):
        Episodes.read(tmp_path / "text.parquet")
    renamed = made.renamed({"a": "b"})
    assert renamed.routers == {"b": "policy"} and renamed.header["train_reward"] == {"b": 0.25}
