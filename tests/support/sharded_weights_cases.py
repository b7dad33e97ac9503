"""Policies of several kinds on an engine: torchrun --nproc_per_node 2 support/sharded_weights_cases.py FOLDER ENGINE.

Two steps with a checkpoint after the second, then a third in a run that resumes from it. Completions depend on
(prompt, place in the group) only, so that one process takes the same steps.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [*(str(TESTS / folder) for folder in ("support", "srpo", "routers")), str(TESTS.parent)]

ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
POLICIES: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {},
    "whole_head": {"modules_to_save": ["lm_head"]},
}
STEPS = 3


def policies_of(engine: str) -> list[str]:
    """A head that is the embeddings too cannot be trained as a copy where weights are sharded: that is refused."""
    return [name for name in POLICIES if name != "whole_head" or engine in ("ddp", "zero2")]


def engine_settings(engine: str) -> dict[str, Any]:
    if engine == "fsdp2":
        from replay_sharded_cases import settings

        settings("fsdp2")
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "Qwen3DecoderLayer"
        os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"  # accelerate's own default
    if engine.startswith("zero"):
        import deepspeed
        from distributed_cases import ZERO3

        deepspeed.init_distributed("gloo")
        own = {name: value for name, value in ZERO3.items() if name != "optimizer"}
        return {"deepspeed": {**own, "zero_optimization": {"stage": int(engine[-1])}}}
    return {}


def ids() -> Any:
    import torch

    return torch.arange(5, 25).reshape(2, 10)


def trained(folder: Path, policy: str, kind: str, processes: int, engine: dict[str, Any], resume: bool = False) -> Any:
    """A trainer after two steps, or after the third, and on every rank the logits of its policy."""
    import torch
    from core_helpers import config, dataset, trainer
    from distributed_cases import reward
    from peft import LoraConfig

    options = POLICIES[policy]
    if options is not None:
        options = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False, **options}
    args = config(
        folder / policy,
        per_device_train_batch_size=16 // processes,
        max_steps=STEPS if resume else STEPS - 1,
        learning_rate=1.0,
        optim_args="momentum=0.5",  # a state that resuming needs; torch's FSDP2 cannot load an optimiser without one
        teacher_model_kind=kind,
        save_strategy="steps",
        save_steps=STEPS - 1,
        beta=0.05 if policy != "full" else 0.0,
        **engine,
    )
    torch.manual_seed(0)  # adapters begin with random weights
    peft_config = None if options is None else LoraConfig(**options)
    made = trainer(args, rewards=reward, train_dataset=dataset(48), peft_config=peft_config)
    assert made.accelerator.num_processes == processes
    made.train(resume_from_checkpoint=str(folder / policy / f"checkpoint-{STEPS - 1}") if resume else None)
    network = made.model_wrapped
    network.eval()  # DeepSpeed's returns nothing
    with torch.no_grad():
        logits = network(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits
    return made, logits


def main() -> None:
    from safetensors.torch import save_file

    folder, engine, policies = Path(sys.argv[1]), sys.argv[2], sys.argv[3:] or policies_of(sys.argv[2])
    settings = engine_settings(engine)
    for policy in policies:
        for resume in (False, True):
            made, logits = trained(folder, policy, "ema", 2, settings, resume)
            name = f"{policy}_{'resumed' if resume else 'straight'}"
            made.save_model(str(folder / name))
            made.teacher.save(str(folder))  # as in a checkpoint
            if os.environ["RANK"] == "0":
                (folder / "teacher.safetensors").rename(folder / f"{name}_teacher.st")
                save_file({"logits": logits.contiguous()}, folder / f"{name}_logits.st")
                wrapped = f"{made.accelerator.distributed_type.value} {type(made.model_wrapped).__name__}"
                record = {"engine": wrapped, "log": [e for e in made.state.log_history if "loss" in e]}
                (folder / f"{name}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
