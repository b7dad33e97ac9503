"""What the expensive executor is worth at a step, estimated from random episodes on the training tasks.

    gain(s) = mean score of episodes with the expensive executor at a step in state s - the same with the cheapest

A state is what the policy is told, without its counters: which phase, what went wrong, which function was called. The
episodes mix both executors evenly at every step, so that the two groups of a state differ by that step alone.

INFERRED: Arbitrage (arXiv 2512.05033) trains a classifier on process rewards of single reasoning steps; tasks of
agents have a score at their end only.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from routers.language.digest import Head, failed
from srpo.types import Observation

FIRST = "first"
"""The state of the first step."""
EPISODES = 4
"""Of every training task."""
_FEWEST = 10
"""Steps of each executor in a state, below which nothing is said about it."""
_KEPT = re.compile(r"<(?:[a-z]+|f\d+)>")


@dataclass(frozen=True)
class Advantages:
    """Estimates of one benchmark and pair of executors."""

    gains: Mapping[str, float]
    """State -> gain in score."""
    price: float
    """Of one call of the expensive executor in place of the cheapest, in episodes of the expensive one alone."""

    def gain(self, state: str) -> float:
        """0 for a state that was not seen often enough."""
        return self.gains.get(state, 0.0)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Advantages:
        return cls(**json.loads(path.read_text()))


def state_of(told: Observation | None) -> str:
    """The state before a step, from what the policy was told after the one before; None: it is the first."""
    if told is None:
        return FIRST
    words = "".join(_KEPT.findall(told.before))
    if words or not told.body:
        return words
    try:
        head = Head.read(told.body)
        return f"<{head.after}><f{head.function}>"
    except ValueError:
        return "<error>" if failed({"content": told.body.partition("\n")[2]}) else "<fine>"


def estimate(
    episodes: Sequence[tuple[Sequence[tuple[str, bool]], float, float]], large_usd: float, fewest: int = _FEWEST
) -> Advantages:
    """Advantages from episodes.

    Args:
        episodes: ((state, whether the expensive executor acted) of every step, score, USD).
        large_usd: of an episode of the expensive executor alone.
        fewest: steps of each executor in a state.
    """
    scores: dict[str, dict[bool, list[float]]] = defaultdict(lambda: {True: [], False: []})
    for steps, score, _ in episodes:
        for state, large in steps:
            scores[state][large].append(score)
    # least squares: an episode costs so much per step, and so much more per step of the expensive executor
    counts = [(len(steps), sum(large for _, large in steps)) for steps, _, _ in episodes]
    usd = np.linalg.lstsq(np.array(counts, float), np.array([usd for _, _, usd in episodes]), rcond=None)[0][1]
    price = float(usd) / large_usd if large_usd else 0.0
    return Advantages(
        {
            state: fmean(by[True]) - fmean(by[False])
            for state, by in sorted(scores.items())
            if min(map(len, by.values())) >= fewest
        },
        price,
    )


def steps_of(decisions: Sequence[tuple[str, Any]], cheapest: str) -> list[tuple[str, bool]]:
    """What `estimate` takes of an episode's (executor, what was told after its step)."""
    told = [None, *(observation for _, observation in decisions)]
    return [(state_of(before), name != cheapest) for before, (name, _) in zip(told, decisions, strict=False)]
