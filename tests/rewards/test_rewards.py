"""The reward parts, alone and summed with weights."""

import itertools
import math

import numpy as np
import pytest

from rewards import correctness_reward, format_reward, make_cost_reward

TEXTS = ["", "", ""]
IDS = ["a", "b", "c"]


def test_parts_by_hand() -> None:
    assert correctness_reward(TEXTS, correct=[1.0, 0.25, 0], other=[1, 2, 3]) == [1.0, 0.25, 0.0]
    assert format_reward(TEXTS, format_error=["", "why", " "]) == [0.0, -1.0, -1.0]
    # -min(cost / 2e-4, 1)
    assert make_cost_reward(2e-4)(TEXTS, cost=[5e-5, 3e-4, 0.0]) == pytest.approx([-0.25, -1.0, 0.0])


def test_numpy_numbers_are_numbers() -> None:
    assert correctness_reward(TEXTS, correct=np.array([1.0, 0.5, 0.0])) == [1.0, 0.5, 0.0]


def test_names_in_logs() -> None:
    """TRL logs a reward function under its name."""
    functions = (correctness_reward, format_reward, make_cost_reward(1.0))
    assert [function.__name__ for function in functions] == ["correctness_reward", "format_reward", "cost_reward"]


def test_cost_never_makes_wrong_better_than_right() -> None:
    scale, weights = 1e-4, (0.0, 0.2, 0.5, 0.999)
    costs = (0.0, 1e-9, 5e-5, 1e-4, 1.0, 1e300)
    cost_reward = make_cost_reward(scale)
    for weight, format_weight in itertools.product(weights, (0.0, 0.2, 1.0)):
        right, wrong = [], []
        for cost in costs:
            [penalty] = cost_reward([""], cost=[cost])
            right.append(1.0 + weight * penalty)
            wrong.append(0.0 + weight * penalty)
        [invalid] = format_reward([""], format_error=["bad"])
        assert min(right) > max(wrong)
        assert min(right) > format_weight * invalid
        # What the package's docstring asks for: silence never pays more than a wrong try.
        assert (min(wrong) >= format_weight * invalid) == (format_weight >= weight)


def test_the_cost_reward_keeps_no_state() -> None:
    cost_reward = make_cost_reward(1e-4)
    before = cost_reward(TEXTS, cost=[1e-5, 2e-5, 3e-5])
    cost_reward(TEXTS, cost=[1.0, 2.0, 3.0])
    assert cost_reward(TEXTS[:2], cost=[3e-5, 1e-5]) == [before[2], before[0]]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, -1e-9, "0.1", [0.1]])
def test_a_bad_cost_names_its_row(bad: object) -> None:
    with pytest.raises(ValueError, match=r"row 1 \(query_id 'b'\): cost is"):
        make_cost_reward(1.0)(TEXTS, cost=[0.0, bad, 0.0], query_id=IDS)
    with pytest.raises(ValueError, match="row 2: cost is"):
        make_cost_reward(1.0)(TEXTS, cost=[0.0, 0.0, bad])


@pytest.mark.parametrize("bad", [None, math.nan, -0.1, 1.1, "1", True + 1])
def test_a_bad_correctness_names_its_row(bad: object) -> None:
    with pytest.raises(ValueError, match=r"row 2 \(query_id 'c'\): correct is"):
        correctness_reward(TEXTS, correct=[0.0, 1.0, bad], query_id=IDS)


@pytest.mark.parametrize("bad", [None, 0, math.nan])
def test_a_bad_format_error_names_its_row(bad: object) -> None:
    with pytest.raises(ValueError, match=r"row 0 \(query_id 'a'\): format_error is"):
        format_reward(TEXTS, format_error=[bad, "", ""], query_id=IDS)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_scale_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="must be a positive number"):
        make_cost_reward(scale)


def test_columns_must_be_as_long_as_the_batch() -> None:
    for call in (
        lambda: correctness_reward(TEXTS, correct=[1.0]),
        lambda: format_reward(TEXTS, format_error=[""]),
        lambda: make_cost_reward(1.0)(TEXTS, cost=[1.0] * 4),
    ):
        with pytest.raises(ValueError, match="values for 3 completions"):
            call()
