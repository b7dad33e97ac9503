"""BoPO-style objective: clipped policy gradient on a router's decision tokens, every trajectory weighing the same.

    l_it = -min( rho A_i , clip(rho, 1 - eps_low, 1 + eps_high) A_i ) w^TIS_it  +  beta k_it k3_it
    L    = 1/B sum_i ( 1/max(|y_i|,1) sum_t M_it l_it )

    M [B,T] the decisions: tokens of the policy; observations and executors are masked     |y_i| = sum_t M_it
    rho, k3 [B,T] of the decision's probability, renormalised over the actions that were allowed
    (srpo.teacher.masked_decisions)
    A [B] reference-guided advantage (srpo.objectives.advantages)     B trajectories of the whole step
    w^TIS [B,T] sampler correction     k3 to the BoSFT policy, k_it = 1 or rho_it: both as in objectives/srpo.py

A long episode has more decisions, not more weight. The result does not depend on the split into micro-batches.
Where the settings ask for it (`distill_failed`), a failed trajectory with a successful sibling takes SRPO's
distillation loss instead: l_it = w_it l^S_it w^TIS_it + beta k_it k3_it for z_i = 1, in the same mean; the penalty to
the reference policy covers it too. A decision's divergence and its teacher's entropy are over the allowed actions too;
the teacher reads the sibling's decisions and observations as text.

Source: Budget-Aware Agentic Routing (arXiv 2602.21227) describes a GRPO variant; INFERRED, as no formula and no code
are public: the length normalisation per trajectory, the renormalised decisions, where the KL applies. With references
and the price of cost off, a batch has the loss and gradient of TRL's `loss_type="grpo"` with `scale_rewards="group"`.
"""

from __future__ import annotations

from dataclasses import replace

from . import srpo
from .advantages import reference_guided
from .batch import OWN_LOSS, LossConfig, LossOutput, Objective, TokenBatch
from .branches import failed_and_told
from .names import OBJECTIVE_NAMES


def loss(batch: TokenBatch, cfg: LossConfig) -> LossOutput:
    """The objective above on one micro-batch; metrics as in `srpo.loss`, as means over trajectories."""
    return srpo.loss(batch, replace(cfg, aggregation="sequence_mean"))


OBJECTIVE = Objective(
    OBJECTIVE_NAMES["bopo"],
    loss,
    branch=failed_and_told,
    distils=lambda args: bool(args.distill_failed),
    teacher_weights=True,
    credit=reference_guided,
    needs=(OWN_LOSS,),
)
