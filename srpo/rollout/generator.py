"""Where the policy's turns come from: one protocol, and its backend on a transformers model.

A request carries the *whole* context of its row; what a backend has kept of it from the turn before is its own
business. So the rollout never decodes and encodes again, and every backend can be compared with a plain re-prefill.

Ours, on purpose not `model.generate`: a turn continues the KV cache of the turn before it, each distinct prompt is
prefilled once and what all prompts begin with once for all of them, rows that are done leave the batch, and each row
draws from a generator named by its seed.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from srpo.rollout.kv_cache import CachedForward, Kept, cut, reuses_cache, stacked
from srpo.rollout.sampling import Sampling, Stops, draw, uniforms
from srpo.rollout.sampling_rules import without_adapter

Recorder = Callable[[list[tuple[int, ...]], Tensor], None]
"""(rows, positions [N, S]) after each forward of N sequences x S new columns: `rows[n]` are the request rows that
share sequence n (a group's prompt is forwarded once, what all prompts begin with too), `positions[n, s]` the token's
index in its row's whole sequence, -1 where the column holds none. Rows of a model without a reusable cache are
forwarded again each turn."""


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
    """Nats, of each token as a trainer scores it (`srpo.rollout.sampling.draw`; greedy: untempered). vLLM knows them
    under what its cuts left only."""
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


_LEAST_SHARED = 32
"""Tokens that prompts must have in common for a forward of their own."""
_LEAST_FORWARD = 512
"""Tokens below which a forward is not split for the sake of less padding."""
_LEAVE_TOGETHER = 0.25
"""Share of a batch that is over when the cache is copied without it."""


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
            of rows that are `over` are not. None: no row comes back, and nothing
            is kept.
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
        keep_tokens: int | None = 0,
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
        self._kept: dict[int, Kept] = {}
        self._opening = Kept()
        """What the prompts before began with."""
        self._before: tuple[int, ...] | None = None
        """The last prompt before."""
        pad, known = tokenizer.pad_token_id, self._base.config.get_text_config().vocab_size
        self._pad = pad if pad is not None and 0 <= pad < known else 0  # masked: any id will do

    @property
    def in_step(self) -> bool:
        """Whether processes must ask equally often, as they share their weights."""
        return self._any_busy is not None

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
            if len(over) == len(live) or len(over) >= _LEAVE_TOGETHER * len(live):
                self._keep([(b, rows[live[b]], lengths[live[b]]) for b in over], cache, mask)
                going = [b for b, i in enumerate(live) if not rows[i].over]
                live = [live[b] for b in going]
                if not live:
                    break
                index = torch.tensor(going, device=mask.device)
                cache.reorder_cache(index)  # row i becomes row index[i] of it, recurrent states too
                mask = mask[index]
            column = torch.tensor([[rows[i].ids[-1]] for i in live], device=mask.device)
            positions = torch.tensor([[-1 if rows[i].over else lengths[i]] for i in live], device=mask.device)
            mask = torch.cat([mask, (positions >= 0).long()], dim=1)
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
        sharing: dict[tuple[int, ...], list[Request]] = {}
        for request in requests:
            sharing.setdefault(request.ids, []).append(request)
        place = {ids: i for i, ids in enumerate(sharing)}
        index = torch.tensor([place[request.ids] for request in requests], device=self._base.device)
        if not self._reuses:
            kept = dict.fromkeys(sharing, Kept())
            cache, mask, logits = self._feed(sharing, kept)
            if len(sharing) < len(requests):
                cache.reorder_cache(index)
            return cache, mask[index], logits[index]
        kept = {ids: self._known(rs[0]) for ids, rs in sharing.items()}
        self._forget({request.row for request in requests})
        kept |= self._opened({ids: rs for ids, rs in sharing.items() if not kept[ids].ids})
        known, *others = {(len(kept[ids].ids), len(ids)) for ids in sharing}
        if known[0] and not others:  # nothing is padded: the forward's own cache is what is wanted
            cache, mask, logits = self._feed(sharing, kept)
            if len(sharing) < len(requests):
                cache.reorder_cache(index)
            return cache, mask[index], logits[index]
        found: dict[tuple[int, ...], Kept] = {}
        rows: dict[tuple[int, ...], Tensor] = {}
        for part in _of_a_length({ids: len(ids) - len(kept[ids].ids) for ids in sharing}):
            cache, mask, logits = self._feed({ids: sharing[ids] for ids in part}, kept)
            for b, ids in enumerate(part):
                found[ids], rows[ids] = cut(ids, cache, b, mask[b]), logits[b]
        cache, mask = stacked([found[request.ids] for request in requests], self._base.config)
        return cache, mask, torch.stack([rows[ids] for ids in sharing])[index]

    def _feed(
        self, sharing: dict[tuple[int, ...], list[Request]], kept: dict[tuple[int, ...], Kept]
    ) -> tuple[Any, Tensor, Tensor]:
        """One forward of contexts, each after what is kept of it: (cache, mask [N, S], logits [N, V])."""
        device = self._base.device
        known = [kept[ids] for ids in sharing]
        cache, before = stacked(known, self._base.config) if any(k.ids for k in known) else (None, None)
        pending = [ids[len(k.ids) :] for ids, k in zip(sharing, known, strict=True)]
        ids = torch.full((len(pending), max(map(len, pending))), self._pad, device=device)
        positions = torch.full_like(ids, -1)
        for i, (k, rest) in enumerate(zip(known, pending, strict=True)):
            ids[i, -len(rest) :] = torch.tensor(rest, device=device)
            positions[i, -len(rest) :] = torch.arange(len(k.ids), len(k.ids) + len(rest), device=device)
        mask = (positions >= 0).long()
        mask = mask if before is None else torch.cat([before, mask], dim=1)
        rows = [tuple(request.row for request in requests) for requests in sharing.values()]
        cache, logits = self._forward(ids, mask, positions, cache, rows)
        return cache, mask, logits

    def _opened(self, fresh: dict[tuple[int, ...], list[Request]]) -> dict[tuple[int, ...], Kept]:
        """What is known of prompts of which nothing is kept: their common beginning, which is forwarded once.

        That of the call before is used again, and what may be common with a call to come is looked for; not where a
        recorder wants to be told of each row's tokens.
        """
        if self._recorder is not None:
            self._opening, self._before = Kept(), None
        if not fresh:
            return {}
        texts = [*fresh, *([] if self._before is None else [self._before])]
        self._before = next(reversed(fresh))
        n = min(_common(min(texts), max(texts)), min(map(len, fresh)) - 1)
        common = texts[0][:n]
        if len(texts) > 1 and n >= _LEAST_SHARED and self._opening.ids[:n] != common:
            everyone = [request for requests in fresh.values() for request in requests]
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

    def _known(self, request: Request) -> Kept:
        kept = self._kept.get(request.row, Kept())
        if kept.ids == request.ids[: len(kept.ids)] and len(kept.ids) < len(request.ids):
            return kept
        return Kept()

    def _keep(self, over: list[tuple[int, _Row, int]], cache: Any, mask: Tensor) -> None:
        """Rows that are over, each with its place in the batch and the tokens in the cache: until they come back."""
        if not self._reuses or self._keep_tokens is None:
            return
        for b, row, length in over:
            ids = (*row.request.ids, *row.ids)[:length]
            self._kept[row.request.row] = cut(ids, cache, b, mask[b]).alone()

    def _extend(self, rows: list[_Row], logits: Tensor) -> None:
        going = [b for b, row in enumerate(rows) if not row.over]
        penalised = self.sampling.repetition_penalty != 1.0
        for b in going:
            if (choices := rows[b].request.choices) is not None:
                scores = logits[b, list(choices)].float() / (self.sampling.temperature or 1.0)
                rows[b].scores = tuple(torch.log_softmax(scores, dim=-1).tolist())
        allowed = [self._allowed_now(rows[b]) for b in going]
        ids, logprobs = draw(
            logits[going],
            self.sampling,
            [rows[b].draws.random() for b in going],
            allowed,
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
