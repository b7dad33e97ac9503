"""Random ragged micro-batches for the tests of the objectives, float64, one seed per case."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srpo.objectives import Counts, Head, LossConfig, TokenBatch, hidden_divergence

torch.set_num_threads(1)


def counts(tokens: float, distilled: float, sequences: float, dtype: torch.dtype = torch.float64) -> Counts:
    return Counts(*(torch.tensor(x, dtype=dtype) for x in (tokens, distilled, sequences)))


@dataclass
class Case:
    """All that an objective could need, from the logits on; `batch()` builds the graph from `logits` to TokenBatch."""

    logits: Tensor  # [B,T,V] leaf
    teacher_logits: Tensor  # [B,T,V]
    ids: Tensor  # [B,T]
    mask: Tensor  # [B,T] int64, with empty rows and holes (text that the policy did not write)
    old_logp: Tensor
    ref_logp: Tensor
    advantages: Tensor
    distilled: Tensor
    weights: Tensor
    sampler_ratio: Tensor | None
    counts: Counts
    alpha: float
    top_k: int | None
    tail: bool
    temperature: float
    cfg: LossConfig

    def logp(self) -> Tensor:
        scaled = (self.logits / self.temperature).log_softmax(-1)
        return scaled.gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)

    def divergence(self) -> Tensor:
        """Through `hidden_divergence` with identity heads, scored on distilled rows only, as a trainer does."""
        size, length, vocab = self.logits.shape
        head = Head(torch.eye(vocab, dtype=self.logits.dtype))
        scored = hidden_divergence(
            self.logits[self.distilled].reshape(-1, vocab),
            head,
            self.teacher_logits[self.distilled].reshape(-1, vocab),
            head,
            alpha=self.alpha,
            top_k=self.top_k,
            tail=self.tail,
            temperature=self.temperature,
            chunk_tokens=4,
        )
        full = torch.zeros(size, length, dtype=self.logits.dtype)
        return full.masked_scatter(self.distilled.unsqueeze(1).expand(size, length), scored)

    def batch(self) -> TokenBatch:
        return TokenBatch(
            logp=self.logp(),
            old_logp=self.old_logp,
            mask=self.mask,
            advantages=self.advantages,
            distilled=self.distilled,
            divergence=self.divergence() if self.distilled.any() else None,
            weights=self.weights,
            counts=self.counts,
            sampler_ratio=self.sampler_ratio,
            ref_logp=self.ref_logp,
        )


def ragged(seed: int, objective: str = "srpo", dtype: torch.dtype = torch.float64) -> Case:
    """A random case: 1-6 rows, 1-8 tokens, 6-40 words; every option of the configuration is drawn too."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64).to(dtype) * (high - low) + low

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    def pick(*options: object) -> object:
        return options[int(torch.randint(len(options), (1,), generator=g))]

    size, length, vocab = (int(torch.randint(a, b, (1,), generator=g)) for a, b in ((1, 7), (1, 9), (6, 41)))
    logits = 2 * normal(size, length, vocab)
    ids = torch.randint(vocab, (size, length), generator=g)
    lengths = torch.randint(0, length + 1, (size, 1), generator=g)
    mask = (torch.arange(length) < lengths).long() * (uniform(size, length) > 0.15).long()
    distilled = uniform(size) < float(pick(0.0, 0.5, 1.0))  # type: ignore[arg-type]
    temperature = float(pick(1.0, 0.7))  # type: ignore[arg-type]
    logp = (logits / temperature).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    omega = mask * distilled.long().unsqueeze(1)
    sampler = {"none": None, "token": uniform(size, length, high=2.0), "row": uniform(size, 1, high=2.0)}
    beta = float(pick(0.0, 0.1)) if objective == "srpo" else 0.0  # type: ignore[arg-type]
    return Case(
        logits=logits.requires_grad_(),
        teacher_logits=2 * normal(size, length, vocab),
        ids=ids,
        mask=mask,
        old_logp=logp + 0.5 * normal(size, length),
        ref_logp=logp + 0.3 * normal(size, length),
        advantages=normal(size),
        distilled=distilled,
        weights=uniform(size, length, high=3.0) * omega,
        sampler_ratio=sampler[str(pick("none", "token", "row"))],
        # other micro-batches of the step hold the rest; the distilled share may be below one token per rank
        counts=counts(float(mask.sum()) + 7.5, float(omega.sum()) + 0.25, size + 3.0, dtype),
        alpha=float(pick(0.0, 0.25, 0.5, 1.0)),  # type: ignore[arg-type]
        top_k=pick(None, 1, 3, vocab),  # type: ignore[arg-type]
        tail=bool(pick(True, False)),
        temperature=temperature,
        cfg=LossConfig(
            epsilon_low=0.2,
            epsilon_high=float(pick(0.2, 0.28)),  # type: ignore[arg-type]
            delta=pick(None, 1.5, 3.0),  # type: ignore[arg-type]
            level=pick("token", "sequence"),  # type: ignore[arg-type]
            beta=beta,
            is_clip=pick(None, 1.2, 2.0),  # type: ignore[arg-type]
            aggregation=pick("token", "sequence_mean"),  # type: ignore[arg-type]
        ),
    )
