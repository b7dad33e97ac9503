"""MiniRL: REINFORCE on the sampler's tokens, with a truncated importance weight and a decoupled clip.

    J   = E[ sum_t  M_t  sg[ pi_theta(y_t) / mu_old(y_t) ]  A  log pi_theta(y_t) ]                          (eq. 7)
    M_t = 0 if (A > 0 and r_t > 1 + eps_high) or (A < 0 and r_t < 1 - eps_low), else 1
    r_t = pi_theta(y_t) / pi_old(y_t)          A = R - mean of the group's R

    L   = - sum_{i,t} m_it M_it min(sg[pi_theta / mu_old], cap) A_i log pi_theta(y_it)  /  (responses * length)

    mu_old   the policy in the *sampling* engine        pi_old   the same weights in the *training* engine
    logp, old_logp, sampler_logp [B,T] nats     A [B] (or [B,T])     m [B,T] mask of trained tokens

The weight corrects both what the engines compute differently and how far the policy has moved,
pi_theta/mu_old = pi_old/mu_old * pi_theta/pi_old (eq. 5); the clip looks at the second factor only. There is no
standard deviation in A and no length of a response in the denominator: `length` is a constant
(`max_completion_length`), so every token of a step weighs the same.

Source: arXiv:2512.01374, eq. 5 to 7; cap 5, eps_low 0.2, eps_high 0.27. With mu_old = pi_old and no ratio above the
cap the gradient is that of TRL's `dr_grpo`, whose `min` has no gradient exactly where M = 0. With mu_old given, TRL
truncates pi_old/mu_old instead of the product.
Differs from the paper (silent there): a token whose sampler did not report a log-prob (NaN) takes pi_old for mu_old.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import LossConfig, LossOutput, Objective, TokenBatch, token_mean
from .grpo import clipped_tokens
from .names import LOSS_TYPES


def loss(batch: TokenBatch, cfg: LossConfig) -> LossOutput:
    """The loss above on one micro-batch; only `logp` carries gradient. The names of the first numbers are TRL's."""
    found = surrogate(
        batch.logp,
        batch.old_logp,
        batch.old_logp if batch.sampler_logp is None else batch.sampler_logp,
        batch.advantages,
        batch.mask,
        normaliser=batch.counts.sequences * cfg.length,
        epsilon_low=cfg.epsilon_low,
        epsilon_high=cfg.epsilon_high,
        cap=cfg.cap,
    )
    low, high = found.tokens["clip_low"], found.tokens["clip_high"]
    tokens = {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
        "minirl/truncated": found.tokens["truncated"],
    }
    return LossOutput(found.loss, {}, tokens)


def surrogate(
    logp: Tensor,
    old_logp: Tensor,
    sampler_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    normaliser: Tensor,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.27,
    cap: float = 5.0,
) -> LossOutput:
    """The loss above from its tensors.

    Args:
        normaliser: responses of the whole optimiser step / ranks, times the fixed length.

    Returns:
        The loss, and numbers of tokens, which add up over micro-batches and ranks: `tokens` that are trained,
        `clip_low` and `clip_high` of them with M = 0, `truncated` of them whose weight was cut to `cap`.
    """
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    with torch.no_grad():
        mu = torch.where(torch.isnan(sampler_logp), old_logp, sampler_logp)
        ratio = torch.exp(logp - mu)
        low, high = clipped_tokens(
            torch.exp(logp - old_logp), advantages, epsilon_low=epsilon_low, epsilon_high=epsilon_high
        )
        # Padding may hold any number, also an infinite one: it is left out by selection, not by a product with 0.
        trained = mask.bool()
        coefficient = torch.where(trained & ~low & ~high, ratio.clamp(max=cap) * advantages, 0.0)
        tokens = {
            "tokens": trained.sum(),
            "clip_low": (low & trained).sum(),
            "clip_high": (high & trained).sum(),
            "truncated": ((ratio > cap) & trained).sum(),
        }
    per_token = -coefficient * torch.where(trained, logp, 0.0)
    return LossOutput(token_mean(per_token, trained, normaliser), {}, tokens)


OBJECTIVE = Objective(
    LOSS_TYPES["minirl"],
    loss,
    sampler_logps=True,
    needs=(
        (
            {"use_transformers_continuous_batching": False},
            " leaves loss_type: minirl without the sampler's log-probs, which continuous batching does not return; "
            "set use_transformers_continuous_batching: false",
        ),
        (
            {
                "scale_rewards": "none",  # the advantage is the reward minus its group's mean
                "multi_objective_aggregation": "sum_then_normalize",
                "importance_sampling_level": "token",
                "beta": 0.0,
                "delta": None,
                "top_entropy_quantile": 1.0,
                "entropy_coef": 0.0,
                "use_adaptive_entropy": False,
                "off_policy_mask_threshold": None,
            },
            " is not part of loss_type: minirl (arXiv:2512.01374, eq. 7); set it to {value!r} or take one of TRL's "
            "loss types",
        ),
    ),
)
