"""Which completions are distilled from the self-teacher (eq. 4.1), and what each of their tokens weighs (eq. 4.2).

    z^S_i = (1 - c_i) m_i       z^G_i = 1 - z^S_i                                                          (eq. 4.1)
    w~_it = exp(-beta H_it)     w_it = w~_it / Z     Z = 1/|Omega| sum_{Omega} w~                            (eq. 4.2)

    c [B] bool: completion i is correct      m [B] bool: teacher information exists for i (another correct completion
    of the same prompt, and/or feedback)     H [B,T] teacher entropy, nats, over the vocabulary, of a decision over its
    choices (srpo.teacher.masked_decisions)  Omega [B,T] trained tokens of distilled completions

The four cases of SRPO (P-SRPO Table 7):

    correct   available                                        branch
    yes       yes                                              GRPO   (the teacher is not run)
    yes       no    (the only correct one of its group)        GRPO
    no        yes                                              SDPO
    no        no    (the whole group is wrong)                 GRPO   (fallback; A = 0 with binary rewards)

SDPO (P-SDPO section 3, spec section 3.5) distils whatever has teacher information, correct or not: z^S = m; its other
completions contribute nothing. Differs from the paper: none.

The mean of w over Omega is 1, whatever beta and the entropies are, and the scale of the loss is kept; w is a constant
for the gradient. Computed relative to the least entropy m of Omega, w~ / e^(-beta m), since w~ itself may be smaller
than any number: one token of Omega then has e^0, so that Z neither vanishes nor overflows.
Source: P-SRPO section 3.2, beta = 1. Differs: the paper leaves open over what Omega ranges; here it is the generation
batch over all ranks (`gather`), never a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Branch = Callable[[Tensor, Tensor], Tensor]
"""(correct [B] bool, available [B] bool) -> z^S [B] bool."""


def whoever_is_told(correct: Tensor, available: Tensor) -> Tensor:
    """z^S = m, of SDPO."""
    return available.clone()


def failed_and_told(correct: Tensor, available: Tensor) -> Tensor:
    """z^S = (1 - c) m, of SRPO."""
    return ~correct & available


def distilled_by(branch: Branch, correct: Tensor, available: Tensor) -> Tensor:
    """z^S [B] bool of a rule; TypeError unless both [B] are bool."""
    if correct.dtype != torch.bool or available.dtype != torch.bool:
        raise TypeError(f"correct and available must be bool, got {correct.dtype} and {available.dtype}")
    return branch(correct, available)


def local_only(stats: Tensor) -> Tensor:
    """The gathering of a single process: the identity."""
    return stats


def entropy_weights(
    entropy: Tensor, omega_mask: Tensor, beta: float, gather: Callable[[Tensor], Tensor] = local_only
) -> Tensor:
    """w [B,T] of eq. 4.2: 0 outside Omega; exactly 1 on Omega when beta is 0; all zero when Omega is empty.

    `entropy` [B,T] may hold anything outside Omega. `gather` joins the rows [1,3] (least entropy, sum of w~ relative
    to it, |Omega|) of all ranks to [ranks,3]; it is called exactly once whatever the masks are, so that collectives
    stay in step.
    """
    omega = omega_mask.bool()
    entropy = entropy.detach() if entropy.dtype == torch.float64 else entropy.detach().float()
    own = entropy.masked_fill(~omega, torch.inf)
    least = own.amin() if own.numel() else own.new_full((), torch.inf)  # infinite where this rank has no token
    total = _relative(own, least, beta, omega).sum()
    rows = gather(torch.stack([least, total, omega.sum().to(total)]).unsqueeze(0))
    lows, totals, counts = rows.unbind(dim=1)
    present = counts > 0
    if not present.any():
        return torch.zeros_like(own)
    least = lows.amin()
    normaliser = (_relative(lows, least, beta, present) * totals).sum() / counts.sum()
    return _relative(own, least, beta, omega) / normaliser


def _relative(entropy: Tensor, least: Tensor, beta: float, where: Tensor) -> Tensor:
    """e^(-beta (H - m)) where `where` holds, else 0; at most 1."""
    return torch.exp(-beta * (entropy - least).masked_fill(~where, 0.0)).masked_fill(~where, 0.0)
