"""Logs of decisions: their table, the estimators against a simulated truth, and encoders that learn from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from routers.baselines.critic import Critic
from routers.data.catalogue import Member
from routers.data.table import ReplyTable, load_table
from routers.evaluation.episodes import Outcomes, RewardRule
from routers.evaluation.off_policy import Logged, doubly_robust, value_of
from routers.evaluation.statistics import Paired
from srpo.quarantine import BadRows

CATALOGUE = {"small": Member("small", "small", 1.0, 1.0), "large": Member("large", "large", 10.0, 10.0)}
RULE = RewardRule(cost_scale=2.0, cost_weight=0.2)


def truth(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Contexts, propensities, mean rewards and a policy to evaluate, of 3 members."""
    rng = np.random.default_rng(seed)
    x = rng.random(count)
    means = np.column_stack([0.2 + 0.6 * x, 0.8 - 0.5 * x, np.full(count, 0.4)])
    logging = np.column_stack([0.1 + 0.6 * x, 0.7 - 0.6 * x, np.full(count, 0.2)])
    policy = np.column_stack([0.8 * (x > 0.5) + 0.1, 0.8 * (x <= 0.5) + 0.1, np.zeros(count)])
    return x, logging, means, policy


def simulated(guess: np.ndarray | float, given: np.ndarray | None = None, count: int = 4000) -> tuple[float, float]:
    """(an estimate from a simulated log minus the closed form, its standard error); `given`: stated propensities."""
    _, logging, means, policy = truth(count)
    rng = np.random.default_rng(1)
    chosen = np.array([rng.choice(3, p=p) for p in logging])
    rows = np.arange(count)
    reward = (rng.random(count) < means[rows, chosen]).astype(float)
    stated = (logging if given is None else given)[rows, chosen]
    credit = doubly_robust(np.zeros((count, 3)) + guess, chosen, reward, stated, np.inf)
    found = (policy * credit).sum(axis=1) - (policy * means).sum(axis=1)
    return float(found.mean()), float(found.std() / count**0.5)


def test_ips_and_doubly_robust_estimates_are_unbiased_where_either_half_is_right() -> None:
    means, wrong = truth(4000)[2], np.full((4000, 3), 1 / 3)
    for error, deviation in (simulated(0.0), simulated(means, wrong), simulated(0.9), simulated(means)):
        assert abs(error) < 4 * deviation  # IPS; right guesses; right propensities; both
    both_wrong, deviation = simulated(0.9, wrong)
    assert abs(both_wrong) > 8 * deviation
    assert simulated(means)[1] < 0.8 * simulated(0.0)[1]  # a good guess is worth its while


def test_the_clips_bias_is_the_one_that_is_stated() -> None:
    """Every outcome of one query, weighed by its probability: an expectation without a draw."""
    propensity, reward, guess = np.array([0.05, 0.95]), np.array([1.0, 0.25]), np.array([0.5, 0.5])
    policy, clip = np.array([0.7, 0.3]), 4.0
    credits = [doubly_robust(guess[None], np.array([a]), reward[[a]], propensity[[a]], clip)[0] for a in (0, 1)]
    expected = sum(p * policy @ credit for p, credit in zip(propensity, credits, strict=True))
    stated = -(policy * np.maximum(0, 1 - clip * propensity) * (reward - guess)).sum()
    assert expected - policy @ reward == pytest.approx(stated, abs=1e-12)
    assert stated == pytest.approx(-0.7 * 0.8 * 0.5)


