"""Java processes that hold ScienceWorld's simulators, many in each.

The package starts one process of about a gigabyte for one world. Its simulator class can be made many times in one
process (about 12 MB each), but these share two things that their worlds depend on: the random generator and the
counter of objects' numbers. Each simulator here has its own of both, put in place before it is called; calls to one
process take turns. Java's identity hashes are made constant (`hashCode=2`), because the order of the simulator's hash
sets follows them: without that the same actions lead to different worlds now and then.
"""

import importlib
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from routers.environments.protocol import GameError

SIMULATORS = 64
"""Of one process, with the memory below."""
SIMPLIFICATIONS = "easy"
"""ScienceWorld's word for all of them: teleporting, open doors and containers, pots that water themselves, and no
electrical actions where the task does without."""
ROOMS = (
    "kitchen", "workshop", "outside", "greenhouse", "living room", "bathroom", "bedroom", "art studio", "foundry",
    "hallway",
)  # fmt: skip
_DEAF = 'trap "" INT TERM USR1; exec java "$0" "$@"'
"""A terminal and Slurm signal every process, and the run needs its simulators until it has finished its step. Java
leaves ignored what was ignored when it started; it ends when its input does, however this process ends."""
_JAVA = ["-Xmx2g", "-XX:+UseSerialGC", "-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2"]


class Server:
    """One Java process. It ends at `close`, when this process does, and when a call hangs.

    Args:
        seconds: longest time of one call. Then the process is killed: its thread cannot be stopped otherwise.

    Raises:
        ImportError, OSError: the package or Java is not installed.
    """

    def __init__(self, seconds: float) -> None:
        package = importlib.import_module("scienceworld.constants")
        py4j = importlib.import_module("py4j.java_gateway")
        self._errors = importlib.import_module("py4j.protocol")
        logging.getLogger("py4j").setLevel(logging.CRITICAL)  # what it logs it raises too
        # In the package's folder: the simulator looks for its table of object types where it runs, or writes one.
        port, token, self.process = py4j.launch_gateway(
            java_path=_DEAF,
            use_shell=True,
            classpath=package.JAR_PATH,
            javaopts=_JAVA,
            cwd=package.BASEPATH,
            die_on_exit=True,
            enable_auth=True,
            return_proc=True,
        )
        # Without memory management: it would tell a process that may be dead of every Python object that goes.
        self.gateway = py4j.JavaGateway(
            gateway_parameters=py4j.GatewayParameters(
                port=port, auth_token=token, read_timeout=seconds, enable_memory_management=False
            )
        )
        self.seconds = seconds
        self.simulators: list[Simulator] = []
        """All that were made."""
        self.alive = True
        self._turn = threading.Lock()
        self._present: Simulator | None = None
        java = self.gateway.jvm
        self.dice = java.java.util.Random
        self.scratch = self.dice()
        self.interface = java.scienceworld.runtime.pythonapi.PythonInterface
        self._tour()
        self._counter = _singleton(java.util, "UniqueIdentifier")
        self._random = _singleton(java.scala.util, "Random")
        self._random_field = java.java.lang.Class.forName("scala.util.Random").getDeclaredField("self")
        self._random_field.setAccessible(True)

    def _tour(self) -> None:
        """How the package's solvers search all rooms: in this order, by teleport.

        Without it they would work out a walk at their first search, which takes seconds and depends on who is first.
        """
        walks = _singleton(self.gateway.jvm.scienceworld.goldagent, "PathFinder").precomputedExhaustivePaths()
        for start in ROOMS:
            rooms = [room for room in ROOMS if room != start]
            tour = self.gateway.new_array(self.gateway.jvm.java.lang.String, len(rooms), 1)
            for i, room in enumerate(rooms):
                tour[i][0] = f"teleport to {room}"
            walks.put(start, tour)

    @contextmanager
    def turn(self, simulator: "Simulator", what: str) -> Iterator[None]:
        """Nobody else calls the process in here, and what its simulators share is this one's.

        Raises:
            GameError: the process died or hangs, or the simulator raised; names `what` was played.
        """
        with self._turn:
            if not self.alive:
                raise GameError(f"{what}: its Java process has ended; the episode is lost")
            try:
                if simulator is not self._present:
                    if self._present is not None:
                        self._present.count = self._counter.count()
                    getattr(self._counter, "count_$eq")(simulator.count)
                    self.roll(simulator.dice)
                    self._present = simulator
                yield
            except self._errors.Py4JJavaError as error:
                raise GameError(f"{what}: the simulator failed with {error.java_exception.toString()}") from None
            except self._errors.Py4JError as error:
                self._end()
                raise GameError(
                    f"{what}: the Java process has died, or took more than {self.seconds:g} s; its episodes are lost"
                ) from error

    def roll(self, dice: Any) -> None:
        """Let the simulators draw from this Java random generator."""
        self._random_field.set(self._random, dice)

    def close(self) -> None:
        """Also while a call hangs."""
        self.alive = False
        self.process.kill()
        with self._turn:
            self._end()

    def _end(self) -> None:
        self.alive = False
        self.process.kill()
        self.process.wait()
        self.gateway.close()


