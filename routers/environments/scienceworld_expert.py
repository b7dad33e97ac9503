"""ScienceWorld's own solvers, as an expert that goes on from wherever an episode is. PRIVILEGED: they know everything.

The package has a scripted solver for every task; its "gold path" is what the solver does from the start. Here it is
started in a second world, which was brought to the episode's state by the episode's actions, so that its way begins
where others have left off. The way is made shorter (teleport instead of doors, no looking around) where a trial shows
that this ends with no lower score.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from routers.environments.scienceworld_server import Simulator, Simulators

_HARMLESS = re.compile(r"(?:look|examine|read|inventory|task|wait1?|go|teleport|open door)\b")
_NO_EFFECT = ("No known action", "Unknown action", "Ambiguous request", "ERROR")
_PLACE = re.compile(r"This (?:room|outside location) is called the (.+?)\. ")
_MOVE = re.compile(r"(?:go|teleport) to (.+)")


class Solver:
    """What finishes tasks from states of theirs; remembers the last ways that it has worked out."""

    def __init__(self, simulators: Simulators) -> None:
        self._simulators = simulators
        self.way = lru_cache(maxsize=4096)(self._way)

    def _way(self, task: str, variation: int, taken: tuple[str, ...]) -> tuple[str, ...]:
        """Actions to take after those that were taken; none where nothing that is known here gains more score."""
        with self._simulators.lent() as world:
            before = _bring(world, task, variation, taken)
            long = world.gold(task, variation)
            _, best, _ = world.step("inventory")
            if best < 1 and taken:  # the package's solvers expect things to be where they were at the start
                _bring(world, task, variation, taken)
                first, reached = _try(world, self.way(task, variation, ()), 1.0)
                if reached > max(best, before):
                    return first
            if best <= before:
                return ()
            _bring(world, task, variation, taken)
            short, reached = _try(world, shorter(long), best)
            return short if reached >= best else tuple(long)


def _bring(world: Simulator, task: str, variation: int, taken: Sequence[str]) -> float:
    """Bring a world to the state after these actions; returns the score there."""
    world.load(task, variation)
    for action in ("look around", *taken):
        _, score, _ = world.step(action)
    return score


def _try(world: Simulator, actions: Sequence[str], enough: float) -> tuple[tuple[str, ...], float]:
    """Take actions until the score is enough; returns those that were taken, and the score."""
    score = 0.0
    for number, action in enumerate(actions, 1):
        _, score, over = world.step(action)
        if over or score >= enough:
            return tuple(actions[:number]), score
    return tuple(actions), score


def shorter(actions: Sequence[str]) -> list[str]:
    """The same way by teleport, without opening doors (they are open) and looking around."""
    found: list[str] = []
    for action in actions:
        if move := _MOVE.fullmatch(action):
            if found and found[-1].startswith("teleport to "):
                found.pop()
            found.append(f"teleport to {move[1]}")
        elif action != "look around" and not action.startswith("open door to "):
            found.append(action)
    return found


class Expert:
    """Follows a way through one episode, whoever else acts in it."""

    def __init__(self, solver: Solver, task: str, variation: int) -> None:
        self._solver, self._task, self._variation = solver, task, variation
        self._taken: list[str] = []
        self._way: list[str] | None = None
        self._place = ""
        """Where the way expects the agent."""

    def saw(self, action: str, observation: str) -> None:
        """Somebody has acted. What may have changed more than place and time makes the way invalid."""
        self._taken.append(action)
        if self._way and action == self._way[0]:
            self._way.pop(0)
            if move := _MOVE.fullmatch(action):
                self._place = move[1]
            if not self._way:
                self._way = None
        elif not (_HARMLESS.match(action) or observation.startswith(_NO_EFFECT)):
            self._way = None

    def next(self, look: str) -> str | None:
        """The next action, given what "look around" says now; None where no way is known."""
        here = _PLACE.match(look)
        place = here[1] if here else ""
        if self._way is None:
            self._way = list(self._solver.way(self._task, self._variation, tuple(self._taken)))
            self._place = place
        if not self._way:
            return None
        if place != self._place and not _MOVE.fullmatch(self._way[0]):
            return f"teleport to {self._place}"
        return self._way[0]
