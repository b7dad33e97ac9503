"""Objectives as pure functions on tensors: one file each, equation first. No trainer, no model, no TRL in here."""

from __future__ import annotations

from collections.abc import Callable

from . import bopo, sdpo, srpo
from .batch import Counts, LossConfig, LossOutput, TokenBatch
from .branches import route
from .divergence import Head, hidden_divergence, sampled_token_divergence, topk_divergence
from .weights import entropy_weights

# `grpo` is TRL's own loss (all its loss types). A new objective is one file and one line here, and one line in
# `routing.ROUTES`.
OBJECTIVES: dict[str, Callable[[TokenBatch, LossConfig], LossOutput]] = {
    "sdpo": sdpo.loss,
    "srpo": srpo.loss,
    "bopo": bopo.loss,
}

__all__ = [
    "OBJECTIVES",
    "Counts",
    "Head",
    "LossConfig",
    "LossOutput",
    "TokenBatch",
    "entropy_weights",
    "hidden_divergence",
    "route",
    "sampled_token_divergence",
    "topk_divergence",
]
