"""Replay on sharded weights: torchrun --nproc_per_node 2 support/replay_two_processes.py FILE. Rank 0 writes results.

Each rank replays its own routes on its own tokens with gradient checkpointing. Reported per case: whether a spy saw
these ids in forward and re-forward, and the relative error of the gates' gradient against one unsharded process.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [*(str(TESTS / folder) for folder in ("support", "srpo", "routers")), str(TESTS.parent)]

import torch
import torch.distributed as dist
from moe_families import TOP_K, build, right_aligned, sampled, spy
from test_replay import PROMPTS, SHAPE, gate, random_routes
from test_replay_wrapped import loss
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from srpo.replay.replay import RoutingReplay

CHECKPOINTING = {"use_reentrant": False}


def expected() -> list[Tensor]:
    """Gradient of each layer's gate, averaged over the ranks' batches, in one process without checkpointing."""
    model = build("qwen3_moe").train()
    replay = RoutingReplay(model)
    for rank in (0, 1):
        with replay.replay(random_routes(seed=rank)):
            (loss(model, rank) / 2).backward()
    return [gate(model, layer).grad for layer in (0, 1)]


def sees_the_routes(model: Any, replay: RoutingReplay, forward: Any, backward: Any) -> bool:
    routes = random_routes(seed=dist.get_rank())
    with spy(model) as seen, replay.replay(routes):
        backward(loss(forward, dist.get_rank()))
    first, again = seen[:2], seen[:1:-1]  # layers 0, 1 and, in backward, 1, 0
    exact = [torch.equal(torch.stack(one, 1).view(*SHAPE, 2, TOP_K), routes.long()) for one in (first, again)]
    everyone = [None, None]
    dist.all_gather_object(everyone, all(exact) and len(seen) == 4)
    return all(everyone)


def fsdp2(hooks_first: bool) -> tuple[bool, list[Tensor]]:
    model = build("qwen3_moe").train()
    model.gradient_checkpointing_enable(CHECKPOINTING)
    replay = RoutingReplay(model) if hooks_first else None
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    replay = replay or RoutingReplay(model)
    exact = sees_the_routes(model, replay, model, Tensor.backward)
    return exact, [gate(model, layer).grad.full_tensor() for layer in (0, 1)]


def zero3() -> tuple[bool, list[Tensor], bool]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = build("qwen3_moe").train()
    zero = {"zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = zero | {"train_micro_batch_size_per_gpu": 1}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    model.gradient_checkpointing_enable(CHECKPOINTING)
    assert gate(model, 0).numel() == 0, "sharded weights have no shape to read the number of experts from"
    replay = RoutingReplay(model)
    exact = sees_the_routes(model, replay, engine, engine.backward)
    gradients = [safe_get_full_grad(layer.mlp.gate.weight) for layer in model.model.layers]

    model.eval()  # the ranks end at different lengths; the earlier one goes on so that the other can gather weights

    def any_busy(busy: bool) -> bool:
        dist.all_reduce(flag := torch.tensor(float(busy)), op=dist.ReduceOp.MAX)
        return bool(flag)

    sequences, routes, *_ = sampled(model, replay, PROMPTS, 4 + 3 * dist.get_rank(), any_busy=any_busy)
    ids, mask = right_aligned(sequences)
    with torch.no_grad(), replay.record_once():
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    recorded = [row[real.bool()] for row, real in zip(replay.recorded(), mask, strict=True)]
    same = all(torch.equal(a[:-1], b[:-1]) for a, b in zip(routes, recorded, strict=True))
    everyone = [None, None]
    dist.all_gather_object(everyone, same)
    return exact, gradients, all(everyone)


def main() -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    truth, results = expected(), {}
    for name, run in (("fsdp2", lambda: fsdp2(False)), ("fsdp2_hooks_first", lambda: fsdp2(True)), ("zero3", zero3)):
        exact, gradients, *sampling = run()
        errors = [((g - t).norm() / t.norm()).item() for g, t in zip(gradients, truth, strict=True)]
        results[name] = {"exact": exact, "error": max(errors), "sampling": all(sampling)}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
