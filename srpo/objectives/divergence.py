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
Differs: computed in chunks of tokens whose logits have a size in bytes, whatever V is, and are computed again in the
backward pass (of the teacher only the log-probs of the K tokens are kept), so neither student nor teacher logits of
all N tokens ever exist; log-probs are floored at -1e4 nats, so a token that a model forbids (-inf) gives a large
finite penalty instead of NaN; K >= V is the exact divergence (the code would add an empty tail).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 2**26
"""What a chunk of tokens may take in logits and in what is computed from them, on a CPU."""
CHUNK_BYTES_GPU = 2**29
"""The same on a GPU, where few large products are faster than many small ones."""
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
            return self.transformed(self.projected(hidden))
        read, place = torch.unique(choices.clamp(min=0), return_inverse=True)
        bias = None if self.bias is None else self.bias[read]
        some = F.linear(hidden.to(self.weight.dtype), self.weight[read], bias)  # [N, ids that occur]
        return self.transformed(some.gather(-1, place)).masked_fill(choices < 0, -torch.inf)

    def projected(self, hidden: Tensor) -> Tensor:
        """W h + b, [N,V], in the precision of the weight."""
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def transformed(self, projected: Tensor) -> Tensor:
        """Logits of what `projected` gave; the same tensor where nothing is to be done."""
        logits = _upcast(projected)
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def chunks(self, tokens: int, copies: int, chunk_tokens: int | None = None) -> Iterator[slice]:
        """Rows of `tokens` in chunks of `chunk_tokens`; None: of which `copies` tensors [n,V] take `CHUNK_BYTES`."""
        room = CHUNK_BYTES if self.weight.device.type == "cpu" else CHUNK_BYTES_GPU
        row = copies * self.weight.size(0) * max(self.weight.dtype.itemsize, 4)
        size = chunk_tokens or max(1, room // row)
        return (slice(start, start + size) for start in range(0, tokens, size))


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
    t = teacher_logits.gather(-1, index) - teacher_logits.logsumexp(-1, keepdim=True)
    return _on_support(s, t, alpha, tail)


def _on_support(s: Tensor, t: Tensor, alpha: float, tail: bool) -> Tensor:
    """D from both log-probs of the K tokens, [..., K] -> [...]."""
    t = t.clamp(min=MIN_LOGP)
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
    chunk_tokens: int | None = None,
) -> Tensor:
    """D per token from the last hidden states, without ever holding the logits of all tokens.

    `student_hidden` [N,D] and `teacher_hidden` [N,D'] are the states that predict the same N sampled tokens; the two
    heads share V but not necessarily D (a trust-region teacher concatenates two hidden states). Both logits are
    divided by `temperature`. `top_k` and `tail` are for tokens without `choices` [N,A]. Gradient reaches
    `student_hidden` and the student head. N = 0 gives an empty result that is connected to the graph. Returns [N],
    float32 (float64 for float64 inputs).

    Tokens are taken `chunk_tokens` at a time; None: so many that their logits take `CHUNK_BYTES`. However many there
    are, each head is gathered once forward and once backward: all ranks of a sharded model must do so equally often.
    """
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(f"{student_hidden.shape[0]} student tokens but {teacher_hidden.shape[0]} teacher tokens")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    how = _How(student_head, teacher_head, alpha, top_k, tail, temperature, chunk_tokens)
    teacher_hidden = teacher_hidden.detach()
    parts = []
    with student_head.gather(), teacher_head.gather():
        for rows, among in supports(choices):
            student, teacher = student_hidden[rows], teacher_hidden[rows]
            if among is None:
                parts.append(_free_tokens(student, student_head.weight, student_head.bias, teacher, how))
            else:
                own = student_head.logits(student, among) / temperature
                with torch.no_grad():
                    other = teacher_head.logits(teacher, among) / temperature
                parts.append(topk_divergence(own, other, None, alpha))
    return joined(parts, choices)


