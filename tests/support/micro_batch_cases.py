"""Two steps of each case on two processes: torchrun --nproc_per_node 2 support/micro_batch_cases.py FOLDER.

Each rank writes the groups and widths of every micro-batch it trained on, and a digest of its last weights.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [*(str(TESTS / folder) for folder in ("support", "srpo", "routers")), str(TESTS.parent)]

import torch
from core_helpers import config, dataset, digest, trainer, weights

CASES: dict[str, tuple[int, int, int]] = {  # completions of a group, rows of a micro-batch, micro-batches of a step
    "two in one of four": (2, 4, 2),
    "eight, and the second on both ranks": (8, 4, 3),
    "four in micro-batches of six": (4, 6, 2),
}


def run(folder: Path, case: str) -> dict[str, Any]:
    group, size, accumulation = CASES[case]
    args = config(
        folder / case.replace(" ", "_"),
        objective="srpo",
        num_generations=group,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
    )
    made = trainer(args, train_dataset=dataset(40))
    assert made.accelerator.num_processes == 2
    parts: list[Any] = []
    prepare = made._prepare_inputs

    def watched(batch: Any) -> Any:
        part = prepare(batch)
        prompts = [digest(i[m.bool()].tolist()) for i, m in zip(part["prompt_ids"], part["prompt_mask"], strict=True)]
        parts.append((prompts, part["prompt_ids"].size(1) + part["completion_ids"].size(1)))
        return part

    made._prepare_inputs = watched
    made.train()
    total = torch.cat([value.flatten() for value in weights(made.model).values()])
    return {"parts": parts, "weights": digest(total.tolist()), "steps": made.state.global_step}


def main() -> None:
    found = {case: run(Path(sys.argv[1]), case) for case in CASES}
    (Path(sys.argv[1]) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