def test_values_of_a_policy_by_hand() -> None:
    logged = Logged(
        [{"query_id": str(i), "query": f"q {i}"} for i in range(4)], ["small", "large"],
        np.array([0, 1, 0, 1]), np.array([0.5, 0.5, 0.25, 0.005]), np.array([1.0, 0.0, 1.0, 1.0]),
        np.array([1.0, 4.0, 1.0, 2.0]), RULE,
    )  # fmt: skip
    known = logged.outcomes(np.full((4, 2), 0.5), np.zeros((4, 2)))
    found = value_of(Paired(known.play("always small", "member", ["small"] * 4)), "always small")
    # Rewards 1 - .2 * .5 = .9 in the first and third; weights 2 and 4.
    assert found.ips.value == pytest.approx((2 * 0.9 + 4 * 0.9) / 4)
    assert found.snips.value == pytest.approx(0.9)
    # Scores .5 + 2 * .5, .5, .5 + 4 * .5, .5, and costs 2 * .5, 0, 4 * .5, 0.
    assert found.dr.value == pytest.approx((1.5 + 0.5 + 2.5 + 0.5 - 0.2 * (1 + 2)) / 4)
    assert found.cut == 0 and found.dr.low < found.dr.value < found.dr.high
    large = value_of(Paired(known.play("always large", "member", ["large"] * 4)), "always large")
    assert large.ips.value == pytest.approx((2 * -0.2 + 100 * 0.8) / 4)  # 1 / .005 is cut to 100
    assert large.cut == pytest.approx((200 - 100) / 4)  # one row; in expectation it is 1 - 100 * .005 of its share


def rows(**changed: Any) -> list[dict[str, Any]]:
    """A log of 40 decisions; `changed`: of the first."""
    made = [
        {
            "query_id": f"q{i}", "query": f"sum of {i // 2} and 1", "member": ("small", "large")[i % 3 == 0],
            "correct": float(i % 2), "prompt_tokens": 10, "completion_tokens": i,
            "split": ("train", "heldout")[i > 25], "propensity": 1 / 3 if i % 3 == 0 else 2 / 3,
        }
        for i in range(40)
    ]  # fmt: skip
    made[0] |= changed
    return made


def test_a_table_with_propensities_is_a_log() -> None:
    table = ReplyTable(rows(), CATALOGUE, "log.csv")
    assert table.log and len(table) == 40 and not table.bad_rows  # repeated texts of one split stay
    assert table.asked("train").tolist() == [1 if i % 3 == 0 else 0 for i in range(26)]
    np.testing.assert_allclose(table.told("propensity")[:2], [1 / 3, 2 / 3])
    assert table.lookup("q3", "large").completion_tokens == 3
    with pytest.raises(KeyError, match="'small' was not asked 'q3'"):
        table.lookup("q3", "small")
    # Means of 0, 3, .. 24 and of the others, each member with one propensity; USD 10e-6 (10 + tokens) of the large.
    np.testing.assert_allclose(table.means("completion_tokens", "train"), [217 / 17, 12.0])
    assert table.max_cost == pytest.approx(22 * 10e-6)
    for refused in (table.correct_matrix, lambda: Outcomes.of_table(table, RULE)):
        with pytest.raises(ValueError, match=r"log\.csv: has a column propensity, so it is a log"):
            refused()
    full = [{**row, "query": f"{i}", "member": name} for i, row in enumerate(rows()) for name in CATALOGUE]
    assert not ReplyTable([{k: v for k, v in row.items() if k != "propensity"} for row in full], CATALOGUE).log


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"propensity": 0.0}, "bad propensity"),
        ({"propensity": 1.2}, "bad propensity"),
        ({"propensity": float("nan")}, "missing propensity"),
        ({"propensity": "often"}, "bad propensity"),
        ({"query_id": "q1", "query": "sum of 0 and 1", "member": "large"}, "several rows of one decision"),
    ],
)
def test_a_row_without_a_propensity_is_bad(changed: dict[str, Any], reason: str, tmp_path: Path) -> None:
    table = ReplyTable(rows(**changed), CATALOGUE, max_bad_share=0.1)
    assert reason in {entry["reason"] for entry in table.bad_rows}
    if "propensity" in reason:
        assert len(table) == 39
        pd.DataFrame(rows(**changed)).astype({"propensity": str}).to_csv(tmp_path / "log.csv")
        assert len(load_table(tmp_path / "log.csv", CATALOGUE, max_bad_share=0.1)) == 39
        with pytest.raises(BadRows, match=reason):
            ReplyTable(rows(**changed), CATALOGUE, max_bad_share=0.0)


