"""Suites: parts by name, one per process, and clear words where something is missing."""

import json
from pathlib import Path

import pytest
from alfworld_problem import TASK, problem

from routers.environments.alfworld.environment import AlfWorldBenchmark
from routers.environments.protocol import GameError
from routers.environments.registry import BENCHMARKS, benchmark


def test_generated_parts_are_different_games_with_turns_of_the_types() -> None:
    made = AlfWorldBenchmark()
    train, validation = made.tasks("generated/train", 12), made.tasks("generated/validation", 12)
    assert list(train) == [f"generated/train/{n}" for n in range(12)] and not set(train) & set(validation)
    kinds = sorted(set(train.values()))
    assert len(kinds) == 6 and sorted(train.values())[::2] == kinds
    first = [made.make(name, 20).reset() for name in ("generated/train/0", "generated/validation/0")]
    assert first[0] != first[1]
    fresh = AlfWorldBenchmark().make("generated/train/0", 20)  # another process needs no listing
    assert fresh.reset() == first[0] and fresh.limit == 20


def test_games_of_a_file_are_known_once_it_was_listed(tmp_path: Path) -> None:
    packed = tmp_path / "two.jsonl"
    rows = [
        {"id": name, "task": f"Your task is to: {TASK}", "walkthrough": [], "problem": problem()}
        for name in ("a", "b")
    ]
    packed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = AlfWorldBenchmark()
    with pytest.raises(GameError, match="no file with it was loaded"):
        made.make("a", 20)
    assert list(made.tasks(str(packed))) == ["a", "b"] and list(made.tasks(str(packed), 1)) == ["a"]
    assert made.make("b", 7).limit == 7


@pytest.mark.parametrize(("which", "count"), [("generated/dev", 3), ("generated/train", 0)])
def test_a_part_that_does_not_exist_names_those_that_do(which: str, count: int) -> None:
    with pytest.raises(GameError, match=r"generated/\{train,validation,test\}|has no end: say how many"):
        AlfWorldBenchmark().tasks(which, count)


def test_one_suite_per_process_and_clear_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert benchmark("alfworld") is benchmark("alfworld")
    with pytest.raises(GameError, match="'minecraft'; there are alfworld, appworld"):
        benchmark("minecraft")
    monkeypatch.setitem(BENCHMARKS, "absent", ("absent_module:Suite", "absent-package"))
    with pytest.raises(ImportError, match=r"needs the package absent-package .*how to install"):
        benchmark("absent")
