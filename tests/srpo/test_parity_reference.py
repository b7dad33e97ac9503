"""Parity with the released SDPO code, whose self-distillation loss is written out here from its description.

Top-K support of the student, tail bucket, alpha family, clipped ratio, sampler correction, sample mask, and the two
ways to average: its `token-mean` over one micro-batch, and per sequence, which is what it does as it is launched.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from objectives_cases import Case, counts, ragged
from torch import Tensor

from srpo.objectives import sampled_token_divergence, sdpo


def released_divergence(s: Tensor, t: Tensor, alpha: float) -> Tensor:
    """Of log-probs s (student) and t (teacher); `F.kl_div(input, target)` is KL(target || input)."""
    if alpha == 0.0:
        return F.kl_div(s, t, reduction="none", log_target=True).sum(-1)
    if alpha == 1.0:
        return F.kl_div(t, s, reduction="none", log_target=True).sum(-1)
    a = torch.tensor(alpha, dtype=s.dtype)
    m = torch.logsumexp(torch.stack([s + torch.log(1 - a), t + torch.log(a)]), dim=0)
    towards_student = F.kl_div(m, s, reduction="none", log_target=True)
    towards_teacher = F.kl_div(m, t, reduction="none", log_target=True)
    return torch.lerp(towards_student, towards_teacher, a).sum(-1)


def released_loss(case: Case, token_mean: bool) -> Tensor:
    """The per-token loss on all rows, then the self-distillation mask, then the mean."""
    logits, teacher = case.logits / case.temperature, case.teacher_logits / case.temperature
    k = logits.shape[-1] if case.top_k is None else case.top_k
    support, index = torch.topk(logits, k, dim=-1)
    s = support - logits.logsumexp(-1, keepdim=True)
    t = teacher.gather(-1, index) - teacher.logsumexp(-1, keepdim=True)
    if k < logits.shape[-1]:
        if case.tail:
            rest = [torch.log(-torch.expm1(x.logsumexp(-1, keepdim=True).clamp(max=-1e-7))) for x in (s, t)]
            s, t = torch.cat([s, rest[0]], -1), torch.cat([t, rest[1]], -1)
        else:
            s, t = s - s.logsumexp(-1, keepdim=True), t - t.logsumexp(-1, keepdim=True)
    per_token = released_divergence(s, t, case.alpha)
    if case.cfg.is_clip is not None:
        log_ratio = torch.clamp((case.logp() - case.old_logp).detach(), -20.0, 20.0)
        per_token = per_token * torch.exp(log_ratio).clamp(max=case.cfg.is_clip)
    if case.sampler_ratio is not None:
        per_token = per_token * case.sampler_ratio
    mask = case.mask * case.distilled.unsqueeze(1)
    if token_mean:
        return (per_token * mask).sum() / mask.sum().clamp(min=1)
    return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def compare(token_mean: bool, cases: int) -> tuple[int, float]:
    compared, worst = 0, 0.0
    for seed in range(cases):
        case = ragged(seed, "sdpo")
        omega = case.mask * case.distilled.unsqueeze(1)
        case.weights = omega.to(case.logits.dtype)  # plain SDPO has no weights
        case.counts = counts(1, float(omega.sum()), len(case.distilled))  # one micro-batch is the step
        case.cfg = replace(case.cfg, aggregation="token" if token_mean else "sequence_mean")
        ours = sdpo.loss(case.batch(), case.cfg).loss
        theirs = released_loss(case, token_mean)
        (grad,) = torch.autograd.grad(ours, case.logits)
        (expected,) = torch.autograd.grad(theirs, case.logits)
        error = max((ours - theirs).abs().item(), (grad - expected).abs().max().item())
        worst = max(worst, error)
        assert error <= 1e-9, f"seed {seed}: {error:.1e}"
        compared += bool(expected.abs().max() > 1e-4)
    return compared, worst


def test_token_mean() -> None:
    compared, worst = compare(token_mean=True, cases=450)
    assert compared >= 200
    print(f"released SDPO code, token mean: {compared} cases with gradient, largest error {worst:.1e}")


def test_sequence_mean() -> None:
    compared, worst = compare(token_mean=False, cases=450)
    assert compared >= 200
    print(f"released SDPO code, sequence mean: {compared} cases with gradient, largest error {worst:.1e}")


def test_sampled_token_estimator() -> None:
    """`full_logit_distillation=False`: sg(log pi - log q) log pi, then the rest of the path."""
    for seed in range(200):
        case = ragged(seed, "sdpo")
        if not case.distilled.any():
            continue
        base = case.batch()
        logp, teacher = base.logp, case.ref_logp  # any log-probs of the sampled tokens
        omega = case.mask * case.distilled.unsqueeze(1)
        case.cfg = replace(case.cfg, aggregation="token", is_clip=2.0)
        batch = replace(
            base,
            divergence=sampled_token_divergence(logp, teacher),
            counts=counts(1, float(omega.sum()), 1),
            weights=omega.double(),
            sampler_ratio=None,
        )
        ratio = torch.exp(torch.clamp((logp - case.old_logp).detach(), -20.0, 20.0)).clamp(max=2.0)
        theirs = ((logp - teacher).detach() * logp * ratio * omega).sum() / omega.sum().clamp(min=1)
        ours = sdpo.loss(batch, case.cfg).loss
        assert (ours - theirs).abs() <= 1e-12
        (a,) = torch.autograd.grad(ours, case.logits, retain_graph=True)
        (b,) = torch.autograd.grad(theirs, case.logits)
        assert (a - b).abs().max() <= 1e-12
