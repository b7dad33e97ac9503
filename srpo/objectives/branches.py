"""Which completions are distilled from the self-teacher, which follow their reward (eq. 4.1).

    z^S_i = (1 - c_i) m_i       z^G_i = 1 - z^S_i

    c [B] bool: completion i is correct      m [B] bool: teacher information exists for i (another correct completion
    of the same prompt, and/or feedback)

The four cases of SRPO (P-SRPO Table 7):

    correct   available                                        branch
    yes       yes                                              GRPO   (the teacher is not run)
    yes       no    (the only correct one of its group)        GRPO
    no        yes                                              SDPO
    no        no    (the whole group is wrong)                 GRPO   (fallback; A = 0 with binary rewards)

SDPO (P-SDPO section 3, spec section 3.5) distils whatever has teacher information, correct or not: z^S = m; its other
completions contribute nothing. GRPO distils nothing. BoPO routes as SRPO does where the settings ask for it. Differs
from the paper: none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROUTES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": lambda correct, available: torch.zeros_like(available),
    "sdpo": lambda correct, available: available.clone(),
    "srpo": lambda correct, available: ~correct & available,
    "bopo": lambda correct, available: ~correct & available,
}


def route(objective: str, correct: Tensor, available: Tensor) -> Tensor:
    """z^S [B] bool for the named objective, from `correct` [B] bool and `available` [B] bool."""
    if objective not in ROUTES:
        raise ValueError(f"unknown objective {objective!r}; known: {', '.join(ROUTES)}")
    if correct.dtype != torch.bool or available.dtype != torch.bool:
        raise TypeError(f"correct and available must be bool, got {correct.dtype} and {available.dtype}")
    return ROUTES[objective](correct, available)
