"""Four updates with R3 on two processes: torchrun --nproc_per_node 2 support/replay_sharded_cases.py FOLDER KIND.

KIND is ddp, zero3 or fsdp2. Writes what each rank's spy saw and what was logged.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [*(str(TESTS / folder) for folder in ("support", "srpo", "routers")), str(TESTS.parent)]

ZERO3 = {
    "zero_optimization": {"stage": 3},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
}
FSDP2 = {
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3MoeDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def settings(kind: str) -> dict[str, Any]:
    if kind == "fsdp2":
        import torch
        from accelerate.state import DistributedType, PartialState

        torch.distributed.init_process_group("gloo")
        os.environ.update(FSDP2)
        # accelerate ignores FSDP where it finds no accelerator; on gloo everything else of it works.
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    if kind == "zero3":
        import deepspeed

        deepspeed.init_distributed("gloo")
        return {"deepspeed": ZERO3}
    return {}


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    extra = settings(kind)
    from core_helpers import logged
    from replay_cases import Spy, agreement, made

    run = made(
        folder / kind,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        routing_replay_metrics_steps=3,  # the first and the last of the four updates
        optim="adamw_torch",
        learning_rate=1e-2,
        loss_type="minirl",
        seed=1,  # its first samples of a group differ in reward, so that there is a gradient
        **extra,
    )
    assert run.accelerator.num_processes == 2
    spy = Spy(run)
    run.train()
    counts = []
    for update, policy in enumerate(spy.seen["policy"]):
        counts.append(agreement(spy.seen["rollout"][update // 2], policy))
    names = ("grad_norm", "loss", "reward", "router/flip_rate", "router/fallback_fraction", "sampling/kl_k3")
    record = {
        "engine": f"{run.accelerator.distributed_type.value} {type(run.model_wrapped).__name__}",
        "sharded": [type(p).__name__ + str(list(getattr(p, "ds_shape", p.shape))) for p in run.model.parameters()][:1],
        "counts": counts,
        "again": len(spy.layers["again"]),
        **{name: logged(run, name) for name in names},
    }
    (folder / f"{kind}_{os.environ['RANK']}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
