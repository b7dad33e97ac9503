"""What a step router reports: steps, and episodes that were played."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from srpo.types import Stop


@dataclass(frozen=True)
class RoutedStep:
    """One step: who acted, out of whom, and what became of it."""

    executor: str
    allowed: tuple[str, ...]
    """Who was affordable."""
    bounds: Mapping[str, float]
    """USD that each executor's call would have cost at most."""
    left: float
    """Of the budget, in its unit, before the step; infinite without a cap."""
    probability: float
    """Of the choice, renormalised over `allowed`."""
    usd: float = 0.0
    action: str = ""
    observation: str = ""
    error: str | None = None
    """Why the call failed."""


@dataclass(frozen=True)
class PlayedEpisode:
    """What became of one episode."""

    score: float
    """Of the environment, in [0, 1]."""
    won: bool
    stop: Stop
    """done: won, or over for good. turns: the step limit. budget: nothing was affordable. lost: see `error`."""
    error: str | None
    """Why the environment or an executor raised, or did not come back in time; the money of the open call counts."""
    steps: tuple[RoutedStep, ...]
    executor_usd: float
    policy_usd: float
    """The policy's own tokens at `StepSettings.policy_price`; not a part of the cap."""
    violated: bool
    """Whether a call cost more than its bound; without that the cap cannot be passed."""
    ids: tuple[int, ...]
    """What the policy read and wrote."""

    @property
    def cost_usd(self) -> float:
        return self.executor_usd + self.policy_usd
