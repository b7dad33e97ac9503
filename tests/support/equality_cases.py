"""Gradients of every objective, however a step is cut over processes and micro-batches.

python support/equality_cases.py FOLDER [OBJECTIVE:KIND...]      all groups of processes are forked from this one

Every cell is two steps of SGD over real samples of the policy's own sampler (and, with replay, its own routes), whose
gradients are kept as each optimiser step finds them.
"""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [*(str(TESTS / folder) for folder in ("support", "srpo", "routers")), str(TESTS.parent)]

import torch
from core_helpers import config, dataset, digest, model, tokenizer, trainer
from forked import group
from peft import LoraConfig
from replay_cases import moe
from safetensors.torch import save_file
from transformers import TrainerCallback

BOPO = {"objective": "bopo", "distill_failed": True, "advantage_scale": "group", "advantage_baseline": "refmean"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"objective": "grpo", "beta": 0.05},
    "sdpo": {"objective": "sdpo"},
    "srpo": {"objective": "srpo"},
    "srpo_lora": {"objective": "srpo", "lora": True},
    "bopo": BOPO,
    "minirl": {"objective": "grpo", "loss_type": "minirl", "routing_replay": "R3"},
}
KINDS = {
    "mixed": list(OBJECTIVES),
    # What the second half of the ranks has.
    "no tokens": list(OBJECTIVES),
    "no routed rows": ["sdpo", "srpo", "bopo"],
    # Five groups: one, at least, lies on several ranks.
    "straddling": ["grpo", "srpo", "minirl"],
}
CELLS = [(objective, kind) for kind, objectives in KINDS.items() for objective in objectives]
CUTS = ((1, 16, 1), (1, 4, 4), (2, 4, 2), (4, 4, 1))
"""Processes, rows of a micro-batch, micro-batches of a step. The first is what all are compared with."""
TORN = ((1, 20, 1), (2, 2, 5), (4, 5, 1))
HALF = 8


def cuts(kind: str) -> tuple[tuple[int, int, int], ...]:
    return TORN if kind == "straddling" else CUTS


def name(objective: str, kind: str, cut: tuple[int, int, int]) -> str:
    return f"{objective}-{kind}-{'x'.join(map(str, cut))}".replace(" ", "_")


def reward(completion_ids: list[list[int]], first_half: list[bool], **_: Any) -> list[float]:
    return [float(mine and digest(ids) % 3 == 0) for ids, mine in zip(completion_ids, first_half, strict=True)]


class Gradients(TrainerCallback):
    """Of each step, before it is made."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for parameter, value in model.named_parameters():
            if value.grad is not None:
                self.found[f"{state.global_step}/{parameter}"] = value.grad.detach().clone().contiguous()


def run(folder: Path, objective: str, kind: str, cut: tuple[int, int, int]) -> None:
    processes, rows, accumulation = cut
    settings = dict(OBJECTIVES[objective])
    lora, replay = settings.pop("lora", False), "routing_replay" in settings
    network = moe() if replay else model()
    end = tokenizer().eos_token_id
    network.generation_config.eos_token_id = [end, *range(145, len(tokenizer()))]  # half of the tokens end a sample
    args = config(
        folder / "runs" / name(objective, kind, cut),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        log_completions=False,
        mask_truncated_completions=kind == "no tokens",
        **settings,
    )
    rank = int(os.environ.get("RANK", 0))

    def second(row: int) -> bool:
        return rank * rows * accumulation + row >= HALF

    def world(_rows: Any, texts: Any) -> dict[str, list[Any]]:
        return {"first_half": [kind != "no routed rows" or not second(i) for i in range(len(texts))]}

    torch.manual_seed(0)
    peft = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None
    data = dataset(40).add_column("references", [[0.0, 0.5 * (i % 3)] for i in range(40)])
    gradients = Gradients()
    made = trainer(
        args, network, reward, rollout_func=None, train_dataset=data, world=world, peft_config=peft,
        callbacks=[gradients],
    )  # fmt: skip
    assert made.accelerator.num_processes == processes, "this is not the number of processes that was asked for"
    if kind == "no tokens":
        whole, letter = made.sampler.completions, tokenizer()("a", add_special_tokens=False)["input_ids"][0]

        def ended(*given: Any) -> Any:  # those of the second half, all of them, by a limit
            found = whole(*given)
            return [replace(s, ids=(*s.ids[:-1], letter if second(i) else end)) for i, s in enumerate(found)]

        made.sampler.completions = ended
    made.train()
    stem = str(folder / f"{name(objective, kind, cut)}-{rank}")
    save_file(gradients.found, f"{stem}.st")
    numbers = [{k: v for k, v in entry.items() if isinstance(v, float)} for entry in made.state.log_history[:2]]
    Path(f"{stem}.json").write_text(json.dumps(numbers))


def work(folder: Path, processes: int, cells: list[tuple[str, str]]) -> None:
    for objective, kind in cells:
        for cut in cuts(kind):
            if cut[0] == processes:
                run(folder, objective, kind, cut)
                gc.freeze()


def main(folder: str, *words: str) -> None:
    cells = [cell for cell in CELLS if not words or ":".join(cell) in words]
    assert len(cells) == (len(words) or len(CELLS)), words
    for processes in (1, 2, 4):
        group(processes, work, Path(folder), processes, cells, log=Path(folder) / f"log{processes}")


if __name__ == "__main__":
    main(*sys.argv[1:])
