"""The report of think/route agents, against numbers worked by hand."""

from pathlib import Path

import numpy as np
import pytest

from routers.evaluation.agent_report import (
    ANSWERER,
    AgentEvaluation,
    Line,
    best_per_family,
    gains,
    seeds_table,
    single_lines,
)


def line(name: str, em: list[float], cost: list[float], kind: str = "policy") -> Line:
    reward = [e - 1000 * c for e, c in zip(em, cost, strict=True)]
    return Line(name, kind, {"em": em, "f1": em, "cost": cost, "calls": [1.0] * len(em), "reward": reward})


def evaluation(policy: Line, *others: Line) -> AgentEvaluation:
    ids = [f"q{i}" for i in range(len(policy.values["em"]))]
    return AgentEvaluation(ids, ["x", "x", "y", "y"], [policy, *others], {"a": 0.75, "b": 0.25}, {"done": 1.0})


ONCE = {"calls": [1] * 4}
VALUES = {
    "a": {**ONCE, "em": [1, 0, 0, 0], "f1": [1, 0, 0.5, 0], "cost": [1e-4] * 4, "reward": [0.9, -0.1, -0.1, -0.1]},
    "b": {**ONCE, "em": [1, 1, 0, 0], "f1": [1, 1, 0, 0], "cost": [3e-4] * 4, "reward": [0.7, 0.7, -0.3, -0.3]},
}
ARRAYS = {name: {m: np.array(v, dtype=float) for m, v in columns.items()} for name, columns in VALUES.items()}


def test_the_lines_of_single_members() -> None:
    lines = {x.name: x for x in single_lines(["a", "b"], ARRAYS, ["x", "x", "y", "z"], {"x": "b", "y": "a"})}
    assert list(lines) == ["a", "b", "random", "best per family", "oracle"]
    assert lines["random"].values["em"] == [1.0, 0.5, 0.0, 0.0]
    assert lines["random"].values["cost"] == pytest.approx([2e-4] * 4)
    # x -> b, x -> b, y -> a; z was never seen: one of the best members of the others
    assert lines["best per family"].values["reward"][:3] == [0.7, 0.7, -0.1]
    # the oracle takes, per question, whoever earns most: a, b, a, a
    assert lines["oracle"].values["reward"] == [0.9, 0.7, -0.1, -0.1]
    assert lines["oracle"].values["cost"] == [1e-4, 3e-4, 1e-4, 1e-4]
    assert [x.name for x in single_lines(["a", "b"], ARRAYS, ["x"] * 4)] == ["a", "b", "random", "oracle"]


def test_best_per_family_is_by_training_reward() -> None:
    rewards = {"a": np.array([0.2, 0.2, 0.9]), "b": np.array([0.5, 0.0, 0.1])}
    assert best_per_family(["a", "b"], rewards, ["x", "x", "y"]) == {"x": "b", "y": "a"}


def test_gains_are_paired_by_seed_and_question() -> None:
    # Every question of every seed gains exactly 0.25 in reward although the rewards differ wildly: no interval.
    starts = [evaluation(line("warm start", [1.0, 0.0, 0.0, s], [0.0] * 4)) for s in (0.0, 1.0)]
    runs = [evaluation(line("srpo", [e + 0.25 for e in s.policy.values["em"]], [0.0] * 4)) for s in starts]
    found = gains(runs, starts)
    assert (found["reward"].value, found["reward"].low, found["reward"].high) == pytest.approx((0.25, 0.25, 0.25))
    assert found["cost"].value == 0
    other = AgentEvaluation(["z"] * 4, ["x"] * 4, starts[0].lines, {}, {})
    with pytest.raises(ValueError, match="all on the same questions"):
        gains(runs, [starts[0], other])
    with pytest.raises(ValueError, match="every run needs its start"):
        gains(runs, starts[:1])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    made = evaluation(line("srpo", [1.0, 0.0, 1.0, 1.0], [1e-5] * 4), line("a", [0.0] * 4, [1e-5] * 4, "member"))
    made.write(tmp_path)
    assert AgentEvaluation.read(tmp_path) == made


def test_the_text_says_the_numbers_and_who_answers() -> None:
    start = evaluation(line("warm start", [0.0, 0.0, 1.0, 1.0], [2e-5] * 4))
    text = evaluation(line("srpo", [1.0, 0.0, 1.0, 1.0], [1e-5] * 4)).text(start)
    rows = {row.split("  ")[0]: row for row in text.splitlines()}
    assert "0.750" in rows["srpo"] and "0.0100" in rows["srpo"] and "1.00" in rows["srpo"]  # $ per 1,000 questions
    assert "0.500" in rows["warm start"]
    assert rows["x"].split()[:3] == ["x", "2", "0.500"] and rows["y"].split()[:3] == ["y", "2", "1.000"]
    assert "Calls of srpo: a 75.0%, b 25.0%. Ends: done 100.0%." in text
    assert "EM +0.250" in text and ANSWERER in text


def test_seeds_in_one_row(tmp_path: Path) -> None:
    runs = [evaluation(line("srpo", em, [0.0] * 4), line("a", [0.0] * 4, [0.0] * 4, "member"))
            for em in ([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0])]  # fmt: skip
    rows = seeds_table({"srpo": runs}, markdown=True).splitlines()
    assert rows[2].startswith("| srpo | 0.375 |") and "0.250 0.500" in rows[2]
    assert rows[3].startswith("| a ")


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="srpo: every metric needs one finite number"):
        line("srpo", [float("nan")], [0.0])
    with pytest.raises(ValueError, match="srpo: every metric"):
        Line("srpo", "policy", {m: [0.0] * (1 + (m == "em")) for m in ("em", "f1", "cost", "calls", "reward")})
