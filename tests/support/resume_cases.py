"""Runs of eight steps, and the same taken up from a checkpoint: python support/resume_cases.py FOLDER PART [CELL...]

PART is `straight` or `resumed`: two interpreters, in each of which every cell is a process of its own.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [*(str(TESTS / folder) for folder in ("support", "srpo", "routers")), str(TESTS.parent)]

import torch
from core_helpers import config, dataset, digest, model, tokenizer, trainer, weights
from forked import begin, several
from peft import LoraConfig
from safetensors.torch import save_file
from scripted import Scripted
from think_route_cases import CATALOGUE
from transformers import TrainerCallback

from routers.language.actions import Tags
from routers.language.grammar import Action
from routers.pool import Ledger, Pool, ReplyCache
from routers.tasks.think_route.environment import ThinkRoute
from srpo.types import Observation

OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"objective": "grpo", "beta": 0.05},
    "sdpo": {"objective": "sdpo"},
    "srpo": {"objective": "srpo"},
    "bopo": {"objective": "bopo", "distill_failed": True, "advantage_scale": "group", "advantage_baseline": "refmean"},
}
# A generation batch is eight completions of two prompts; twice as many where it feeds two steps.
POINTS: dict[str, dict[str, Any]] = {
    "middle": {"rows": 24, "at": 4},
    "epoch end": {"rows": 8, "at": 4},
    "inside batch": {"rows": 24, "at": 3, "steps_per_generation": 2},
    "inside accumulation": {"rows": 24, "at": 3, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
}
# TRL's loss may cut a generation batch of three micro-steps into steps of two and, at an epoch's end, of one.
TORN = {"rows": 6, "at": 3, "steps_per_generation": 3, "gradient_accumulation_steps": 2}
POLICIES: dict[str, dict[str, Any]] = {"full": {}, "lora": {}}
OTHERS: dict[str, dict[str, Any]] = {
    "shared": {"shared_prefix": "on"},
    "live": {"teacher_model_kind": "live", "distillation_mode": "sampled_token", "distillation_alpha": 1.0},
    "trust": {"teacher_model_kind": "trust_region"},
    "iterations": {"num_iterations": 2},
}
CELLS = ["-".join(cell) for cell in product(OBJECTIVES, POINTS, POLICIES, ("world", "environment"))]
FEW = [
    "grpo-inside accumulation-full-world",
    "bopo-epoch end-lora-environment",
    "srpo-inside batch-full-environment",
    "srpo-middle-shared-world",
    "srpo-inside batch-live-world",
    "srpo-inside batch-trust-world",
    "grpo-inside batch-iterations-world",
]
STEPS = 8


class Digested(Tags):
    """What an untrained policy writes, as actions: it asks once, and then answers."""

    def parse(self, text: str, *, first: bool) -> Action:
        if first:
            return Action("route", ("small", "large")[digest(text) % 2], "", query=text)
        return Action("answer", None, "", answer=("yes", "no")[digest(text) % 2])

    def reply(self, text: str, reasoning: str = "") -> Observation:
        return Observation(text, before="<|im_end|>\n", after="<|im_start|>assistant\n")


def environment(cache: Path) -> ThinkRoute:
    backends = {name: Scripted(lambda query: f"{digest(query) % 100}", cached_as=name) for name in CATALOGUE}
    pool = Pool(CATALOGUE, backends, ledger=Ledger(), cache=ReplyCache(cache))
    return ThinkRoute(pool, Digested([*CATALOGUE.values()], tokenizer()), count_tokens=len)


class KeepCache(TrainerCallback):
    """The replies that were there at the checkpoint, for the run that is taken up."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def on_save(self, args: Any, run: Any, control: Any, **kwargs: Any) -> None:
        shutil.copytree(self.cache, f"{self.cache}_{run.global_step}")


def played_reward(answer: list[Any], cost: list[float], **_: Any) -> list[float]:
    return [float(a == "yes") - 500 * usd for a, usd in zip(answer, cost, strict=True)]


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 3 > 0) for ids in completion_ids]


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


def run(folder: Path, cell: str, resume: bool) -> None:
    objective, where, policy, world = cell.split("-")
    point = TORN if (objective, where) == ("grpo", "inside accumulation") else POINTS[where]
    settings = {**point, **OBJECTIVES[objective], **(POLICIES | OTHERS)[policy]}
    at, rows, lora, plays = settings.pop("at"), settings.pop("rows"), policy == "lora", world == "environment"
    folder = folder / cell.replace(" ", "_")
    network = model()  # half of the tokens end an answer
    network.generation_config.eos_token_id = [tokenizer().eos_token_id, *range(145, len(tokenizer()))]
    length = {"max_completion_length": 60, "max_turn_tokens": 6} if plays else {}
    args = config(
        folder,
        per_device_train_batch_size=8,
        max_steps=STEPS,
        optim="adamw_torch",
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        log_completions=False,
        save_strategy="steps",
        save_steps=at,
        success_reward_threshold=0.5,
        **length,
        **settings,
    )
    torch.manual_seed(0)
    peft = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if lora else None
    data = dataset(rows)
    data = data.add_column("references", [[0.0, 0.5 * (i % 3)] for i in range(len(data))])
    data = data.add_column("query", [f"question {i}" for i in range(len(data))])
    how: dict[str, Any] = {"world": lambda rows, texts: {"cost": [0.01 * (digest(text) % 5) for text in texts]}}
    if plays:
        cache = folder / (f"cache_{at}" if resume else "cache")
        how = {"environment": environment(cache), "callbacks": [KeepCache(cache)]}
    made = trainer(
        args, network, played_reward if plays else reward, rollout_func=None, train_dataset=data, peft_config=peft,
        **how,
    )  # fmt: skip
    made.train(resume_from_checkpoint=str(folder / f"checkpoint-{at}") if resume else None)
    found = state(made)
    if plays:
        ledger = made.environment.pool.ledger.state_dict()
        sums = {**ledger["run"], "spent": ledger["spent"]}
        del sums["seconds"]  # of waiting
        # Calls of a batch end in any order, and with them the last bit of a sum of money.
        found |= {f"ledger/{name}": torch.tensor(round(value, 12)) for name, value in sums.items()}
    save_file(found, f"{folder}-{'resumed' if resume else 'straight'}.st")


def main(folder: str, part: str, *cells: str) -> list[str]:
    def jobs() -> Iterator[Any]:
        for cell in cells or CELLS:
            log = Path(folder) / f"{cell}-{part}.log".replace(" ", "_")
            yield partial(begin, 1, run, Path(folder), cell, part == "resumed", log=log)

    return several(jobs())


if __name__ == "__main__":
    if wrong := main(*sys.argv[1:]):
        sys.exit("\n\n".join(wrong))
