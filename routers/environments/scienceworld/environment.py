"""ScienceWorld's tasks (Wang et al. 2022, arXiv 2203.07540, package `scienceworld`, Apache-2.0) as environments.

Optional: `pip install scienceworld`, and a Java runtime on the path. Many episodes share a Java process
(`scienceworld_server`). Scores give partial credit, so that success of a task is its progress, from 0 to 1.
"""

import importlib
import shutil
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import overload

from routers.environments.protocol import GameError
from routers.environments.scienceworld.expert import Expert, Solver
from routers.environments.scienceworld.server import Simulator, Simulators

PARTS = ("train", "dev", "test")
HOW = (
    "Write one command. Forms of commands, OBJ stands for a thing: {forms}. A number alone answers the question which "
    "of several things is meant; wait is ten moments, wait1 one. Things here: {things}"
)


class ScienceWorldBenchmark:
    """The package's own splits of its 30 tasks, 7207 variations; a `Benchmark`.

    Parts are `train`, `dev` and `test`, or some types of one: `train:boil,melt`. Types take turns, so that few tasks
    cover all. A task's id is TYPE/VARIATION.

    Args:
        seconds: longest time of one call of a simulator; after it, its process and all its episodes are lost.
    """

    def __init__(self, seconds: float = 120.0) -> None:
        importlib.import_module("scienceworld")
        if shutil.which("java") is None:
            raise GameError("ScienceWorld needs a Java runtime: there is no `java` on the path")
        self._simulators = Simulators(seconds)
        self._solver = Solver(self._simulators)
        self._variations: dict[str, dict[str, list[int]]] = {}

    def tasks(self, which: str, count: int = 0) -> dict[str, str]:
        part, _, types = which.partition(":")
        known = self._known()
        if part not in PARTS:
            raise GameError(f"ScienceWorld has no part {which!r}; there are {', '.join(PARTS)}, and PART:TYPE,TYPE")
        chosen = types.split(",") if types else list(known)
        if unknown := [name for name in chosen if name not in known]:
            raise GameError(f"ScienceWorld has no task {unknown[0]!r}; it has {', '.join(known)}")
        most = max(len(known[name][part]) for name in chosen)
        turns = (
            (name, known[name][part][turn]) for turn in range(most) for name in chosen if turn < len(known[name][part])
        )
        tasks = {f"{name}/{variation}": name for name, variation in turns}
        return dict(list(tasks.items())[: count or None])

    def make(self, task: str, limit: int) -> "ScienceWorld":
        name, _, variation = task.rpartition("/")
        known = self._known()
        if name not in known or not any(variation in map(str, known[name][part]) for part in PARTS):
            raise GameError(f"ScienceWorld has no task {task!r}; ids are TYPE/VARIATION, as `tasks` returns them")
        return ScienceWorld(self._simulators, self._solver, name, int(variation), limit)

    def close(self) -> None:
        self._simulators.close()

    def _known(self) -> dict[str, dict[str, list[int]]]:
        if not self._variations:
            with self._simulators.lent() as simulator:
                self._variations = simulator.variations()
        return self._variations


class ScienceWorld:
    """One variation of a task; an `AgentEnvironment`. Score: ScienceWorld's, which gives partial credit, over 100.

    Its simulator is taken at `reset`, and given back at the end or when the object goes.
    """

    waits = True

    def __init__(self, simulators: Simulators, solver: Solver, task: str, variation: int, limit: int = 40) -> None:
        if limit < 1:
            raise GameError(f"{task}/{variation}: the step limit is {limit}; it must be at least 1")
        self.task_type, self.seed, self.limit, self.steps = task, f"{task}/{variation}", limit, 0
        self.task = ""
        """Known after `reset`."""
        self.score = 0.0
        self._variation = variation
        self._simulators = simulators
        self._simulator: Simulator | None = None
        self._give_back: Callable[[], object] = lambda: None
        self._over = False
        self._solver = solver
        self._admissible: Sequence[str] = ()
        self._how = ""

    @property
    def won(self) -> bool:
        return self.score == 1.0

    @property
    def done(self) -> bool:
        return self._over or self.steps >= self.limit

    @property
    def admissible(self) -> Sequence[str]:
        """Some hundred commands, worked out when they are looked at, which takes longer than a step."""
        return self._admissible

    @property
    def how(self) -> str:
        if not self._how and self._simulator is not None and not self.done:
            forms = [form for form in self._simulator.templates if form != "reset task"]
            self._how = HOW.format(forms="; ".join(forms), things=", ".join(self._simulator.things()))
        return self._how

    def expert(self) -> str | None:
        """PRIVILEGED: the next command of the package's own solver of this task, started where the episode is now."""
        self._now("expert")
        return self._expert.next()

    def reset(self) -> str:
        if self.task:
            raise GameError(f"{self.seed}: an episode object is played once; make a new one")
        self._simulator = self._simulators.take()
        self._give_back = weakref.finalize(self, self._simulators.give_back, self._simulator)
        self.task = self._simulator.load(self.task_type, self._variation)
        observation, _, _ = self._simulator.step("look around")
        self._expert = Expert(self._solver, self.task_type, self._variation, observation)
        self._admissible = Commands(self._simulator)
        return f"{self.task}\n\n{observation}"

    def step(self, action: str) -> tuple[str, bool]:
        simulator = self._now("step")
        action = " ".join(action.split())[:200]
        self.steps += 1
        observation, self.score, self._over = simulator.step(action)
        self._expert.saw(action, observation)
        self._admissible, self._how = () if self.done else Commands(simulator), ""
        if self.done:
            self._give_back()
        return observation, self.done

    def _now(self, what: str) -> Simulator:
        if self._simulator is None or self.done:
            raise GameError(f"{self.seed}: {what}() {'after the end' if self.task else 'before reset()'}")
        return self._simulator


class Commands(Sequence[str]):
    """All possible commands, asked for when somebody looks, at the latest before the next step."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator, self._moves = simulator, simulator.moves

    @cached_property
    def _all(self) -> tuple[str, ...]:
        if self._simulator.moves != self._moves:
            raise GameError("the commands that were possible before the last step are no longer known")
        return self._simulator.valid()

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[str, ...]: ...
    def __getitem__(self, at: int | slice) -> str | tuple[str, ...]:
        return self._all[at]
