"""Where the policy's turns come from: one protocol, and its backend on a transformers model.

A request carries the *whole* context of its row; what a backend has kept of it from the turn before is its own
business. So the rollout never decodes and encodes again, and every backend can be compared with a plain re-prefill.

Ours, on purpose not `model.generate`: a turn continues the KV cache of the turn before it, a group's prompt is
prefilled once, rows that are done leave the batch, and each row draws from a generator named by its seed.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from srpo.rollout.kv_cache import CachedForward
from srpo.rollout.sampling import Sampling, Stops, draw, uniforms
from srpo.rollout.sampling_rules import without_adapter

Recorder = Callable[[list[tuple[int, ...]], Tensor], None]
"""(rows, positions [N, S]) after each forward of N sequences x S new columns: `rows[n]` are the request rows that
share sequence n (a group's prompt is forwarded once), `positions[n, s]` the token's index in its row's whole sequence,
-1 where the column holds none. Rows of a model without a reusable cache are forwarded again each turn."""


ALL_TOKENS = sys.maxsize
"""For `keep_tokens`: rows wait for their worlds, and every one of them comes back until it is over."""

Allowed = Callable[[Sequence[int]], Sequence[int] | None]
"""The ids of a turn so far -> those that may follow; None there: any. See `srpo.rollout.constrained`."""


@dataclass(frozen=True)
class Request:
    """One turn that is wanted."""

    row: int
    """Names the conversation: later turns of a row extend its earlier context."""
    ids: tuple[int, ...]
    """The whole context: prompt and all turns so far. At least one id."""
    seed: str
    max_tokens: int
    """At least 1."""
    choices: tuple[int, ...] | None = None
    """Allowed ids: the turn is then one of them. None: any text."""
    allowed: Allowed | None = None
    """Of this turn, where it is free text; None: the generator's."""
    told: "Callable[[Sample], object] | None" = None
    """Called as soon as the turn is written, by a backend that knows then: others of its batch may go on."""


@dataclass(frozen=True)
class Sample:
    """One turn that was written."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Nats, of each token under the distribution that it was drawn from (greedy: the untempered one)."""
    ended: bool
    """By an end token, a stop string or a choice; False: it was cut at `max_tokens`."""
    scores: tuple[float, ...] = ()
    """Of a request with choices: nats of each of them, in their order; they sum to probability 1."""


class Generator(Protocol):
    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """One turn per request, in their order. Rows that are left out may come back."""

    def over(self, rows: Sequence[int]) -> None:
        """These rows do not come back: their caches may be dropped."""

    def finish(self) -> None:
        """This process asks for nothing more; returns when no other process needs its help."""


@dataclass
class _Row:
    """One request while it is being written."""

    request: Request
    draws: Any
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    scores: tuple[float, ...] = ()

    @property
    def over(self) -> bool:
        return self.ended or len(self.ids) >= self.request.max_tokens

    @property
    def sample(self) -> Sample:
        return Sample(tuple(self.ids), tuple(self.logprobs), self.ended, self.scores)


@dataclass(frozen=True)
class _Kept:
    """What is cached of one row: its ids, and per layer keys and values [heads, len(ids), dim]."""

    ids: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]


def reuses_cache(model: Any) -> bool:
    """Whether a row's cache can be cut out, moved and continued: plain attention over all columns in every layer.

    Recurrent layers keep a state instead of columns, sliding windows drop columns: such models are prefilled again.
    """
    base = without_adapter(model)
    if getattr(base, "_is_stateful", False):
        return False
    layers = DynamicCache(config=base.config).layers
    return len(layers) > 0 and all(type(layer) is DynamicLayer for layer in layers)


