"""In which precision weights are kept and trained: fp32, except where DeepSpeed keeps fp32 copies itself.

Adam moves a weight by about the learning rate. bf16 keeps 8 bits of a weight, so 5e-6 is less than half a step for
every weight above 0.0013: nearly all updates are rounded away, and the run learns nothing while loss and gradient
look healthy. So `bf16: true` means computing in bf16 (autocast), over fp32 weights.

    one process, DDP    fp32 weights, autocast
    FSDP2               fp32 shards, gathered and computed with in bf16 (its mixed-precision policy)
    DeepSpeed           bf16 weights; the engine keeps and updates fp32 copies
    PEFT                what is frozen may be in bf16; what trains is fp32 as above
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


def engine_keeps_masters(args: TrainingArguments) -> bool:
    """Whether low-precision weights may be given to the engine because it updates fp32 copies of them."""
    return args.deepspeed_plugin is not None and bool(args.bf16 or args.fp16)


def check_precision(args: TrainingArguments) -> None:
    """ValueError for settings that would train or leave behind weights that are rounded, or no numbers."""
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"{name}: true rounds the policy's own weights for an evaluation before training, and leaves them so; "
                f"{name.removesuffix('_full_eval')}: true evaluates in that precision over fp32 weights"
            )
    if args.deepspeed_plugin is not None:
        settings = args.deepspeed_plugin.deepspeed_config
        for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
            if settings.get("bf16", {}).get(name):
                raise ValueError(
                    f"the DeepSpeed file sets bf16.{name}: small updates are then rounded away; remove that line, so "
                    "that DeepSpeed keeps fp32 copies of the weights"
                )
        for part, name in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
            if settings.get(part, {}).get(name) is False:
                raise ValueError(
                    f"the DeepSpeed file sets {part}.{name}: false: a NaN in one gradient would then become the "
                    "weights; remove that line, so that such a step is left out"
                )


def loading_options(options: dict[str, Any] | None, args: TrainingArguments, adapter: bool = False) -> dict[str, Any]:
    """`model_init_kwargs` for a policy that is given by its name: `dtype` is set where it was left open.

    A `dtype` that was chosen stays for what is frozen; `train_in_fp32` sees to the rest.
    """
    options = dict(options or {})
    if "dtype" not in options and "torch_dtype" not in options:
        low = args.bf16 and (adapter or engine_keeps_masters(args))
        options["dtype"] = "bfloat16" if low else "float32"
    return options


def train_in_fp32(model: nn.Module, args: TrainingArguments) -> None:
    """Casts what trains to fp32, in place, unless the engine keeps fp32 copies; says so once where that changed it.

    Raises:
        ValueError: nothing trains.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            "the policy has no weight that trains: load an adapter with is_trainable=True, or give the model unfrozen"
        )
    if engine_keeps_masters(args):
        if is_peft_model(model):  # ZeRO-3 gathers layers whole, which must be of one precision
            for p in trained.values():
                p.data = p.data.to(torch.bfloat16 if args.bf16 else torch.float16)
        return
    low = {name: p for name, p in trained.items() if p.is_floating_point() and p.itemsize < 4}
    if not low:
        return
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in low.values()})
    logger.warning(
        f"{len(low)} of {len(trained)} trained tensors are in {', '.join(kinds)}, where small updates would be lost: "
        "they are kept in float32 instead (bf16: true still computes in bfloat16, and DeepSpeed keeps float32 copies)"
    )
    if getattr(model, "is_quantized", False) or _all_in_adapter_layers(model, low):
        for p in low.values():
            p.data = p.data.float()
    else:  # outside of autocast, where a policy is evaluated, layers do not take another precision than their own
        model.float()


def _all_in_adapter_layers(model: nn.Module, low: dict[str, nn.Parameter]) -> bool:
    """Whether all of these belong to layers of adapters, which convert what they are given."""
    if not is_peft_model(model):
        return False
    inside = {
        id(p)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for name in module.adapter_layer_names
        for p in _parameters_of(module, name)
    }
    return all(id(p) in inside for p in low.values())


def _parameters_of(module: nn.Module, name: str) -> list[nn.Parameter]:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, nn.Parameter):
        return [found]
    return list(found.parameters()) if isinstance(found, nn.Module) else []
