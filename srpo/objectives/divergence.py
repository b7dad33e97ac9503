"""Divergence of the student from its self-teacher, per token.

Over a support S with student log-probs s and teacher log-probs t (a constant), eq. 3.4:

    alpha = 0       D = sum_v e^t (t - s)                          KL(teacher || student), "forward"
    alpha = 1       D = sum_v e^s (s - t)                          KL(student || teacher), "reverse"
    0 < alpha < 1   m = log[ (1-alpha) e^s + alpha e^t ]
                    D = (1-alpha) KL(student || m) + alpha KL(teacher || m);  alpha = 1/2: Jensen-Shannon, D <= ln 2

The two ends are not the limits of the middle, which vanishes there: D ~ alpha KL(teacher || student) for alpha -> 0
and D ~ (1-alpha) KL(student || teacher) for alpha -> 1. At alpha = 1e-4 the loss has about 1e-4 of its size at 0.

Support: the whole vocabulary (exact), or the K tokens that the *student* ranks highest now, plus one bucket that holds
the rest of the mass (`tail`), or renormalised over the K. With the tail D is never above the exact value. A decision
was sampled among its choices C only, so its support is C, exactly, and both are renormalised over it
(srpo.teacher.masked_decisions).

    hidden [N,D], [N,D']   weight [V,D], [V,D']   logits [N,V]   D [N]   (N = scored tokens, V = vocabulary)
    choices [N,A] token ids padded with -1; a row of -1 is a token without restriction

Source: P-SDPO section 2 and A.3 (top-K and tail), the alpha family as in the released code (spec section 3.2).
Differs: computed in chunks of tokens that are recomputed in the backward pass, so neither student nor teacher logits
of all N tokens ever exist; log-probs are floored at -1e4 nats, so a token that a model forbids (-inf) gives a large
finite penalty instead of NaN; K >= V is the exact divergence (the code would add an empty tail).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 512
MIN_LOGP = -1e4  # e^-1e4 = 0 in every dtype, and 1e4 * probability stays finite


@dataclass(frozen=True, eq=False)
class Head:
    """An output projection: logits = softcap * tanh(scale * (W h + b) / softcap), or scale * (W h + b)."""

    weight: Tensor  # [V,D]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    scale: float = 1.0
    # Entered around every read of the weight, in forward and again in recomputation: gathers a sharded weight.
    gather: Callable[[], AbstractContextManager[object]] = nullcontext

    def logits(self, hidden: Tensor, choices: Tensor | None = None) -> Tensor:
        """hidden [N,D] -> logits [N,V], float32 (float64 stays float64), before the temperature.

        With choices [N,A]: those logits only, [N,A], -inf at the padding; no other row of the weight is read.
        """
        if choices is None:
            return self._transformed(F.linear(hidden.to(self.weight.dtype), self.weight, self.bias))
        tokens = choices.clamp(min=0)
        logits = torch.einsum("nd,nad->na", hidden.to(self.weight.dtype), self.weight[tokens])
        logits = self._transformed(logits if self.bias is None else logits + self.bias[tokens])
        return logits.masked_fill(choices < 0, -torch.inf)

    def _transformed(self, logits: Tensor) -> Tensor:
        logits = _upcast(logits) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def divergence(student_logp: Tensor, teacher_logp: Tensor, alpha: float) -> Tensor:
    """D of eq. 3.4 over the last dimension: [..., S], [..., S] -> [...]. Only `student_logp` gets gradient."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    s = _upcast(student_logp).clamp(min=MIN_LOGP)
    t = _upcast(teacher_logp.detach()).clamp(min=MIN_LOGP)
    if alpha == 0.0:
        return _kl(t, s)
    if alpha == 1.0:
        return _kl(s, t)
    m = torch.logsumexp(torch.stack([s + math.log(1 - alpha), t + math.log(alpha)]), dim=0)
    return (1 - alpha) * _kl(s, m) + alpha * _kl(t, m)


def with_tail(logp: Tensor) -> Tensor:
    """Log-probs of K tokens [..., K] -> [..., K+1]: appends log(1 - sum of their probabilities)."""
    # The captured mass may round to 1 or above; below the clamp the gradient is zero, as it should be for no tail.
    captured = torch.logsumexp(logp, dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logp, torch.log(-torch.expm1(captured))], dim=-1)


def topk_divergence(
    student_logits: Tensor, teacher_logits: Tensor, k: int | None, alpha: float, tail: bool = True
) -> Tensor:
    """D on the student's top-k support: logits [..., V] -> [...]. `k` None or >= V is the exact divergence."""
    student_logits, teacher_logits = _upcast(student_logits), _upcast(teacher_logits.detach())
    if k is None or k >= student_logits.shape[-1]:
        return divergence(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), alpha)
    if k < 1:
        raise ValueError(f"top-k must be at least 1, got {k}")
    top, index = student_logits.topk(k, dim=-1)
    s = top - student_logits.logsumexp(-1, keepdim=True)
    t = (teacher_logits.gather(-1, index) - teacher_logits.logsumexp(-1, keepdim=True)).clamp(min=MIN_LOGP)
    s, t = (with_tail(s), with_tail(t)) if tail else (s.log_softmax(-1), t.log_softmax(-1))
    return divergence(s, t, alpha)


