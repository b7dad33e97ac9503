"""What a `RouterAgent` is made of, besides the rollout loop: its answers, ears for its turns, and a safe tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from routers.tasks.think_route.environment import ThinkRoute
from srpo.types import Episode, Observation, Row, Stop, Trajectory

OnTurn = Callable[[str], None]
"""Called with the text of every turn of the policy, as soon as it is written. An exception ends the episode."""


@dataclass(frozen=True)
class AgentAnswer:
    """What became of one question."""

    answer: str | None
    """None: there is none; `stop` says why."""
    stop: Stop
    error: str | None
    """Why the pool failed, where `stop` is "lost"."""
    cost_usd: float
    """Members' tokens at catalogue prices, and the policy's own where they have a price."""
    members: tuple[str, ...]
    """Who was asked, in order."""
    prompt_tokens: int
    """That the policy read: its prompt and the observations."""
    completion_tokens: int
    """That the policy wrote."""
    turns: tuple[tuple[str, str], ...]
    """(owner, text) of every turn: "policy" or "world"."""
    trajectory: Trajectory


class Listening:
    """A world that tells somebody what the policy writes."""

    def __init__(self, world: ThinkRoute, on_turn: OnTurn) -> None:
        self._world = world
        self._on_turn = on_turn

    def episode(self, row: Row, seed: str) -> Episode:
        return _ListeningEpisode(self._world.episode(row, seed), self._on_turn)


class _ListeningEpisode:
    def __init__(self, episode: Episode, on_turn: OnTurn) -> None:
        self._episode = episode
        self._on_turn = on_turn

    def choices(self) -> Sequence[str] | None:
        return self._episode.choices()

    async def step(self, text: str) -> Observation:
        self._on_turn(text)
        return await self._episode.step(text)

    def columns(self, stop: Stop) -> Mapping[str, Any]:
        return self._episode.columns(stop)
