"""Cases of test_resume.py, and the process that resumes them: python support/resume_cases.py FOLDER CASE..."""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [*(str(TESTS / folder) for folder in ("support", "srpo", "routers")), str(TESTS.parent)]

import torch
from core_helpers import config, dataset, logged, model, tokenizer, trainer, weights
from peft import LoraConfig
from safetensors.torch import save_file

STEPS = 8

# Rows per epoch: 16 rows are 4 steps, so a checkpoint at step 4 falls on an epoch's end; 24 rows put it inside the
# first epoch, 12 rows inside the second.
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"objective": "grpo", "rows": 24},
    "sdpo": {"objective": "sdpo", "rows": 16},
    "srpo": {"objective": "srpo", "rows": 12},
    "srpo_lora": {"objective": "srpo", "rows": 12, "lora": True},
    "shared_prefix": {"objective": "srpo", "rows": 12, "shared_prefix": "on"},
    # Two optimiser steps per generation batch: the checkpoint at step 3 falls inside one.
    "inside_batch": {"objective": "srpo", "steps_per_generation": 4, "at": 3},
    "inside_iterations": {"objective": "grpo", "num_iterations": 2, "at": 3},
    "inside_batch_live": {
        "objective": "srpo",
        "steps_per_generation": 4,
        "at": 3,
        "teacher_model_kind": "live",
        "distillation_mode": "sampled_token",
        "distillation_alpha": 1.0,
    },
    "inside_batch_trust_region": {
        "objective": "srpo",
        "steps_per_generation": 4,
        "at": 3,
        "teacher_model_kind": "trust_region",
    },
}


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 3 > 0) for ids in completion_ids]


def made(folder: Path, case: str) -> Any:
    settings = dict(CASES[case])
    at, rows, lora = settings.pop("at", 4), settings.pop("rows", 24), settings.pop("lora", False)
    network = model()  # short answers that end, so that siblings are demonstrations: half of the tokens end one
    network.generation_config.eos_token_id = [tokenizer().eos_token_id, *range(145, len(tokenizer()))]
    args = config(
        folder / case,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        optim="adamw_torch",
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=at,
        **settings,
    )
    peft = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if lora else None
    return trainer(args, network, rewards=reward, rollout_func=None, train_dataset=dataset(rows), peft_config=peft)


def state(run: Any) -> dict[str, torch.Tensor]:
    """Everything that must agree at the end, by name."""
    tensors = {f"model/{name}": value for name, value in weights(run.model).items()}
    for i, slots in run.optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer/{i}/{name}": torch.as_tensor(value) for name, value in slots.items()})
    if run.teacher is not None and run.teacher.model is not None:
        tensors.update({f"teacher/{name}": value for name, value in weights(run.teacher.model).items()})
    if run.teacher is not None and run.teacher.weights is not None:
        tensors.update({f"teacher/{name}": value for name, value in run.teacher.weights.values.items()})
    for name in ("loss", "grad_norm", "reward", "learning_rate", "srpo/distilled_share", "completions/mean_length"):
        steps = {entry["step"]: entry[name] for entry in run.state.log_history if name in entry}
        tensors[f"log/{name}"] = torch.tensor([steps.get(s, -1.0) for s in range(1, STEPS + 1)], dtype=torch.float64)
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


def main() -> None:
    folder = Path(sys.argv[1])
    for case in sys.argv[2:]:
        run = made(folder, case)
        at = CASES[case].get("at", 4)
        run.train(resume_from_checkpoint=str(folder / case / f"checkpoint-{at}"))
        assert logged(run, "loss")
        save_file(state(run), folder / f"{case}.safetensors")


if __name__ == "__main__":
    main()
