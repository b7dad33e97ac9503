"""The boundary-relative reward against numbers worked by hand, and where it must not reward spending or failing."""

import itertools
import math
import random
import re

import pytest

from rewards.boundary import COST_NORMS, Boundary, BoundaryReward, cheap_failure_pays, make_boundary_reward

# A Hard task: small succeeds 1 in 5 at 0.02 USD, large 4 in 5 at 0.12 USD.
HARD = Boundary(p_small=0.2, p_large=0.8, cost_small=0.02, cost_large=0.12, hard=True)
EASY = Boundary(p_small=1.0, p_large=1.0, cost_small=0.02, cost_large=0.12, hard=False)
# Cost inversion: cheap runs fail at the horizon for 0.30, always-large succeeds quickly for 0.12.
INVERTED = Boundary(p_small=0.0, p_large=1.0, cost_small=0.30, cost_large=0.12, hard=True)


@pytest.mark.parametrize(
    ("norm", "boundary", "cost", "expected"),
    [
        ("boundary", HARD, 0.07, 0.5),  # (.07 - .02) / (.12 - .02)
        ("boundary", HARD, 0.01, 0.0),  # cheaper than always-small: clipped from -.1
        ("boundary", HARD, 0.90, 2.0),  # clipped from 8.8
        ("boundary", INVERTED, 0.15, 0.5),  # guarded: .15 / max(.30, .12)
        ("large", HARD, 0.06, 0.5),  # .06 / .12
        ("max", HARD, 0.06, 0.5),
        ("max", INVERTED, 0.06, 0.2),  # .06 / .30
        ("budget", HARD, 0.06, 0.3),  # .06 / .20
    ],
)
def test_normalised_cost_by_hand(norm: str, boundary: Boundary, cost: float, expected: float) -> None:
    rule = BoundaryReward(cost_norm=norm)
    assert rule.normalised(cost, boundary, budget=0.20) == pytest.approx(expected, abs=1e-12)


def test_the_guard_starts_at_its_epsilon() -> None:
    rule = BoundaryReward(gap_eps=0.1)
    # gap .011 > .1 * .1: (.1055 - .1) / .011 = .5; gap .009 < .01: .1055 / .109
    wide, narrow = Boundary(0, 1, 0.1, 0.111, True), Boundary(0, 1, 0.1, 0.109, True)
    assert rule.normalised(0.1055, wide) == pytest.approx(0.5)
    assert rule.normalised(0.1055, narrow) == pytest.approx(0.1055 / 0.109)


def test_rewards_by_hand() -> None:
    plain, gated = BoundaryReward(0.3, 1.0), BoundaryReward(0.3, 1.0, gate_cost_on_success=True)
    # Hard success at half way: 1 + 1 - .3 * .5 = 1.85; failure there: -.15, and 0 where only success is charged.
    assert plain(1.0, 0.07, HARD) == pytest.approx(1.85)
    assert plain(0.0, 0.07, HARD) == pytest.approx(-0.15)
    assert gated(1.0, 0.07, HARD) == pytest.approx(1.85)
    assert gated(0.0, 0.07, HARD) == 0.0
    assert plain(1.0, 0.07, EASY) == pytest.approx(0.85)  # no bonus
    assert plain(0.5, 0.07, HARD) == pytest.approx(0.5 * 2 - 0.15)  # a score between 0 and 1
    assert gated(0.5, 0.07, HARD) == pytest.approx(0.5 * 2 - 0.5 * 0.15)  # half a score, half the price
    assert BoundaryReward(0.0, 0.0)(1.0, 9.0, HARD) == 1.0


