"""The one owner of masks and denominators.

    token mean      L = sum_{i,t} M_it x_it / N                                        (eq. 4.3)
    sequence mean   L = 1/B sum_i ( 1/max(|y_i|,1) sum_t M_it x_it )                   (section 3.5, compatibility)

    x [B,T] per-token loss     M [B,T] mask     |y_i| = sum_t M_it     N, B: counts of the whole optimiser step

Source: P-SRPO section 3.3 (joint denominator), P-SDPO eq. 13 (token mean); the sequence mean is what the released
SDPO code and TRL's SDPOTrainer optimise. Products and sums are in the order of TRL's `dapo` and `grpo` losses, so that
equal inputs give equal bits. Differs from the paper: N counts the step, never one micro-batch, so the result does
not depend on the split (the released code averages inside micro-batches).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .batch import Counts, LossConfig


def per_step(total: Tensor, *, ranks: int, accumulation: int = 1, steps_per_generation: int = 1) -> Tensor:
    """Denominator of one optimiser step from `total`, the 0-d amount over the generation batch and all ranks.

    A generation batch may feed several optimiser steps; each gets `accumulation / steps_per_generation` of it, as in
    TRL. In evaluation leave both at 1.
    """
    return total.clamp(min=1.0) / ranks * accumulation / steps_per_generation


def token_mean(x: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Masked sum of x [B,T] over `count` (0-d) -> 0-d. A count of zero (nothing to train on) divides by one."""
    # Not clamp(min=1): a share of a small step per rank may be a fraction, and TRL divides by that fraction.
    return (x * mask).sum() / torch.where(count > 0, count, torch.ones_like(count))


def sequence_mean(x: Tensor, mask: Tensor, sequences: Tensor) -> Tensor:
    """Sum over rows of the masked row mean of x [B,T], over `sequences` (0-d) -> 0-d. Empty rows contribute 0."""
    rows = (x * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
    return rows.sum() / torch.where(sequences > 0, sequences, torch.ones_like(sequences))


def reducer(mask: Tensor, count: Tensor, counts: Counts, cfg: LossConfig) -> Callable[[Tensor], Tensor]:
    """The mean that `cfg.aggregation` names, as a function of x [B,T]; `count` is the token mean's denominator."""
    if cfg.aggregation == "sequence_mean":
        return lambda x: sequence_mean(x, mask, counts.sequences)
    return lambda x: token_mean(x, mask, count)
