"""Turns from a transformers model.

Ours, on purpose not `model.generate`: a turn continues the KV cache of the turn before it, each distinct prompt is
prefilled once and what all prompts begin with once for all of them (`srpo.rollout.kv_cache`), rows that are done leave
the batch, and each row draws from a generator named by its seed. `TransformersGenerator.generate` is the loop: mask,
draw, end, forward, all of it in this file.
"""

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from srpo.rollout.kv_cache import Contexts
from srpo.rollout.sampling_rules import Sampling, without_adapter
from srpo.rollout.turns import Recorder, Request, Sample, State
from srpo.texts import reader
from srpo.trainer.forward_checks import padding_matters, rounding

logger = logging.get_logger(__name__)


@dataclass
class _Row:
    """One request while it is being written."""

    request: Request
    draws: random.Random
    """The row's own numbers for one turn, named by (run, step, row, sample, turn) and not by what was drawn before."""
    state: State | None
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
        allowed: where turns of free text begin that may not go on anyhow; None: any id may follow.
        recorder: called after every forward, see `Recorder`.
        any_busy: where parameters are sharded, every process must enter every forward. A collective "is any process
            busy?", given whether this one is; None where processes are independent.
        keep_tokens: of rows that a batch leaves out, caches of so many tokens are kept, the latest used first; those
            of rows that are `over` are not. None: no row comes back, and nothing is kept.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        eos_ids: Sequence[int],
        allowed: State | None = None,
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
        base = without_adapter(model)
        self._run = CachedForward(model, base)
        pad, known = tokenizer.pad_token_id, base.config.get_text_config().vocab_size
        self._pad = pad if pad is not None and 0 <= pad < known else 0  # masked: any id will do
        self.contexts = Contexts(base, self._forward, self._pad, keep_tokens, recorder is None)

    @property
    def in_step(self) -> bool:
        """Whether processes must ask equally often, as they share their weights."""
        return self._any_busy is not None

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        if not requests:
            return []
        cache, mask, logits = self.contexts.prefill([(request.row, request.ids) for request in requests])
        if self.contexts.reuses:
            cache.layers = [RoomyLayer(layer) for layer in cache.layers]
        rows = [
            _Row(request, random.Random(request.seed), None if request.choices else request.allowed or self._allowed)
            for request in requests
        ]
        lengths = [len(request.ids) for request in requests]  # tokens in the cache, per row
        live = list(range(len(rows)))  # the rows of the batch, in its order
        penalised = self.sampling.repetition_penalty != 1.0
        while True:
            # A token for each row that goes on: what may follow, one draw for all of them, and what it ends.
            going = [b for b, i in enumerate(live) if not rows[i].over]
            allowed: list[Sequence[int] | None] = []
            for b in going:
                row = rows[live[b]]
                if (choices := row.request.choices) is not None:
                    scores = logits[b, list(choices)].float() / (self.sampling.temperature or 1.0)
                    row.scores = tuple(torch.log_softmax(scores, dim=-1).tolist())
                    allowed.append(choices)
                else:
                    allowed.append(None if row.state is None else row.state.allowed)
            drawn = draw(
                logits[going],
                self.sampling,
                [rows[live[b]].draws.random() for b in going],
                allowed,
                [(*rows[live[b]].request.ids, *rows[live[b]].ids) for b in going] if penalised else None,
            )
            told: dict[Any, list[tuple[Request, Sample]]] = {}
            for b, token, logprob in zip(going, *drawn, strict=True):
                row = rows[live[b]]
                row.ids.append(token)
                row.logprobs.append(logprob)
                row.ended = row.request.choices is not None or token in self._eos or self.stops.ended(row.ids)
                if row.state is not None:
                    row.state = row.state.next[token]
                if row.over and row.request.told is not None:
                    told.setdefault(row.request.told, []).append((row.request, row.sample))
            for tell, turns in told.items():
                tell(turns)

            # Rows that are over leave the batch, several at a time.
            over = [b for b, i in enumerate(live) if rows[i].over]
            if len(over) == len(live) or len(over) >= _LEAVE_TOGETHER * len(live):
                for b in over:
                    row, n = rows[live[b]], lengths[live[b]]
                    self.contexts.keep(row.request.row, (*row.request.ids, *row.ids)[:n], cache, b, mask[b])
                going = [b for b, i in enumerate(live) if not rows[i].over]
                live = [live[b] for b in going]
                if not live:
                    return [row.sample for row in rows]
                index = torch.tensor(going, device=mask.device)
                cache.reorder_cache(index)  # row i becomes row index[i] of it, recurrent states too
                mask = mask[index]

            # The next logits, of the tokens that were drawn.
            column = torch.tensor([[rows[i].ids[-1]] for i in live], device=mask.device)
            positions = torch.tensor([[-1 if rows[i].over else lengths[i]] for i in live], device=mask.device)
            mask = torch.cat([mask, (positions >= 0).long()], dim=1)
            cache, logits = self._forward(column, mask, positions, cache, [(rows[i].request.row,) for i in live])
            for i in live:
                lengths[i] += not rows[i].over

    def over(self, rows: Sequence[int]) -> None:
        self.contexts.drop(rows)

    def finish(self) -> None:
        self.contexts.drop_all()
        while self._any_busy is not None and self._any_busy(False):
            self.forwards += 1
            self._run(torch.tensor([[self._pad]], device=self.contexts.base.device))

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