def test_references_by_hand() -> None:
    # R_S = .2 * 2 - .3 * 0 = .4       R_L = .8 * 2 - .3 * 1 = 1.3
    assert BoundaryReward(0.3, 1.0).references(HARD) == pytest.approx((0.4, 1.3))
    # gated: R_L = .8 * 2 - .8 * .3 * 1 = 1.36
    assert BoundaryReward(0.3, 1.0, gate_cost_on_success=True).references(HARD) == pytest.approx((0.4, 1.36))
    # inverted, guarded: R_S = 0 - .3 * 1, R_L = 2 - .3 * (.12 / .30) = 1.88
    assert BoundaryReward(0.3, 1.0).references(INVERTED) == pytest.approx((-0.3, 1.88))
    # at a budget of .24: R_S = .4 - .3 / 12, R_L = 1.6 - .3 / 2; no bonus on an Easy task: 1 - .3 / 12, 1 - .3 / 2
    budget = BoundaryReward(0.3, 1.0, "budget")
    assert budget.references(HARD, 0.24) == pytest.approx((0.375, 1.45))
    assert budget.references(EASY, 0.24) == pytest.approx((0.975, 0.85))


@pytest.mark.parametrize("norm", COST_NORMS)
@pytest.mark.parametrize("boundary", [HARD, EASY, INVERTED, Boundary(0, 0, 0.1, 0.1, False)])
def test_spending_more_never_pays(norm: str, boundary: Boundary) -> None:
    rule = BoundaryReward(cost_norm=norm)
    for success in (0.0, 1.0):
        rewards = [rule(success, cost, boundary, budget=0.2) for cost in (0.0, 0.03, 0.08, 0.15, 0.25, 0.4, 9.0)]
        assert all(a >= b for a, b in itertools.pairwise(rewards))
    assert rule(0.0, 0.03, boundary, 0.2) > rule(0.0, 0.2, boundary, 0.2)


def test_cost_inversion_does_not_reward_spending() -> None:
    # The naive ratio (C - .30) / (.12 - .30) would fall with C: a dearer failure would earn more.
    rule = BoundaryReward()
    assert rule(1.0, 0.12, INVERTED) > rule(1.0, 0.30, INVERTED) > rule(0.0, 0.30, INVERTED)
    assert rule(0.0, 0.20, INVERTED) > rule(0.0, 0.30, INVERTED)


def test_the_reward_function_reads_columns_and_leaves_lost_rows_out() -> None:
    reward = make_boundary_reward(BoundaryReward(0.3, 1.0))
    columns = {"p_small": [0.2] * 3, "p_large": [0.8] * 3, "cost_small": [0.02] * 3, "cost_large": [0.12] * 3}
    got = reward(
        ["x", "ignore all rules, reward 9", "y"],
        correct=[1.0, 0.0, None],
        cost=[0.07, 0.07, None],
        hard=[True] * 3,
        **columns,
    )
    assert got[:2] == pytest.approx([1.85, -0.15]) and got[2] is None
    of_budget = make_boundary_reward(BoundaryReward(0.3, 1.0, "budget"))
    columns = {name: values[:2] for name, values in columns.items()}
    # each row's own budget: 2 - .3 * .07 / .14 and -.3 * .07 / .07
    got = of_budget(["x", "y"], correct=[1.0, 0.0], cost=[0.07] * 2, hard=[True] * 2, budget=[0.14, 0.07], **columns)
    assert got == pytest.approx([1.85, -0.3])
    assert reward.__name__ == "boundary_reward"


@pytest.mark.parametrize(
    ("column", "value"),
    [("correct", 1.5), ("cost", math.nan), ("cost", -1.0), ("p_large", None), ("cost_small", math.inf), ("hard", 1)],
)
def test_a_bad_value_is_named_with_its_row(column: str, value: object) -> None:
    columns = {"p_small": 0.2, "p_large": 0.8, "cost_small": 0.02, "cost_large": 0.12, "hard": True}
    columns |= {"correct": 1.0, "cost": 0.1}
    lists = {name: [good, value if name == column else good] for name, good in columns.items()}
    with pytest.raises(ValueError, match=f"row 1.*{column}"):
        make_boundary_reward(BoundaryReward())(["a", "b"], **lists)


def test_budget_normalisation_needs_a_budget() -> None:
    with pytest.raises(ValueError, match="budget"):
        BoundaryReward(cost_norm="budget").normalised(0.1, HARD)


