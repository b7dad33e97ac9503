"""BoSFT: which episodes become demonstrations, how they are balanced, and how they are weighed in training."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from step_helpers import drive
from test_step_routing_episode import world

from routers.tasks.step_routing.arguments import Synthesis
from routers.tasks.step_routing.player import Driven, Job, PlayAll
from routers.tasks.step_routing.sft_rows import (
    Demonstration,
    balance,
    demonstrations,
    read_dataset,
    write_dataset,
)
from srpo.types import CORRECT, COST

SEEDS = [f"s{k}" for k in range(5)]


def row(length: int, difficulty: str = "hard") -> dict[str, Any]:
    task = f"corridor/{length}"
    return {"length": length, "task": task, "query_id": task, "prompt": "walk", "difficulty": difficulty}


def one_by_one(jobs: Sequence[Job]) -> Iterator[tuple[Job, Driven]]:
    for job in jobs:
        yield job, drive(world(), job.row, job.seed, job.choose)


def made(folder: Path, row: dict[str, Any], how: Synthesis, play: PlayAll = one_by_one) -> list[Demonstration]:
    """Of one row; in a fresh file."""
    path = folder / "partial"
    path.unlink(missing_ok=True)
    return demonstrations([row], how, lambda row: SEEDS, play, path)


def executors(demonstration: Demonstration) -> list[str]:
    return [step["executor"] for step in demonstration.decisions]


def test_hard_keeps_the_cheapest_success_of_the_sweep(tmp_path: Path) -> None:
    # 10 steps, 12 to go: at least two double steps are needed. Always-large takes 6 calls, the optimum 2.
    [found] = made(tmp_path, row(12), Synthesis(sweep=10, keep=1))
    assert found.score == 1.0
    assert 2 * 0.1 + 8 * 0.01 <= found.cost_usd < 6 * 0.1 and 0 < found.p_large < 1
    several = made(tmp_path, row(12), Synthesis(sweep=10, keep=3))
    costs = [d.cost_usd for d in several]
    assert costs == sorted(costs) and costs[0] == found.cost_usd and len(several) == 3


def test_hard_without_a_success_is_left_out_and_always_large_is_the_fallback(tmp_path: Path) -> None:
    assert made(tmp_path, row(21), Synthesis()) == []
    [only] = made(tmp_path, row(20), Synthesis(sweep=2))  # every step must be double
    assert only.p_large == 1.0 and executors(only) == ["large"] * 10


def test_easy_and_intractable_are_always_small(tmp_path: Path) -> None:
    [easy] = made(tmp_path, row(5, "easy"), Synthesis())
    assert set(executors(easy)) == {"small"} and easy.score == 1.0
    assert len(made(tmp_path, row(5, "easy"), Synthesis(keep=3))) == 1  # `keep` is about Hard tasks
    assert made(tmp_path, row(11, "easy"), Synthesis()) == []  # no success to show
    [lost] = made(tmp_path, row(99, "intractable"), Synthesis())
    assert set(executors(lost)) == {"small"} and lost.score == 0.0


def test_a_part_of_the_score_is_no_success(tmp_path: Path) -> None:
    """Scores: always-small .75 for little, every other run 1 for more."""

    def graded(jobs: Sequence[Job]) -> Iterator[tuple[Job, Driven]]:
        for job, driven in one_by_one(jobs):
            small = driven.columns["large_calls"] == 0
            yield (
                job,
                Driven(driven.decisions, {**driven.columns, CORRECT: 0.75 if small else 1.0}, "done"),
            )

    assert made(tmp_path, row(5, "easy"), Synthesis(), graded) == []
    [hard] = made(tmp_path, row(5), Synthesis(), graded)
    assert hard.score == 1.0 and "large" in executors(hard)


def test_a_lost_episode_is_nobodys_demonstration(tmp_path: Path) -> None:
    def lose_the_first(jobs: Sequence[Job]) -> Iterator[tuple[Job, Driven]]:
        for job, driven in one_by_one(jobs):
            nothing = Driven((), {CORRECT: 0.0, COST: 0.0}, "lost")
            yield job, nothing if job.seed == "s0" else driven

    [kept] = made(tmp_path, row(99, "intractable"), Synthesis(), lose_the_first)
    assert len(kept.decisions) == 10 and kept.cost_usd == pytest.approx(0.1)


def test_interrupted_and_resumed_gives_the_same_demonstrations(tmp_path: Path) -> None:
    rows = [row(n, difficulty) for n, difficulty in ((12, "hard"), (5, "easy"), (13, "hard"), (99, "intractable"))]
    whole = demonstrations(rows, Synthesis(), lambda row: SEEDS, one_by_one, tmp_path / "whole")
    jobs = list[Job]()

    def torn(some: Sequence[Job]) -> Iterator[tuple[Job, Driven]]:
        for job, driven in one_by_one(some):
            if len(jobs) == 20:
                jobs.append(job)
                raise KeyboardInterrupt
            jobs.append(job)
            yield job, driven

    for _ in range(2):
        try:
            found = demonstrations(rows, Synthesis(), lambda row: SEEDS, torn, tmp_path / "torn")
        except KeyboardInterrupt:
            continue
    assert found == whole and len(whole) == 4
    assert len(jobs) == 2 * 14 + 2 * 5 + 1  # one was played twice: it had not come to its end


def some(count: int, difficulty: str, p_large: float = 0.0) -> list[Demonstration]:
    return [Demonstration("t", "walk", [], difficulty, p_large, 1.0, 0.1) for _ in range(count)]  # type: ignore


def test_balance_by_class_by_share_and_not_at_all() -> None:
    found = some(6, "easy") + some(2, "hard", 0.3) + some(40, "intractable")

    def counts(how: Synthesis, key: str) -> dict[Any, int]:
        chosen = [getattr(d, key) for d in balance(found, how, random.Random(0))]
        return {value: chosen.count(value) for value in sorted(set(chosen))}

    # At most a fifth of all is Intractable, after balancing too: 2 beside 8 others, 3 beside 12.
    assert counts(Synthesis(strata="none"), "difficulty") == {"easy": 6, "hard": 2, "intractable": 2}
    assert counts(Synthesis(strata="class"), "difficulty") == {"easy": 6, "hard": 6, "intractable": 3}
    assert counts(Synthesis(strata="p_large"), "p_large") == {0.0: 6 + 3, 0.3: 6}
    assert counts(Synthesis(max_intractable_share=0.0), "difficulty") == {"easy": 6, "hard": 6}
    few = balance(some(6, "easy") + some(1, "intractable"), Synthesis(), random.Random(0))
    assert len(few) == 7, "an Intractable episode is not repeated"
    assert balance([], Synthesis(), random.Random(0)) == []


def test_the_dataset_reads_back_and_holds_no_tokens(tmp_path: Path) -> None:
    from datasets import load_dataset

    found = made(tmp_path, {**row(12), "prompt": [{"role": "user", "content": "walk"}]}, Synthesis())
    write_dataset(found, tmp_path / "d", ["small", "large"])
    read = load_dataset(str(tmp_path / "d"), split="train", cache_dir=str(tmp_path / "cache"))
    assert [d["executor"] for d in read[0]["decisions"]] == executors(found[0])
    assert read[0]["cost_usd"] == found[0].cost_usd and read[0]["difficulty"] == "hard"
    assert read_dataset(tmp_path / "d") == found
    assert "| hard | 1 |" in (tmp_path / "d" / "README.md").read_text()
    assert "input_ids" not in json.dumps(read.column_names)


@pytest.mark.parametrize("bad", [{"sweep": 0}, {"keep": 0}, {"strata": "task"}, {"max_intractable_share": 1.0}])
def test_settings_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Synthesis(**bad)


def test_every_episode_weighs_the_same_in_training(tmp_path: Path) -> None:
    """One optimiser step on a long and a short episode = the mean of the two single steps' gradients."""
    import core_helpers as core
    import torch
    from trl import SFTConfig

    from srpo.sft import sft

    long = {"input_ids": [20, 21, 22, 23, 24, 25], "labels": [-100, 21, 22, 23, 24, 25]}
    short = {"input_ids": [30, 31, 32], "labels": [-100, -100, 32]}

    def step(*rows: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        args = SFTConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=len(rows), learning_rate=1e-2, optim="sgd",
            lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none", use_cpu=True, bf16=False,
            save_strategy="no", gradient_checkpointing=False, max_length=None, disable_tqdm=True,
        )  # fmt: skip
        start = core.model()
        before = core.weights(start)
        after = core.weights(sft(start, core.tokenizer(), list(rows), args, mean="rows"))
        return {name: after[name] - before[name] for name in before}

    both, one, other = step(long, short), step(long), step(short)
    assert core.distance(both, {n: (one[n] + other[n]) / 2 for n in one}) < 1e-6
    assert max(v.abs().max() for v in both.values()) > 1e-4
    with pytest.raises(ValueError, match="row 1"):
        sft(core.model(), core.tokenizer(), [long, {"input_ids": [3], "labels": [-100]}], None)
