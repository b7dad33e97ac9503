"""Boundary profiles: classes by hand, the guards, and that an interrupted profiling ends in the same file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from routers.tasks.step_routing.arguments import DifficultyRule
from routers.tasks.step_routing.player import Driven, Job, play_jobs
from routers.tasks.step_routing.profiles import (
    BoundaryProfile,
    observe,
    profile_tasks,
    read_profiles,
    read_settings,
    write_profiles,
)
from routers.tasks.step_routing.rules import always_large, always_small
from srpo.types import CORRECT, COST


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
    assert made(small, large).difficulty(DifficultyRule()) == expected


def test_thresholds_and_guards() -> None:
    assert made(1, 5).difficulty(DifficultyRule(tau_easy=0.2)) == "easy"
    assert made(0, 3).difficulty(DifficultyRule(tau_large=0.8)) == "intractable"
    assert made(2, 0).difficulty(DifficultyRule(small_only_is_easy=False)) == "intractable"
    assert made(0, 0, policy_runs=8, policy_successes=1).difficulty(DifficultyRule()) == "hard"
    assert made(0, 0, policy_runs=8).difficulty(DifficultyRule()) == "intractable"
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


def scored(small: tuple[float, ...], large: tuple[float, ...], solved: int = 0) -> BoundaryProfile:
    return BoundaryProfile("t", "boil", small, (0.1,) * len(small), large, (1.0,) * len(large), 9, solved)


@pytest.mark.parametrize(
    ("small", "large", "solved", "expected"),
    [
        ((0.5, 0.7), (0.9, 0.9), 0, "easy"),  # mean .6
        ((0.5, 0.69), (0.2, 0.2), 0, "hard"),
        ((0.4, 0.3), (0.1, 0.2), 0, "intractable"),  # some progress, but small solved nothing
        ((1.0, 0.0), (0.1, 0.2), 0, "easy"),  # small solved it once
        ((0.4, 0.3), (0.1, 0.2), 1, "hard"),  # the policy solved it once
    ],
)
def test_partial_scores_by_hand(
    small: tuple[float, ...], large: tuple[float, ...], solved: int, expected: str
) -> None:
    """Mean scores against the thresholds; the guards ask for a whole success."""
    assert scored(small, large, solved).difficulty(DifficultyRule()) == expected


def test_the_policy_relabels_what_the_boundaries_could_not_solve() -> None:
    unseen = BoundaryProfile("u", "walk", (0.0,), (1.0,), (0.0,), (1.0,))
    ranks = [{"t": (3, 0), "elsewhere": (5, 5)}, {"t": (2, 1)}]
    [seen, other] = observe([made(0, 0), unseen], ranks)
    assert (seen.policy_runs, seen.policy_successes) == (5, 1) and seen.difficulty(DifficultyRule()) == "hard"
    assert other == unseen and other.difficulty(DifficultyRule()) == "intractable"
    [again, _] = observe([seen, other], [{"t": (4, 2)}])  # a later run goes on counting
    assert (again.policy_runs, again.policy_successes) == (9, 3)


def test_a_file_is_in_the_order_of_names(tmp_path: Path) -> None:
    names = ["t10", "t2", "a", "t1"]
    write_profiles([BoundaryProfile(n, "x", (0.0,), (1.0,), (0.0,), (1.0,)) for n in names], tmp_path / "p.parquet")
    assert [profile.task for profile in read_profiles(tmp_path / "p.parquet")] == sorted(names)


def test_a_file_says_what_it_was_made_with(tmp_path: Path) -> None:
    profiles = [made(0, 0, policy_runs=8, policy_successes=1), scored((0.5, 0.25), (1.0, 0.75))]
    write_profiles(profiles[:1], tmp_path / "known.parquet", {"step_limit": 20, "executors": ["a", "b"]})
    write_profiles(profiles[1:], tmp_path / "unknown.parquet")
    assert read_settings(tmp_path / "known.parquet") == {"step_limit": 20, "executors": ["a", "b"]}
    assert read_settings(tmp_path / "unknown.parquet") == {}
    assert read_profiles(tmp_path / "known.parquet") == profiles[:1]
    assert read_profiles(tmp_path / "unknown.parquet") == profiles[1:]


class Play:
    """A deterministic world; ends at one job as a crash would, and knows what it played."""

    def __init__(self, stop_at: str = "") -> None:
        self.stop_at, self.played = stop_at, list[str]()

    def __call__(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Driven]]:
        for job in reversed(jobs):  # in any order
            if job.key == self.stop_at:
                raise KeyboardInterrupt
            self.played.append(job.key)
            _, boundary, k, task = job.seed.split("/")
            number, large = int(task[1:]), job.choose is always_large
            assert large == (boundary == "large") and job.row == {"task": task}
            score = float((number + int(k)) % 3 == 0 or large)
            columns = {CORRECT: score, COST: 0.01 * number + int(k) + 5 * large}
            yield job, Driven((), columns, "done")


TASKS = {f"t{i}": "even" if i % 2 == 0 else "odd" for i in range(12)}


def test_interrupted_and_resumed_gives_the_same_file(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole.parquet", tmp_path / "torn.parquet"
    expected = profile_tasks(TASKS, Play(), whole, runs=3)
    assert expected[1] == BoundaryProfile("t1", "odd", (0, 0, 1), (0.01, 1.01, 2.01), (1, 1, 1), (5.01, 6.01, 7.01))
    with pytest.raises(KeyboardInterrupt):
        profile_tasks(TASKS, Play("profile/large/1/t7"), torn, runs=3)
    assert not torn.exists()
    partial = tmp_path / "torn.parquet.partial"
    assert partial.read_text().count("\n") == 4 * 6 + 1  # t11 to t8 whole, and one run of t7
    partial.write_text(partial.read_text() + '["profile/large/1/t7", [1.')  # the crash was in the middle of a line
    rest = Play()
    found = profile_tasks(TASKS, rest, torn, runs=3)
    assert found == expected and torn.read_bytes() == whole.read_bytes() and not partial.exists()
    assert len(rest.played) == 72 - 25 and "profile/large/2/t7" not in rest.played  # nothing was played twice


def test_new_tasks_extend_a_file_and_other_runs_do_not(tmp_path: Path) -> None:
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    profile_tasks(TASKS, Play(), one, runs=2)
    profile_tasks(dict(list(TASKS.items())[:5]), Play(), two, runs=2)
    profile_tasks(TASKS, Play(), two, runs=2)
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(ValueError, match="t0 has 2 and 2 runs, asked for are 3"):
        profile_tasks(TASKS, Play(), one, runs=3)


def test_jobs_need_names_of_their_own(tmp_path: Path) -> None:
    job = Job("same", {}, "s", always_small)
    with pytest.raises(ValueError, match="two jobs"):
        play_jobs([job, job], tmp_path / "x", Play(), lambda driven: None)


def test_raw_costs_survive_the_file(tmp_path: Path) -> None:
    profile = BoundaryProfile("a b", "walk", (1.0, 0.25), (0.1, 1e-9), (0.0, 1.0), (3.0, 4.0), 7, 2)
    write_profiles([profile], tmp_path / "x.parquet")
    assert read_profiles(tmp_path / "x.parquet") == [profile]