@dataclass(frozen=True, eq=False)
class _How:
    student: Head
    teacher: Head
    alpha: float
    top_k: int | None
    tail: bool
    temperature: float
    chunk_tokens: int | None

    @property
    def exact(self) -> bool:
        return self.top_k is None or self.top_k >= self.student.weight.size(0)

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Student, teacher and a sum live at once; of the exact divergence its parts and their gradients, too."""
        return self.student.chunks(tokens, 12 if self.exact else 3, self.chunk_tokens)


class _FreeTokens(torch.autograd.Function):
    """D [N] of tokens without choices; inside of gathered heads.

    For the backward pass it keeps, per token, its K tokens, both models' log-probs of them and the student's
    normaliser, [N,3K+1] in all; the student's logits are computed again. With p = softmax(z / tau), a_v = dD / d log
    p_v for v in the support and 0 elsewhere:

        dD / dz_v = (a_v - p_v sum_k a_k) / tau

    The exact divergence keeps nothing, and computes the teacher's logits again, too.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor, how: _How
    ) -> Tensor:
        kept: list[tuple[Tensor, ...]] = []
        values = [_upcast(hidden).new_zeros(0)]
        for rows in how.chunks(len(hidden)):
            logits = how.student.logits(hidden[rows])
            if how.exact or how.top_k is None:
                other = how.teacher.logits(teacher_hidden[rows]) / how.temperature
                values.append(topk_divergence(logits / how.temperature, other, None, how.alpha))
                continue
            logits.div_(how.temperature)
            top, index = logits.topk(how.top_k, dim=-1)
            norm = logits.logsumexp(dim=-1, keepdim=True)
            s = top - norm
            del logits
            other = how.teacher.logits(teacher_hidden[rows]).div_(how.temperature)
            t = other.gather(-1, index) - other.logsumexp(dim=-1, keepdim=True)
            del other
            values.append(_on_support(s, t, how.alpha, how.tail))
            kept.append((index, s, t, norm))
        ctx.save_for_backward(hidden, teacher_hidden, *(torch.cat(parts) for parts in zip(*kept, strict=True)))
        ctx.how, device = how, hidden.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, teacher_hidden, *kept = ctx.saved_tensors
        how, head = ctx.how, ctx.how.student
        with head.gather(), how.teacher.gather(), torch.autocast(*ctx.autocast):
            sought = [hidden, head.weight, head.bias]
            found = [
                torch.zeros_like(_upcast(x)) if on else None
                for x, on in zip(sought, ctx.needs_input_grad[:3], strict=True)
            ]
            for rows in how.chunks(len(hidden)):
                projected = head.projected(hidden[rows])
                if how.exact:
                    flow = _exact_flow(projected, teacher_hidden[rows], upstream[rows], how)
                else:
                    flow = _top_flow(projected, [part[rows] for part in kept], upstream[rows], how)
                del projected
                if found[0] is not None:
                    found[0][rows] = flow @ head.weight.to(flow.dtype)
                if found[1] is not None:
                    found[1].addmm_(_upcast(flow).T, _upcast(hidden[rows]).to(found[1].dtype))
                if found[2] is not None:
                    found[2] += flow.sum(dim=0)
            grads = [None if x is None else x.to(like.dtype) for x, like in zip(found, sought, strict=True)]
        return *grads, None, None


_free_tokens: Callable[..., Tensor] = _FreeTokens.apply


def _top_flow(projected: Tensor, kept: list[Tensor], upstream: Tensor, how: _How) -> Tensor:
    """Gradient at W h + b, [n,V], of tokens with a top-K support; may write into `projected`."""
    index, s, t, norm = kept
    with torch.enable_grad():
        s = s.requires_grad_()
        (a,) = torch.autograd.grad(_on_support(s, t, how.alpha, how.tail), s, upstream)
    head, tau = how.student, how.temperature
    logits = head.transformed(projected)
    flow = (logits / tau).sub_(norm).exp_().mul_(-a.sum(dim=-1, keepdim=True)).scatter_add_(-1, index, a)
    flow.mul_(head.scale / tau)
    if head.softcap is not None:  # d tanh = 1 - tanh^2
        flow.mul_(1 - (logits / head.softcap).square())
    return flow.to(projected.dtype)


def _exact_flow(projected: Tensor, teacher_hidden: Tensor, upstream: Tensor, how: _How) -> Tensor:
    """Gradient at W h + b, [n,V], of tokens whose support is the whole vocabulary."""
    other = how.teacher.logits(teacher_hidden) / how.temperature
    with torch.enable_grad():
        projected = projected.detach().requires_grad_()
        own = how.student.transformed(projected) / how.temperature
        (flow,) = torch.autograd.grad(topk_divergence(own, other, None, how.alpha), projected, upstream)
    return flow


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
    hidden: Tensor, head: Head, temperature: float, choices: Tensor | None = None, chunk_tokens: int | None = None
) -> Tensor:
    """Exact entropy in nats, hidden [N, D] -> [N]: of a decision over its choices [N, A]. fp32."""

    def entropy(_rows: Tensor, logp: Tensor, _among: Tensor | None) -> Tensor:
        p = logp.exp()
        return -p.mul_(logp.clamp_(min=MIN_LOGP)).sum(dim=-1)  # 0 log 0 = 0

    return _scored(entropy, hidden, head, temperature, choices, chunk_tokens)


@torch.no_grad()
def hidden_logp(
    hidden: Tensor,
    head: Head,
    tokens: Tensor,
    temperature: float,
    choices: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-probability of `tokens` [N], of a decision among its choices [N, A]: hidden [N, D] -> [N]. fp32."""

    def logp(rows: Tensor, found: Tensor, among: Tensor | None) -> Tensor:
        wanted = tokens[rows].unsqueeze(-1)
        place = wanted if among is None else (among == wanted).int().argmax(-1, keepdim=True)
        return found.gather(-1, place).squeeze(-1)

    return _scored(logp, hidden, head, temperature, choices, chunk_tokens)


def _scored(
    score: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    hidden: Tensor,
    head: Head,
    temperature: float,
    choices: Tensor | None,
    chunk_tokens: int | None,
) -> Tensor:
    """`score` of (rows, their log-probs [n,V] or [n,A], their choices), [N], in chunks of tokens without choices."""
    parts, every = [], torch.arange(len(hidden), device=hidden.device)
    with head.gather():  # once, however many tokens: a sharded head is gathered by all ranks together
        for which, among in supports(choices):
            rows = every[which]
            spans = [slice(None)] if among is not None else head.chunks(len(rows), 3, chunk_tokens)
            found = [_upcast(hidden).new_zeros(0)]
            for span in spans:
                logp = (head.logits(hidden[rows[span]], among) / temperature).log_softmax(dim=-1)
                found.append(score(rows[span], logp, among))
            parts.append(torch.cat(found))
    return joined(parts, choices)
