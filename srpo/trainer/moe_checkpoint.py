"""Weights of a mixture of experts out of a checkpoint folder.

transformers 5 trains all experts of a layer as one tensor and saves them one by one, under the names of the Hub. Its
Trainer loads a checkpoint with `load_state_dict(strict=False)`, which knows nothing of that: the experts stay as they
are, with a warning only (seen with 5.23 on Qwen3-MoE). `from_pretrained` does know.
"""

import json
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def load_renamed_weights(model: PreTrainedModel, folder: str) -> None:
    """Load all of `folder` into `model` if it holds names that are not the model's; else it was loaded already.

    Does nothing for folders without whole safetensors weights (adapters, FSDP, DeepSpeed).
    """
    if saved_names(Path(folder)) - model.state_dict().keys():
        fresh = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(fresh.state_dict())


def saved_names(folder: Path) -> set[str]:
    """Names of the tensors in a folder's `model.safetensors`, in one piece or several; empty if it has none."""
    if (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        return set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).exists():
        return set()
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return set(file.keys())
