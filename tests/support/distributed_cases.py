"""Two steps of several cases, in one process or by torchrun: python support/distributed_cases.py FOLDER [CASE...].

Completions depend on (prompt, place in the group) only, and a generation batch holds the same rollouts whether one
process takes them all or two take half each, so both world sizes train on the same tokens.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [*(str(TESTS / folder) for folder in ("support", "srpo", "routers")), str(TESTS.parent)]

from core_helpers import config, dataset, digest, distance, equal, scripted, trainer, weights
from peft import LoraConfig
from safetensors.torch import save_file

CASES: dict[str, dict[str, Any]] = {
    "srpo": {"objective": "srpo"},
    "sdpo": {"objective": "sdpo"},
    "sdpo_sequence_mean": {"objective": "sdpo", "distillation_aggregation": "sequence_mean"},
    # 20 rollouts in groups of four: the third group lies on both ranks.
    "straddling": {"objective": "srpo", "rollouts": 20, "demonstration": "random"},
    "feedback": {"objective": "srpo", "include_environment_feedback": True, "gradient_accumulation_steps": 2},
    # Only the groups of the first rank hold a correct rollout: the second has no distilled row.
    "idle_rank": {"objective": "srpo", "idle": True},
    "idle_rank_sdpo": {"objective": "sdpo", "idle": True},
    "lora": {"objective": "srpo", "lora": True},
    "shared_prefix": {"objective": "srpo", "shared_prefix": "on"},
}
SHARDED: dict[str, dict[str, Any]] = {
    "zero3_srpo": {"objective": "srpo"},
    # 20 rollouts: a group lies on both ranks, so that none changes its rank, and the second rank stays idle.
    "zero3_idle_rank": {"objective": "srpo", "idle": True, "rollouts": 20},
    "zero3_shared_prefix": {"objective": "srpo", "idle": True, "shared_prefix": "on"},
    "zero3_idle_rank_trust_region": {
        "objective": "sdpo",
        "idle": True,
        "rollouts": 20,
        "teacher_model_kind": "trust_region",
    },
    "zero3_idle_rank_sampled_token": {
        "objective": "sdpo",
        "idle": True,
        "rollouts": 20,
        "distillation_mode": "sampled_token",
        "distillation_alpha": 1.0,
    },
}
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": 0.0,  # accelerate clips to 1 where this is missing
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
    "zero_allow_untested_optimizer": True,
}
HALF = 8


def rollouts(prompts: list[Any], made: Any) -> dict[str, Any]:
    start = made.accelerator.process_index * len(prompts)
    return {**scripted(prompts, made), "first_half": [start + i < HALF for i in range(len(prompts))]}


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(digest(ids) % 3 == 0) for ids in completion_ids]


def first_half_reward(completion_ids: list[list[int]], first_half: list[bool], **_: Any) -> list[float]:
    return [float(mine and digest(ids) % 3 == 0) for ids, mine in zip(completion_ids, first_half, strict=True)]


def world(_rows: Any, texts: Any) -> dict[str, list[Any]]:
    return {
        "route": [("small", "large", None)[digest(text) % 3] for text in texts],
        "cost": [0.01 * (digest(text) % 5) for text in texts],
        "feedback": ["too short" if digest(text) % 2 else "" for text in texts],
    }


def run(folder: Path, case: str, processes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors after two steps, and what was logged and shown to the teacher."""
    settings = dict((CASES | SHARDED)[case])
    if case in SHARDED and processes > 1:
        import deepspeed

        deepspeed.init_distributed("gloo")
        settings["deepspeed"] = ZERO3
    size, idle, lora = settings.pop("rollouts", 16), settings.pop("idle", False), settings.pop("lora", False)
    accumulation = settings.get("gradient_accumulation_steps", 1)
    args = config(
        folder / f"{case}_{processes}",
        per_device_train_batch_size=size // processes // accumulation,
        max_steps=2,
        learning_rate=1.0,
        **settings,
    )
    made = trainer(
        args,
        rewards=first_half_reward if idle else reward,
        rollout_func=rollouts,
        train_dataset=dataset(40),
        world=world,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None,
    )
    assert made.accelerator.num_processes == processes, "this is not the number of processes that was asked for"
    plans, decide = [], made.distiller.plan

    def spy(*given: Any) -> Any:
        plan = decide(*given)
        plans.append({"distilled": plan.distilled.tolist(), "shown": plan.demonstrations, "notes": plan.feedback})
        return plan

    made.distiller.plan = spy
    start = weights(made.model)
    made.train()
    if case in SHARDED:
        sharded = made.accelerator.distributed_type.value == "DEEPSPEED" and made._dist.is_zero3
        assert sharded == (processes > 1)
        return {}, {"plans": plans, "log": made.state.log_history}
    tensors = {f"model/{name}": value for name, value in weights(made.model).items()}
    if made.teacher.model is not None:
        tensors.update({f"teacher/{name}": value for name, value in weights(made.teacher.model).items()})
    moved = distance(start, weights(made.model))
    return tensors, {"plans": plans, "log": made.state.log_history, "moved": moved}


def resumed_equals_straight(folder: Path, processes: int) -> bool:
    """Four steps against three and one, the checkpoint inside a generation batch, on this rank, bit for bit."""
    ends = []
    for checkpoint in (None, str(folder / "resume" / "checkpoint-3")):
        args = config(
            folder / "resume",
            per_device_train_batch_size=16 // processes,
            max_steps=4,
            steps_per_generation=2,
            optim="adamw_torch",
            save_strategy="steps",
            save_steps=3,
        )
        made = trainer(args, rewards=reward, train_dataset=dataset(40))
        made.train(resume_from_checkpoint=checkpoint)
        assert checkpoint is None or [e["step"] for e in made.state.log_history if "loss" in e] == [1, 2, 3, 4]
        ends.append({**weights(made.model), **{f"teacher/{k}": v for k, v in weights(made.teacher.model).items()}})
    return equal(*ends)


def main() -> None:
    folder = Path(sys.argv[1])
    processes, rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
    for case in sys.argv[2:] or CASES:
        tensors, record = run(folder, case, processes)
        (folder / f"{case}_rank{rank}.json").write_text(json.dumps(record))
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"{case}_rank{rank}.st")
    if sys.argv[2:]:
        return
    (folder / f"resumed_rank{rank}.json").write_text(json.dumps(resumed_equals_straight(folder, processes)))


if __name__ == "__main__":
    main()