def draw(
    logits: Tensor,
    sampling: Sampling,
    uniforms: Sequence[float],
    choices: Sequence[Sequence[int] | None],
    contexts: Sequence[Sequence[int]] | None = None,
) -> tuple[list[int], list[float]]:
    """One token per row, and its log-probability (nats) as a trainer scores it: at this temperature and among the
    row's choices, but of the whole distribution, which top-k, top-p, min-p and the penalty take a part of.

    Old, new and reference log-probs know no such cut, in TRL neither: under the cut ones, their ratio would be the
    mass that was kept, and not 1, before the policy has moved.

    Inverse transform sampling in float64: the token is a function of the row's logits and its own uniform number.

    Args:
        logits: [n, V].
        uniforms: n numbers in [0, 1), of the rows' own generators.
        choices: per row the ids that are allowed, or None. A choice is drawn at `temperature` from the probabilities
            renormalised over them; top_p, top_k, min_p and the penalty do not apply to it.
        contexts: per row all ids before the token; needed by the repetition penalty only.
    """
    scores = _scores(logits, sampling, choices, contexts or ())
    logp = torch.log_softmax(scores, dim=-1)
    if sampling.temperature == 0:
        ids = scores.argmax(dim=-1)
    else:
        mass = logp.exp().cumsum(dim=-1, dtype=torch.float64)
        points = torch.tensor(uniforms, dtype=torch.float64, device=mass.device).unsqueeze(1) * mass[:, -1:]
        ids = torch.searchsorted(mass, points, right=True).squeeze(1)
        if (beyond := ids == logits.size(1)).any():  # rounding at the very end
            ids = torch.where(beyond, scores.argmax(dim=-1), ids)
    if sampling.cuts:
        logp = torch.log_softmax(_scores(logits, sampling.whole, choices, ()), dim=-1)
    return ids.tolist(), logp.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()


def _scores(
    logits: Tensor, sampling: Sampling, choices: Sequence[Sequence[int] | None], contexts: Sequence[Sequence[int]]
) -> Tensor:
    """Logits [n, V] of the distributions that are drawn from, -inf at what is not allowed. fp32."""
    logits = logits.float()
    free = [i for i, allowed in enumerate(choices) if allowed is None]
    if len(free) == len(choices):
        return _processed(logits, sampling, contexts)
    scores = torch.full_like(logits, -torch.inf)
    if free:
        scores[free] = _processed(logits[free], sampling, [contexts[i] for i in free] if contexts else [])
    for i, allowed in enumerate(choices):
        if allowed is not None:
            scores[i, list(allowed)] = logits[i, list(allowed)] / (sampling.temperature or 1.0)
    return scores


def _processed(logits: Tensor, sampling: Sampling, contexts: Sequence[Sequence[int]]) -> Tensor:
    seen = torch.empty(0)
    if sampling.repetition_penalty != 1.0:
        width = max(map(len, contexts))
        # A repeated id is penalised once: padding with the row's own first id changes nothing.
        padded = [[*ids, *[ids[0]] * (width - len(ids))] for ids in contexts]
        seen = torch.tensor(padded, device=logits.device)
    processed: Tensor = sampling.rules(seen, logits)
    return processed


class Stops:
    """Whether a turn's text holds a stop string, looked up when a token could have completed one."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._text = reader(tokenizer)
        self._stop = tuple(stop)
        self._last = {text[-1] for text in stop} | {"\ufffd"}  # a character may be spread over tokens
        self._window = max((len(text.encode()) for text in stop), default=0) + 4
        self._may_end: dict[int, bool] = {}

    def ended(self, ids: Sequence[int]) -> bool:
        """Did the last of these tokens complete a stop string?"""
        if not self._stop or not ids:
            return False
        last = ids[-1]
        if last not in self._may_end:
            self._may_end[last] = any(c in self._last for c in self._text([last]))
        if not self._may_end[last]:
            return False
        text = self._text(ids[-self._window :])
        return any(stop in text for stop in self._stop)


ROOM = 64
"""Columns by which a cache grows."""


class RoomyLayer(DynamicLayer):
    """Writes a new column into room that it has; a `DynamicLayer` copies all columns for each new one.

    What `update` returns and `keys` and `values` show are views of the columns that are filled.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._whole = [_with_room(columns, ROOM) for columns in (layer.keys, layer.values)]
        self._show(layer.keys.size(-2))

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
