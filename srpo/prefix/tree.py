"""Rows of a micro-batch as trees of common beginnings: what two rows begin with alike is encoded once.

    rows                      columns of the packed row (depth first)         position = depth
    s s a a x x               s s a a x x y b z                               0 1 2 3 4 5 4 2 3
    s s a a y                 who sees whom: a column sees itself and its ancestors,
    s s b z                       sees(q, k)  <=>  k <= q <= last[k]          last[k]: end of the subtree of k

The common parts are found from the ids, wherever they come from: a system part over all groups, a prompt over its
group, turns, equal beginnings of completions, rows that are equal. A causal model says the same of a token whatever
follows it, so a token needs nothing but its ancestors and its own depth; the result for row b, token s is found in
column `columns[b, s]`. Attention costs the square of the width, so the rows may be cut into several packed rows, where
the cost of the mask says so.

What a pass costs is estimated from token counts, in floating-point operations:

    forward(R, N) = R N (2 P + N / 2 * 4 L A)  without a mask of ours: half of the square is causal, and skipped
                    R N (2 P + N * 4 L A * M)  with one

    P weights that a token meets in the decoder (of experts those of its own)     L layers     A = heads * head size
    M what masked attention costs more per operation than a product of matrices

Measured where it decides, at P=400, C=48, G=8: `scripts/benchmark_step.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_WIDTHS = 128  # widths that are tried at most
_BACKWARD = 3.0  # forward and backward in forwards
_MASKED = 2.0
"""M above. Masked attention of torch 2.13 on a CPU reads the whole mask, in smaller products."""
_FIXED = {"cpu": 1.5e8}
_FIXED_ELSEWHERE = 1e12
"""Operations in whose time a tree is built: about 5 ms."""

Cost = Callable[[int, int], float]
"""Of a forward over (rows, columns), in any unit."""


@dataclass(frozen=True)
class Layout:
    """B rows of S columns as R packed rows of N columns, all int64.

    Columns beyond the tree of a packed row see only themselves.
    """

    ids: Tensor
    """[R, N]"""
    positions: Tensor
    """[R, N] depth in the tree, from 0."""
    last: Tensor
    """[R, N] the last column below each column, itself where there is none."""
    columns: Tensor
    """[B, S] where each token is, in R * N; 0 at padding."""
    real: Tensor
    """[B, S] bool: not padding."""

    def sees(self, window: int | None = None) -> Tensor:
        """[R, 1, N, N] bool, query by key. `window`: a token sees that many, itself among them; None: all before."""
        column = torch.arange(self.ids.size(1), device=self.ids.device)
        query, key = column[:, None], column[None, :]
        seen = (key <= query) & (query <= self.last[:, None, :])
        if window is not None:
            seen &= self.positions[:, :, None] - self.positions[:, None, :] < window
        return seen.unsqueeze(1)

    def pack(self, values: Tensor) -> Tensor:
        """[B, S, ...] of each token -> [R, N, ...] of each column; tokens that share a column must agree. 0 beyond."""
        packed = values.new_zeros(self.ids.numel(), *values.shape[2:])
        real = self.real.to(values.device)
        packed[self.columns.to(values.device)[real]] = values[real]
        return packed.view(*self.ids.shape, *values.shape[2:])

    def unpack(self, values: Tensor) -> Tensor:
        """[R, N, ...] of each column -> [B, S, ...] of each token; padding gets another token's."""
        return values.flatten(0, 1)[self.columns.to(values.device)]


class Tree:
    """The common beginnings of B rows.

    Attributes:
        order: the rows, sorted, so that each begins as much like the one before as like any.
        lengths: tokens of each, in that order.
        common: how many it begins with that the one before it has too; 0 for the first.
    """

    def __init__(self, ids: Tensor, attention: Tensor, keys: Tensor | None = None) -> None:
        """`ids`, `attention` [B, S], padding anywhere; `keys` [B, S] int64 in place of the ids where tokens are told
        apart by more than these."""
        self._device, self._shape = ids.device, tuple(ids.shape)
        real = attention.bool()
        self._real = real
        self._places = [np.flatnonzero(row) for row in real.cpu().numpy()]
        self._ids = self._unpadded(ids)
        rows = self._ids if keys is None else self._unpadded(keys)
        listed = [row.tolist() for row in rows]
        self.order = sorted(range(len(rows)), key=listed.__getitem__)
        self.lengths = [len(listed[b]) for b in self.order]
        self.common = [0, *(_common(rows[a], rows[b]) for a, b in pairwise(self.order))][: len(rows)]

    def cut(self, cost: Cost) -> list[range]:
        """Runs of `order`, each a packed row, at the least cost of all of them as wide as the widest."""
        sizes: set[int] = set()
        for start in range(len(self.order)):
            width = 0
            for k in range(start, len(self.order)):
                width += self._new(k, k == start)
                sizes.add(width)
        widest = max(self.lengths)
        tried = sorted(size for size in sizes if size >= widest)
        step = -(-len(tried) // _WIDTHS)
        found = [self._filled(size) for size in {*tried[::step], tried[-1]}]
        return min(found, key=lambda runs: (cost(len(runs), self.width(runs)), len(runs)))

    def width(self, runs: Sequence[range]) -> int:
        """Columns of the widest packed row."""
        return max(sum(self._new(k, k == run.start) for k in run) for run in runs)

    def lay_out(self, runs: Sequence[range]) -> Layout:
        """Write the packed rows."""
        shape = len(runs), self.width(runs)
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        last = np.tile(np.arange(shape[1]), (shape[0], 1))
        columns = np.zeros(self._shape, np.int64)
        for r, run in enumerate(runs):
            end, path = 0, np.empty(0, np.int64)  # path: the columns of the row before, from the root
            for k in run:
                b, shared = self.order[k], 0 if k == run.start else self.common[k]
                last[r, path[shared:]] = end - 1
                new = np.arange(end, end + self.lengths[k] - shared)
                path = np.concatenate([path[:shared], new])
                end += len(new)
                ids[r, new] = self._ids[b][shared:]
                positions[r, new] = np.arange(shared, self.lengths[k])
                columns[b, self._places[b]] = r * shape[1] + path
            last[r, path] = end - 1
        made = [torch.from_numpy(one).to(self._device) for one in (ids, positions, last, columns)]
        return Layout(made[0], made[1], made[2], made[3], self._real)

    def _unpadded(self, values: Tensor) -> list[np.ndarray]:
        return [row[at] for row, at in zip(values.cpu().numpy(), self._places, strict=True)]

    def _new(self, k: int, first: bool) -> int:
        return self.lengths[k] - (0 if first else self.common[k])

    def _filled(self, width: int) -> list[range]:
        """As many rows as fit, one packed row after the other."""
        runs, start, filled = [], 0, 0
        for k in range(len(self.order)):
            more = self._new(k, k == start)
            if k > start and filled + more > width:
                runs.append(range(start, k))
                start, filled, more = k, 0, self.lengths[k]
            filled += more
        return [*runs, range(start, len(self.order))]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many elements two rows begin with alike."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


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
