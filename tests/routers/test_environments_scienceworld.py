"""ScienceWorld's tasks, many episodes in one Java process; skipped where the package or Java is not installed."""

import dataclasses
import gc
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice

import pytest

from routers.environments.protocol import GameError, Session
from routers.environments.scienceworld.environment import ScienceWorld, ScienceWorldBenchmark
from routers.environments.scienceworld.novice import novice
from srpo.run.signals import HEARD

pytestmark = pytest.mark.slow
BEES = ("teleport to greenhouse", "open bee hive", *["wait1", "look around"] * 6)
"""What bees do is random: it shows whether worlds share their dice."""


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    pytest.importorskip("scienceworld", reason="ScienceWorld is not installed: pip install scienceworld")
    if shutil.which("java") is None:
        pytest.skip("ScienceWorld needs a Java runtime on the path")


@pytest.fixture(scope="module")
def benchmark(installed: None) -> Iterator[ScienceWorldBenchmark]:
    made = ScienceWorldBenchmark()
    yield made
    made.close()


def processes(benchmark: ScienceWorldBenchmark) -> list[int]:
    return [server.process.pid for server in benchmark._simulators._servers]


def simulators(benchmark: ScienceWorldBenchmark) -> tuple[int, int]:
    """(made, busy)."""
    made = [s for server in benchmark._simulators._servers for s in server.simulators]
    return len(made), sum(s.busy for s in made)


# --- parts


def test_parts_are_the_packages_splits_and_types_take_turns(benchmark: ScienceWorldBenchmark) -> None:
    parts = {part: benchmark.tasks(part) for part in ("train", "dev", "test")}
    assert {part: len(tasks) for part, tasks in parts.items()} == {"train": 3592, "dev": 1796, "test": 1819}
    assert len({*parts["train"], *parts["dev"], *parts["test"]}) == 3592 + 1796 + 1819
    first = benchmark.tasks("train", 30)
    assert len(set(first.values())) == 30 and list(first) == list(parts["train"])[:30]
    some = benchmark.tasks("test:melt,find-plant", 5)
    assert list(some.values()) == ["melt", "find-plant", "melt", "find-plant", "melt"]
    assert all(task.startswith(f"{kind}/") for task, kind in some.items())


def test_what_does_not_exist_is_named(benchmark: ScienceWorldBenchmark) -> None:
    with pytest.raises(GameError, match="no part 'training'; there are train, dev, test"):
        benchmark.tasks("training")
    with pytest.raises(GameError, match="no task 'juggle'; it has boil"):
        benchmark.tasks("train:melt,juggle")
    for task in ("melt/100000", "juggle/0", "melt", "melt/x"):
        with pytest.raises(GameError, match=f"no task '{task}'"):
            benchmark.make(task, 40)
    with pytest.raises(GameError, match="melt/0: the step limit is 0"):
        benchmark.make("melt/0", 0)


# --- one episode


def test_nonsense_the_limit_and_order(benchmark: ScienceWorldBenchmark) -> None:
    episode = benchmark.make("find-living-thing/0", 2)
    with pytest.raises(GameError, match="before reset"):
        episode.step("look around")
    first = episode.reset()
    assert "living thing" in episode.task and first.startswith(episode.task)
    with pytest.raises(GameError, match="played once"):
        episode.reset()
    commands = episode.admissible
    assert "look around" in commands and list(commands) == sorted(commands)
    assert episode.step("dance\nwith me") == ("No known action matches that input.", False)
    late = episode.admissible
    assert episode.step("look around")[1] and not episode.won and episode.score < 0.5
    with pytest.raises(GameError, match="find-living-thing/0: step\\(\\) after the end"):
        episode.step("look around")
    with pytest.raises(GameError, match="no longer known"):
        len(late)
    assert len(commands) > 50 and tuple(episode.admissible) == ()


def test_a_failed_task_ends_with_no_score(benchmark: ScienceWorldBenchmark) -> None:
    episode = benchmark.make("find-living-thing/0", 40)
    episode.reset()
    wrong = next(command for command in episode.admissible if command.startswith("focus on ") and "air" in command)
    assert episode.step(wrong)[1] and episode.score == 0.0 and not episode.won


def test_a_language_model_is_told_the_forms_of_commands_and_what_is_here(benchmark: ScienceWorldBenchmark) -> None:
    episode = benchmark.make("boil/0", 40)
    episode.reset()
    assert "pour OBJ in OBJ" in episode.how and "reset task" not in episode.how
    assert "thermometer" not in episode.how
    episode.step("teleport to kitchen")
    assert "thermometer" in episode.how and len(episode.how) < 2000 < len("; ".join(episode.admissible))


# --- many episodes


def played(episode: ScienceWorld, look: bool = False) -> Iterator[tuple[str, float]]:
    yield episode.reset(), 0.0
    for action in BEES:
        if look:
            assert len(episode.admissible) > 10
        yield episode.step(action)[0], episode.score


def test_interleaved_episodes_are_each_as_if_alone(benchmark: ScienceWorldBenchmark) -> None:
    names = [f"{task}/{n}" for n in (0, 1) for task in ("melt", "grow-plant", "find-animal")] + ["melt/0"]
    alone = [list(played(benchmark.make(name, 40))) for name in names]
    together = [played(benchmark.make(name, 40), look=n % 2 == 0) for n, name in enumerate(names)]
    assert list(zip(*together, strict=True)) == list(zip(*alone, strict=True))
    assert alone[0] == alone[-1]
    assert len({tuple(episode) for episode in alone}) == len(names) - 1
    bees = {observation.count("adult bee") for episode in alone for observation, _ in episode}
    assert len(bees) > 2, "nothing random happened: the test would not notice shared dice"