def supports(choices: Tensor | None) -> list[tuple[Tensor | slice, Tensor | None]]:
    """[(rows, their choices)] of N tokens: those without restriction (None), and the decisions."""
    if choices is None:
        return [(slice(None), None)]
    decided = (choices >= 0).any(dim=-1)
    return [(~decided, None), (decided, choices[decided])]


def joined(parts: list[Tensor], choices: Tensor | None) -> Tensor:
    """One value per token of each of `supports(choices)` -> [N], every value in its row."""
    if choices is None:
        return parts[0]
    decided = (choices >= 0).any(dim=-1)
    free, among = parts
    return free.new_zeros(len(choices)).masked_scatter(~decided, free).masked_scatter(decided, among)


def hidden_divergence(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    *,
    alpha: float,
    top_k: int | None,
    tail: bool = True,
    temperature: float = 1.0,
    choices: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    chunks: int = 1,
) -> Tensor:
    """D per token from the last hidden states, without ever holding the logits of all tokens.

    `student_hidden` [N,D] and `teacher_hidden` [N,D'] are the states that predict the same N sampled tokens; the two
    heads share V but not necessarily D (a trust-region teacher concatenates two hidden states). Both logits are
    divided by `temperature`. `top_k` and `tail` are for tokens without `choices` [N,A]. Gradient reaches
    `student_hidden` and the student head. N = 0 gives an empty result that is connected to the graph. Returns [N],
    float32 (float64 for float64 inputs).

    At least `chunks` chunks are made, the last ones empty: each gathers the head, forward and backward, which all
    ranks of a sharded model must do equally often.
    """
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(f"{student_hidden.shape[0]} student tokens but {teacher_hidden.shape[0]} teacher tokens")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    def chunk(student: Tensor, teacher: Tensor, allowed: Tensor | None) -> Tensor:
        found = supports(allowed)
        with student_head.gather():
            own = [student_head.logits(student[rows], among) / temperature for rows, among in found]
        with torch.no_grad(), teacher_head.gather():
            other = [teacher_head.logits(teacher[rows], among) / temperature for rows, among in found]
        parts = [
            topk_divergence(s, t, top_k if among is None else None, alpha, tail)
            for s, t, (_, among) in zip(own, other, found, strict=True)
        ]
        return joined(parts, allowed)

    teacher_hidden = teacher_hidden.detach()
    parts: list[Tensor] = []
    for number in range(max(chunks, math.ceil(student_hidden.shape[0] / chunk_tokens))):
        rows = slice(number * chunk_tokens, (number + 1) * chunk_tokens)
        inputs = student_hidden[rows], teacher_hidden[rows], None if choices is None else choices[rows]
        parts.append(checkpoint(chunk, *inputs, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts)


def sampled_token_divergence(logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Estimator from the sampled token alone: sg(log pi(y) - log q(y)) * log pi(y), elementwise.

    Its gradient is an unbiased sample of the gradient of the reverse KL (eq. 3.2); its value is not a divergence.
    """
    return (logp - teacher_logp).detach() * logp


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def hidden_entropy(
    hidden: Tensor, head: Head, temperature: float, choices: Tensor | None = None, chunk_tokens: int = 1024
) -> Tensor:
    """Exact entropy in nats, hidden [N, D] -> [N]: of a decision over its choices [N, A]. fp32."""

    def entropy(chunk: slice, rows: Tensor | slice, among: Tensor | None) -> Tensor:
        return torch.special.entr(_log_probs(hidden[chunk][rows], head, temperature, among).exp()).sum(-1)

    return _in_chunks(entropy, len(hidden), head, choices, chunk_tokens)


@torch.no_grad()
def hidden_logp(
    hidden: Tensor,
    head: Head,
    tokens: Tensor,
    temperature: float,
    choices: Tensor | None = None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Log-probability of `tokens` [N], of a decision among its choices [N, A]: hidden [N, D] -> [N]. fp32."""

    def logp(chunk: slice, rows: Tensor | slice, among: Tensor | None) -> Tensor:
        wanted = tokens[chunk][rows].unsqueeze(-1)
        place = wanted if among is None else (among == wanted).int().argmax(-1, keepdim=True)
        return _log_probs(hidden[chunk][rows], head, temperature, among).gather(-1, place).squeeze(-1)

    return _in_chunks(logp, len(hidden), head, choices, chunk_tokens)


def _in_chunks(
    score: Callable[[slice, Tensor | slice, Tensor | None], Tensor],
    count: int,
    head: Head,
    choices: Tensor | None,
    chunk_tokens: int,
) -> Tensor:
    parts = []
    with head.gather():  # once, however many tokens: a sharded head is gathered by all ranks together
        for start in range(0, max(count, 1), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            allowed = None if choices is None else choices[chunk]
            parts.append(joined([score(chunk, rows, among) for rows, among in supports(allowed)], allowed))
    return torch.cat(parts)


def _log_probs(hidden: Tensor, head: Head, temperature: float, choices: Tensor | None) -> Tensor:
    return torch.log_softmax(head.logits(hidden, choices) / temperature, dim=-1)
