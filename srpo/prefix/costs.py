"""What a pass of a model costs, estimated from token counts, in floating-point operations.

    forward(R, N) = R N (2 P + N / 2 * 4 L A)  without a mask of ours: half of the square is causal, and skipped
                    R N (2 P + N * 4 L A * M)  with one

    P weights that a token meets in the decoder (of experts those of its own)     L layers     A = heads * head size
    M what masked attention costs more per operation than a product of matrices

Measured where it decides, at P=400, C=48, G=8: `scripts/benchmark_step.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_BACKWARD = 3.0  # forward and backward in forwards
_MASKED = 2.0
"""M above. Masked attention of torch 2.13 on a CPU reads the whole mask, in smaller products."""
_FIXED = {"cpu": 1.5e8}
_FIXED_ELSEWHERE = 1e12
"""Operations in whose time a tree is built: about 5 ms."""


@dataclass(frozen=True)
class Costs:
    """Of one model."""

    token: float
    """Operations of a token in the decoder's layers."""
    pair: float
    """Operations of a query and a key in all its layers."""
    head: float
    """Operations of a token in the LM head."""
    fixed: float

    def packed(self, rows: int, width: int, gradient: bool) -> float:
        """Packed rows with a mask."""
        return self._times(gradient) * rows * width * (self.token + width * self.pair * _MASKED)

    def plain(self, rows: int, width: int, padded: bool, gradient: bool) -> float:
        """Rows as they are; padding costs a mask too."""
        factor = _MASKED if padded else 0.5
        return self._times(gradient) * rows * width * (self.token + width * self.pair * factor)

    def worth_a_tree(self, saved: float) -> bool:
        """Whether that many operations saved pay for finding out."""
        return saved > self.fixed

    def worth_picking(self, positions: int, gradient: bool) -> bool:
        """Whether so many positions fewer before the LM head are worth another path than TRL's own."""
        return self._times(gradient) * positions * self.head > self.fixed

    def _times(self, gradient: bool) -> float:
        return _BACKWARD if gradient else 1.0


def costs_of(model: Any) -> Costs:
    """Of a causal language model of transformers, sharded or not."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    embeddings = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in _own(m)}
    share = _expert_share(text)
    weights = sum(
        _numel(p) * (share if ".experts." in name else 1.0)
        for name, p in model.named_parameters()
        if id(p) not in embeddings
    )
    device = next(model.parameters()).device.type
    return Costs(
        token=2.0 * weights,
        pair=4.0 * text.num_hidden_layers * heads * size,
        head=2.0 * text.hidden_size * text.vocab_size,
        fixed=_FIXED.get(device, _FIXED_ELSEWHERE),
    )


def _own(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _numel(p: Tensor) -> int:
    return int(getattr(p, "ds_numel", p.numel()))  # ZeRO-3 leaves nothing in a parameter that it has partitioned


def _expert_share(text: Any) -> float:
    """Of the experts' weights, what one token meets."""
    experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    chosen = _first(text, "num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k")
    return chosen / experts if experts and chosen else 1.0


def _first(text: Any, *names: str) -> int:
    return next((int(value) for name in names if (value := getattr(text, name, None))), 0)
