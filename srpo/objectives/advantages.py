"""Group credit with boundary references: what a rollout is worth beside its siblings and the two boundary policies.

    r_1..r_G   rewards of one group: G rollouts of the same task, seed and budget
    R_S, R_L   references: what always-small and always-large earn on the task, from its boundary profile; constants

    A_i = ( r_i - b ) / s

    b:  none      mean r                         GRPO
        refgroup  mean { r_1..r_G, R_S, R_L }    the references join the group
        refmax    max ( mean r, R_S, R_L )       a group that a boundary policy beats is pushed down as a whole
        refmean   ( R_S + R_L ) / 2              static
        refsmall  R_S                            relative to the cheap boundary
    s:  group      std { r_1..r_G } + eps
        group+ref  std { r_1..r_G, R_S, R_L } + eps
        none       1

    drop_all_fail: A_i = 0 in a group without any success

std is unbiased and eps is TRL's 1e-4, so `none` with `group` is TRL's `scale_rewards="group"` to the last bit, and
`none` with `none` is `scale_rewards="none"`. A rollout whose reward is NaN is not in its group and gets A = 0.

Why references help. In a group that fails as a whole, GRPO ranks by cost alone, and dividing by the group's std blows
that small spread up to unit size whatever the price of cost is: the policy learns to fail cheaply. With the references
in the std the spread stays small beside a success.

INFERRED. "BoPO-style": Budget-Aware Agentic Routing (arXiv 2602.21227) names a reference-guided advantage, but its
formula is not public. These are the candidates of our specification (A.7); none is verified against the paper's code.
With `group` and references |A| has no bound (a group that nearly agrees, far from b): hence the default `group+ref`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .names import BASELINES, SCALES

REFERENCES = "references"
"""Dataset column [R_S, R_L] of a row's task; every row of a group has the same."""
_EPS = 1e-4  # TRL's


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    baseline: str,
    scale: str,
    references: Tensor | None = None,
    success: Tensor | None = None,
    drop_all_fail: bool = False,
) -> Tensor:
    """A [B] of the formulas above.

    Args:
        rewards: [B], groups one after the other; NaN: not scored.
        group_size: G; B is a multiple of it.
        baseline: one of `BASELINES`.
        scale: one of `SCALES`.
        references: [B, 2], (R_S, R_L) of each row's task; needed wherever a name above says ref.
        success: [B] bool; needed with `drop_all_fail`.
        drop_all_fail: groups without a success teach nothing.

    Raises:
        ValueError: unknown names, references or successes that are needed and missing, references that are not
            finite or differ within a group.
    """
    if baseline not in BASELINES or scale not in SCALES:
        raise ValueError(f"baseline={baseline!r} and scale={scale!r}: must be of {BASELINES} and of {SCALES}")
    r = rewards.view(-1, group_size)
    with_references = r
    if baseline != "none" or scale == "group+ref":
        if references is None:
            raise ValueError(f"baseline={baseline!r} with scale={scale!r} needs the references R_S, R_L of every row")
        refs = references.to(r).view(-1, group_size, 2)
        if not torch.isfinite(refs).all() or not torch.equal(refs, refs[:, :1].expand_as(refs)):
            raise ValueError("the references must be finite, and the same for all rollouts of a group")
        small, large = refs[:, :1, 0], refs[:, :1, 1]
        with_references = torch.cat([r, small, large], dim=1)

    mean = torch.nanmean(r, dim=1, keepdim=True)
    if baseline == "none":
        b = mean
    elif baseline == "refgroup":
        b = torch.nanmean(with_references, dim=1, keepdim=True)
    elif baseline == "refmax":
        b = torch.maximum(mean, torch.maximum(small, large))
    elif baseline == "refmean":
        b = (small + large) / 2
    else:
        b = small

    advantages = r - b
    if scale != "none":
        s = _nanstd(with_references if scale == "group+ref" else r)
        # A group that agrees has no scale of its own: its distance to a reference is kept as it is. (Without
        # references the distance is 0, and TRL divides it by eps.)
        agrees = (s < _EPS) & (baseline != "none")
        advantages = advantages / torch.where(agrees, torch.ones_like(s), s + _EPS)
    if drop_all_fail:
        if success is None:
            raise ValueError("drop_all_fail needs to know which rollouts succeeded")
        advantages = advantages * success.view(-1, group_size).any(dim=1, keepdim=True)
    return torch.nan_to_num(advantages, nan=0.0).view(-1)


def importance_weighted(rewards: Tensor, importance: Tensor, group_size: int) -> Tensor:
    """A_i = w_i (r_i - mean_j w_j r_j)   [B]: policy-gradient credit of completions that the policy did not draw.

    With each of M actions once and w = M pi(a), the gradient is that of the expected reward, exactly, and the mean is
    the policy's value. A group with a reward of NaN has no such mean, and gets A = 0.

    Args:
        rewards, importance: [B], groups one after the other; w is the policy's probability over that of the draw.
    """
    r, w = rewards.view(-1, group_size), importance.to(rewards).view(-1, group_size)
    return torch.nan_to_num(w * (r - (w * r).mean(dim=1, keepdim=True)), nan=0.0).view(-1)


def _nanstd(x: Tensor) -> Tensor:
    """Unbiased std over the last dimension without its NaNs, [N, 1]; 0 for fewer than two values. As TRL's nanstd."""
    count = (~torch.isnan(x)).sum(dim=1, keepdim=True)
    variance = torch.nanmean((x - torch.nanmean(x, dim=1, keepdim=True)) ** 2, dim=1, keepdim=True)
    std = torch.sqrt(variance * (count / (count - 1).clamp(min=1)))
    return torch.where(count > 1, std, torch.zeros_like(std))


def references_of(rows: Sequence[Any], args: Any) -> list[tuple[float, float]] | None:
    """[R_S, R_L] of every row, or None where a row has none and the settings need none.

    Args:
        rows: what the column `REFERENCES` of each row holds.
        args: has `advantage_baseline` and `advantage_scale`.

    Raises:
        ValueError: a row has none and the settings need them; names the row.
    """
    missing = [i for i, found in enumerate(rows) if found is None or len(found) != 2]
    if not missing:
        return [(float(small), float(large)) for small, large in rows]
    if args.advantage_baseline != "none" or args.advantage_scale == "group+ref":
        raise ValueError(
            f"row {missing[0]} of the batch: column {REFERENCES!r} is {rows[missing[0]]!r}; advantage_baseline: "
            f"{args.advantage_baseline} with advantage_scale: {args.advantage_scale} needs [R_S, R_L] there"
        )
    return None


def reference_guided(rewards: Tensor, references: Tensor | None, success: Tensor, args: Any) -> Tensor:
    """`group_advantages` as the settings of a run say: [B]."""
    return group_advantages(
        rewards,
        args.num_generations,
        baseline=args.advantage_baseline,
        scale=args.advantage_scale,
        references=references,
        success=success,
        drop_all_fail=args.drop_all_fail,
    )
