"""The tasks of a benchmark behind one small protocol: which there are, and a fresh episode of each.

`benchmark("alfworld")` needs nothing but this library; the others are optional packages, imported on demand.
"""

import atexit
import functools
import importlib
from typing import Protocol

from routers.environments.protocol import AgentEnvironment, GameError


class Benchmark(Protocol):
    """The tasks of one benchmark. Made without arguments, once per process."""

    def tasks(self, which: str, count: int = 0) -> dict[str, str]:
        """Task id -> its type, of a named part (a split, a file, a folder), in a fixed order.

        Args:
            which: the part.
            count: at most so many; 0: all.

        Raises:
            GameError: no such part; the text says which there are.
        """

    def make(self, task: str, limit: int) -> AgentEnvironment:
        """A fresh episode of a task that `tasks` has returned in this process. Many may be open at the same time.

        Args:
            task: its id.
            limit: steps of the episode.

        Raises:
            GameError: no such task.
        """

    def close(self) -> None:
        """Give back processes and connections."""


BENCHMARKS = {
    "alfworld": ("routers.environments.alfworld.environment:AlfWorldBenchmark", ""),
    "appworld": ("routers.environments.appworld.environment:AppWorldBenchmark", "appworld"),
    "bfcl": ("routers.environments.bfcl:BfclBenchmark", "bfcl-eval"),
    "messages": ("routers.environments.messages.environment:MessagesBenchmark", ""),
    "scienceworld": ("routers.environments.scienceworld.environment:ScienceWorldBenchmark", "scienceworld"),
    "textworld": ("routers.environments.textworld:TextWorldBenchmark", "textworld"),
}
"""Name -> its class, and the optional package that it needs."""


@functools.cache
def benchmark(name: str) -> Benchmark:
    """The one benchmark of this process with this name; closed at exit.

    Raises:
        GameError: no such benchmark.
        ImportError: its package is not installed.
    """
    if name not in BENCHMARKS:
        raise GameError(f"there is no environment {name!r}; there are {', '.join(BENCHMARKS)}")
    place, package = BENCHMARKS[name]
    module, kind = place.split(":")
    try:
        made: Benchmark = getattr(importlib.import_module(module), kind)()
    except ImportError as error:
        raise ImportError(
            f"the environment {name!r} needs the package {package} ({error}); README.md, Agent environments, says how "
            "to install it"
        ) from error
    atexit.register(made.close)
    return made
