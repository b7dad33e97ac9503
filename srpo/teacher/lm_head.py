"""One student forward that yields log-probabilities, entropies and divergences to the teacher.

The divergence needs the student's last hidden states and its LM head. Both are read *inside* the model's own forward,
so DDP, FSDP and ZeRO see one ordinary forward pass, and no `[B, T, V]` logits are ever made: the log-probabilities
come from TRL's fused head, the divergences from `srpo.objectives.divergence`, chunk by chunk.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from srpo.objectives.divergence import Head, hidden_divergence


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
    chunks: int = 1
    """Least number of chunks to compute it in (`hidden_divergence`)."""


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


def add_distillation_head(model: PreTrainedModel) -> None:
    """Let `model(..., fused_lm_head=True, targets=TeacherTargets)` also return the divergence to the teacher.

    Call it after TRL's `add_fused_lm_head`, on the base model of a PEFT model. `gradient_probe` is called in the
    backward pass with the gradient at the last hidden states, [B, S, D].
    """
    fused_forward = model.forward

    # Keep the original signature: `generate` validates its model kwargs against it.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: object,
        targets: TeacherTargets | None = None,
        gradient_probe: Callable[[Tensor], None] | None = None,
        **kwargs: object,
    ) -> object:
        if targets is None and gradient_probe is None:
            return fused_forward(*args, **kwargs)
        with capture_hidden(self) as captured:
            output = fused_forward(*args, **kwargs)
        hidden = captured[0]
        if gradient_probe is not None and hidden.requires_grad:
            hidden.register_hook(gradient_probe)
        divergence = None
        if targets is not None:
            completion = hidden[:, -1 - targets.mask.size(1) : -1]  # position t predicts token t + 1
            how = targets.divergence
            values = hidden_divergence(
                completion[targets.mask],
                head_of(self),
                targets.hidden,
                targets.head,
                alpha=how.alpha,
                top_k=how.top_k,
                tail=how.tail,
                temperature=how.temperature,
                choices=targets.choices,
                chunks=targets.chunks,
            )
            divergence = values.new_zeros(targets.mask.shape).masked_scatter(targets.mask, values)
        return PolicyOutput(**output, divergence=divergence)

    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def completion_hidden(model: torch.nn.Module, base: PreTrainedModel, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """Hidden states that predict the last `length` tokens, [B, length, D], without gradient and without dropout.

    `model` is the (possibly wrapped) module to call and `base` the Hugging Face model inside it. One position of
    logits is all that the forward projects.
    """
    training = model.training
    model.eval()
    try:
        with capture_hidden(base) as captured:
            model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    finally:
        model.train(training)
    return captured[0][:, -1 - length : -1]