class TransformersGenerator:
    """Turns from a causal language model of transformers, sampled by our own loop.

    The same seeds and contexts give the same samples whatever else is in the batch, up to the rounding of the forward
    pass (batched matrix products may differ in the last bit).

    Args:
        model: a causal LM, unwrapped, in the mode in which it shall be sampled (evaluation: no dropout).
        tokenizer: for stop strings and the padding id.
        eos_ids: ids that end a turn.
        allowed: which ids may follow in a turn; None: any.
        recorder: called after every forward, see `Recorder`.
        any_busy: where parameters are sharded, every process must enter every forward. A collective "is any process
            busy?", given whether this one is; None where processes are independent.
        keep_tokens: of rows that a batch leaves out, caches of so many tokens are kept, the latest used first; those
            of rows that are `over` are not.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        eos_ids: Sequence[int],
        allowed: Allowed | None = None,
        recorder: Recorder | None = None,
        any_busy: Callable[[bool], bool] | None = None,
        keep_tokens: int = 0,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.stops = Stops(tokenizer, sampling.stop)
        self.forwards = 0
        self._eos = frozenset(eos_ids)
        self._allowed = allowed
        self._recorder = recorder
        self._any_busy = any_busy
        self._keep_tokens = keep_tokens
        self._base = without_adapter(model)
        self._run = CachedForward(model, self._base)
        self._reuses = reuses_cache(model)
        self._kept: dict[int, _Kept] = {}
        pad, known = tokenizer.pad_token_id, self._base.config.get_text_config().vocab_size
        self._pad = pad if pad is not None and 0 <= pad < known else 0  # masked: any id will do

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        if not requests:
            return []
        rows = [_Row(request, uniforms(request.seed)) for request in requests]
        cache, mask, logits = self._prefill(requests)
        lengths = [len(request.ids) for request in requests]  # tokens in the cache, per row
        live = list(range(len(rows)))  # the rows of the batch, in its order
        while True:
            self._extend([rows[i] for i in live], logits)
            over = [b for b, i in enumerate(live) if rows[i].over]
            if self._reuses and over:
                for b in over:
                    self._keep(rows[live[b]], lengths[live[b]], cache, b, mask[b])
                going = [b for b, i in enumerate(live) if not rows[i].over]
                live = [live[b] for b in going]
                if live:
                    index = torch.tensor(going, device=mask.device)
                    cache.batch_select_indices(index)
                    mask = mask[index]
            if all(rows[i].over for i in live):
                break
            column = torch.tensor([[rows[i].ids[-1]] for i in live], device=mask.device)
            positions = torch.tensor([[-1 if rows[i].over else lengths[i]] for i in live], device=mask.device)
            mask = torch.cat([mask, torch.ones_like(column)], dim=1)
            cache, logits = self._forward(column, mask, positions, cache, [(rows[i].request.row,) for i in live])
            for i in live:
                lengths[i] += not rows[i].over
        return [row.sample for row in rows]

    def over(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._kept.pop(row, None)

    def finish(self) -> None:
        self._kept.clear()
        while self._any_busy is not None and self._any_busy(False):
            self.forwards += 1
            self._run(torch.tensor([[self._pad]], device=self._base.device))

    def _prefill(self, requests: Sequence[Request]) -> tuple[Any, Tensor, Tensor]:
        """(cache, mask [B, S] of its real columns, logits [B, V] of the next token); equal contexts share the work."""
        device = self._base.device
        sharing: dict[tuple[int, ...], list[Request]] = {}
        for request in requests:
            sharing.setdefault(request.ids, []).append(request)
        kept = [self._known(rs[0]) for rs in sharing.values()]
        self._forget({request.row for request in requests})
        known = [len(k.ids) for k in kept]
        pending = [ids[n:] for ids, n in zip(sharing, known, strict=True)]
        old, new = max(known), max(map(len, pending))
        mask = torch.zeros(len(pending), old + new, dtype=torch.long, device=device)
        ids = torch.full((len(pending), new), self._pad, device=device)
        positions = torch.full_like(ids, -1)
        for i, (n, rest) in enumerate(zip(known, pending, strict=True)):
            mask[i, old - n : old] = 1
            mask[i, -len(rest) :] = 1
            ids[i, -len(rest) :] = torch.tensor(rest, device=device)
            positions[i, -len(rest) :] = torch.arange(n, n + len(rest), device=device)
        cache = _stack(kept, old, self._base.config) if old else None
        rows = [tuple(r.row for r in rs) for rs in sharing.values()]
        cache, logits = self._forward(ids, mask, positions, cache, rows)
        if len(sharing) < len(requests) or not self._reuses:
            place = {ids: i for i, ids in enumerate(sharing)}
            index = torch.tensor([place[request.ids] for request in requests], device=device)
            if len(sharing) < len(requests):
                cache.reorder_cache(index)  # row i becomes row index[i] of it, recurrent states too
            mask, logits = mask[index], logits[index]
        return cache, mask, logits

    def _forget(self, rows: set[int]) -> None:
        """The caches of these rows, which come back longer, and of the others the oldest beyond `keep_tokens`."""
        room = self._keep_tokens
        for row, kept in reversed(list(self._kept.items())):
            room -= 0 if row in rows else len(kept.ids)
            if row in rows or room < 0:
                del self._kept[row]

    def _known(self, request: Request) -> _Kept:
        kept = self._kept.get(request.row, _Kept((), []))
        if kept.ids == request.ids[: len(kept.ids)] and len(kept.ids) < len(request.ids):
            return kept
        return _Kept((), [])

    def _keep(self, row: _Row, length: int, cache: Any, b: int, mask: Tensor) -> None:
        columns = mask.bool()
        ids = (*row.request.ids, *row.ids)[:length]
        layers = [(layer.keys[b][:, columns], layer.values[b][:, columns]) for layer in cache.layers]
        self._kept[row.request.row] = _Kept(ids, layers)

    def _extend(self, rows: list[_Row], logits: Tensor) -> None:
        going = [b for b, row in enumerate(rows) if not row.over]
        penalised = self.sampling.repetition_penalty != 1.0
        for b in going:
            if (choices := rows[b].request.choices) is not None:
                scores = logits[b, list(choices)].float() / (self.sampling.temperature or 1.0)
                rows[b].scores = tuple(torch.log_softmax(scores, dim=-1).tolist())
        ids, logprobs = draw(
            logits[going],
            self.sampling,
            [rows[b].draws.random() for b in going],
            [self._allowed_now(rows[b]) for b in going],
            [(*rows[b].request.ids, *rows[b].ids) for b in going] if penalised else None,
        )
        for b, token, logprob in zip(going, ids, logprobs, strict=True):
            row = rows[b]
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.ended = row.request.choices is not None or token in self._eos or self.stops.ended(row.ids)
            if row.over and row.request.told is not None:
                row.request.told(row.sample)

    def _allowed_now(self, row: _Row) -> Sequence[int] | None:
        allowed = row.request.allowed or self._allowed
        return row.request.choices if allowed is None or row.request.choices is not None else allowed(row.ids)

    def _forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, rows: list[tuple[int, ...]]
    ) -> tuple[Any, Tensor]:
        if self._any_busy is not None:
            self._any_busy(True)
        self.forwards += 1
        cache, logits = self._run(ids, mask, positions.clamp(min=0), cache)
        if self._recorder is not None:
            self._recorder(rows, positions)
        return cache, logits


def _stack(kept: Sequence[_Kept], width: int, config: Any) -> DynamicCache:
    """The rows' caches side by side, [n, heads, width, dim], their columns on the right; the holes are masked."""
    cache = DynamicCache(config=config)
    example = next(k for k in kept if k.layers)
    for number, layer in enumerate(cache.layers):
        stacked = []
        for part in (0, 1):
            like = example.layers[number][part]
            whole = like.new_zeros(len(kept), like.size(0), width, like.size(2))
            for i, k in enumerate(kept):
                if k.layers:
                    whole[i, :, width - len(k.ids) :] = k.layers[number][part]
            stacked.append(whole)
        layer.update(*stacked)
    return cache
