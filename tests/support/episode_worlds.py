"""Scripted environments for tests of rollouts: what a world says depends on the row, never on time."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from srpo.types import Observation, Stop


class ScriptedEpisode:
    """Answers turn t with `script(t, text)`: an Observation, or an exception to raise."""

    def __init__(self, script: Callable[[int, str], Any], labels: Any, seconds: float):
        self._script, self._labels, self._seconds = script, labels, seconds
        self.texts: list[str] = []

    def choices(self) -> Sequence[str] | None:
        return self._labels(len(self.texts))

    async def step(self, text: str) -> Observation:
        self.texts.append(text)
        await asyncio.sleep(self._seconds)
        answer = self._script(len(self.texts) - 1, text)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def columns(self, stop: Stop) -> Mapping[str, Any]:
        return {"said": "|".join(self.texts), "cost": 0.01 * len(self.texts)}


class ScriptedEnvironment:
    """`script(row, t, text)`; counts a cent per step."""

    def __init__(
        self,
        script: Callable[[Mapping[str, Any], int, str], Any],
        labels: Callable[[int], Sequence[str] | None] = lambda _: None,
        seconds: float = 0.0,
    ):
        self._script, self._labels, self._seconds = script, labels, seconds
        self.made: list[ScriptedEpisode] = []
        self.cents = 0

    def episode(self, row: Mapping[str, Any], seed: str) -> ScriptedEpisode:
        def script(t: int, text: str) -> Any:
            self.cents += 1
            return self._script(row, t, text)

        self.made.append(ScriptedEpisode(script, self._labels, self._seconds))
        return self.made[-1]

    def metrics(self) -> Mapping[str, float]:
        return {"world/episodes": float(len(self.made))}

    def spent_usd(self) -> float:
        return self.cents / 100

    def state_dict(self) -> dict[str, Any]:
        return {"cents": self.cents}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cents = int(state["cents"])
