"""Whole groups change ranks before they are trained on, so that no rank waits on another's long rows.

    groups of a step, all ranks' -> by length -> the W longest, one to each of W ranks; the next W; ...

Ranks meet at the end of a step, with TRL's own loss (its metrics) after each micro-batch, and with sharded weights in
each layer, too. Where they meet after each, a step takes the sum over k of the longest k-th group. Of all ways to
leave each rank as many groups as it had, this makes that sum least. Within a round the longest goes to whoever has
least to do so far, so that ranks end together.

Whoever holds a row, the loss of a step is the same sum over rows, with denominators of all ranks. Sampling, scoring
and the teacher's passes come before: their rows stay where they are. A step in which that saves little stays as it is.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed import all_to_all_single

from srpo.trainer.nested import nested_bytes, nested_of

_WORTH = 0.02
"""Share of a step's time that has to be saved."""


def dealt(costs: Sequence[Sequence[float]]) -> list[list[int]]:
    """To which rank each group of a step goes.

    Args:
        costs: of each rank's groups, equally many; in any unit of time.
    """
    ranks = range(len(costs))
    stay = [[rank] * len(own) for rank, own in enumerate(costs)]
    groups = [(rank, i) for rank in ranks for i in range(len(costs[rank]))]
    groups.sort(key=lambda group: -costs[group[0]][group[1]])
    to, done = [list(own) for own in stay], [0.0 for _ in ranks]
    for start in range(0, len(groups), len(ranks)):
        free = set(ranks)
        for rank, i in groups[start : start + len(ranks)]:
            to[rank][i] = least = min(free, key=lambda one: (done[one], one != rank, one))
            done[least] += costs[rank][i]
            free.remove(least)
    return to if time_of(costs, to) < (1 - _WORTH) * time_of(costs, stay) else stay


def time_of(costs: Sequence[Sequence[float]], to: Sequence[Sequence[int]]) -> float:
    """Of a step whose groups have gone `to` these ranks, each of which takes its longest first: where all meet after
    each group, and where they do at the end, added up."""
    held: list[list[float]] = [[] for _ in costs]
    for own, ranks in zip(costs, to, strict=True):
        for cost, rank in zip(own, ranks, strict=True):
            held[rank].append(cost)
    rounds = zip(*(sorted(own, reverse=True) for own in held), strict=True)
    return sum(map(max, rounds)) + max(map(sum, held))


def exchanged(
    batch: dict[str, Any],
    steps: Sequence[Sequence[Sequence[int]]],
    cost: Callable[[Sequence[int]], float],
    cut: Callable[[dict[str, Any], list[int]], dict[str, Any]],
    join: Callable[[list[dict[str, Any]]], dict[str, Any]],
    accelerator: Accelerator,
) -> tuple[dict[str, Any], list[list[list[int]]]]:
    """(batch, steps) of this rank after groups have changed ranks. All ranks call it, with as many groups of a size.

    Args:
        steps: of each optimiser step its groups, of each group its rows.
        cost: of a group.
        cut, join: take rows out of a batch, and make one of several.
    """
    each, rank = len(steps[0]), accelerator.process_index
    mine = torch.tensor([[cost(group) for step in steps for group in step]], device=accelerator.device)
    costs = accelerator.gather(mine).tolist()
    to = [dealt([own[start : start + each] for own in costs]) for start in range(0, len(steps) * each, each)]
    if all(target == source for step in to for source, own in enumerate(step) for target in own):
        return batch, [[list(group) for group in step] for step in steps]
    ranks = range(len(costs))
    leaving: list[list[int]] = [[] for _ in ranks]
    for step, groups in zip(to, steps, strict=True):
        for target, group in zip(step[rank], groups, strict=True):
            leaving[target] += group
    parts = _sent([cut(batch, rows) if rows else {} for rows in leaving], batch, accelerator.device)
    starts = list(accumulate((len(part.get("prompt_ids", ())) for part in parts), initial=0))
    rows = len(steps[0][0])
    arrived: list[list[list[int]]] = []
    for step in to:
        arrived.append([])
        for source in ranks:
            for _ in range(step[source].count(rank)):
                arrived[-1].append(list(range(starts[source], starts[source] + rows)))
                starts[source] += rows
    return join([part for part in parts if part]), arrived


def _sent(parts: list[dict[str, Any]], like: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """One for each rank, and one from each; tensors come to the device on which this rank has them."""
    packed = [torch.frombuffer(bytearray(nested_bytes(part)), dtype=torch.uint8) for part in parts]
    out = torch.tensor([len(one) for one in packed], device=device)
    sizes = torch.empty_like(out)
    all_to_all_single(sizes, out)
    come = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=device)
    all_to_all_single(come, torch.cat(packed).to(device), sizes.tolist(), out.tolist())
    found = [nested_of(one.numpy().tobytes()) for one in come.cpu().split(sizes.tolist())]
    for part in found:
        for name, value in part.items():
            if isinstance(value, Tensor):
                part[name] = value.to(like[name].device)
    return found
