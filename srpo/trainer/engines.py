"""Whole weights in and out of engines that keep them in parts (ZeRO-3, FSDP).

What a run saves can be loaded by whoever knows transformers and peft. Left to themselves, FSDP with
`SHARDED_STATE_DICT` writes no weights beside its checkpoints at all, and ZeRO-3 without
`stage3_gather_16bit_weights_on_model_save` writes its own partitions in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from srpo.hub.files import LOADED
from srpo.run.whole import MANIFEST, SAVING, seal


def gather_when_saving(args: Any) -> None:
    """Before engines exist: ZeRO-3 gathers its weights when they are saved, whatever its file says."""
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


@contextmanager
def saved_whole(accelerator: Any) -> Iterator[None]:
    """Inside, FSDP saves whole weights; its checkpoints of optimiser and weights may still be sharded."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None) if accelerator.distributed_type == "FSDP" else None
    if plugin is None or "FULL_STATE_DICT" in str(plugin.state_dict_type):
        yield
        return
    from torch.distributed.fsdp import StateDictType

    found, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = found


@contextmanager
def sealed(folder: str, writes: bool) -> Iterator[None]:
    """Around what writes a policy: its files are then listed in a manifest; in a checkpoint, with all else there."""
    place = Path(folder)
    writes = writes and SAVING not in place.parts
    if writes:
        (place / MANIFEST).unlink(missing_ok=True)
    yield
    if writes:
        seal(place, only=LOADED)


@torch.no_grad()
def load_whole(model: torch.nn.Module, values: dict[str, Any]) -> None:
    """Load a whole state dict into a model that ZeRO-3 or FSDP2 may have sharded; all ranks call it."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if sharded:
        import deepspeed

        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0):
            for name, parameter in model.named_parameters():
                parameter.data.copy_(values[name])
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True))


def save_whole(values: Mapping[str, torch.Tensor], path: Path, accelerator: Any) -> None:
    """Write a whole state dict that every rank has; only the main one writes."""
    if accelerator.is_main_process:
        # Tied weights share memory, which safetensors refuses: every tensor is written on its own.
        save_file({name: value.detach().clone().contiguous() for name, value in values.items()}, path)
