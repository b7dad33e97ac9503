"""The tensors an objective reads and the numbers it returns.

An objective is a pure function ``loss(batch: TokenBatch, cfg: LossConfig) -> LossOutput``. Symbols, with shapes:

    B   completions in this micro-batch on this rank          T   padded completion length
    M   mask [B,T]: 1 = token that the policy sampled and that is trained on, 0 = padding or text of others
    z   distilled [B]: True = this completion is distilled (z^S of eq. 4.1), False = it is rewarded (z^G)

How partial results add up. One optimiser step is many micro-batches on many ranks. Every `Counts` field is the amount
over the *whole* step and all ranks, divided by the number of ranks. Then

    objective of the step = mean over ranks ( sum over micro-batches ( loss ) )

which is what distributed data parallel (mean of gradients) and plain accumulation (sum of gradients) compute, and
the result does not depend on how the step was cut into micro-batches. **Metrics add up in the same way.**

This file is also the one owner of masks and denominators:

    token mean      L = sum_{i,t} M_it x_it / N                                        (eq. 4.3)
    sequence mean   L = 1/B sum_i ( 1/max(|y_i|,1) sum_t M_it x_it )                   (section 3.5, compatibility)

    x [B,T] per-token loss     |y_i| = sum_t M_it     N, B: counts of the whole optimiser step

Source: P-SRPO section 3.3 (joint denominator), P-SDPO eq. 13 (token mean); the sequence mean is what the released
SDPO code and TRL's SDPOTrainer optimise. Products and sums are in the order of TRL's `dapo` and `grpo` losses, so that
equal inputs give equal bits. Differs from the paper: N counts the step, never one micro-batch (the released code
averages inside micro-batches).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .branches import Branch


@dataclass(frozen=True, eq=False)
class Counts:
    """Denominators: 0-d tensors, each the amount over the whole optimiser step and all ranks / number of ranks.

    `per_step` makes them from all-reduced totals in TRL's order of operations.
    """

    tokens: Tensor  # trained tokens, sum of M (TRL's `num_items_in_batch`)
    distilled_tokens: Tensor  # trained tokens of distilled completions, |Omega|
    sequences: Tensor  # completions, distilled or not, also those whose tokens are all masked


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """One micro-batch. Only `logp` and `divergence` carry gradient; the other tensors are constants."""

    logp: Tensor  # [B,T] log pi_theta(y_t), nats, at the sampling temperature
    old_logp: Tensor  # [B,T] log pi_old(y_t); pass `logp.detach()` on the first step of a generation batch
    mask: Tensor  # [B,T] M, bool / int / float of 0 and 1
    advantages: Tensor  # [B] A_i, or [B,T]
    distilled: Tensor  # [B] bool, z^S
    divergence: (
        Tensor | None
    )  # [B,T] D(student, teacher) before any clip, 0 where not distilled; None = Omega is empty
    weights: Tensor  # [B,T] w of eq. 4.2, 0 outside Omega (ones on Omega switch the weighting off)
    counts: Counts
    sampler_ratio: Tensor | None = None  # [B,T] or [B,1]: w^TIS, truncated pi_old / pi_sampler; None = 1
    ref_logp: Tensor | None = None  # [B,T] log pi_ref(y_t), needed when LossConfig.beta > 0
    sampler_logp: Tensor | None = (
        None  # [B,T] log mu_old(y_t) of the sampling engine, NaN where unknown; None = old_logp
    )

    def __post_init__(self) -> None:
        if self.divergence is None and bool((self.mask.bool() & self.distilled.unsqueeze(1)).any()):
            raise ValueError("trained tokens are to be distilled but there is no divergence for them")


@dataclass(frozen=True)
class LossConfig:
    """Constants of the per-token losses. Defaults are the paper's (SRPO Table 3; epsilon_low from the SDPO code)."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    delta: float | None = None  # cap of the ratio before the min (two-sided clip); None = off
    level: str = "token"  # or "sequence": of the importance ratio of the GRPO branch
    beta: float = 0.0  # coefficient of the KL penalty to the reference policy
    correct_kl: bool = False  # weigh that penalty by the importance ratio (TRL's use_bias_correction_kl)
    is_clip: float | None = 2.0  # cap of the detached ratio that multiplies the divergence; None = ratio off
    aggregation: str = "token"  # or "sequence_mean"
    cap: float = 5.0  # minirl: largest weight pi_theta/mu_old
    length: int = 1  # minirl: the fixed length of a response, max_completion_length

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence"):
            raise ValueError(f"level must be 'token' or 'sequence', got {self.level!r}")
        if self.aggregation not in ("token", "sequence_mean"):
            raise ValueError(f"aggregation must be 'token' or 'sequence_mean', got {self.aggregation!r}")
        if self.is_clip is not None and self.is_clip <= 0:
            raise ValueError(f"is_clip must be positive or None, got {self.is_clip}")


@dataclass(frozen=True, eq=False)
class LossOutput:
    """`loss`: 0-d, with gradient. `metrics`: detached 0-d tensors that add up over micro-batches as the loss does.

    `tokens`: numbers of tokens, which are logged as shares of all trained tokens of the step over all ranks.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    tokens: dict[str, Tensor] = field(default_factory=dict)


TRL_LOSS_ONLY = {
    "loss_type": "dapo",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
}
"""Settings of TRL's that act inside its own loss function, with the values that do nothing."""


@dataclass(frozen=True)
class Objective:
    """All that the trainer, the configuration and the model card know of an objective."""

    paper: str
    loss: Callable[[TokenBatch, LossConfig], LossOutput] | None = None
    """None: TRL's own loss, with all its loss types."""
    branch: Branch | None = None
    """Which completions are distilled. With a rule TRL's own loss evaluates, where there is no teacher; None: nothing
    is ever distilled, and `loss` evaluates too."""
    distils: Callable[[Any], bool] = lambda args: False
    """Whether a run with these settings has a teacher."""
    rewards_others: bool = True
    """Whether a completion that is not distilled follows its reward."""
    teacher_weights: bool = False
    """Whether a distilled token weighs by the teacher's entropy (eq. 4.2) instead of 1."""
    credit: Callable[..., Tensor] | None = None
    """Advantages in place of TRL's: `srpo.objectives.advantages.reference_guided`."""
    sampler_logps: bool = False
    """Whether the loss reads the sampler's own log-probs."""
    needs: tuple[tuple[Mapping[str, Any], str], ...] = ()
    """(settings with the only values that mean something, why not another)."""

    def check(self, args: Any) -> None:
        """Raise ValueError for a setting that this objective would silently ignore, or that changes its meaning."""
        for settings, why in self.needs:
            for name, value in settings.items():
                if getattr(args, name) != value:
                    raise ValueError(f"{name}={getattr(args, name)!r}{why.format(value=value, args=args)}")


OWN_LOSS = (
    TRL_LOSS_ONLY,
    " acts inside TRL's own loss and has no meaning for objective: {args.objective}; leave it at {value!r} or use "
    "objective: grpo",
)


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
