"""How a generation batch is cut into micro-batches: groups whole, like lengths together, no column that nobody needs.

    rows of this rank -> their groups, shuffled -> optimiser steps -> micro-batches of equally many rows, longest first

TRL shuffles rows, which scatters the siblings of a prompt over micro-batches, and leaves each the width of the longest
prompt and completion of the whole batch. Here

    a group        stays in one micro-batch where its size divides the micro-batch's, fills several where it is a
                   multiple of it, and is torn once at most elsewhere;
    a step         gets groups by chance, where a generation batch feeds several;
    within a step  groups of like length go together and the longest come first. Of all ways to fill micro-batches of
                   equally many groups this makes the k-th longest as short as it can be, for every k at once: so the
                   padded work is least, and so is the wait of ranks that meet after each micro-batch (ZeRO-3, FSDP).

Rows stay on the rank that sampled them, and which groups feed which of several steps is not chosen by length.

The loss of a step is a sum over its rows, so that their order changes only its rounding. Where TRL or transformers
compute something of each micro-batch on its own (`depends_on_split`, a load-balancing loss), groups stay in the order
of chance: sorted by length, tokens of short completions would weigh otherwise.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

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


def micro_batches(
    batch: dict[str, Any], args: Any, rank: int, router_loss: bool, shared: bool
) -> list[dict[str, Any]]:
    """A scored generation batch of this rank as its `steps_per_generation` micro-batches, in their order.

    Draws the order of groups from torch's own random state, as TRL does for rows.

    Args:
        batch: tensors and lists of B rows, a group's one after the other, and numbers of the whole.
        rank: of this process; the group of its first row may have begun on another.
        router_loss: whether the loss has a load-balancing term.
        shared: as in `arrange`.
    """
    rows, steps = len(batch["prompt_ids"]), args.steps_per_generation
    prompts, completions = (batch[f"{part}_mask"].sum(dim=1).tolist() for part in ("prompt", "completion"))
    arranged = arrange(
        prompts,
        completions,
        groups=[(rank * rows + row) // args.num_generations for row in range(rows)],
        size=rows // steps,
        together=math.gcd(steps, args.gradient_accumulation_steps),
        by_length=not (router_loss or depends_on_split(args)),
        shared=shared,
    )
    return [cut(batch, part, args.pad_to_multiple_of or 1) for part in arranged]


def depends_on_split(args: Any) -> bool:
    """Whether TRL's loss has a part that is no sum over rows: a mean or a quantile of each micro-batch."""
    bonus = args.entropy_coef != 0 or args.use_adaptive_entropy
    return bool(args.loss_type == "bnpo" or bonus or args.top_entropy_quantile < 1)


def arrange(
    prompts: Sequence[int],
    completions: Sequence[int],
    groups: Sequence[int],
    size: int,
    together: int,
    by_length: bool = True,
    shared: bool = False,
) -> list[list[int]]:
    """Which rows make up each micro-batch.

    Args:
        prompts, completions: tokens of each row.
        groups: of each row, equal numbers one after the other.
        size: rows of a micro-batch; divides the number of rows.
        together: micro-batches in a row that always belong to the same optimiser step.
        by_length: like lengths together, longest first; else all order is chance.
        shared: siblings share the positions of their prompt, which so counts once.
    """

    def tokens(rows: Sequence[int]) -> int:
        """Of a row of the forward: the longest that padding makes, or a group packed into one."""
        count = sum if shared else max
        return max(prompts[row] for row in rows) + count(completions[row] for row in rows)

    whole = [list(rows) for _, rows in groupby(range(len(groups)), key=groups.__getitem__)]
    laid = [row for i in torch.randperm(len(whole)).tolist() for row in whole[i]]
    arranged = []
    for step in _cut(laid, size * together):
        parts = []
        for _, found in groupby(step, key=groups.__getitem__):
            rows = list(found)
            if by_length and len(rows) > size:
                rows.sort(key=lambda row: -completions[row])
            parts += _cut(rows, size)
        alike = len({len(part) for part in parts}) == 1 and size % len(parts[0]) == 0
        if by_length and alike:
            parts.sort(key=tokens, reverse=True)
        made = _cut([row for part in parts for row in part], size)
        arranged += sorted(made, key=tokens, reverse=True) if by_length and not alike else made
    return arranged


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
