"""The tensors an objective reads and the numbers it returns.

An objective is a pure function ``loss(batch: TokenBatch, cfg: LossConfig) -> LossOutput``. Symbols, with shapes:

    B   completions in this micro-batch on this rank          T   padded completion length
    M   mask [B,T]: 1 = token that the policy sampled and that is trained on, 0 = padding or text of others
    z   routed [B]: True = this completion is distilled (z^S of eq. 4.1), False = it is rewarded (z^G)

How partial results add up. One optimiser step is many micro-batches on many ranks. Every `Counts` field is the amount
over the *whole* step and all ranks, divided by the number of ranks. Then

    objective of the step = mean over ranks ( sum over micro-batches ( loss ) )

which is what distributed data parallel (mean of gradients) and plain accumulation (sum of gradients) compute, and
the result does not depend on how the step was cut into micro-batches. **Metrics add up in the same way.**
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Counts:
    """Denominators: 0-d tensors, each the amount over the whole optimiser step and all ranks / number of ranks.

    `srpo.objectives.normaliser.per_step` makes them from all-reduced totals in TRL's order of operations.
    """

    tokens: Tensor  # trained tokens, sum of M (TRL's `num_items_in_batch`)
    distilled_tokens: Tensor  # trained tokens of routed completions, |Omega|
    sequences: Tensor  # completions, routed or not, also those whose tokens are all masked


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """One micro-batch. Only `logp` and `divergence` carry gradient; the other tensors are constants."""

    logp: Tensor  # [B,T] log pi_theta(y_t), nats, at the sampling temperature
    old_logp: Tensor  # [B,T] log pi_old(y_t); pass `logp.detach()` on the first step of a generation batch
    mask: Tensor  # [B,T] M, bool / int / float of 0 and 1
    advantages: Tensor  # [B] A_i, or [B,T]
    routed: Tensor  # [B] bool, z^S
    divergence: Tensor | None  # [B,T] D(student, teacher) before any clip, 0 where not routed; None = Omega is empty
    weights: Tensor  # [B,T] w of eq. 4.2, 0 outside Omega (ones on Omega switch the weighting off)
    counts: Counts
    sampler_ratio: Tensor | None = None  # [B,T] or [B,1]: w^TIS, truncated pi_old / pi_sampler; None = 1
    ref_logp: Tensor | None = None  # [B,T] log pi_ref(y_t), needed when LossConfig.beta > 0

    def __post_init__(self) -> None:
        if self.divergence is None and bool((self.mask.bool() & self.routed.unsqueeze(1)).any()):
            raise ValueError("trained tokens are routed to the teacher but there is no divergence for them")


@dataclass(frozen=True)
class LossConfig:
    """Constants of the per-token losses. Defaults are the paper's (SRPO Table 3; epsilon_low from the SDPO code)."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    delta: float | None = None  # cap of the ratio before the min (two-sided clip); None = off
    level: Literal["token", "sequence"] = "token"  # of the importance ratio of the GRPO branch
    beta: float = 0.0  # coefficient of the KL penalty to the reference policy
    correct_kl: bool = False  # weigh that penalty by the importance ratio (TRL's use_bias_correction_kl)
    is_clip: float | None = 2.0  # cap of the detached ratio that multiplies the divergence; None = ratio off
    aggregation: Literal["token", "sequence_mean"] = "token"

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence"):
            raise ValueError(f"level must be 'token' or 'sequence', got {self.level!r}")
        if self.aggregation not in ("token", "sequence_mean"):
            raise ValueError(f"aggregation must be 'token' or 'sequence_mean', got {self.aggregation!r}")
        if self.is_clip is not None and self.is_clip <= 0:
            raise ValueError(f"is_clip must be positive or None, got {self.is_clip}")


@dataclass(frozen=True, eq=False)
class LossOutput:
    """`loss`: 0-d, with gradient. `metrics`: detached 0-d tensors that add up over micro-batches as the loss does."""

    loss: Tensor
    metrics: dict[str, Tensor]
