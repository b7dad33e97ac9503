"""Whether the rows of a pass share their beginnings, and the pass itself: the one place where a backbone is packed.

    auto    where the estimated cost with trees is below that without
    on      wherever the model takes it
    off     never; the pass is TRL's own, bit for bit

Which models take it is read from their configuration (`attention_of`), not from a list of names. A packed row is right
where every layer is attention that looks at nothing but the mask and the position ids it is given. Recurrent and
linear-attention layers run over neighbours, ALiBi and blocks count columns, flash attention takes no mask: there it
would be wrong in silence, so it is refused. A sliding window counts columns too, but is known: it becomes part of the
mask (`Layout.sees`). Then it is tried out: the first packed
pass of each kind (precision; rows longer than a sliding window) also runs a few of its rows both ways, in evaluation
mode and without gradient, and compares the hidden states of every token. Where they differ, that model keeps to plain
rows from then on, and one warning says so. Siblings that share a prefix in training mode share its dropout, too
(`disable_dropout` is on unless a recipe says otherwise).

Ranks decide for themselves: a pass is one forward of the backbone either way. In a sharded engine (ZeRO-3, FSDP) every
forward is one that all ranks make together, so there the first pass is tried whatever it costs, and rows that are
longer than a window stay plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from srpo.prefix.tree import Costs, Layout, Tree, costs_of
from srpo.replay.replay import RoutingReplay
from srpo.trainer.forward_checks import positions_of, takes_positions

logger = logging.get_logger(__name__)

_PLAIN_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache", "output_router_logits"}
_TRIED_ROWS = 4
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Largest difference of a token's hidden state, as a share of its size: several times what rounding does, and far
below what a token that sees too much or too little moves."""
_TOLERANCE_LOW = 0.1
_FLIPPED = 0.1  # share of tokens that rounding may give another expert
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


@dataclass(frozen=True)
class Way:
    """How one pass goes."""

    layout: Layout | None = None
    mask: Any = None
    picked: bool = False
    """Only the positions that are scored reach the LM head."""


