"""One forward that yields log-probabilities, entropies, divergences to the teacher, or hidden states.

They need the last hidden states and the LM head. Both are read *inside* the model's own forward, so DDP, FSDP and ZeRO
see one ordinary forward pass, and no `[B, T, V]` logits are ever made: the log-probabilities come from TRL's fused
head, the divergences from `srpo.objectives.divergence`, chunk by chunk. For the same reason rows are packed here
(`srpo.prefix`), whatever calls the model: TRL's own loss, its old and reference passes, ours, the teacher.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from srpo.objectives.divergence import Head, hidden_divergence
from srpo.prefix.sharing import PrefixSharing
from srpo.teacher.masked_decisions import score_choices

_OF_HEAD = ("fused_lm_head", "num_items_in_batch")
"""Arguments that TRL's fused head keeps from the backbone."""


@dataclass(frozen=True)
class Divergence:
    """How student and teacher distributions are compared (see `srpo.objectives.divergence`)."""

    alpha: float
    top_k: int | None
    tail: bool
    temperature: float


@dataclass(frozen=True)
class TeacherTargets:
    """What one micro-batch distils: the teacher at the N distilled tokens, in row-major order of `mask`."""

    mask: Tensor
    """[B, T] bool, True at the distilled completion tokens (routed rows, trained tokens)."""
    hidden: Tensor
    """[N, D'] teacher hidden states at the positions that predict those tokens."""
    head: Head
    divergence: Divergence
    choices: Tensor | None = None
    """[N, A] ids that were allowed there, padded with -1 (`masked_decisions`); None: no token was restricted."""


@dataclass
class PolicyOutput(FusedCausalLMOutput):
    """TRL's fused output plus the divergence to the teacher, [B, T] (None without targets)."""

    divergence: Tensor | None = None


def head_of(model: PreTrainedModel) -> Head:
    """The model's LM head as a pure projection. The logit transforms are those TRL's fused head knows."""
    text = model.config.get_text_config()
    output = model.get_output_embeddings()
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(text, name, None)) is not None
        ),
        1.0,
    )
    if (divisor := getattr(text, "logits_scaling", None)) is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1.0 / divisor
    # FSDP2 shards parameters as DTensors, ZeRO-3 empties them: gather once per use, as TRL's fused head does.
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in (output.weight, output.bias))
    gather = functools.partial(maybe_gather_lm_head_ctx, weight, bias)
    return Head(weight, bias, getattr(text, "final_logit_softcapping", None), scale, gather)


