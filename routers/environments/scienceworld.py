"""ScienceWorld's tasks (Wang et al. 2022, arXiv 2203.07540, package `scienceworld`, Apache-2.0) as environments.

Optional: `pip install scienceworld`, and a Java runtime on the path. Each server is a Java process of about 1 GB.
"""

import importlib

from routers.environments.protocol import GameError


class Server:
    """A simulator for many episodes, one after the other: an episode's `reset` takes it from the one before."""

    def __init__(self) -> None:
        self.simulator = importlib.import_module("scienceworld").ScienceWorldEnv("")
        self.episode: ScienceWorld | None = None

    def close(self) -> None:
        self.simulator.close()


class ScienceWorld:
    """One variation of a task; an `AgentEnvironment`. Score: ScienceWorld's, which gives partial credit, over 100."""

    def __init__(
        self, server: Server, task: str, variation: int, simplifications: str = "easy", limit: int = 40
    ) -> None:
        tasks = server.simulator.get_task_names()
        if task not in tasks:
            raise GameError(f"ScienceWorld has no task {task!r}; it has {', '.join(tasks)}")
        last = server.simulator.get_max_variations(task) - 1
        if not 0 <= variation <= last:
            raise GameError(f"ScienceWorld's {task} has variations 0 to {last}, not {variation}")
        self._server = server
        self._variation, self._simplifications = variation, simplifications
        self._ended = False
        self.task_type, self.seed, self.limit, self.steps = task, f"{task}/{variation}", limit, 0
        self.task = ""
        """Known after `reset`."""
        self.score = 0.0
        self.admissible: tuple[str, ...] = ()

    @property
    def won(self) -> bool:
        return self.score == 1.0

    @property
    def done(self) -> bool:
        return self._ended or self.steps >= self.limit

    def reset(self) -> str:
        if self.task:
            raise GameError(f"{self.seed}: an episode object is played once; make a new one")
        self._server.episode, simulator = self, self._server.simulator
        simulator.envStepLimit = self.limit
        simulator.load(self.task_type, self._variation, self._simplifications)
        observation, info = simulator.reset()
        self.task = info["taskDesc"].removeprefix("Task Description:").strip()
        self.admissible = tuple(sorted(info["valid"]))
        return f"{self.task}\n\n{observation}"

    def step(self, action: str) -> tuple[str, bool]:
        if not self.task or self.done:
            raise GameError(f"{self.seed}: step() {'after the end' if self.task else 'before reset()'}")
        if self._server.episode is not self:
            raise GameError(
                f"{self.seed}: another episode has taken over the server; use one server for each at a time"
            )
        self.steps += 1
        observation, _, self._ended, info = self._server.simulator.step(" ".join(action.split())[:200])
        self.score = max(0, info["score"]) / 100  # -100: the task was failed for good
        self.admissible = tuple(sorted(info["valid"]))
        return observation, self.done
