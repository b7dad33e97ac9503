"""How a generation batch is cut into micro-batches: groups whole, like lengths together, no column that nobody needs.

    rows of this rank -> their groups, shuffled -> optimiser steps -> groups change ranks (`srpo.trainer.balance`)
                      -> micro-batches of equally many rows, longest first

TRL shuffles rows, which scatters the siblings of a prompt over micro-batches, and leaves each the width of the longest
prompt and completion of the whole batch. Here

    a group        stays in one micro-batch where its size divides the micro-batch's, fills several where it is a
                   multiple of it, and is torn once at most elsewhere;
    a step         gets groups by chance, where a generation batch feeds several;
    within a step  groups of like length go together and the longest come first. Of all ways to fill micro-batches of
                   equally many groups this makes the k-th longest as short as it can be, for every k at once: so the
                   padded work is least, and so is the wait of ranks, which meet after each micro-batch.

Which groups feed which of several steps is not chosen by length. Rows stay on the rank that sampled them where a group
lies on two ranks, or in two steps.

The loss of a step is a sum over its rows, so that their order changes only its rounding. Where TRL or transformers
compute something of each micro-batch on its own (`depends_on_split`, a load-balancing loss), groups stay in the order
of chance, and on their rank: sorted by length, tokens of short completions would weigh otherwise.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import pad

from srpo.trainer.balance import exchanged

_PROMPT = ("prompt_ids", "prompt_mask")
"""[B, P], padded on the left."""
_COMPLETION = (
    *("completion_ids", "completion_mask", "tool_mask", "choices"),
    *("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio"),
    *("teacher_logps", "distillation_weights", "advantages"),
)
"""[B, T, ...], padded on the right; a number per row, [B] or [B, 1], is taken as it is."""
_BOTH = ("expert_ids",)
"""[B, P + T, ...]."""
_PADDING = {"choices": -1, "expert_ids": -1, "tool_mask": 1}
"""What is not 0 where there is no token."""


def micro_batches(
    batch: dict[str, Any], args: Any, accelerator: Accelerator, router_loss: bool, shared: bool
) -> list[dict[str, Any]]:
    """A scored generation batch of this rank as its `steps_per_generation` micro-batches, in their order.

    Draws the order of groups from torch's own random state, as TRL does for rows. All ranks call it together.

    Args:
        batch: tensors and lists of B rows, a group's one after the other, and numbers of the whole.
        router_loss: whether the loss has a load-balancing term.
        shared: as in `arrange`.
    """
    rows, group, parts = len(batch["prompt_ids"]), args.num_generations, args.steps_per_generation
    size, first = rows // parts, accelerator.process_index * rows  # whose group may have begun on another rank
    of_step = size * math.gcd(parts, args.gradient_accumulation_steps)
    by_length = not (router_loss or depends_on_split(args))
    take = partial(cut, multiple=args.pad_to_multiple_of or 1)
    steps = laid([(first + row) // group for row in range(rows)], of_step)
    if by_length and accelerator.num_processes > 1 and of_step % group == 0:
        cost = partial(_tokens, *_lengths(batch), shared)
        batch, steps = exchanged(batch, steps, cost, take, joined, accelerator)
    lengths = _lengths(batch)
    return [take(batch, part) for step in steps for part in arrange(*lengths, step, size, by_length, shared)]


def _lengths(batch: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Tokens of each row's prompt, and of its completion."""
    return batch["prompt_mask"].sum(dim=1).tolist(), batch["completion_mask"].sum(dim=1).tolist()


def depends_on_split(args: Any) -> bool:
    """Whether TRL's loss has a part that is no sum over rows: a mean or a quantile of each micro-batch."""
    bonus = args.entropy_coef != 0 or args.use_adaptive_entropy
    return bool(args.loss_type == "bnpo" or bonus or args.top_entropy_quantile < 1)


