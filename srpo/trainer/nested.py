"""Nested dicts and lists of tensors as a file, or as bytes between ranks: safetensors, no pickle."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

_TENSOR = "tensor"
_LAYOUT = "layout"


def save_nested(value: Any, path: Path) -> None:
    """Write nested dicts (with text keys) and lists of tensors, numbers, texts and None; TypeError for others."""
    tensors: dict[str, Tensor] = {}
    layout = json.dumps(_pack(value, "", tensors))
    save_file(tensors, path, metadata={_LAYOUT: layout})


def load_nested(path: Path, device: torch.device | str = "cpu") -> Any:
    """What `save_nested` wrote, bit for bit, with its tensors on `device`."""
    with safe_open(path, framework="pt") as file:
        return _unpack(json.loads(file.metadata()[_LAYOUT]), lambda name: file.get_tensor(name).to(device))


def nested_bytes(value: Any) -> bytes:
    """The same of a dict, as bytes: its tensors have names that begin with a slash, the layout has not."""
    tensors: dict[str, Tensor] = {}
    layout = json.dumps(_pack(value, "", tensors)).encode()
    return save({**tensors, _LAYOUT: torch.frombuffer(bytearray(layout), dtype=torch.uint8)})


def nested_of(data: bytes) -> Any:
    """What `nested_bytes` made, bit for bit, with its tensors on the CPU."""
    tensors = load(data)
    return _unpack(json.loads(bytes(tensors.pop(_LAYOUT).tolist())), tensors.__getitem__)


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().clone().contiguous()  # slices of one batch share their memory
        return {_TENSOR: path}
    if isinstance(value, dict):
        return {"dict": {key: _pack(item, f"{path}/{key}", tensors) for key, item in value.items()}}
    if isinstance(value, list):
        return [_pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _unpack(layout: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(layout, list):
        return [_unpack(item, tensor) for item in layout]
    if not isinstance(layout, dict):
        return layout
    if _TENSOR in layout:
        return tensor(layout[_TENSOR])
    return {key: _unpack(item, tensor) for key, item in layout["dict"].items()}
