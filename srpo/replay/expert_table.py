"""Which experts a MoE model used, as data: layout, alignment, validation and flip statistics. Pure tensor functions.

Layout
    ``[B, S, L, k]`` int16: batch, columns of ``input_ids``, MoE routers in the order of the layers, experts per token.
    Row t holds the experts that were used when token t was *fed* to the model, so it acts on the log-probability of
    token t + 1. A row of -1 means "route natively": pads, the last sampled token (it is never fed while sampling),
    whatever an engine did not report. A row is -1 as a whole or not at all.
Ragged
    One ``[T, L, k]`` per sequence with a row for each real token and none for pads. It does not depend on how a batch
    was padded; `pad_routes` lays it out for any other padding.
Why int16
    Expert ids go to 511 in current models and -1 needs a code of its own, so 8 bits are too few from 256 experts on.
    NCCL has no int16: send ``routes.view(torch.uint8)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NATIVE = -1
"""Expert id of a row that the router routes by itself."""


@dataclass(frozen=True)
class RouterSpec:
    """What a model's routes look like.

    layers: decoder layer of each router, ascending. num_layers: decoder layers in all, dense ones too.
    top_k: experts per token. num_experts: experts to choose from (LongCat's zero experts included).
    """

    layers: tuple[int, ...]
    num_layers: int
    top_k: int
    num_experts: int


def check_routes(routes: Tensor, spec: RouterSpec) -> None:
    """Refuse routes that a model would accept silently or crash on without a word.

    Args:
        routes: integers ``[..., L, k]``.

    Raises:
        ValueError: wrong L or k; not integers; an id outside -1..E-1; a row that is partly -1; an expert twice in a
            row (an all-zero row is one: buffers that nobody filled look like this, and Hugging Face experts run on
            them without an error). With k = 1 there are no duplicates; a table of several rows, all zero, is refused.
    """
    if routes.dtype not in (torch.int16, torch.int32, torch.int64):
        raise ValueError(f"routes must be int16, int32 or int64 (8 bits are too few for ids), got {routes.dtype}")
    if routes.shape[-2:] != (len(spec.layers), spec.top_k):
        raise ValueError(
            f"routes end in {tuple(routes.shape[-2:])}, but the model has {len(spec.layers)} routers that choose "
            f"{spec.top_k} experts each"
        )
    if routes.numel() == 0:
        return
    wrong = (routes < NATIVE) | (routes >= spec.num_experts)
    _refuse(wrong.any(-1), routes, f"holds an id outside 0..{spec.num_experts - 1} (or -1 for a native row)")
    native = routes < 0
    _refuse(native.any(-1) & ~native.all(-1), routes, "is -1 in part; a row is native as a whole")
    if spec.top_k == 1:
        if routes.numel() > len(spec.layers) and bool((routes == 0).all()):
            raise ValueError("every route is expert 0: a buffer that nobody filled")
        return
    ordered = routes.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    _refuse(twice.any(-1), routes, "names an expert twice (rows of zeros are what a buffer that nobody filled holds)")


def _refuse(bad: Tensor, routes: Tensor, what: str) -> None:
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{int(bad.sum())} of {bad.numel()} rows of the routes: row {place} (..., token, layer) {what}: "
            f"{routes[tuple(place)].tolist()}"
        )


def pad_routes(rows: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Ragged -> ``[B, S, L, k]`` in the layout of an attention mask ``[B, S]``, pads -1.

    Raises:
        ValueError: a sequence has another number of rows than real tokens.
    """
    real = mask.bool()
    tokens = real.sum(1).tolist()
    if [len(row) for row in rows] != tokens:
        found = [(i, len(row)) for i, row in enumerate(rows) if i >= len(tokens) or len(row) != tokens[i]]
        raise ValueError(f"routes with (sequence, rows) {found[:3]} do not fit a mask with {tokens} real tokens")
    routes = rows[0].new_full((*mask.shape, *rows[0].shape[1:]), NATIVE)
    routes[real.to(routes.device)] = torch.cat(list(rows)).to(routes.device)
    return routes


def fit_rows(rows: Tensor, tokens: int) -> Tensor:
    """``[T, L, k]`` with T <= tokens -> ``[tokens, L, k]``; what is missing at the end is -1."""
    if len(rows) > tokens:
        raise ValueError(f"{len(rows)} rows of routes for a sequence of {tokens} tokens")
    return torch.cat([rows, rows.new_full((tokens - len(rows), *rows.shape[1:]), NATIVE)])


def append_routes(held: Tensor, new: Tensor, start: int) -> Tensor:
    """Routes of a conversation grow and are never rewritten.

    A later turn's prefill routes the earlier tokens again, perhaps differently; the rows that produced the stored
    log-probabilities are the ones to keep.

    Args:
        held: ``[T0, L, k]``, the tokens fed so far (no trailing -1 for the last sampled token: it is fed next).
        new: ``[T1, L, k]``.
        start: token that the first new row belongs to.

    Raises:
        ValueError: the new rows leave a gap after the held ones or overlap them.
    """
    if start != len(held):
        raise ValueError(f"the new routes start at token {start}, but {len(held)} rows are held")
    return torch.cat([held, new])


def flip_statistics(lost: Tensor, top_k: int, mask: Tensor | None = None) -> dict[str, Tensor]:
    """How far native routing has moved from the replayed one.

    Args:
        lost: ``[B, S, L]``, native experts that the replayed set lacks, 0..k; -1 where the row was native.
        mask: ``[B, S]``, tokens that count; all if None.

    Returns:
        ``flip_rate``: share of (token, layer) whose sets differ. ``per_layer`` ``[L]``: the same by layer.
        ``slot_flip``: share of expert slots that differ. ``token_any_layer``: share of tokens that differ in a layer.
        ``fallback_fraction``: share of counted (token, layer) that were not replayed. NaN where nothing counts.
    """
    counted = lost[mask.bool().to(lost.device)] if mask is not None else lost.flatten(0, 1)
    live = counted >= 0
    flips = (counted > 0).double()
    rows = live.sum(0).double()
    tokens = live.any(-1).sum().double()
    return {
        "flip_rate": flips.sum() / rows.sum(),
        "slot_flip": counted.clamp(min=0).sum().double() / (top_k * rows.sum()),
        "token_any_layer": flips.any(-1).sum().double() / tokens,
        "fallback_fraction": 1 - live.double().mean(),
        "per_layer": flips.sum(0) / rows,
    }


class RowRecorder:
    """Collects routes by sequence and position from forwards whose rows come and go, as our own decoding runs them.

    The model's hooks `put` the routes of each forward; the decoding loop then says, by calling this object, which
    tokens of which sequences they were (`srpo.rollout.turns.Recorder`). A forward that nobody claims is dropped:
    processes that wait for others run some under sharding.
    """

    def __init__(self) -> None:
        self._waiting: Tensor | None = None
        self._steps: list[tuple[list[tuple[int, ...]], Tensor, Tensor]] = []

    def put(self, routes: Tensor) -> None:
        """Routes ``[N, S, L, k]`` of a forward."""
        self._waiting = routes

    def __call__(self, rows: Sequence[Sequence[int]], positions: Tensor) -> None:
        """Say what the last forward was.

        Args:
            rows: the sequences of each row of the forward; several where they share it (the prompt of a group).
            positions: ``[N, S]``, index of each token in its sequence, -1 where the column holds none.

        Raises:
            RuntimeError: no forward of the model was recorded since the last call.
            ValueError: other sizes than the forward's.
        """
        if self._waiting is None:
            raise RuntimeError("no forward of the recorded model ended since the recorder was last called")
        if self._waiting.shape[:2] != positions.shape or len(rows) != len(positions):
            raise ValueError(
                f"the forward was {tuple(self._waiting.shape[:2])} (sequences, columns), but {len(rows)} rows and "
                f"positions of {tuple(positions.shape)} were reported"
            )
        self._steps.append(([tuple(row) for row in rows], positions.detach(), self._waiting))
        self._waiting = None

    def rows(self, lengths: Mapping[int, int]) -> list[Tensor]:
        """Ragged routes.

        A position that was fed again (a context prefilled anew) keeps its first row: the one that its log-probability
        was sampled with.

        Args:
            lengths: sequence -> its tokens, in the order of the result.

        Raises:
            RuntimeError: no forward was reported.
            ValueError: a token was never fed although a later one was, or a position lies behind the end.
        """
        if not self._steps:
            raise RuntimeError("no forward was reported to the recorder")
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {sequence: [] for sequence in lengths}
        for owners, positions, routes in self._steps:
            for one, place, table in zip(owners, positions.cpu(), routes.cpu(), strict=True):
                for sequence in one:
                    if sequence in parts:
                        parts[sequence].append((place, table))
        return [self._assemble(sequence, parts[sequence], tokens) for sequence, tokens in lengths.items()]

    def _assemble(self, sequence: int, parts: list[tuple[Tensor, Tensor]], tokens: int) -> Tensor:
        if not parts:
            raise ValueError(f"sequence {sequence} was never fed while recording")
        place = torch.cat([place for place, _ in parts])
        order = place.argsort(stable=True)
        first = place[order] >= 0
        first[1:] &= place[order][1:] != place[order][:-1]
        order = order[first]
        if not torch.equal(place[order], torch.arange(len(order))) or len(order) > tokens:
            raise ValueError(
                f"sequence {sequence} has {tokens} tokens, but those at {place[order].tolist()[-3:]} were the last of "
                f"{len(order)} fed: a forward was not reported, or rows were mixed up"
            )
        return fit_rows(torch.cat([table for _, table in parts])[order], tokens)
