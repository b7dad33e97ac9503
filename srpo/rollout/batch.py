"""Trajectories as rows of a batch: one completion of several owners, groups without the lost, seeds by name."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srpo.types import Trajectory

MIN_SURVIVORS = 0.75


@dataclass(frozen=True)
class Flat:
    """A trajectory as TRL takes it: one completion with an owner per token."""

    ids: list[int]
    policy: list[int]
    """1 where the policy wrote the token."""
    logprobs: list[float]
    """0 where the world did."""
    choices: list[tuple[int, ...]]
    """Allowed ids, () where there was no restriction."""


def flatten(trajectory: Trajectory, pad_id: int) -> Flat:
    """All turns in one row. A trajectory without a token becomes one padding token of the world's."""
    flat = Flat([], [], [], [])
    for turn in trajectory.turns:
        n = len(turn.ids)
        ours = turn.owner == "policy"
        flat.ids.extend(turn.ids)
        flat.policy.extend([int(ours)] * n)
        flat.logprobs.extend(turn.logprobs if turn.logprobs is not None else [0.0] * n)
        flat.choices.extend([turn.choices or ()] * n)
    return flat if flat.ids else Flat([pad_id], [0], [0.0], [()])


def most_choices(rows: Sequence[Sequence[tuple[int, ...]]]) -> int:
    """A: how many ids the widest decision had; 0 if no token was restricted."""
    return max((len(allowed) for row in rows for allowed in row), default=0)


def padded_choices(rows: Sequence[Sequence[tuple[int, ...]]], length: int, widest: int) -> Tensor | None:
    """[B, T, A] int64, padded with -1, of each token's allowed ids; None if A, `widest`, is 0."""
    if not widest:
        return None
    table = torch.full((len(rows), length, widest), -1)
    for b, row in enumerate(rows):
        for t, allowed in enumerate(row):
            if allowed:
                table[b, t, : len(allowed)] = torch.tensor(allowed)
    return table


def kept_rows(lost: Sequence[bool], group: int) -> list[bool]:
    """Which rows are trained on: not lost, and in a group (consecutive rows) of which enough survive."""
    kept: list[bool] = []
    for start in range(0, len(lost), group):
        members = lost[start : start + group]
        enough = members.count(False) >= MIN_SURVIVORS * len(members)
        kept.extend(enough and not gone for gone in members)
    return kept


def row_seeds(keys: Sequence[str], prefix: str) -> list[str]:
    """`prefix:key:n`, n the number of equal keys before: named by what a row is, not by where it stands."""
    seen: Counter[str] = Counter()
    seeds = []
    for key in keys:
        seeds.append(f"{prefix}:{key}:{seen[key]}")
        seen[key] += 1
    return seeds


def row_key(row: Any) -> str:
    """A dataset row's own name: its `query_id`, or a digest of its prompt."""
    if row.get("query_id") is not None:
        return str(row["query_id"])
    return hashlib.sha256(json.dumps(row["prompt"], sort_keys=True, default=str).encode()).hexdigest()[:16]
