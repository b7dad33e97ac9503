"""Objectives as pure functions on tensors: one file each, equation first. No trainer, no model, no TRL in here.

A new objective is one file with a record `OBJECTIVE` (`srpo.objectives.batch.Objective`) and one line in
`srpo.objectives.names`. What needs torch is imported on first use, so that the names can be read without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from srpo.objectives.names import LOSS_TYPES, OBJECTIVE_NAMES

if TYPE_CHECKING:
    from .batch import Counts, LossConfig, LossOutput, Objective, TokenBatch
    from .branches import entropy_weights
    from .divergence import Head, hidden_divergence, sampled_token_divergence, topk_divergence

    OBJECTIVES: dict[str, Objective]

_LAZY = {
    **dict.fromkeys(("Counts", "LossConfig", "LossOutput", "Objective", "TokenBatch"), "batch"),
    **dict.fromkeys(("Head", "hidden_divergence", "sampled_token_divergence", "topk_divergence"), "divergence"),
    "entropy_weights": "branches",
}

__all__ = [
    "OBJECTIVES",
    "Counts",
    "Head",
    "LossConfig",
    "LossOutput",
    "Objective",
    "TokenBatch",
    "entropy_weights",
    "hidden_divergence",
    "objective_of",
    "sampled_token_divergence",
    "topk_divergence",
]


def objective_of(args: Any) -> Objective:
    """The record that `objective:` and `loss_type:` of a configuration name."""
    records: dict[str, Objective] = __getattr__("OBJECTIVES")
    record = records[args.objective]
    return records[args.loss_type] if record.loss is None and args.loss_type in LOSS_TYPES else record


def __getattr__(name: str) -> Any:
    if name == "OBJECTIVES":
        found: Any = {n: import_module(f"{__name__}.{n}").OBJECTIVE for n in (*OBJECTIVE_NAMES, *LOSS_TYPES)}
    elif name in _LAZY:
        found = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found
