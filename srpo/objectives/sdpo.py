"""SDPO: distil the policy towards itself, told the answer or the feedback.

    l^S_it = D_alpha(student, teacher)_it * min( sg[rho_it], c )                     rho clamped to e^-20 .. e^20
    L      = sum_{i,t} z_i M_it w_it l^S_it w^TIS_it / |Omega|                       aggregation "token"
    L      = 1/B sum_i z_i 1/|y_i| sum_t M_it w_it l^S_it w^TIS_it                   aggregation "sequence_mean"

    D [B,T] divergence (eq. 3.4)    z [B] distilled    rho [B,T] = pi_theta/pi_old of the sampled token    c = is_clip
    w [B,T] token weights, ones in plain SDPO    w^TIS [B,T] sampler correction    |Omega| distilled tokens of the step
    |y_i| trained tokens of i    B completions of the step    is_clip None: l^S = D, no ratio    no penalty (beta = 0)

Source: P-SDPO eq. 1 and A.3-A.4, spec sections 3.4-3.5. Differs: the default denominator counts distilled tokens (the
paper's length normalisation, applied to the completions that are distilled); "sequence_mean" is what the released code
and TRL's SDPOTrainer optimise, where completions without a teacher still count in B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import OWN_LOSS, LossConfig, LossOutput, Objective, TokenBatch, reducer
from .branches import whoever_is_told
from .names import OBJECTIVE_NAMES


def importance(logp: Tensor, old_logp: Tensor) -> Tensor:
    """sg[pi_theta / pi_old] of the sampled tokens, [B,T], the log clamped to +-20."""
    return torch.exp((logp - old_logp).detach().clamp(-20.0, 20.0))


def token_loss(divergence: Tensor, logp: Tensor, old_logp: Tensor, *, is_clip: float | None) -> Tensor:
    """l^S [B,T], unmasked. `is_clip` None leaves the ratio out."""
    if is_clip is None:
        return divergence
    return divergence * importance(logp, old_logp).clamp(max=is_clip)


def loss(batch: TokenBatch, cfg: LossConfig) -> LossOutput:
    """The objective above on one micro-batch; a zero that is connected to the graph when nothing is distilled.

    Metrics: `loss/sdpo`, `is_ratio` (mean pi_theta/pi_old) and `is_clipped` (share of tokens at the cap), both over
    distilled tokens. Raises ValueError for beta > 0: SDPO has no penalty to a reference policy.
    """
    if cfg.beta:
        raise ValueError("sdpo has no reference-policy penalty; set beta to 0")
    distilled = batch.distilled.unsqueeze(1)
    mean = reducer(batch.mask, batch.counts.distilled_tokens, batch.counts, cfg)
    idle = batch.logp * 0.0  # rows that are not distilled; keeps every rank's backward pass alive
    if batch.divergence is None:
        per_token = idle
    else:
        branch = batch.weights * token_loss(batch.divergence, batch.logp, batch.old_logp, is_clip=cfg.is_clip)
        if batch.sampler_ratio is not None:
            branch = branch * batch.sampler_ratio
        per_token = torch.where(distilled, branch, idle)
    total = mean(per_token)
    rho = torch.where(distilled, importance(batch.logp, batch.old_logp), 0.0)
    metrics = {"loss/sdpo": total.detach(), "is_ratio": mean(rho)}
    if cfg.is_clip is not None:
        metrics["is_clipped"] = mean((rho > cfg.is_clip).to(rho.dtype))
    return LossOutput(total, metrics)


OBJECTIVE = Objective(
    OBJECTIVE_NAMES["sdpo"],
    loss,
    branch=whoever_is_told,
    distils=lambda args: True,
    rewards_others=False,
    needs=(OWN_LOSS, ({"beta": 0.0}, ": sdpo has no penalty to a reference policy; set beta: 0.0")),
)
