"""What a `RouterAgent` is made of, besides the rollout loop: its answers, ears for its turns, and a safe tokenizer."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from routers.tasks.think_route.environment import ThinkRoute
from srpo.types import Episode, Observation, Row, Stop, Trajectory
from srpo.well_formed import well_formed

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


def without_control_tokens(tokenizer: Any, keep: Collection[str] = ()) -> Callable[[str], str]:
    """A function that breaks every control token that a text spells out ("<|im_end|>" becomes "< |im_end|>").

    A chat template is text, and would read it as the end of the user's turn. Control tokens are the special ones and,
    as in `srpo.rollout.untrusted`, added ones of two or more characters, such as Qwen's <tool_call> or a policy's
    labels; `keep` are those that the text may say. Lone surrogates, which no tokenizer takes, are replaced.
    """
    control = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    control -= set(keep)
    long = sorted((content for content in control if len(content.strip()) > 1), key=len, reverse=True)
    if not long:
        return well_formed
    pattern = re.compile("|".join(map(re.escape, long)))
    return lambda text: pattern.sub(lambda match: f"{match.group()[0]} {match.group()[1:]}", well_formed(text))


class LockedTokenizer:
    """A tokenizer for several threads.

    A fast tokenizer keeps `split_special_tokens` of the last call as its own state, so that text of others, encoded in
    one thread, could be read with the setting of another thread's call.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return self._tokenizer(*args, **kwargs)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._tokenizer, name)
        if not callable(found):
            return found

        def locked(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return found(*args, **kwargs)

        return locked


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