class Simulator:
    """One world at a time, in a server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.count = 0
        """Objects made so far; kept here while other simulators have their turn."""
        self.dice = server.dice()
        self.name = ""
        """What is played."""
        self.moves = 0
        """Counts loads and steps."""
        self.busy = False
        with server.turn(self, "a new simulator"):
            self._java = server.interface()
        server.simulators.append(self)

    def load(self, task: str, variation: int) -> str:
        """Begin a variation of a task; returns what has to be done, in words."""
        self.name = f"{task}/{variation}"
        self.moves += 1
        with self._turn():
            if problem := self._java.load(task, variation, SIMPLIFICATIONS, False):
                raise GameError(f"{self.name}: {problem}")
            return self._java.getTaskDescription().removeprefix("Task Description:").strip()

    def step(self, action: str) -> tuple[str, float, bool]:
        """(observation, score in [0, 1], whether it is over). A task that was failed for good is over and scores 0."""
        self.moves += 1
        with self._turn():
            observation, score, over = self._java.step(action), self._java.getScore(), self._java.getCompleted()
        return observation, max(0, round(100 * score)) / 100, over or score < 0

    def valid(self) -> tuple[str, ...]:
        """All commands that are possible now, sorted."""
        with self._turn():
            self.server.roll(self.server.scratch)  # it draws numbers, and the world must not notice that we looked
            try:
                return tuple(sorted(set(self._lines(self._java.getValidActionObjectCombinations()))))
            finally:
                self.server.roll(self.dice)

    @cached_property
    def templates(self) -> tuple[str, ...]:
        """The forms of commands; OBJ stands for a thing."""
        with self._turn():
            return tuple(self._lines(self._java.getPossibleActions()))

    def things(self) -> tuple[str, ...]:
        """Names of things that commands can be about now."""
        with self._turn():
            return tuple(self._lines(self._java.getPossibleObjects()))

    def variations(self) -> dict[str, dict[str, list[int]]]:
        """Task type -> part (train, dev, test) -> its variations, by the package's own split."""
        found = {}
        with self._turn():
            for task in self._lines(self._java.getTaskNames()):
                getattr(self._java, "taskStr_$eq")(task)
                found[task] = {
                    part: json.loads(getattr(self._java, f"getVariations{part.title()}")().toString())
                    for part in ("train", "dev", "test")
                }
        return found

    def gold(self, task: str, variation: int) -> list[str]:
        """Play on as the package's own solver of this task would from here, and return what it did."""
        with self._turn():
            before = len(self._lines(self._java.getActionHistory()))
            solvers = self._java.taskMaker()
            self._forget(solvers.createGoldActions(task, variation, self._java))
            self._forget(solvers)
            return self._lines(self._java.getActionHistory())[before:]

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self.server.turn(self, self.name):
            yield

    def _lines(self, strings: Any) -> list[str]:
        """A Java list in one message instead of one for each element."""
        text = self.server.gateway.jvm.java.lang.String.join("\n", strings)
        self._forget(strings)
        return text.split("\n") if text else []

    def _forget(self, thing: Any) -> None:
        """Java keeps what it has returned until it is told; a task's solvers are megabytes."""
        self.server.gateway.detach(thing)


def _singleton(package: Any, name: str) -> Any:
    """A Scala object."""
    return getattr(getattr(package, f"{name}$"), "MODULE$")


class Simulators:
    """Simulators for as many episodes as are open, in as few processes as hold them."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._servers: list[Server] = []
        self._lock = threading.Lock()

    def take(self) -> Simulator:
        """A simulator that nobody uses; in a new process where the others are full or dead."""
        with self._lock:
            self._servers = [server for server in self._servers if server.alive and server.process.poll() is None]
            for server in self._servers:
                simulator = next((s for s in server.simulators if not s.busy), None)
                if simulator is None and len(server.simulators) < SIMULATORS:
                    simulator = Simulator(server)
                if simulator is not None:
                    break
            else:
                self._servers.append(Server(self._seconds))
                simulator = Simulator(self._servers[-1])
            simulator.busy = True
            return simulator

    def give_back(self, simulator: Simulator) -> None:
        simulator.busy = False

    @contextmanager
    def lent(self) -> Iterator[Simulator]:
        simulator = self.take()
        try:
            yield simulator
        finally:
            self.give_back(simulator)

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            for server in self._servers:
                server.close()
            self._servers = []
