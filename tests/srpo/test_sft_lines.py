"""Rows of a batch in short lines (`padding_free` without flash attention): the step of padded rows, for less work."""

from pathlib import Path
from typing import Any

import core_helpers as core
import torch
from datasets import Dataset
from trl import SFTConfig

from srpo.sft import _Lines, _LinesSFT, sft

LENGTHS = (9, 2, 5, 3, 9, 4, 6)


def rows() -> list[dict[str, list[int]]]:
    made = []
    for number, length in enumerate(LENGTHS):
        ids = [20 + (7 * number + place) % 40 for place in range(length)]
        made.append({"input_ids": ids, "labels": ids[:1] + [-100] * (length - 2) + ids[-1:]})  # the first is no target
    return made


def test_lines_are_full_and_no_longer_than_the_longest_row() -> None:
    batch = _Lines(0).torch_call(rows())
    assert batch["input_ids"].shape == (5, 9) and batch["tokens"] == sum(LENGTHS)
    places, ids = batch["position_ids"].flatten().tolist(), batch["input_ids"].flatten().tolist()
    found = [ids[at : at + length] for length in LENGTHS for at in range(len(ids)) if places[at] == 0]
    assert all(row["input_ids"] in found for row in rows())
    assert (batch["labels"] != -100).sum() == len(LENGTHS) and batch["labels"][:, 0].unique().tolist() == [-100]


def arguments(folder: Path, **more: Any) -> SFTConfig:
    how: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": len(LENGTHS), "learning_rate": 1e-2}
    how |= {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none"}
    how |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "gradient_checkpointing": False}
    how |= {"max_length": None, "disable_tqdm": True, "logging_steps": 1}
    return SFTConfig(str(folder), **how, **more)


def test_one_step_is_that_of_padded_rows(tmp_path: Path) -> None:
    def step(padding_free: bool) -> dict[str, torch.Tensor]:
        network, args = core.model(), arguments(tmp_path, padding_free=padding_free)
        before = core.weights(network)
        after = core.weights(sft(network, core.tokenizer(), rows(), args))
        assert args.padding_free is padding_free
        return {name: after[name] - before[name] for name in before}

    lines, padded = step(True), step(False)
    assert core.distance(lines, padded) < 1e-6 and max(v.abs().max() for v in padded.values()) > 1e-4


def test_every_token_is_counted(tmp_path: Path) -> None:
    made = _LinesSFT(
        core.model(), arguments(tmp_path), _Lines(0), Dataset.from_list(rows()), processing_class=core.tokenizer()
    )
    made.train()
    assert core.logged(made, "num_tokens") == [sum(LENGTHS)]
