"""Runs in which one number of one rank at one step is none; by torchrun all of them: bad_number_cases.py FOLDER."""

import json
import math
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [*(str(TESTS / folder) for folder in ("support", "srpo", "routers")), str(TESTS.parent)]

import torch
from core_helpers import config, dataset, digest, equal, scripted, trainer, weights
from transformers import TrainerCallback

from srpo.trainer.bad_numbers import BadNumbers

KINDS = ("loss", "gradient", "reward", "log-prob")
RANK = int(os.environ.get("RANK", "0"))


class Injected:
    """A reward function that returns a NaN for row 1 of the batches of the steps `at`."""

    def __init__(self, kind: str, at: set[int]) -> None:
        self.at, self.calls, self.__name__ = at if kind == "reward" else set(), 0, "injected"

    def __call__(self, completion_ids: Any, **_: Any) -> list[float]:
        self.calls += 1
        rewards = [float(digest(ids) % 3 == 0) for ids in completion_ids]
        if self.calls in self.at or 0 in self.at:
            rewards[1] = math.nan
        return rewards


def everything(made: Any) -> dict[str, torch.Tensor]:
    """What a step moves, by name."""
    found = {f"model/{name}": value for name, value in weights(made.model).items()}
    found |= {f"teacher/{name}": value for name, value in weights(made.teacher.model).items()}
    for i, slots in made.optimizer.state_dict()["state"].items():
        found |= {f"optimizer/{i}/{name}": torch.as_tensor(value).clone() for name, value in slots.items()}
    return found


class States(TrainerCallback):
    def __init__(self, made: Any) -> None:
        self.made, self.found = made, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.found.append(everything(self.made))


class Broken(TrainerCallback):
    """A parameter becomes NaN before the steps `at`."""

    def __init__(self, made: Any, at: set[int]) -> None:
        self.made, self.at = made, at

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 in self.at:
            self.made.accelerator.unwrap_model(self.made.model).model.norm.weight.data[0] = math.nan


def run(
    folder: Path, kind: str, accumulation: int, at: set[int], rank: int = RANK, processes: int = 1, **changes: Any
) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A trained trainer, and everything after each step; `rank` alone has the bad number, in its last micro-batch."""
    everywhere, at = at, at if rank == RANK else set()
    args = config(
        folder,
        **{
            "objective": "srpo",
            "per_device_train_batch_size": 16 // accumulation // processes,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 4,
            "optim": "adamw_torch",
            "max_grad_norm": 1.0,
            "learning_rate": 1e-2,
            **changes,
        },
    )
    made = trainer(args, rewards=Injected(kind, at), rollout_func=scripted, train_dataset=dataset(40))
    compute, generate = made._compute_loss, made._generate_and_score_completions

    def due() -> bool:
        return made.state.global_step + 1 in at

    def loss(model: Any, inputs: Any) -> Any:
        last = made._step % accumulation == accumulation - 1
        return compute(model, inputs) * (math.nan if kind == "loss" and due() and last else 1.0)

    def scored(inputs: Any) -> Any:
        batch = generate(inputs)
        if kind == "log-prob" and made.state.global_step + 1 in everywhere:
            batch["old_per_token_logps"] = torch.zeros_like(batch["completion_mask"], dtype=torch.float32)
            if due():
                batch["old_per_token_logps"][batch["completion_mask"].argmax(dim=0).max()] = -math.inf
        return batch

    made._compute_loss, made._generate_and_score_completions = loss, scored
    if kind == "gradient":
        first = next(made.model.parameters())
        first.register_hook(lambda gradient: gradient * (math.inf if due() else 1.0))
    states = States(made)
    made.add_callback(states)
    if kind == "parameter":
        made.add_callback(Broken(made, at))
    made.train()
    return made, states.found


def main() -> None:
    folder = Path(sys.argv[1])
    records = {}
    for kind in KINDS:
        for rank in (0, 1):
            for accumulation in (1, 2):
                case = f"{kind}/rank{rank}/{accumulation}"
                quick = {"max_steps": 3, "log_completions": False}
                made, states = run(folder / case, kind, accumulation, {2}, rank, processes=2, **quick)
                assert made.accelerator.num_processes == 2
                made.accelerator.wait_for_everyone()
                records[case] = {
                    "kept": [equal(a, b) for a, b in pairwise(states)],
                    "end": [float(value.double().sum()) for value in states[-1].values()],
                    "cause": made.bad_steps.last,
                    "files": [f"rank{path.stem[-1]}" for path in sorted((folder / case / "bad_steps").iterdir())],
                }
    for rank in (0, 1):
        for accumulation in (1, 2):
            case = f"parameter/rank{rank}/{accumulation}"
            try:
                quick = {"max_steps": 6, "log_completions": False}
                run(folder / case, "parameter", accumulation, {2}, rank, processes=2, **quick)
            except BadNumbers as error:
                saved = [str(path) for path in (folder / case).rglob("*.safetensors")]
                records[case] = {"error": str(error), "saved": saved}
    (folder / f"rank{RANK}.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main()