def test_episodes_are_those_of_the_official_package(
    benchmark: ScienceWorldBenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's simulator in its own process; its Python class also asks for commands, which draws numbers."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-XX:+UnlockExperimentalVMOptions -XX:hashCode=2")
    official = importlib.import_module("scienceworld").ScienceWorldEnv("")
    try:
        for name in ("melt/1", "grow-plant/2"):
            task, _, variation = name.partition("/")
            official.load(task, int(variation), "easy")
            first = official.server.step("look around")
            mine = list(played(benchmark.make(name, 40)))
            assert mine[0][0].endswith(first)
            for action, (observation, score) in zip(BEES, mine[1:], strict=True):
                assert official.server.step(action) == observation
                assert max(0, round(100 * official.server.getScore())) / 100 == score
    finally:
        official.close()


def test_simulators_are_given_back_and_used_again(installed: None) -> None:
    benchmark = ScienceWorldBenchmark()
    for limit in (1, 3):
        episode = benchmark.make("melt/0", limit)
        episode.reset()
        episode.step("look around")
        assert simulators(benchmark) == (1, int(limit == 3))  # the first is done; the second is still open
    other = benchmark.make("melt/1", 3)
    other.reset()
    assert simulators(benchmark) == (2, 2)
    del other, episode
    gc.collect()
    assert simulators(benchmark) == (2, 0)
    [process] = processes(benchmark)
    benchmark.close()
    assert not alive(process)


# --- faults


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_process_costs_its_episodes_and_no_more(installed: None) -> None:
    benchmark = ScienceWorldBenchmark()
    episodes = [benchmark.make("melt/0", 40) for _ in range(2)]
    for episode in episodes:
        episode.reset()
    [process] = processes(benchmark)
    os.kill(process, signal.SIGKILL)
    for episode in episodes:
        with pytest.raises(GameError, match=r"melt/0: .*Java process"):
            episode.step("look around")
    fresh = benchmark.make("melt/0", 40)
    assert "melt" in fresh.reset() and processes(benchmark) != [process]
    benchmark.close()


def test_what_a_run_is_told_by_its_terminal_or_by_slurm_does_not_end_its_simulators(installed: None) -> None:
    benchmark = ScienceWorldBenchmark()
    episode = benchmark.make("melt/0", 40)
    episode.reset()
    [process] = processes(benchmark)
    for number in HEARD:
        os.kill(process, number)
        episode.step("look around")
    benchmark.close()
    assert not alive(process)


def test_a_call_that_hangs_ends_its_process(installed: None) -> None:
    benchmark = ScienceWorldBenchmark(seconds=20)
    episode = benchmark.make("melt/0", 40)
    episode.reset()
    [process] = processes(benchmark)
    os.kill(process, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(GameError, match="melt/0: the Java process has died, or took more than 20 s"):
        episode.step("look around")
    assert time.monotonic() - start < 40 and not alive(process)
    assert benchmark.make("melt/0", 40).reset()
    benchmark.close()


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_no_process_stays_behind(how: str) -> None:
    last = "" if how == "ends" else "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    code = f"""
from routers.environments.registry import benchmark
from routers.environments.scienceworld.environment import ScienceWorldBenchmark
made = benchmark("scienceworld")
made.make("melt/0", 40).reset()
print(*(server.process.pid for server in made._simulators._servers), flush=True)
{last}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if how == "ends" else -signal.SIGKILL), done.stderr
    for _ in range(100):
        if not alive(int(done.stdout)):
            return
        time.sleep(0.1)
    pytest.fail("the Java process is still there")


# --- scripted executors


@pytest.mark.parametrize(
    "task",
    ["change-the-state-of-matter-of/0", "chemistry-mix/0", "find-plant/2", "grow-plant/0", "lifespan-shortest-lived/1",
     "measure-melting-point-known-substance/0", "power-component/0", "test-conductivity/1", "use-thermometer/0"],
)  # fmt: skip
def test_the_planner_fulfils_tasks(benchmark: ScienceWorldBenchmark, task: str) -> None:
    episode = benchmark.make(task, 40)
    episode.reset()
    scores = []
    while not episode.done:
        episode.step(episode.expert() or "none")
        scores.append(episode.score)
    assert episode.won and scores == sorted(scores) and any(0 < score < 1 for score in scores)


@pytest.mark.parametrize("task", ["find-plant/2", "power-component/0", "use-thermometer/0", "test-conductivity/3"])
def test_the_planner_goes_on_after_others(benchmark: ScienceWorldBenchmark, task: str) -> None:
    """It was here before, somebody else did this and that, and it starts again from there."""
    session = Session(benchmark.make(task, 40), "s")
    session.start()
    episode = session.environment
    for action in ("teleport to kitchen", "pick up thermometer", "pick up cup", "open fridge", "wait"):
        session.take(episode.expert() or "none")  # type: ignore[attr-defined]
        session.take(action)
    while not episode.done:
        session.take(episode.expert() or "none")  # type: ignore[attr-defined]
    assert episode.won


class Sealed:
    """An environment that nobody may look into."""

    seed = "sealed"

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"read hidden state: {name}")


def test_the_novice_is_honest_and_weaker(benchmark: ScienceWorldBenchmark) -> None:
    scores = []
    for task in islice(benchmark.tasks("train"), 0, 30, 3):
        session = Session(benchmark.make(task, 40), "s")
        session.start()
        while not session.environment.done:
            view = dataclasses.replace(session.view, environment=Sealed(), admissible=())
            session.take(novice(view))
        scores.append(session.environment.score)
    assert 0.15 < sum(scores) / len(scores) < 0.7
