"""Which models take a tree for a row, and what their layers see of it; read from the model, not from a list of names.

A packed row is right where every layer is attention that looks at nothing but the mask and the position ids it is
given. Recurrent and linear-attention layers run over neighbours, ALiBi and blocks count columns, flash attention takes
no mask: there it would be wrong in silence, so it is refused. A sliding window counts columns too, but is known: it
becomes part of the mask (`Layout.sees`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srpo.prefix.tree import Layout
from srpo.trainer.forward_checks import takes_positions

_FULL, _SLIDING = "full_attention", "sliding_attention"
_MASKS = ("sdpa", "eager")
_BY_LENGTH = ("dynamic", "longrope")


class NotShared(Exception):
    """Why a model's rows cannot share their beginnings."""


@dataclass(frozen=True)
class Attention:
    """What the layers of a model see.

    Attributes:
        windows: by kind of layer, tokens that it sees; None: all before.
        additive: masks are added to the scores.
        longest: tokens of a row from which on the model computes in another way; None: never.
    """

    windows: Mapping[str, int | None]
    additive: bool
    longest: int | None

    def narrows(self, length: int) -> bool:
        """Whether rows of so many tokens are longer than some window."""
        return any(window is not None and window < length for window in self.windows.values())

    @property
    def shortest(self) -> int:
        """Tokens of the longest row that nothing of this concerns; 0: any."""
        return min(
            [*(w for w in self.windows.values() if w is not None), *([self.longest] if self.longest else [])],
            default=0,
        )

    def mask(self, layout: Layout, length: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """What the model takes as its `attention_mask`, for rows of at most `length` tokens.

        One mask, or one by the kind of layer, as models take it whose layers differ.
        """
        narrow = {k: None if w is None or w >= length else w for k, w in self.windows.items()}
        seen = {window: self._as_taken(layout.sees(window), dtype) for window in set(narrow.values())}
        if len(seen) == 1:
            return next(iter(seen.values()))
        return {kind: seen[window] for kind, window in narrow.items()}

    def _as_taken(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.additive:
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def attention_of(model: Any) -> Attention:
    """Of a causal language model of transformers.

    Raises:
        NotShared: a tree would be wrong for it, or it does not take one.
    """
    text = model.config.get_text_config()
    kinds = _kinds(model, text)
    if not takes_positions(model):
        raise NotShared("it takes no position ids")
    if getattr(text, "alibi", False):
        raise NotShared("its attention counts columns (ALiBi)")
    if getattr(text, "index_topk", None):
        raise NotShared("its attention chooses the tokens that it looks at (index_topk)")
    if getattr(text, "use_bidirectional_attention", False):
        raise NotShared("its attention is not causal")
    implementation = model.config._attn_implementation
    if implementation not in _MASKS:
        raise NotShared(
            f"its attention ({implementation}) takes no mask of ours; with attn_implementation: sdpa it would"
        )
    window = getattr(text, "sliding_window", None)
    if getattr(text, "use_sliding_window", True) is False:
        window = None
    windows = {kind: window if kind == _SLIDING else None for kind in kinds} if kinds else {_FULL: window}
    return Attention(windows, implementation == "eager", _longest(text))


def _kinds(model: Any, text: Any) -> set[str]:
    """Of its layers; none where all are alike."""
    if any(getattr(type(one), "_is_stateful", False) for one in (model, model.base_model)):
        raise NotShared("it has recurrent or linear-attention layers")
    kinds = set(getattr(text, "layer_types", None) or ())
    local = {str(one) for one in getattr(text, "attention_layers", None) or ()} - {"global"}
    if other := sorted((kinds | local) - {_FULL, _SLIDING}):
        raise NotShared(f"it has layers of another kind than full and sliding attention ({', '.join(other)})")
    return kinds


def _longest(text: Any) -> int | None:
    """Rotary frequencies may depend on the longest row of a batch, once that exceeds what was first trained with."""
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    every = [one for one in (given, *given.values()) if isinstance(one, Mapping)]
    lengths = [
        one.get("original_max_position_embeddings") or text.max_position_embeddings
        for one in every
        if (one.get("rope_type") or one.get("type")) in _BY_LENGTH
    ]
    return min(lengths, default=None)
