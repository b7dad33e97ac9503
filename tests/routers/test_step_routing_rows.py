"""Rows of a run: what reward and advantage read, profiles of an earlier run, re-labelled tasks, the warning."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import step_helpers as steps

ROOT = Path(__file__).resolve().parents[2]

from rewards.boundary import BoundaryReward
from routers.tasks.step_routing.profiles import BoundaryProfile, observe, write_profiles
from routers.tasks.step_routing.world import StepWorld, describe_rows

RULE = BoundaryReward(0.3, 1.0)
INF = float("inf")


def training_rows(world: StepWorld, profiled: Any) -> list[dict[str, Any]]:
    return world.completed(world.rows(world.train_tasks(), world.arguments.train_caps), profiled)


def profile(task: str, large: tuple[float, ...] = (0.0, 0.5)) -> BoundaryProfile:
    """Small never scores, at .2 on average; large costs 1.2."""
    return BoundaryProfile(task, "x", (0.0, 0.0), (0.1, 0.3), large, (1.0, 1.4))


def test_a_task_that_the_policy_solved_is_hard_in_the_next_run(tmp_path: Path) -> None:
    """Intractable -> solved once -> Hard: in the file, the class, the bonus and the references."""
    world = steps.world(train_limit=2, tau_large=0.5)
    one, two = world.train_tasks()
    first = {name: profile(name) for name in (one, two)}  # p_L .25 < .5
    before = training_rows(world, first)
    assert [row["difficulty"] for row in before] == ["intractable"] * 2
    # No bonus: R_L = .25 - .3
    assert before[0]["references"] == pytest.approx([0.0, -0.05])

    path = tmp_path / "profiles.parquet"
    write_profiles(observe(first.values(), [{one: (8, 1), two: (8, 0)}]), path, world.profile_settings())
    after = training_rows(world, world.given_profiles(path))
    assert [row["hard"] for row in after] == [True, False]
    # R_L = .25 (1 + beta) - .3; a success there earns 2 - .3 C_norm instead of 1 - .3 C_norm
    assert after[0]["references"] == pytest.approx([0.0, 0.2])
    assert after[1] == before[1]
    assert describe_rows(RULE, after).startswith("training tasks: 1 hard, 1 intractable")


def test_profiles_of_another_world_or_of_other_tasks_are_refused(tmp_path: Path) -> None:
    world, path = steps.world(train_limit=3), tmp_path / "profiles.parquet"
    names = list(world.train_tasks())
    write_profiles([profile(name) for name in names[:1]], path, world.profile_settings())
    with pytest.raises(ValueError, match=f"no profile of '{names[1]}', nor of 1 more of the 3 training tasks"):
        world.given_profiles(path)
    assert list(steps.world(train_limit=1).given_profiles(path)) == names[:1]
    with pytest.raises(ValueError, match=r"made with step_limit=20, the recipe says 30; give another file, or none"):
        steps.world(train_limit=1, step_limit=30).given_profiles(path)
    write_profiles([profile(name) for name in names], path)
    with pytest.raises(ValueError, match="was made with environment=None, the recipe says 'alfworld'"):
        world.given_profiles(path)
    for content, message in ((b"text", "cannot be read as parquet"), (None, "row 1 is no profile")):
        broken = tmp_path / "broken.parquet"
        if content is None:
            settings = {b"settings": json.dumps(world.profile_settings()).encode()}
            pq.write_table(pq.read_table(path).drop(["costs_small"]).replace_schema_metadata(settings), broken)
        else:
            broken.write_bytes(content)
        with pytest.raises(ValueError, match=rf"broken\.parquet: {message}"):
            world.given_profiles(broken)
    with pytest.raises(FileNotFoundError, match=r"there is no .*missing\.parquet"):
        world.given_profiles(tmp_path / "missing.parquet")


def rows(rule: BoundaryReward, **settings: Any) -> list[dict[str, Any]]:
    made = {"cost_weight": rule.cost_weight, "hard_bonus": rule.hard_bonus, "cost_norm": rule.cost_norm}
    world = steps.world(train_limit=2, **made, **settings)
    return training_rows(world, {name: profile(name, (0.5, 1.0)) for name in world.train_tasks()})


def test_the_warning_counts_tasks_and_knows_the_form_of_the_cost() -> None:
    # p_L .75, gap 1: ratio 1.5 / lambda. Two tasks, whatever the number of caps.
    assert describe_rows(RULE, rows(RULE, train_caps=[INF, 1, 2])) == "training tasks: 2 hard"
    dear = BoundaryReward(1.6, 1.0)
    said = describe_rows(dear, rows(dear, train_caps=[INF, 1, 2]))
    assert said.startswith("training tasks: 2 hard\nWARNING: cost_weight=1.6 is too high: on 2 of 2 Hard tasks")
    # Over a budget of 1 the gap is (1.2 - .2) / 1; over one of 10 it is .1, and failing does not pay.
    budget = BoundaryReward(1.6, 1.0, "budget")
    found = rows(budget, train_caps=[1.0, 10.0], budget_unit="usd")
    assert [row["budget"] for row in found] == [1.0, 1.0, 10.0, 10.0]
    assert found[2]["references"] == pytest.approx([-1.6 * 0.02, 1.5 - 1.6 * 0.12])
    assert "on 2 of 4 Hard tasks" in describe_rows(budget, found)


@pytest.mark.parametrize("settings", [{}, {"budget_unit": "usd"}, {"train_caps": [1.0]}])
def test_a_cost_over_the_budget_needs_a_budget_in_dollars(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="budget_unit: usd and finite train_caps"):
        rows(BoundaryReward(cost_norm="budget"), **settings)