def test_the_critic_is_ridge_regression_and_leaves_rows_out_exactly() -> None:
    rng = np.random.default_rng(0)
    x = np.hstack([rng.standard_normal((40, 3)), np.ones((40, 1))])
    chosen, reward = rng.integers(0, 2, 40), rng.standard_normal(40)
    critic = Critic(x, chosen, reward, 2)
    shared, own = critic.variances
    pairs = np.hstack([x, x * (chosen == 0)[:, None], x * (chosen == 1)[:, None]])
    prior = np.array([*[shared] * 3, 10.0, *([*[own] * 3, 0.1] * 2)])
    found = np.linalg.solve(pairs.T @ pairs + np.diag(1 / prior), pairs.T @ reward)
    np.testing.assert_allclose(critic.theta, found[:4] + found[4:].reshape(2, 4), atol=1e-10)
    for i in (0, 7):
        rest = np.arange(40) != i
        other = Critic(x[rest], chosen[rest], reward[rest], 2, [critic.variances])
        np.testing.assert_allclose(critic.left_out(x, chosen, reward)[i], other.theta @ x[i], atol=1e-10)


def test_the_critic_chooses_its_variances_by_the_evidence() -> None:
    rng = np.random.default_rng(0)
    x = np.hstack([rng.standard_normal((400, 3)) / 2, np.ones((400, 1))])
    chosen, noise = rng.integers(0, 2, 400), rng.standard_normal(400) * 0.3
    for effect, expected in ((np.zeros(400), 0.01), (np.where(chosen == 0, 2, -2) * x[:, 0], 1.0)):
        critic = Critic(x, chosen, effect + noise, 2)
        assert critic.variances[1] == expected


def kinds(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    right = rng.integers(0, 2, count)
    return [f"add {i} and {i + 3}" if k else f"name the capital of land {i}" for i, k in enumerate(right)], right


def log_of(count: int, seed: int = 0) -> Logged:
    """Sums are for the first member, the rest for the second; whoever decided asked the wrong one more often."""
    texts, right = kinds(count, seed)
    rng = np.random.default_rng(seed + 1)
    logging = np.where(right[:, None] == [1, 0], 0.3, 0.7)
    chosen = (rng.random(count) > logging[:, 0]).astype(int)
    score = (chosen != right).astype(float)
    items = [{"query_id": f"{seed}-{i}", "query": text} for i, text in enumerate(texts)]
    return Logged(items, ["sums", "lands"], chosen, logging[np.arange(count), chosen], score, np.ones(count), RULE)


@pytest.mark.parametrize("objective", ["expected", "grpo", "bopo"])
def test_an_encoder_learns_from_a_log_what_nobody_who_logged_it_knew(objective: str) -> None:
    from routers.tasks.query_routing.encoder.training import train_encoder

    how: dict[str, Any] = {"objective": objective, "max_steps": 40, "queries": 64, "seed": 3}
    router, again = (train_encoder(log_of(300), RULE, **how) for _ in range(2))
    texts, right = kinds(100, 9)
    asked = [decision.member for decision in router.route_all(texts)]
    assert np.mean([a == ("sums" if k else "lands") for a, k in zip(asked, right, strict=True)]) > 0.95
    for one, other in zip(router.model.parameters(), again.model.parameters(), strict=True):
        assert (one == other).all()


def test_what_a_log_cannot_tell_is_refused() -> None:
    from routers.tasks.query_routing.encoder.training import train_encoder

    with pytest.raises(ValueError, match="objective: srpo has to know which choices failed"):
        train_encoder(log_of(40), RULE, objective="srpo")
    with pytest.raises(ValueError, match="divide by a group's spread"):
        train_encoder(log_of(40), RULE, objective="grpo", scale_rewards="group")
    with pytest.raises(ValueError, match="propensities must be above 0"):
        Logged([{}], ["a"], np.array([0]), np.array([0.0]), np.ones(1), np.ones(1), RULE)
