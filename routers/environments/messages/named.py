"""Environments of other libraries by their name in a recipe: ``train_tasks: verifiers:my-env?max_turns=6/train``.

    FAMILY:WHAT?key=value&key=value        values are read as YAML; no "/" in any of them

`worst` and `best` (0 and 1 unless given) say what sum of rewards the scores 0 and 1 are; the other keys are the
environment's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from routers.environments.protocol import GameError
from srpo.strict_yaml import read_yaml_text

if TYPE_CHECKING:
    from routers.environments.messages.agent import Agent

FAMILIES = {
    "gymnasium": "routers.environments.messages.games:gymnasium_agent",
    "openenv": "routers.environments.messages.openenv:openenv_agent",
    "verifiers": "routers.environments.messages.verifiers:VerifiersAgent",
}
"""Family -> a function of (what, its own keys, scale) that makes the agent."""

SEEDS = {"train": 0, "validation": 100_000, "test": 200_000}
"""Splits of environments whose tasks are seeds, and the first seed of each."""
_EACH = 2_000


@dataclass(frozen=True)
class Scale:
    """What rewards are worth.

    Args:
        worst, best: the sums that score 0 and 1.

    Raises:
        GameError: they are no numbers, or best <= worst.
    """

    worst: float = 0.0
    best: float = 1.0

    def __post_init__(self) -> None:
        numbers = all(isinstance(end, (int, float)) and end == end for end in (self.worst, self.best))
        if not numbers or not self.worst < self.best:
            raise GameError(f"worst={self.worst!r}, best={self.best!r}: give two numbers, worst below best")

    def score(self, reward: float) -> float:
        """In [0, 1].

        Raises:
            GameError: the reward lies outside.
        """
        if not self.worst <= reward <= self.best:
            raise GameError(
                f"a reward of {reward:g} is not between worst={self.worst:g} and best={self.best:g}: say in the name "
                "of the environment what it may be, ?worst=...&best=..."
            )
        return (reward - self.worst) / (self.best - self.worst)


def named(name: str) -> Agent | None:
    """The agent of another library that a recipe names; None: no such family.

    Raises:
        GameError: what follows the family cannot be read.
    """
    family, colon, rest = name.partition(":")
    if not colon or family not in FAMILIES:
        return None
    what, asked, text = rest.partition("?")
    try:
        given = {key: read_yaml_text(value, name)[0] for key, value in parse_qsl(text, True, bool(asked))}
    except ValueError:
        raise GameError(f"{name}: write {family}:WHAT?key=value&key=value") from None
    scale = Scale(given.pop("worst", 0.0), given.pop("best", 1.0))
    module, _, make = FAMILIES[family].partition(":")
    made: Agent = getattr(importlib.import_module(module), make)(what, given, scale)
    return made


def seeds(split: str, kind: str, count: int) -> Mapping[str, str]:
    """The first `count` tasks of a split of seeds, 2,000 where that is 0; a task is a seed, `kind` its type.

    Raises:
        ValueError: no such split.
    """
    if split not in SEEDS:
        raise ValueError(f"there is no split {split!r}; there are {', '.join(SEEDS)}")
    return {str(SEEDS[split] + number): kind for number in range(min(count or _EACH, _EACH))}
