"""Scored rollouts in a checkpoint that falls inside a generation batch: one safetensors file, no pickle.

    batches = [{"completion_ids": Tensor, "teacher_hidden": [Tensor, None, ...], ...}, ...]

Tensors are stored under their path in the structure; the structure itself, with everything that is not a tensor, is
JSON in the file's metadata.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_TENSOR = "tensor"


def save_nested(value: Any, path: Path) -> None:
    """Write nested dicts (with text keys) and lists of tensors, numbers, texts and None; TypeError for others."""
    tensors: dict[str, Tensor] = {}
    layout = json.dumps(_pack(value, "", tensors))
    save_file(tensors, path, metadata={"layout": layout})


def load_nested(path: Path, device: torch.device | str = "cpu") -> Any:
    """What `save_nested` wrote, bit for bit, with its tensors on `device`."""
    with safe_open(path, framework="pt") as file:
        return _unpack(json.loads(file.metadata()["layout"]), file, device)


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().clone().contiguous()  # slices of one batch share their memory
        return {_TENSOR: path}
    if isinstance(value, dict):
        return {"dict": {key: _pack(item, f"{path}/{key}", tensors) for key, item in value.items()}}
    if isinstance(value, list):
        return [_pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _unpack(layout: Any, file: Any, device: torch.device | str) -> Any:
    if isinstance(layout, list):
        return [_unpack(item, file, device) for item in layout]
    if not isinstance(layout, dict):
        return layout
    if _TENSOR in layout:
        return file.get_tensor(layout[_TENSOR]).to(device)
    return {key: _unpack(item, file, device) for key, item in layout["dict"].items()}