class PrefixSharing:
    """Of one model.

    Args:
        model: a causal language model of transformers, without wrappers.
        mode: see above.
        sharded: its weights lie in parts on several ranks.
        replay: replays and records the experts of this very model.
    """

    def __init__(self, model: Any, mode: str, sharded: bool = False, replay: RoutingReplay | None = None) -> None:
        self.model, self.mode, self.sharded, self.replay = model, mode, sharded, replay
        self._tried: set[tuple[bool, bool]] = set()
        self._refused: str | None = None
        self._known: tuple[Attention | None, Costs] | None = None

    # ---------------------------------------------------------------------------------------------------- deciding

    def way(self, inputs: dict[str, Any], scored: int | None = None) -> Way:
        """How a pass goes with `inputs`, the backbone's keyword arguments.

        Args:
            scored: tokens that are; None: no LM head comes after the backbone.
        """
        if self.mode == "off":
            return Way()
        attention, costs = self._about()
        gradient, ids = torch.is_grad_enabled(), inputs.get("input_ids")
        if ids is None:
            return Way()
        picked = scored is not None and costs.worth_picking(ids.numel() - scored, gradient)
        if attention is None or self._refused is not None:
            return Way(picked=picked)
        mask = inputs.get("attention_mask")
        if odd := sorted(name for name, value in inputs.items() if value is not None and name not in _PLAIN_INPUTS):
            self._say(f"passes with {', '.join(odd)} cannot be packed")
            return Way(picked=picked)
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            return Way(picked=picked)
        if self.sharded:  # before anything that one rank may decide otherwise
            self._try_once(ids[:, -attention.shortest :], mask[:, -attention.shortest :], attention, narrow=False)
        length = int(mask.sum(dim=1).max())
        if attention.longest is not None and ids.size(1) > attention.longest:
            self._say(f"its positions are computed otherwise in rows of more than {attention.longest} tokens")
            return Way(picked=picked)
        if self.sharded and attention.narrows(length):
            self._say("with sharded weights, rows must not be longer than its sliding window")
            return Way(picked=picked)
        layout = self._layout(ids, mask, gradient, costs) if length else None
        if layout is None:
            return Way(picked=picked)
        self._try_once(ids, mask, attention, attention.narrows(length))
        if self._refused is not None:
            return Way(picked=picked)
        return Way(layout, attention.mask(layout, length, self._mask_dtype()), picked=True)

    def _layout(self, ids: Tensor, mask: Tensor, gradient: bool, costs: Costs) -> Layout | None:
        plain = costs.plain(ids.size(0), ids.size(1), padded=not bool(mask.all()), gradient=gradient)
        if self.mode == "auto" and not costs.worth_a_tree(plain):
            return None  # not even if a tree cost nothing
        tree = Tree(ids, mask, self._told_apart(ids))
        cost = partial(costs.packed, gradient=gradient)
        runs = tree.cut(cost)
        if self.mode == "auto" and not costs.worth_a_tree(plain - cost(len(runs), tree.width(runs))):
            return None
        return tree.lay_out(runs)

    def _told_apart(self, ids: Tensor) -> Tensor | None:
        """Equal tokens that replay other experts are not the same; keys that tell them apart, [B, S] int64."""
        routes = None if self.replay is None else self.replay.armed_routes
        if routes is None:
            return None
        # A random linear form modulo 2^64 of id and routes: that two tokens of a batch agree by chance is of the order
        # of tokens^2 / 2^64.
        told = torch.cat([ids.cpu().unsqueeze(-1), routes.flatten(2).cpu().long()], dim=-1)
        factors = torch.empty(told.size(-1), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(0))
        return (told * factors).sum(dim=-1)

    @cached_property
    def attention(self) -> Attention | None:
        """What its layers see; None: no row of it is packed, by its configuration or by the mode. Whether it was
        refused when it was tried is not in here: a resumed run would not know that yet."""
        if self.mode == "off":
            return None
        try:
            return attention_of(self.model)
        except NotShared as why:
            self._say(str(why))
            return None

    def _about(self) -> tuple[Attention | None, Costs]:
        if self._known is None:
            self._known = self.attention, costs_of(self.model)
        return self._known

    def _say(self, why: str) -> None:
        logger.warning_once(
            f"shared_prefix: {self.mode}, but each row of {type(self.model).__name__} is encoded by itself: {why}"
        )

    def _mask_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    # ----------------------------------------------------------------------------------------------------- the pass

    @contextmanager
    def packed(
        self, way: Way, places: Tensor | None, watch: Callable[[Tensor], None] | None = None
    ) -> Iterator[list[Tensor]]:
        """Inside, one forward of the backbone goes this way, whoever calls it; the list then has its hidden states.

        Args:
            places: flat indices into [B, S]: the backbone returns the hidden states of those tokens alone, [1, n, D];
                None: all, [B, S, D].
            watch: called with what it returns, before anybody else sees that.
        """
        found: list[Tensor] = []
        layout = way.layout

        def before(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if layout is None:
                return None
            own = {"input_ids": layout.ids, "attention_mask": way.mask, "position_ids": layout.positions}
            return args, {**kwargs, **own}

        def after(_module: Any, _args: Any, output: Any) -> Any:
            states = output.last_hidden_state
            if layout is not None and (logits := getattr(output, "router_logits", None)) is not None:
                # The balance of the experts is counted over tokens, and so over each row's own.
                output.router_logits = tuple(one[layout.columns.flatten()] for one in logits)
            if places is not None:
                index = places if layout is None else layout.columns.flatten()[places]
                states = states.flatten(0, 1).index_select(0, index).unsqueeze(0)
            elif layout is not None:
                states = layout.unpack(states)
            output.last_hidden_state = states
            if watch is not None:
                watch(states)
            found.append(states)
            return output

        backbone = self.model.base_model
        hooks = [
            backbone.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            backbone.register_forward_hook(after),
        ]
        try:
            with nullcontext() if self.replay is None else self.replay.packed(layout):
                yield found
        finally:
            for hook in hooks:
                hook.remove()

    # --------------------------------------------------------------------------------------------------- trying out

    def _try_once(self, ids: Tensor, mask: Tensor, attention: Attention, narrow: bool) -> None:
        """Refuse, for good, a model that says something else of packed rows; once for each kind of pass.

        Args:
            narrow: a row is longer than some window.
        """
        kind = (torch.is_autocast_enabled(ids.device.type), narrow)
        if kind in self._tried:
            return
        self._tried.add(kind)
        ids, mask = tried_rows(ids, mask)
        tree = Tree(ids, mask)
        layout = tree.lay_out([range(len(ids))])
        taken = attention.mask(layout, int(mask.sum(dim=1).max()), self._mask_dtype())
        try:
            with self._aside():
                plain = self._states(Way(), ids, mask)
                packed = self._states(Way(layout, taken), ids, mask)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError) as error:
            if self.sharded:
                raise  # the other ranks wait in a forward that this one has left
            self._refuse(f"its forward fails on a packed row ({type(error).__name__}: {error})")
            return
        real = mask.bool()
        apart = (plain - packed)[real].float().norm(dim=-1) / plain[real].float().norm(dim=-1).clamp(min=1e-12)
        low = plain.dtype not in TOLERANCE or torch.is_autocast_enabled(plain.device.type)
        low = low or torch.get_float32_matmul_precision() != "highest"
        most = _TOLERANCE_LOW if low else TOLERANCE[plain.dtype]
        beyond = (~(apart <= most)).float().mean().item()
        if beyond > (_FLIPPED if self._has_experts() else 0.0):
            self._refuse(
                f"packed rows differ from plain ones by up to {apart.max().item():.2g} of a hidden state, of which "
                f"{most:g} may be rounding"
            )

    def _refuse(self, why: str) -> None:
        self._refused = why
        family = self.model.config.get_text_config().model_type
        logger.warning(
            f"shared_prefix: {self.mode} is off for this {type(self.model).__name__} (family {family}): {why}. Every "
            "row is encoded by itself from here on; results are right, and slower. shared_prefix: off silences this"
        )

    def _states(self, way: Way, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, S, D]"""
        with self.packed(way, None) as found:
            self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, position_ids=positions_of(mask))
        return found[0]

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Inside, passes leave no trace: no gradient, no dropout, no replay, nothing in autocast's cache."""
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            for module, _ in modes:
                module.training = False
            with torch.no_grad(), nullcontext() if self.replay is None else self.replay.aside():
                yield
        finally:
            for module, training in modes:
                module.training = training
            # Weights that were cast without gradient would else serve the pass that needs one.
            torch.clear_autocast_cache()

    def _has_experts(self) -> bool:
        return any(".experts" in name for name, _ in self.model.named_modules())


def tried_rows(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A few rows of a batch that share most, and the first of them once more with the second half turned round."""
    tree = Tree(ids, mask)
    starts: Sequence[int] = range(max(len(tree.order) - _TRIED_ROWS + 2, 1))
    best = max(starts, key=lambda s: sum(tree.common[s + 1 : s + _TRIED_ROWS - 1]))
    rows = tree.order[best : best + _TRIED_ROWS - 1]
    ids, mask = ids[rows], mask[rows]
    row = int(mask.sum(dim=1).argmax())
    places = mask[row].nonzero().flatten()
    turned, half = ids[row].clone(), places[len(places) // 2 :]
    turned[half] = turned[half.flip(0)]
    return torch.cat([ids, turned[None]]), torch.cat([mask, mask[row : row + 1]])


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
