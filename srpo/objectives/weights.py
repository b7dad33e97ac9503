"""Entropy-aware token weights of the distillation branch.

    w~_it = exp(-beta H_it)        w_it = w~_it / Z        Z = 1/|Omega| sum_{Omega} w~        (eq. 4.2)

    H [B,T] teacher entropy, nats, over the vocabulary, of a decision over its choices (srpo.choices)
    Omega [B,T] trained tokens of routed completions

so that the mean of w over Omega is 1 and the scale of the loss is kept. w is a constant for the gradient.
Source: P-SRPO section 3.2, beta = 1. Differs: the paper leaves open over what Omega ranges; here it is the generation
batch over all ranks (`reduce`), never a micro-batch. Z is clamped at 1e-8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def local_only(stats: Tensor) -> Tensor:
    """The reduction of a single process: the identity."""
    return stats


def entropy_weights(
    entropy: Tensor, omega_mask: Tensor, beta: float, reduce: Callable[[Tensor], Tensor] = local_only
) -> Tensor:
    """w [B,T] of eq. 4.2: 0 outside Omega; exactly 1 on Omega when beta is 0; all zero when Omega is empty.

    `entropy` [B,T] may hold anything outside Omega. `reduce` sums the 1-d tensor [sum of w~, |Omega|] over all ranks;
    it is called exactly once whatever the masks are, so that collectives stay in step.
    """
    omega = omega_mask.bool()
    entropy = entropy.detach() if entropy.dtype == torch.float64 else entropy.detach().float()
    raw = torch.where(omega, torch.exp(-beta * entropy), 0.0)
    stats = reduce(torch.stack([raw.sum(), omega.sum().to(raw.dtype)]))
    return raw / (stats[0] / stats[1].clamp(min=1.0)).clamp(min=1e-8)
