"""ScienceWorld's own solvers, as an expert that goes on from wherever an episode is. PRIVILEGED: they know everything.

The package has a scripted solver for every task; its "gold path" is what the solver does from the start. Here it is
started in a second world, which was brought to the episode's state by the episode's actions, so that its way begins
where others have left off. The way is made shorter (teleport instead of doors, no looking around) where a trial shows
that this ends with no lower score.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from routers.environments.scienceworld.server import Simulator, Simulators

_TIME = re.compile(r"(?:look|examine|read|inventory|task|wait)\b.*")
"""Actions that change nothing but time."""
_MOVE = re.compile(r"(?:go|teleport) to (.+)")
_ARRIVED = re.compile(r"(?:You (?:teleport|move) to|This (?:room|outside location) is called) the (.+?)\.")
_FAILED = ("No known action", "Unknown action", "ERROR")


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


def essential(actions: Sequence[str]) -> tuple[str, ...]:
    """Actions that lead to the same place and things as all of them, if not at the same time; none for mere walks."""
    found = shorter(actions)
    while len(found) > 1 and (_TIME.fullmatch(found[0]) or (_MOVE.fullmatch(found[0]) and _TIME.fullmatch(found[1]))):
        found.pop(0 if _TIME.fullmatch(found[0]) else 1)
    return () if all(_MOVE.fullmatch(action) or _TIME.fullmatch(action) for action in found) else tuple(found)


class Expert:
    """Follows a way through one episode, whoever else acts in it.

    It keeps to its way while that works, and looks for another one, from what things are now, when a step of it fails
    after others have acted, or when it ends too early.

    Args:
        first: the episode's first observation.
    """

    def __init__(self, solver: Solver, task: str, variation: int, first: str) -> None:
        self._solver, self._task, self._variation = solver, task, variation
        self._taken: list[str] = []
        self._here = self._start = _place(first) or ""
        self._way: list[str] | None = None
        self._place = ""
        """Where the way expects the agent."""
        self._alone = True
        """Nobody else has acted since the way was found."""

    def saw(self, action: str, observation: str) -> None:
        """Somebody has acted."""
        failed = observation.startswith(_FAILED)
        if not failed:
            self._taken.append(action)
        self._here = _place(observation) or self._here
        if not self._way or action != self._way[0]:
            self._alone &= failed
            if not self._way and not failed:
                self._way = None
            return
        self._way.pop(0)
        self._place = self._here
        if not self._way or (failed and not self._alone):
            self._way = None

    def next(self) -> str | None:
        """The next action; None where no way is known."""
        if self._way is None:
            state = essential(self._taken)
            self._way = list(self._solver.way(self._task, self._variation, state))
            self._place = self._here if state else self._start
            self._alone = True
        if not self._way:
            return None
        if self._here != self._place and not _MOVE.fullmatch(self._way[0]):
            return f"teleport to {self._place}"
        return self._way[0]


def _place(observation: str) -> str | None:
    found = _ARRIVED.search(observation)
    return found[1] if found else None
