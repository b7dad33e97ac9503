"""Runs in which one number of one rank at one step is none; by torchrun all of them: bad_number_cases.py FOLDER.

`on_engine`: a loss, a gradient and a parameter of the second process alone, on an engine, in one of two forks.
"""

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
from core_helpers import config, dataset, digest, equal, scripted, trainer
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


def local(value: Any) -> torch.Tensor:
    """What lies on this process: of ZeRO-3's parameters, and of FSDP2's, a part."""
    value = torch.as_tensor(getattr(value, "ds_tensor", value)).detach()
    return value.to_local() if hasattr(value, "to_local") else value


def everything(made: Any) -> dict[str, torch.Tensor]:
    """What a step moves, by name, on this process."""
    found = {f"model/{name}": value for name, value in made.model.named_parameters()}
    found |= {f"teacher/{name}": value for name, value in made.teacher.model.named_parameters()}
    optimizer, masters = made.optimizer, ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
        for name in masters:  # of DeepSpeed
            found |= {f"optimizer/{name}/{i}": value for i, value in enumerate(getattr(optimizer, name, ()))}
    for i, slots in enumerate(optimizer.state.values()):
        found |= {f"optimizer/{i}/{name}": value for name, value in slots.items()}
    return {name: local(value).clone() for name, value in found.items()}


class Exploding(torch.autograd.Function):
    """A finite loss with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


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
            for parameter in self.made.model.parameters():
                local(parameter).view(-1)[:1] = math.nan


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
        found = compute(model, inputs)
        if kind == "gradient" and due():
            found = Exploding.apply(found)
        last = made._step % accumulation == accumulation - 1
        return found * (math.nan if kind == "loss" and due() and last else 1.0)

    def scored(inputs: Any) -> Any:
        batch = generate(inputs)
        if kind == "log-prob" and made.state.global_step + 1 in everywhere:
            batch["old_per_token_logps"] = torch.zeros_like(batch["completion_mask"], dtype=torch.float32)
            if due():
                batch["old_per_token_logps"][batch["completion_mask"].argmax(dim=0).max()] = -math.inf
        return batch

    made._compute_loss, made._generate_and_score_completions = loss, scored
    states = States(made)
    made.add_callback(states)
    if kind == "parameter":
        made.add_callback(Broken(made, at))
    made.train()
    return made, states.found


def on_engine(folder: Path, engine: str, rank: int, port: int) -> None:
    from sharded_weights_cases import engine_settings

    global RANK
    RANK = rank
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
    settings = engine_settings(engine)
    if engine.startswith("zero"):
        settings["deepspeed"]["gradient_clipping"] = "auto"
    records = {}
    quick = {"log_completions": False, "save_strategy": "steps", "save_steps": 1, **settings}
    for kind in ("loss", "gradient"):
        made, states = run(folder / kind, kind, 2, {2}, 1, processes=2, **{**quick, "max_steps": 3})
        saved = [str(path) for path in (folder / kind).glob("checkpoint-*/manifest.json")]
        records[kind] = {
            "kept": [equal(a, b) for a, b in pairwise(states)],
            "moved": sorted({name.split("/")[0] for name in states[2] if not states[1][name].equal(states[2][name])}),
            "finite": all(bool(value.isfinite().all()) for value in states[-1].values()),
            "cause": made.bad_steps.last,
            "logged": [(log.get("bad_steps"), log["loss"]) for log in made.state.log_history if "loss" in log],
            "saved": len(saved),
            "wrapped": type(made.model_wrapped).__name__,
        }
    try:
        run(folder / "parameter", "parameter", 1, {2}, 1, processes=2, **{**quick, "max_steps": 6, "save_steps": 2})
    except BadNumbers as error:
        saved = [str(path) for path in (folder / "parameter").rglob("*.safetensors")]
        records["parameter"] = {"error": str(error), "saved": saved}
    (folder / f"rank{RANK}.json").write_text(json.dumps(records))


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