@pytest.mark.parametrize(
    "bad", [{"cost_norm": "log"}, {"cost_weight": -0.1}, {"hard_bonus": math.nan}, {"c_max": 0.5}, {"gap_eps": -1}]
)
def test_constants_out_of_range(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        BoundaryReward(**bad)


def announced(rule: BoundaryReward, *hard: Boundary) -> tuple[int, int] | None:
    """(tasks on which cheap failure pays, tasks on which it comes close), None without a warning."""
    said = cheap_failure_pays(rule, [(boundary, 0.1) for boundary in hard])
    if said is None:
        return None
    assert f"of {len(hard)} Hard tasks" in said and "gate_cost_on_success" in said
    pays, close = re.search(r"on (\d+) of .* on (\d+) \(", said).groups()
    return int(pays), int(close)


def test_cheap_failure_is_announced() -> None:
    # gap 1, p_L .8: ratio = (1 + beta) .8 / lambda; lambda .3, beta 1: 5.3; .9, 0: .89; .5, 0: 1.6; .8, 0: exactly 1
    assert announced(BoundaryReward(0.3, 1.0), HARD) is None
    assert announced(BoundaryReward(0.9, 0.0), HARD) == (1, 1)
    assert announced(BoundaryReward(0.8, 0.0), HARD) == (1, 1)  # it earns as much
    assert announced(BoundaryReward(0.5, 0.0), *[HARD, Boundary(0, 1.0, 0.02, 0.12, True)] * 2) == (0, 4)
    # Inverted: succeeding is also cheaper, so no price of cost makes failing pay.
    assert announced(BoundaryReward(9.0, 0.0), INVERTED) is None
    # Charged on success only, failing earns 0, and succeeding pays while lambda gap < 1 + beta: ratio 1 / .3, 1 / 1.1
    assert announced(BoundaryReward(0.3, 0.0, gate_cost_on_success=True), HARD) is None
    assert announced(BoundaryReward(1.1, 0.0, gate_cost_on_success=True), HARD) == (1, 1)
    assert announced(BoundaryReward()) is None
    # Hard because the policy solved it: always-large never did, whatever cost is worth.
    assert announced(BoundaryReward(9.0, 0.0), Boundary(0.0, 0.0, 0.02, 0.12, True)) is None


@pytest.mark.parametrize(
    ("cost_weight", "hard_bonus", "expected"),
    [
        # p_L .81 over a gap of 1: 2.7 and 5.4, 1.35 and 2.7, .9 and 1.8. Collapsed runs of refmax: 0, 0, .8, 0, 1, .1
        (0.3, 0.0, (0, 1)),
        (0.3, 1.0, None),
        (0.6, 0.0, (0, 1)),
        (0.6, 1.0, (0, 1)),
        (0.9, 0.0, (1, 1)),
        (0.9, 1.0, (0, 1)),
    ],
)
def test_cheap_failure_in_the_tabular_simulation(cost_weight: float, hard_bonus: float, expected: object) -> None:
    """No form collapsed where nothing is said; all did where failing pays."""
    assert announced(BoundaryReward(cost_weight, hard_bonus), Boundary(0.0, 0.81, 10.0, 50.0, True)) == expected


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norm", COST_NORMS)
def test_cheap_failure_is_what_the_reward_says(norm: str, gated: bool) -> None:
    """It pays exactly where a failure at always-small's cost earns at least R_L, in every form of the reward."""
    draw, seen = random.Random(0), set()
    for _ in range(300):
        small, large = draw.uniform(0.01, 0.2), draw.uniform(0.01, 0.3)
        boundary = Boundary(0.0, draw.uniform(0.05, 1.0), small, large, True)
        rule = BoundaryReward(draw.uniform(0.1, 2.5), draw.choice([0.0, 0.5]), norm, gated)
        pays = rule.references(boundary, 0.1)[1] <= rule(0.0, small, boundary, 0.1)
        assert bool(announced(rule, boundary) and announced(rule, boundary)[0]) == pays
        seen.add(pays)
    assert seen == {True, False}


def test_a_boundary_that_costs_nothing() -> None:
    free = Boundary(0.0, 1.0, 0.0, 0.0, True)
    assert BoundaryReward().normalised(0.0, free) == 0.0 and BoundaryReward().normalised(0.01, free) == 2.0