@contextmanager
def capture_hidden(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the backbone's last hidden states, [B, S, D], of every forward inside the block."""
    captured: list[Tensor] = []
    decoder = model.get_decoder()  # OPT's own forward calls its decoder, and not the backbone around it
    backbone = model.base_model if decoder is None or decoder is model else decoder
    hook = backbone.register_forward_hook(lambda _m, _args, out: captured.append(out.last_hidden_state))
    try:
        yield captured
    finally:
        hook.remove()


def add_scoring_head(model: PreTrainedModel, sharing: PrefixSharing, temperature: float = 1.0) -> None:
    """The one seam of every pass that scores: old, new and reference log-probs, and the teacher's hidden states.

    `model(input_ids=, attention_mask=, labels=, fused_lm_head=True)` answers as TRL's fused head does, and

    - its rows share their beginnings (`sharing`), and only positions with a label reach the LM head;
    - `targets=TeacherTargets` adds the divergence to the teacher;
    - inside `srpo.teacher.masked_decisions.scored_among`, decisions are scored among their choices, at `temperature`,
      and of the labels only those that are trained on: what the world wrote has one in TRL's passes, and no use;
    - `gradient_probe` is called in the backward pass with the gradient at the last hidden states of the n positions
      with a label, [n, D], in row-major order.

    `model(input_ids=, attention_mask=, hidden_of=T, sink=)` calls `sink` with the hidden states that predict the last
    T tokens, [B, T, D], and projects nothing. Everything else is the model's own forward, `generate` too.

    Call it after TRL's `add_fused_lm_head`, on the base model of a PEFT model.
    """
    fused_forward = model.forward
    model.scored_choices = model.scored_tokens = None

    # Keep the original signature: `generate` validates its model kwargs against it.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        targets: TeacherTargets | None = None,
        gradient_probe: Callable[[Tensor], None] | None = None,
        hidden_of: int | None = None,
        sink: Callable[[Tensor], None] | None = None,
        **kwargs: Any,
    ) -> Any:
        if hidden_of is not None and sink is not None:
            with sharing.packed(sharing.way(kwargs), None) as found:
                self.base_model(**kwargs, use_cache=False)
            sink(found[0][:, -1 - hidden_of : -1])
            return PolicyOutput()
        if not kwargs.get("fused_lm_head"):
            return fused_forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        choices, trained = (_taken(self, name, len(labels)) for name in ("scored_choices", "scored_tokens"))
        if trained is not None:
            labels = labels.clone()
            labels[:, -trained.size(1) :].masked_fill_(trained == 0, -100)
        scored = torch.zeros_like(labels, dtype=torch.bool)
        scored[:, :-1] = labels[:, 1:] != -100  # position t predicts token t + 1
        places, tokens = scored.flatten().nonzero().flatten(), labels[:, 1:][scored[:, :-1]]
        inputs = {name: value for name, value in kwargs.items() if name not in _OF_HEAD}
        way = sharing.way(inputs, len(places))
        told = {"shift_labels": tokens.unsqueeze(0)} if way.picked else {"labels": labels}

        def watch(states: Tensor) -> None:
            if gradient_probe is not None and states.requires_grad:
                states.register_hook(lambda grad: gradient_probe(grad.flatten(0, 1) if way.picked else grad[scored]))

        with sharing.packed(way, places if way.picked else None, watch) as found:
            output = fused_forward(*args, **kwargs, **told)
        if way.picked:
            _by_row(output, scored[:, :-1])
        if choices is None and targets is None:
            return PolicyOutput(**output)
        hidden = found[0].squeeze(0) if way.picked else found[0][scored]
        if choices is not None:
            _among_choices(self, output, hidden, scored[:, :-1], tokens, choices, temperature)
        if targets is None:
            return PolicyOutput(**output)
        inside = targets.mask[scored[:, -1 - targets.mask.size(1) : -1]]
        how = targets.divergence
        values = hidden_divergence(
            hidden[inside],
            head_of(self),
            targets.hidden,
            targets.head,
            alpha=how.alpha,
            top_k=how.top_k,
            tail=how.tail,
            temperature=how.temperature,
            choices=targets.choices,
        )
        return PolicyOutput(
            **output, divergence=values.new_zeros(targets.mask.shape).masked_scatter(targets.mask, values)
        )

    model.forward = types.MethodType(forward, model)


def _by_row(output: FusedCausalLMOutput, scored: Tensor) -> None:
    """Fields of the n positions that were scored, [1, n] -> [B, S - 1], 0 elsewhere, as TRL's fused head has them."""
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
        if (values := getattr(output, name)) is not None:
            setattr(output, name, values.new_zeros(scored.shape).masked_scatter(scored, values))
    output.label_mask = scored


def _taken(model: Any, name: str, rows: int) -> Tensor | None:
    """The next rows of what `scored_among` has set."""
    if (whole := getattr(model, name)) is None:
        return None
    mine, rest = whole.split_with_sizes([rows, len(whole) - rows])
    setattr(model, name, rest)
    return mine


def _among_choices(
    model: PreTrainedModel,
    output: FusedCausalLMOutput,
    hidden: Tensor,
    scored: Tensor,
    tokens: Tensor,
    choices: Tensor,
    temperature: float,
) -> None:
    """Log-probs and entropies of decisions, in place of those over the whole vocabulary."""
    choices = choices[scored[:, -choices.size(1) :]]
    decided = (choices >= 0).any(dim=-1)
    logp, entropy = score_choices(hidden[decided], head_of(model), choices[decided], tokens[decided], temperature)
    where = torch.zeros_like(scored).masked_scatter(scored, decided)
    output.log_probs = output.log_probs.masked_scatter(where, logp.to(output.log_probs.dtype))
    if output.entropy is not None:
        output.entropy = output.entropy.masked_scatter(where, entropy.to(output.entropy.dtype))


@torch.no_grad()
def completion_hidden(model: torch.nn.Module, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """Hidden states that predict the last `length` tokens, [B, length, D], without gradient and without dropout.

    `model` is the (possibly wrapped) module to call; the model inside has a scoring head. What padding predicts is
    undefined.
    """
    training = model.training
    found: list[Tensor] = []
    model.eval()
    try:
        model(input_ids=ids, attention_mask=mask, hidden_of=length, sink=found.append)
    finally:
        model.train(training)
    return found[0]
