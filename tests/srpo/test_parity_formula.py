"""The objectives against their formulas, written out token by token in numpy, losses and gradients, in float64.

The reference knows no autograd: the gradient with respect to the student's logits z is derived by hand. With p the
student's probabilities, q the teacher's, both on the chosen support, and g_v = dD/dp_v up to a constant,

    dD/dz_v = p_v (g_v - sum_u p_u g_u)     forward: g = -q/p    reverse: g = log(p/q)    else: g = (1-alpha) log(p/m)

A tail is one more category; its gradient reaches every word outside the top-K in proportion to the word's probability.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from objectives_cases import Case, ragged

from srpo.objectives import OBJECTIVES

CASES = 450  # at least 200 of them must have something to compare
worst: dict[str, float] = {}


def divergence(z: np.ndarray, zt: np.ndarray, case: Case) -> tuple[float, np.ndarray]:
    """D of one token and dD/dz."""
    p, q = np.exp(z) / np.exp(z).sum(), np.exp(zt) / np.exp(zt).sum()
    k, vocab, alpha = case.top_k, len(z), case.alpha
    # category of every word: its own, the tail's, or none
    if k is None or k >= vocab:
        owner = np.arange(vocab)
        P, Q = p, q
    else:
        top = np.argsort(-z)[:k]
        owner = np.full(vocab, k if case.tail else -1)
        owner[top] = np.arange(k)
        P, Q = p[top], q[top]
        if case.tail:
            P, Q = np.append(P, 1 - P.sum()), np.append(Q, 1 - Q.sum())
        else:
            P, Q = P / P.sum(), Q / Q.sum()
    M = (1 - alpha) * P + alpha * Q
    if alpha == 0:
        value, g = (Q * np.log(Q / P)).sum(), -Q / P
    elif alpha == 1:
        value, g = (P * np.log(P / Q)).sum(), np.log(P / Q)
    else:
        value = (1 - alpha) * (P * np.log(P / M)).sum() + alpha * (Q * np.log(Q / M)).sum()
        g = (1 - alpha) * np.log(P / M)
    grad = np.zeros(vocab)
    for v in range(vocab):
        if owner[v] >= 0:
            inside = p[v] if case.top_k is None or case.tail or case.top_k >= vocab else P[owner[v]]
            grad[v] = inside * (g[owner[v]] - (P * g).sum())
    return float(value), grad


def reference(case: Case, objective: str) -> tuple[float, np.ndarray]:
    """Loss and its gradient with respect to `case.logits`."""
    cfg = case.cfg
    z = case.logits.detach().numpy() / case.temperature
    zt = case.teacher_logits.numpy() / case.temperature
    mask, old, ref = case.mask.numpy(), case.old_logp.numpy(), case.ref_logp.numpy()
    w, distilled, A = case.weights.numpy(), case.distilled.numpy(), case.advantages.numpy()
    size, length, vocab = z.shape
    total, grad = 0.0, np.zeros_like(z)
    for i in range(size):
        own = [t for t in range(length) if mask[i, t]]
        if not own:
            continue
        p = np.exp(z[i]) / np.exp(z[i]).sum(-1, keepdims=True)
        logp = np.log(p[np.arange(length), case.ids[i].numpy()])
        log_rho = logp - old[i]
        if cfg.level == "sequence":
            log_rho = np.full(length, sum(log_rho[t] for t in own) / len(own))
        if cfg.aggregation == "sequence_mean":
            share = 1 / (len(own) * float(case.counts.sequences))
        else:
            share = 1 / float(case.counts.distilled_tokens if objective == "sdpo" else case.counts.tokens)
        for t in own:
            tis = 1.0 if case.sampler_ratio is None else float(case.sampler_ratio.expand(size, length)[i, t])
            d_logp = np.zeros(length)  # derivative of this token's loss with respect to every log-prob of the row
            value = 0.0
            if distilled[i]:
                D, dD = divergence(z[i, t], zt[i, t], case)
                ratio = 1.0 if cfg.is_clip is None else min(np.exp(np.clip(logp[t] - old[i, t], -20, 20)), cfg.is_clip)
                value = w[i, t] * D * ratio * tis
                grad[i, t] += share * w[i, t] * ratio * tis * dD / case.temperature
            elif objective == "srpo":
                rho = np.exp(log_rho[t])
                capped = rho if cfg.delta is None else min(rho, cfg.delta)
                inside = min(max(rho, 1 - cfg.epsilon_low), 1 + cfg.epsilon_high)
                value = -min(capped * A[i], inside * A[i]) * tis
                chosen = capped if capped * A[i] <= inside * A[i] else inside
                slope = -A[i] * rho * tis if chosen == rho else 0.0  # a clipped ratio has no slope
                if cfg.level == "sequence":
                    for u in own:
                        d_logp[u] += slope / len(own)
                else:
                    d_logp[t] += slope
            if objective == "srpo" and cfg.beta:
                gap = ref[i, t] - logp[t]
                value += cfg.beta * (np.exp(gap) - gap - 1)
                d_logp[t] += cfg.beta * (1 - np.exp(gap))
            total += share * value
            for u in own:
                onehot = np.zeros(vocab)
                onehot[case.ids[i, u]] = 1
                grad[i, u] += share * d_logp[u] * (onehot - p[u]) / case.temperature
    return total, grad


@pytest.mark.parametrize("objective", ["sdpo", "srpo"])
def test_loss_and_gradient_equal_the_formula(objective: str) -> None:
    trained = 0
    for seed in range(CASES):
        case = ragged(seed, objective)
        out = OBJECTIVES[objective].loss(case.batch(), case.cfg)
        out.loss.backward()
        assert case.logits.grad is not None
        value, grad = reference(case, objective)
        error = max(abs(out.loss.item() - value), float(np.abs(case.logits.grad.numpy() - grad).max()))
        worst[objective] = max(worst.get(objective, 0.0), error)
        assert error <= 1e-9, f"seed {seed}: {error:.1e}"
        trained += bool(np.abs(grad).max() > 1e-4)
    assert trained >= 200
    print(f"{objective}: {CASES} cases, {trained} with gradient, largest error {worst[objective]:.1e}")


def test_the_reference_would_notice_a_wrong_constant() -> None:
    """A parity test that cannot fail is worthless: weights that are off by 1e-4 must show."""
    cases = (ragged(s) for s in range(CASES))
    case = next(c for c in cases if c.distilled.any() and not c.distilled.all() and c.mask.all())
    value, _ = reference(case, "srpo")
    case.weights = case.weights * 1.0001
    assert abs(OBJECTIVES["srpo"].loss(case.batch(), case.cfg).loss.item() - value) > 1e-7


def test_metrics_are_parts_of_the_loss() -> None:
    for seed in range(50):
        case = ragged(seed)
        out = OBJECTIVES["srpo"].loss(case.batch(), case.cfg)
        parts = sum(out.metrics[name] for name in ("loss/grpo", "loss/sdpo")) + out.metrics.get("loss/kl", 0.0)
        assert torch.allclose(out.loss, torch.as_tensor(parts), atol=1e-12)
