"""BoSFT: which episodes become demonstrations, how they are balanced, and how they are weighed in training."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_budget_episode import world

from routers.bosft import Demonstration, Synthesis, balance, demonstrations, write_dataset
from srpo.types import CORRECT, COST

SEEDS = [f"s{k}" for k in range(5)]


def row(length: int) -> dict[str, Any]:
    return {"length": length, "task": f"corridor/{length}", "prompt": "walk"}


def test_hard_keeps_the_cheapest_success_of_the_sweep() -> None:
    # 10 steps, 12 to go: at least two double steps are needed. Always-large takes 6 calls, the optimum 2.
    found = demonstrations(world(), row(12), "hard", Synthesis(sweep=10, keep=1), SEEDS)
    assert len(found) == 1 and found[0].driven.columns[CORRECT] == 1.0
    cost = found[0].driven.columns[COST]
    assert 2 * 0.1 + 8 * 0.01 <= cost < 6 * 0.1 and 0 < found[0].p_large < 1
    several = demonstrations(world(), row(12), "hard", Synthesis(sweep=10, keep=3), SEEDS)
    costs = [d.driven.columns[COST] for d in several]
    assert costs == sorted(costs) and costs[0] == cost and len(several) == 3


def test_hard_without_a_success_is_left_out_and_always_large_is_the_fallback() -> None:
    assert demonstrations(world(), row(21), "hard", Synthesis(), SEEDS) == []
    [only] = demonstrations(world(), row(20), "hard", Synthesis(sweep=2), SEEDS)  # every step must be double
    assert only.p_large == 1.0 and [name for name, _ in only.driven.decisions] == ["large"] * 10


def test_easy_and_intractable_are_always_small() -> None:
    [easy] = demonstrations(world(), row(5), "easy", Synthesis(), SEEDS)
    assert {name for name, _ in easy.driven.decisions} == {"small"} and easy.driven.columns[CORRECT] == 1.0
    assert demonstrations(world(), row(11), "easy", Synthesis(), SEEDS) == []  # no success to show
    [lost] = demonstrations(world(), row(99), "intractable", Synthesis(), SEEDS)
    assert {name for name, _ in lost.driven.decisions} == {"small"} and lost.driven.columns[CORRECT] == 0.0


def some(count: int, difficulty: str, p_large: float = 0.0) -> list[Demonstration]:
    [one] = demonstrations(world(), row(3), "easy", Synthesis(), SEEDS[:1])
    return [Demonstration(one.row, one.driven, difficulty, p_large) for _ in range(count)]  # type: ignore[arg-type]


def test_balance_by_class_by_share_and_not_at_all() -> None:
    found = some(6, "easy") + some(2, "hard", 0.3) + some(40, "intractable")

    def counts(how: Synthesis, key: str) -> dict[Any, int]:
        chosen = [getattr(d, key) for d in balance(found, how, random.Random(0))]
        return {value: chosen.count(value) for value in sorted(set(chosen))}

    # At most a fifth of all is Intractable before balancing: 8 others, so 2.
    assert counts(Synthesis(strata="none"), "difficulty") == {"easy": 6, "hard": 2, "intractable": 2}
    assert counts(Synthesis(strata="class"), "difficulty") == {"easy": 6, "hard": 6, "intractable": 6}
    assert counts(Synthesis(strata="p_large"), "p_large") == {0.0: 8, 0.3: 8}
    assert balance([], Synthesis(), random.Random(0)) == []


def test_the_dataset_reads_back_and_holds_no_tokens(tmp_path: Path) -> None:
    from datasets import load_dataset

    found = demonstrations(world(), row(12), "hard", Synthesis(), SEEDS)
    write_dataset(found, tmp_path / "d", ["small", "large"])
    read = load_dataset(str(tmp_path / "d"), split="train", cache_dir=str(tmp_path / "cache"))
    assert [d["executor"] for d in read[0]["decisions"]] == [name for name, _ in found[0].driven.decisions]
    assert read[0]["cost_usd"] == found[0].driven.columns[COST] and read[0]["difficulty"] == "hard"
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

    from srpo.warmstart import imitate

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
        after = core.weights(imitate(start, core.tokenizer(), list(rows), args))
        return {name: after[name] - before[name] for name in before}

    both, one, other = step(long, short), step(long), step(short)
    assert core.distance(both, {n: (one[n] + other[n]) / 2 for n in one}) < 1e-6
    assert max(v.abs().max() for v in both.values()) > 1e-4
    with pytest.raises(ValueError, match="row 1"):
        imitate(core.model(), core.tokenizer(), [long, {"input_ids": [3], "labels": [-100]}], None)
