"""Masked decisions: log-probabilities renormalised over the actions that were allowed.

    log pi(a | s, C) = z_a / tau - logsumexp_{c in C} z_c / tau                 a in C, C the choices of the position

    z logits of the LM head     tau sampling temperature     C stored when the token was sampled: choices [B,T,A],
    int64, token ids padded with -1; a row of -1 is a position without restriction and keeps its log-probability

Sampling was restricted to C, so old, new and reference log-probabilities must be too, with the same stored C:
otherwise the ratio compares two different distributions, and mass on actions that were not allowed leaks into the
gradient. Only the |C| rows of the head are read, inside the model's own forward (`srpo.teacher.lm_head`).

C comes from an environment's decisions (`Turn.choices`), or, where a completion is one turn, from a rule of its ids
(`AllowedTokens`), which then restricts the sampling, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from srpo.objectives import Head
from srpo.rollout.batch import most_choices, padded_choices
from srpo.rollout.turns import State


class AllowedTokens(Protocol):
    """Which ids a completion may hold, a pure function of the ids before (`srpo.rollout.constrained.OneOf` is one)."""

    def __call__(self, ids: list[int], /) -> list[Sequence[int] | None]:
        """For each position of a finished completion the ids that were allowed there; None: any."""
        ...

    def state(self) -> State:
        """Where a completion begins: which ids it may hold while it is sampled."""
        ...


def choice_log_probs(hidden: Tensor, head: Head, choices: Tensor, temperature: float) -> Tensor:
    """hidden [N, D], choices [N, A] -> log-probabilities [N, A] over each row's choices; -inf at the padding. fp32."""
    with head.gather():
        return (head.logits(hidden, choices) / temperature).log_softmax(dim=-1)


def score_choices(
    hidden: Tensor, head: Head, choices: Tensor, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of `tokens` [N] among their choices [N, A], and the entropy over the choices: [N], [N], nats.

    Raises:
        ValueError: a token is not among its choices.
    """
    chosen = choices == tokens.unsqueeze(-1)
    if not chosen.any(dim=-1).all():
        bad = int((~chosen.any(dim=-1)).nonzero()[0])
        raise ValueError(
            f"decision {bad}: token {int(tokens[bad])} is not among its choices {choices[bad].tolist()}; the stored "
            "choices do not belong to these completions"
        )
    logp = choice_log_probs(hidden, head, choices, temperature)
    sampled = logp.gather(-1, chosen.int().argmax(dim=-1, keepdim=True)).squeeze(-1)
    finite = logp.masked_fill(choices < 0, 0.0)  # 0 log 0 = 0, and its gradient too, instead of NaN
    return sampled, -(logp.exp() * finite).sum(dim=-1)


@contextmanager
def scored_among(model: PreTrainedModel, choices: Tensor | None, trained: Tensor | None = None) -> Iterator[None]:
    """Inside, a `model` with a scoring head scores its last T tokens among `choices` [B, T, A], and of these only
    `trained` [B, T], 0 or 1; None: as ever, all.

    Forwards inside take consecutive rows of them: a batch may be scored in parts.
    """
    outer = model.scored_choices, model.scored_tokens
    model.scored_choices, model.scored_tokens = choices, trained
    try:
        yield
    finally:
        model.scored_choices, model.scored_tokens = outer


def gathered_choices(
    found: Sequence[Sequence[Sequence[int] | None]], multiple: int | None, device: Any
) -> Tensor | None:
    """[B, T, A] of the allowed ids of each token, as `padded_choices`; None where no rank has a restricted token.

    A rank without restricted tokens scores choices too where another has some, as it gathers a sharded head in step.

    Args:
        found: a completion each, one entry per token; None or () where there was no restriction.
        multiple: what T is rounded up to, as TRL pads completions.
    """
    multiple, rows = multiple or 1, [[tuple(allowed or ()) for allowed in row] for row in found]
    length = -(-max(map(len, rows)) // multiple) * multiple
    choices = padded_choices(rows, length, max(gather_object([most_choices(rows)])))
    return None if choices is None else choices.to(device)
