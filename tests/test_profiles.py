"""Boundary profiles: classes by hand, the guards, and that an interrupted profiling ends in the same file."""

import functools
from pathlib import Path

import pytest

from routers.profiles import (
    BoundaryProfile,
    DifficultyRule,
    Run,
    observe,
    profile_tasks,
    read_profiles,
    write_profiles,
)


def made(small: int, large: int, runs: int = 5, **more: int) -> BoundaryProfile:
    scores = [tuple(float(k < n) for k in range(runs)) for n in (small, large)]
    return BoundaryProfile("t", "walk", scores[0], (0.1,) * runs, scores[1], (1.0,) * runs, **more)


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        (3, 0, "easy"),  # 3/5 >= .6
        (2, 1, "hard"),  # 2/5 < .6, 1/5 >= .2
        (0, 5, "hard"),
        (0, 0, "intractable"),
        (2, 0, "easy"),  # guard: small sometimes solves what large does not
    ],
)
def test_classes_by_hand(small: int, large: int, expected: str) -> None:
    assert DifficultyRule()(made(small, large)) == expected


def test_thresholds_and_guards() -> None:
    assert DifficultyRule(tau_easy=0.2)(made(1, 5)) == "easy"
    assert DifficultyRule(tau_large=0.8)(made(0, 3)) == "intractable"
    assert DifficultyRule(small_only_is_easy=False)(made(2, 0)) == "intractable"
    assert DifficultyRule()(made(0, 0, policy_runs=8, policy_successes=1)) == "hard"
    assert DifficultyRule()(made(0, 0, policy_runs=8)) == "intractable"
    with pytest.raises(ValueError, match="tau_easy"):
        DifficultyRule(tau_easy=0.0)


def test_columns_are_rates_and_means() -> None:
    profile = BoundaryProfile("t", "walk", (1.0, 0.0), (0.1, 0.3), (1.0, 1.0), (1.0, 2.0))
    assert profile.columns(DifficultyRule()) == {
        "p_small": 0.5,
        "p_large": 1.0,
        "cost_small": pytest.approx(0.2),
        "cost_large": 1.5,
        "hard": True,
        "difficulty": "hard",
    }


def test_the_policy_relabels_what_the_boundaries_could_not_solve() -> None:
    [seen, other] = observe([made(0, 0), BoundaryProfile("u", "walk", (0.0,), (1.0,), (0.0,), (1.0,))], [
        ("t", 0.0), ("t", 1.0), ("t", 0.5),
    ])  # fmt: skip
    assert (seen.policy_runs, seen.policy_successes) == (3, 1) and DifficultyRule()(seen) == "hard"
    assert other.policy_runs == 0 and DifficultyRule()(other) == "intractable"


def play(task: str, boundary: str, k: int, stop_at: str = "", log: str = "") -> Run:
    """A deterministic world; raises at one task, and notes what it played."""
    if task == stop_at:
        raise KeyboardInterrupt
    if log:
        with open(log, "a") as file:
            file.write(f"{task}\n")
    number = int(task[1:])
    return Run(float((number + k) % 3 == 0 or boundary == "large"), 0.01 * number + k + 5 * (boundary == "large"))


TASKS = {f"t{i}": "even" if i % 2 == 0 else "odd" for i in range(12)}


def test_interrupted_and_resumed_gives_the_same_file(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole.parquet", tmp_path / "torn.parquet"
    expected = profile_tasks(TASKS, play, whole, runs=3)
    with pytest.raises(KeyboardInterrupt):
        profile_tasks(TASKS, functools.partial(play, stop_at="t7"), torn, runs=3)
    assert not torn.exists()
    partial = tmp_path / "torn.parquet.partial"
    partial.write_text(partial.read_text() + '{"task": "t7", "task_ty')  # the crash was in the middle of a line
    log = tmp_path / "log"
    found = profile_tasks(TASKS, functools.partial(play, log=str(log)), torn, runs=3)
    assert found == expected and torn.read_bytes() == whole.read_bytes() and not partial.exists()
    assert sorted(set(log.read_text().split())) == ["t10", "t11", "t7", "t8", "t9"]  # and nothing was played twice


def test_other_processes_give_the_same_file_and_new_tasks_extend_it(tmp_path: Path) -> None:
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    profile_tasks(TASKS, play, one, runs=2)
    profile_tasks(dict(list(TASKS.items())[:5]), play, two, runs=2)
    profile_tasks(TASKS, play, two, runs=2, workers=2)
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(ValueError, match="t0 has 2 and 2 runs, asked for are 3"):
        profile_tasks(TASKS, play, one, runs=3)


def test_raw_costs_survive_the_file(tmp_path: Path) -> None:
    profile = BoundaryProfile("a b", "walk", (1.0, 0.25), (0.1, 1e-9), (0.0, 1.0), (3.0, 4.0), 7, 2)
    write_profiles([profile], tmp_path / "x.parquet")
    assert read_profiles(tmp_path / "x.parquet") == [profile]
