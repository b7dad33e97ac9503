"""GRPO's per-token loss, the reward branch of SRPO.

    rho_it = exp( log pi_theta(y_t) - log pi_old(y_t) )
    l^G_it = - min( rho A_i , clip(rho, 1 - eps_low, 1 + eps_high) A_i )                               (eq. 2.2)
    k3_it  = exp(log pi_ref - log pi_theta) - (log pi_ref - log pi_theta) - 1

    logp, old_logp, ref_logp, l^G, k3 [B,T]     A [B] (or [B,T])     level "sequence": one rho per row, the geometric
    mean of the token ratios over the row's trained tokens (GSPO)
    delta  cap of rho in the first term of the min only (two-sided clip)

The objective `grpo` itself is TRL's own `_compute_loss`, so every TRL loss type stays available; nothing here is used
for it. `token_loss` equals TRL's `dapo`/`grpo` surrogate bit for bit (same operations in the same order), so that SRPO
with nothing routed is exactly TRL's `dapo`.

Source: P-SDPO eq. 13, P-SRPO section 2.1, spec section 2. Differs from the papers' code: the log-ratio is not clamped
to +-20 (TRL does not, and its bits are the contract); the advantage comes in ready-made (no division by the standard
deviation unless the trainer did it); `delta` is TRL's two-sided clip (delta = 3: the dual clip of the papers' code).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Objective
from .names import OBJECTIVE_NAMES

OBJECTIVE = Objective(OBJECTIVE_NAMES["grpo"])


def ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """Importance ratio rho: [B,T] for level "token", [B,1] for level "sequence"."""
    log_ratio = logp - old_logp
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    return torch.exp(log_ratio)


def token_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
    level: str = "token",
) -> Tensor:
    """l^G, unmasked: [B,T], or [B,1] at level "sequence" with `advantages` [B]. `mask` is read only at that level."""
    rho = ratio(logp, old_logp, mask, level)
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    clipped = torch.clamp(rho, 1 - epsilon_low, 1 + epsilon_high)
    if delta is not None:
        rho = torch.clamp(rho, max=delta)
    return -torch.min(rho * advantages, clipped * advantages)


def clipped_tokens(
    rho: Tensor, advantages: Tensor, *, epsilon_low: float, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """Where the clip cuts the gradient, bool (low, high): rho below its band with A < 0, above it with A > 0."""
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    return (rho < 1 - epsilon_low) & (advantages < 0), (rho > 1 + epsilon_high) & (advantages > 0)


def kl_penalty(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 [B,T] >= 0: per-token estimate of KL(pi_theta || pi_ref)."""
    return torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