def laid(groups: Sequence[int], rows: int) -> list[list[list[int]]]:
    """Which rows make up each step, by group, in an order of chance.

    Args:
        groups: of each row, equal numbers one after the other.
        rows: of a step; divides the number of rows. A group that does not fit is torn.
    """
    whole = [list(found) for _, found in groupby(range(len(groups)), key=groups.__getitem__)]
    order = [row for i in torch.randperm(len(whole)).tolist() for row in whole[i]]
    return [[list(found) for _, found in groupby(step, key=groups.__getitem__)] for step in _cut(order, rows)]


def arrange(
    prompts: Sequence[int],
    completions: Sequence[int],
    step: Sequence[list[int]],
    size: int,
    by_length: bool = True,
    shared: bool = False,
) -> list[list[int]]:
    """Which rows make up each micro-batch of a step.

    Args:
        prompts, completions: tokens of each row.
        step: its groups, of each its rows.
        size: rows of a micro-batch; divides the number of rows.
        by_length: like lengths together, longest first; else all order is that of `step`.
        shared: siblings share the positions of their prompt, which so counts once.
    """
    tokens = partial(_tokens, prompts, completions, shared)
    parts = []
    for group in step:
        if by_length and len(group) > size:
            group = sorted(group, key=lambda row: -completions[row])
        parts += _cut(group, size)
    alike = len({len(part) for part in parts}) == 1 and size % len(parts[0]) == 0
    if by_length and alike:
        parts.sort(key=tokens, reverse=True)
    made = _cut([row for part in parts for row in part], size)
    return sorted(made, key=tokens, reverse=True) if by_length and not alike else made


def _tokens(prompts: Sequence[int], completions: Sequence[int], shared: bool, rows: Sequence[int]) -> int:
    """Of a row of the forward: the longest that padding makes, or a group packed into one."""
    count = sum if shared else max
    return max(prompts[row] for row in rows) + count(completions[row] for row in rows)


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def cut(batch: dict[str, Any], rows: list[int], multiple: int = 1) -> dict[str, Any]:
    """These rows of a batch, with the columns that one of them needs: of prompt and completion each at least one,
    and a multiple of `multiple`, as TRL pads them.

    Raises:
        ValueError: a tensor of which it is not known whose columns it has.
    """

    def needed(mask: Tensor) -> int:
        return min(max(-(-int(mask[rows].sum(dim=1).max()) // multiple), 1) * multiple, mask.size(1))

    width, length = batch["prompt_mask"].size(1), batch["completion_mask"].size(1)
    start, end = width - needed(batch["prompt_mask"]), needed(batch["completion_mask"])
    kept: dict[str, Any] = {}
    for name, value in batch.items():
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            kept[name] = value
        elif not isinstance(value, Tensor):
            kept[name] = [value[row] for row in rows]
        elif name in _PROMPT:
            kept[name] = value[rows, start:]
        elif name in _COMPLETION and value.ndim > 1 and value.size(1) == length:
            kept[name] = value[rows, :end]
        elif name in _BOTH:
            kept[name] = value[rows, start : width + end]
        elif value.ndim == 1 or value.size(1) == 1:
            kept[name] = value[rows]
        else:
            raise ValueError(
                f"{name!r} of a generation batch has the shape {tuple(value.shape)}, and srpo.trainer.micro_batches "
                "does not know whether its columns are those of the prompts or of the completions: name it there"
            )
    return kept


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of several batches as one batch: what `cut` has taken apart."""
    wide, long = (max(part[f"{name}_mask"].size(1) for part in parts) for name in ("prompt", "completion"))
    kept: dict[str, Any] = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            kept[name] = value
        elif not isinstance(value, Tensor):
            kept[name] = [one for some in values for one in some]
        else:
            of_tokens = value.ndim > 1 and all(
                some.size(1) == part["completion_mask"].size(1) for some, part in zip(values, parts, strict=True)
            )
            left, right = name in (*_PROMPT, *_BOTH), name in _BOTH or (name in _COMPLETION and of_tokens)
            for i, part in enumerate(parts):
                before, after = wide - part["prompt_mask"].size(1), long - part["completion_mask"].size(1)
                room = (0, 0) * (value.ndim - 2) + (left * before, right * after)
                values[i] = pad(values[i], room, value=_PADDING.get(name, 0)) if left or right else values[i]
            kept[name] = torch.cat(values)
    return kept
