"""One forward pass with a KV cache, whatever transformers and the model's family call it; caches cut out and stacked.

transformers 5.24 renamed the argument and the output `past_key_values` to `cache`; state-space families called theirs
`cache_params` before. An argument that a model does not take is an error here, never left out: a dropped cache or mask
gives wrong tokens without a sign.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from srpo.rollout.sampling_rules import without_adapter
from srpo.trainer.forward_checks import padding_matters, rounding

logger = logging.get_logger(__name__)

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""transformers >= 5.24; before; state-space families before."""


def returned_cache(output: Any) -> Any:
    """The cache that a forward pass gave back.

    Raises:
        RuntimeError: it gave none, so that the next token would be computed without its context.
    """
    found = next((c for name in CACHE_NAMES if (c := getattr(output, name, None)) is not None), None)
    if found is None:
        raise RuntimeError(f"{type(output).__name__} holds no KV cache ({', '.join(CACHE_NAMES)}): cannot generate")
    return found


def _takes(model: Any) -> tuple[set[str], bool]:
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name for p in parameters}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def cache_argument(model: Any) -> str:
    """The name under which the model's `forward` takes its cache.

    Raises:
        ValueError: it names none of those that are known, so a cache would be lost on the way.
    """
    names, _ = _takes(model)
    for name in CACHE_NAMES:
        if name in names:
            return name
    raise ValueError(
        f"{type(model).__name__}.forward takes no KV cache under a known name ({', '.join(CACHE_NAMES)}): "
        "such a model cannot be sampled turn by turn"
    )


class CachedForward:
    """Forward passes of a causal language model with its cache: last-token logits and the cache that comes back.

    Args:
        model: what is called; may be a wrapper (PEFT), which hands its arguments on.
        base: the transformers model inside, whose `forward` says what is taken.

    Raises:
        ValueError: `base` takes no cache or no attention mask, or it takes no position ids and its logits depend on
            padding or on what is cached (which is tried here, as in `srpo.trainer.forward_checks`).
    """

    def __init__(self, model: Any, base: Any):
        self.model, self.base = model, base
        self._cache = cache_argument(base)
        names, open_ended = _takes(base)
        self._hidden = {"input_ids", "attention_mask", "use_cache"} - names  # these can arrive through **kwargs only
        if self._hidden and not open_ended:
            raise ValueError(f"{type(base).__name__}.forward does not take {', '.join(sorted(self._hidden))}")
        if "attention_mask" in self._hidden:
            raise ValueError(f"{type(base).__name__} takes no attention_mask: rows of unequal length have no batch")
        self._positions = "position_ids" in names
        # State-space models keep no columns: their mask is of the new tokens, and a longer one would be broadcast.
        self._new_columns_only = not self._positions and getattr(base, "_is_stateful", False)
        self._keeps = "logits_to_keep" in names
        if not self._keeps:
            logger.warning_once(
                f"{type(base).__name__} takes no logits_to_keep: every prefill computes the logits of all positions"
            )
        if not self._positions:
            self._try_without_positions()

    def __call__(
        self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, cache: Any = None
    ) -> tuple[Any, Tensor]:
        """(cache, logits [B, V] of the token after the last column).

        Args:
            ids: [B, S] new tokens, padded on the left.
            mask: [B, columns in the cache + S], 1 where a column counts; None: all do.
            positions: [B, S]; None: counted from the cache.
            cache: what the call before returned; None at the start.

        Raises:
            RuntimeError: the model gave no cache back.
        """
        output = self._run(ids, mask, positions, cache)
        return returned_cache(output), output.logits[:, -1]

    def _run(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any) -> Any:
        if mask is not None and self._new_columns_only:
            mask = mask[:, -ids.size(1) :]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, self._cache: cache, "use_cache": True}
        if self._positions:
            inputs["position_ids"] = positions
        if self._keeps:
            inputs["logits_to_keep"] = 1
        return self.model(**inputs)

    @torch.no_grad()
    def _try_without_positions(self) -> None:
        """A model without position ids must find positions from mask and cache (or have none): see that it does."""

        def last_logits(ids: Tensor, mask: Tensor) -> Tensor:
            return self._run(ids, mask, None, None).logits[:, -1]

        within = rounding(self.base)
        padding = padding_matters(last_logits, self.base.config, self.base.device, within)
        ids, mask = (torch.tensor([row], device=self.base.device) for row in ([0, 1, 2], [0, 1, 1]))
        alone = last_logits(ids[:, 1:], mask[:, 1:])
        before = returned_cache(self._run(ids[:, :2], mask[:, :2], None, None))
        cached = self._run(ids[:, 2:], mask, None, before).logits[:, -1]
        forgets = not torch.allclose(alone, cached, rtol=within, atol=within * float(alone.abs().max()))
        for wrong, what in ((padding, "reads padding as text"), (forgets, "does not continue its cache")):
            if wrong:
                raise ValueError(
                    f"{type(self.base).__name__} takes no position_ids and {what}: rows of unequal length would be "
                    "sampled wrongly; use another model"
                )


