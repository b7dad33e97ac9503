"""Two steps of each case on two processes: torchrun --nproc_per_node 2 support/micro_batch_cases.py FOLDER.

Each rank writes which groups it sampled, every micro-batch it trained on, and a digest of its last weights. Of a
micro-batch: its groups, its width in columns, and the tokens of its runs of siblings, of the longest and where each is
packed behind one prompt.
"""

import json
import os
import sys
from itertools import groupby
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


SHARED = ("auto", "off")  # whether siblings share their prompt decides what is long


def run(folder: Path, case: str, shared: str) -> dict[str, Any]:
    group, size, accumulation = CASES[case]
    args = config(
        folder / f"{case} {shared}".replace(" ", "_"),
        objective="srpo",
        num_generations=group,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        shared_prefix=shared,
    )
    made = trainer(args, train_dataset=dataset(40))
    assert made.accelerator.num_processes == 2
    parts: list[Any] = []
    prepare, score = made._prepare_inputs, made._generate_and_score_completions
    sampled: set[int] = set()

    def names(batch: Any) -> list[int]:
        both = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        return [digest(ids[mask.bool()].tolist()) for ids, mask in both]

    def scored(rows: Any) -> Any:
        batch = score(rows)
        sampled.update(names(batch))
        return batch

    def watched(batch: Any) -> Any:
        part = prepare(batch)
        prompts = names(part)
        lengths = list(zip(*(part[f"{of}_mask"].sum(dim=1).tolist() for of in ("prompt", "completion")), strict=True))
        runs = [list(rows) for _, rows in groupby(range(len(prompts)), key=prompts.__getitem__)]
        packed = [lengths[rows[0]][0] + sum(lengths[row][1] for row in rows) for rows in runs]
        plain = [lengths[rows[0]][0] + max(lengths[row][1] for row in rows) for rows in runs]
        parts.append((prompts, part["prompt_ids"].size(1) + part["completion_ids"].size(1), plain, packed))
        return part

    made._prepare_inputs, made._generate_and_score_completions = watched, scored
    made.train()
    total = torch.cat([value.flatten() for value in weights(made.model).values()])
    trained = {"parts": parts, "weights": digest(total.tolist()), "steps": made.state.global_step}
    return {**trained, "sampled": sorted(sampled)}


def main() -> None:
    found = {shared: {case: run(Path(sys.argv[1]), case, shared) for case in CASES} for shared in SHARED}
    (Path(sys.argv[1]) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
