"""SRPO: correct completions follow their reward, failed ones with teacher information are distilled.

    l_it = ( z_i w_it l^S_it + (1 - z_i) l^G_it ) w^TIS_it  +  beta k_it k3_it
    L    = sum_{i,t} M_it l_it / N                                                                     (eq. 4.3)

    z [B] distilled (eq. 4.1)    l^G [B,T] grpo.token_loss    l^S [B,T] sdpo.token_loss    w [B,T] weights (eq. 4.2)
    w^TIS [B,T] sampler correction, on both branches       N trained tokens of the whole step: one joint denominator
    k3 [B,T] grpo.kl_penalty, of every trained token: of distilled completions too, and without w and w^TIS
    k_it = 1; with `correct_kl` (TRL's use_bias_correction_kl) rho_it = pi_theta/pi_old, unclipped, with gradient, at
    the level of the reward branch's ratio (one per completion at "sequence")

Source: P-SRPO section 3.3. Differs: the paper has no KL penalty (beta = 0, the default). "sequence_mean" replaces the
token mean by the mean over completions of their token means. With nothing distilled the loss and its gradient equal
TRL's `dapo` bit for bit.
"""

from __future__ import annotations

import torch

from . import grpo, sdpo
from .batch import OWN_LOSS, LossConfig, LossOutput, Objective, TokenBatch, reducer
from .branches import failed_and_told
from .names import OBJECTIVE_NAMES


def loss(batch: TokenBatch, cfg: LossConfig) -> LossOutput:
    """The objective above on one micro-batch; always connected to the graph, also when no token is trained.

    Metrics: `loss/grpo`, `loss/sdpo` and `loss/kl` are the parts that sum to the loss. `clip_ratio/low`,
    `clip_ratio/high`, `is_clipped` are shares of all trained tokens (each can only be hit in its own branch);
    `is_ratio` is the mean pi_theta/pi_old of all trained tokens.
    """
    distilled = batch.distilled.unsqueeze(1)
    mean = reducer(batch.mask, batch.counts.tokens, batch.counts, cfg)
    # Routed rows take ratio 1 here: their surrogate is not used, and an overflow in it would turn into 0 * inf = NaN.
    old_logp = torch.where(distilled, batch.logp.detach(), batch.old_logp)
    eps = {"epsilon_low": cfg.epsilon_low, "epsilon_high": cfg.epsilon_high}
    reward = grpo.token_loss(
        batch.logp, old_logp, batch.advantages, batch.mask, **eps, delta=cfg.delta, level=cfg.level
    )
    with torch.no_grad():
        ratio = grpo.ratio(batch.logp, old_logp, batch.mask, cfg.level)
        low, high = grpo.clipped_tokens(ratio, batch.advantages, **eps)
    # [B,1] at sequence level; spread over the tokens as late as TRL does it, which fixes the bits of the gradient.
    per_token = reward if batch.sampler_ratio is None else reward * batch.sampler_ratio
    if batch.divergence is not None:
        distil = batch.weights * sdpo.token_loss(batch.divergence, batch.logp, batch.old_logp, is_clip=cfg.is_clip)
        if batch.sampler_ratio is not None:
            distil = distil * batch.sampler_ratio
        per_token = torch.where(distilled, distil, per_token)

    metrics = {}
    with torch.no_grad():
        rho = sdpo.importance(batch.logp, batch.old_logp)
        metrics["loss/grpo"] = mean(torch.where(distilled, 0.0, per_token))
        metrics["loss/sdpo"] = mean(torch.where(distilled, per_token, 0.0))
        metrics["clip_ratio/low"] = mean(low.to(rho.dtype).expand_as(rho))
        metrics["clip_ratio/high"] = mean(high.to(rho.dtype).expand_as(rho))
        metrics["is_ratio"] = mean(rho)
        if cfg.is_clip is not None:
            metrics["is_clipped"] = mean(torch.where(distilled, (rho > cfg.is_clip).to(rho.dtype), 0.0))

    if cfg.beta:
        if batch.ref_logp is None:
            raise ValueError("beta > 0 needs ref_logp, the reference policy's log-probs")
        penalty = grpo.kl_penalty(batch.logp, batch.ref_logp)
        if cfg.correct_kl:
            penalty = penalty * grpo.ratio(batch.logp, batch.old_logp, batch.mask, cfg.level)
        penalty = cfg.beta * penalty
        metrics["loss/kl"] = mean(penalty.detach())
        per_token = per_token + penalty
    return LossOutput(mean(per_token), metrics)


OBJECTIVE = Objective(
    OBJECTIVE_NAMES["srpo"],
    loss,
    branch=failed_and_told,
    distils=lambda args: True,
    teacher_weights=True,
    needs=(OWN_LOSS,),
)