def reuses_cache(model: Any) -> bool:
    """Whether a row's cache can be cut out, moved and continued: plain attention over all columns in every layer.

    Recurrent layers keep a state instead of columns, sliding windows drop columns: such models are prefilled again.
    """
    base = without_adapter(model)
    if getattr(base, "_is_stateful", False):
        return False
    layers = DynamicCache(config=base.config).layers
    return len(layers) > 0 and all(type(layer) is DynamicLayer for layer in layers)


@dataclass(frozen=True)
class Kept:
    """What is cached of one row: its ids, and per layer keys and values [heads, len(ids), dim]."""

    ids: tuple[int, ...] = ()
    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    def first(self, n: int) -> "Kept":
        """Of the first `n` ids."""
        return Kept(self.ids[:n], tuple((keys[:, :n], values[:, :n]) for keys, values in self.layers))

    def alone(self) -> "Kept":
        """The same in memory of its own: a part of a batch's cache keeps all of it."""
        return Kept(self.ids, tuple((keys.clone(), values.clone()) for keys, values in self.layers))


def cut(ids: Sequence[int], cache: Any, b: int, mask: Tensor) -> Kept:
    """Row `b` of a cache, mostly a view of it; `mask` [S] is 1 at the columns of its `ids`."""
    n = len(ids)
    columns: Any = mask.bool()
    if bool(columns[-n:].all()):  # as ever, but where there is padding in the middle
        columns = slice(len(mask) - n, None)
    return Kept(tuple(ids), tuple((layer.keys[b][:, columns], layer.values[b][:, columns]) for layer in cache.layers))


def stacked(kept: Sequence[Kept], config: Any) -> tuple[DynamicCache, Tensor]:
    """The rows' caches side by side, [n, heads, width, dim], their columns on the right, and the mask [n, width]."""
    width = max(len(k.ids) for k in kept)
    example = next(k for k in kept if k.ids)
    mask = torch.zeros(len(kept), width, dtype=torch.long, device=example.layers[0][0].device)
    for i, k in enumerate(kept):
        mask[i, width - len(k.ids) :] = 1
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() for _ in cache.layers]
    for number, layer in enumerate(cache.layers):
        both = []
        for part in (0, 1):
            like = example.layers[number][part]
            whole = like.new_zeros(len(kept), like.size(0), width + ROOM, like.size(2))
            for i, k in enumerate(kept):
                if k.ids:
                    whole[i, :, width - len(k.ids) : width] = k.layers[number][part]
            both.append(whole)
        layer.fill(*both, width)
    return cache, mask


ROOM = 64
"""Columns by which a cache grows."""


class RoomyLayer(DynamicLayer):
    """Writes a new column into room that it has; a `DynamicLayer` copies all columns for each new one.

    What `update` returns and `keys` and `values` show are views of the columns that are filled.
    """

    def fill(self, keys: Tensor, values: Tensor, width: int) -> None:
        """Take [n, heads, width + room, dim] of which `width` columns are filled."""
        self.lazy_initialization(keys, values)
        self._whole = [keys, values]
        self._show(width)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [n, heads, new, dim]; all columns, with them."""
        width, new = self.keys.size(-2), key_states.size(-2)
        if width + new > self._whole[0].size(-2):
            self._whole = [_with_room(shown, new + ROOM) for shown in (self.keys, self.values)]
        for whole, states in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, width : width + new] = states
        self._show(width + new)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i]; rows that are not named are gone."""
        width = self.keys.size(-2)
        self._whole = [_with_room(shown[beam_idx], ROOM) for shown in (self.keys, self.values)]
        self._show(width)

    def _show(self, width: int) -> None:
        self.keys, self.values = (whole[:, :, :width] for whole in self._whole)


def _with_room(columns: Tensor, room: int) -> Tensor:
    n, heads, width, dim = columns.shape
    whole = columns.new_empty(n, heads, width + room, dim)
    whole[:, :, :width] = columns
    return whole
