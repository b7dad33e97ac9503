"""KV caches by row: what is kept of a context, each distinct prompt fed once, caches cut out and stacked."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from srpo.rollout.sampling_rules import without_adapter

Ids = tuple[int, ...]
Forward = Callable[[Tensor, Tensor, Tensor, Any, list[tuple[int, ...]]], tuple[Any, Tensor]]
"""(ids [N, S], mask [N, columns in cache + S], positions [N, S], cache, rows of each) -> (cache, logits [N, V])"""

_LEAST_SHARED = 32
"""Tokens that prompts must have in common for a forward of their own."""
_LEAST_FORWARD = 512
"""Tokens below which a forward is not split for the sake of less padding."""


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


class Contexts:
    """The contexts of a generator's rows, and what is cached of them from one call to the next.

    Args:
        base: the transformers model.
        forward: of the generator.
        pad: an id for padding.
        keep_tokens: as of `TransformersGenerator`.
        shares_openings: feed what all prompts begin with once for all of them. Not where a recorder wants to be told
            of each row's tokens.
    """

    def __init__(self, base: Any, forward: Forward, pad: int, keep_tokens: int | None, shares_openings: bool):
        self.base, self._forward, self._pad = base, forward, pad
        self._keep_tokens, self._shares_openings = keep_tokens, shares_openings
        self.reuses = reuses_cache(base)
        self._kept: dict[int, Kept] = {}
        self._opening = Kept()
        """What the prompts before began with."""
        self._before: Ids | None = None
        """The last prompt before."""

    def prefill(self, contexts: Sequence[tuple[int, Ids]]) -> tuple[Any, Tensor, Tensor]:
        """Of each (row, its whole context): (cache, mask [B, S] of its real columns, logits [B, V] of the next token);
        equal contexts share the work."""
        sharing: dict[Ids, list[int]] = {}
        for row, ids in contexts:
            sharing.setdefault(ids, []).append(row)
        place = {ids: i for i, ids in enumerate(sharing)}
        index = torch.tensor([place[ids] for _, ids in contexts], device=self.base.device)
        kept = dict.fromkeys(sharing, Kept())
        as_it_comes = not self.reuses
        if self.reuses:
            kept = {ids: self._known(rows[0], ids) for ids, rows in sharing.items()}
            self._forget({row for row, _ in contexts})
            kept |= self._opened({ids: rows for ids, rows in sharing.items() if not kept[ids].ids})
            _, *others = {(len(kept[ids].ids), len(ids)) for ids in sharing}
            as_it_comes = not others  # nothing is padded
        if as_it_comes:
            cache, mask, logits = self._feed(sharing, kept)
            if len(sharing) < len(contexts):
                cache.reorder_cache(index)
            return cache, mask[index], logits[index]
        found: dict[Ids, Kept] = {}
        last: dict[Ids, Tensor] = {}
        for part in _of_a_length({ids: len(ids) - len(kept[ids].ids) for ids in sharing}):
            cache, mask, logits = self._feed({ids: sharing[ids] for ids in part}, kept)
            for b, ids in enumerate(part):
                found[ids], last[ids] = cut(ids, cache, b, mask[b]), logits[b]
        cache, mask = stacked([found[ids] for _, ids in contexts], self.base.config)
        return cache, mask, torch.stack([last[ids] for ids in sharing])[index]

    def keep(self, row: int, ids: Ids, cache: Any, b: int, mask: Tensor) -> None:
        """A row that is over, place `b` of the batch, until it comes back."""
        if self.reuses and self._keep_tokens is not None:
            self._kept[row] = cut(ids, cache, b, mask).alone()

    def drop(self, rows: Iterable[int]) -> None:
        """Rows that do not come back."""
        for row in rows:
            self._kept.pop(row, None)

    def drop_all(self) -> None:
        """No row comes back."""
        self._kept.clear()

    def _feed(self, sharing: dict[Ids, list[int]], kept: dict[Ids, Kept]) -> tuple[Any, Tensor, Tensor]:
        """One forward of contexts, each after what is kept of it: (cache, mask [N, S], logits [N, V])."""
        device = self.base.device
        known = [kept[ids] for ids in sharing]
        cache, before = stacked(known, self.base.config) if any(k.ids for k in known) else (None, None)
        pending = [ids[len(k.ids) :] for ids, k in zip(sharing, known, strict=True)]
        ids = torch.full((len(pending), max(map(len, pending))), self._pad, device=device)
        positions = torch.full_like(ids, -1)
        for i, (k, rest) in enumerate(zip(known, pending, strict=True)):
            ids[i, -len(rest) :] = torch.tensor(rest, device=device)
            positions[i, -len(rest) :] = torch.arange(len(k.ids), len(k.ids) + len(rest), device=device)
        mask = (positions >= 0).long()
        mask = mask if before is None else torch.cat([before, mask], dim=1)
        cache, logits = self._forward(ids, mask, positions, cache, [tuple(rows) for rows in sharing.values()])
        return cache, mask, logits

    def _opened(self, fresh: dict[Ids, list[int]]) -> dict[Ids, Kept]:
        """What is known of prompts of which nothing is kept: their common beginning, which is forwarded once.

        That of the call before is used again, and what may be common with a call to come is looked for.
        """
        if not self._shares_openings:
            self._opening, self._before = Kept(), None
        if not fresh:
            return {}
        texts = [*fresh, *([] if self._before is None else [self._before])]
        self._before = next(reversed(fresh))
        n = min(_common(min(texts), max(texts)), min(map(len, fresh)) - 1)
        common = texts[0][:n]
        if len(texts) > 1 and n >= _LEAST_SHARED and self._opening.ids[:n] != common:
            everyone = [row for rows in fresh.values() for row in rows]
            cache, mask, _ = self._feed({common: everyone}, {common: Kept()})
            self._opening = cut(common, cache, 0, mask[0])
        found = {ids: min(_common(ids, self._opening.ids), len(ids) - 1) for ids in fresh}
        return {ids: self._opening.first(n) for ids, n in found.items() if n >= _LEAST_SHARED}

    def _forget(self, rows: set[int]) -> None:
        """The caches of these rows, which come back longer, and of the others the oldest beyond `keep_tokens`."""
        room = self._keep_tokens or 0
        for row, kept in reversed(list(self._kept.items())):
            room -= 0 if row in rows else len(kept.ids)
            if row in rows or room < 0:
                del self._kept[row]

    def _known(self, row: int, ids: Ids) -> "Kept":
        kept = self._kept.get(row, Kept())
        return kept if kept.ids == ids[: len(kept.ids)] and len(kept.ids) < len(ids) else Kept()


def reuses_cache(model: Any) -> bool:
    """Whether a row's cache can be cut out, moved and continued: plain attention over all columns in every layer.

    Recurrent layers keep a state instead of columns, sliding windows drop columns: such models are prefilled again.
    """
    base = without_adapter(model)
    if getattr(base, "_is_stateful", False):
        return False
    layers = DynamicCache(config=base.config).layers
    return len(layers) > 0 and all(type(layer) is DynamicLayer for layer in layers)


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
    for number, layer in enumerate(cache.layers):
        both = []
        for part in (0, 1):
            like = example.layers[number][part]
            whole = like.new_zeros(len(kept), like.size(0), width, like.size(2))
            for i, k in enumerate(kept):
                if k.ids:
                    whole[i, :, width - len(k.ids) :] = k.layers[number][part]
            both.append(whole)
        layer.lazy_initialization(*both)
        layer.keys, layer.values = both
    return cache, mask


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Ids that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _of_a_length(tokens: dict[tuple[int, ...], int]) -> list[list[tuple[int, ...]]]:
    """Contexts in parts of a similar number of tokens to feed, so that little of a part is padding."""
    parts: list[list[tuple[int, ...]]] = []
    for ids in sorted(tokens, key=lambda ids: -tokens[ids]):
        longest = tokens[parts[-1][0]] if parts else 0
        if parts and (tokens[ids] >= 0.75 * longest or longest * len(parts[-1]) < _LEAST_FORWARD):
            parts[-1].append(ids)
        else:
            parts.append([ids])
    return [[ids for ids in tokens if ids in part] for part in map(set, parts)]
