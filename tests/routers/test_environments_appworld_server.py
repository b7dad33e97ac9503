"""AppWorld's processes: many at once, ones that die or hang, and what they see of ours.

Everything runs on a stand-in for the package, and on AppWorld itself where APPWORLD_PYTHON names a Python that has it.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from appworld_cases import make_world
from appworld_stub import install, make_data

from routers.environments.appworld import environment as appworld
from routers.environments.appworld.environment import AppWorldBenchmark
from routers.environments.protocol import GameError
from srpo.run.signals import HEARD


@pytest.fixture(scope="module", params=["stand-in", pytest.param("appworld", marks=pytest.mark.slow)])
def benchmark(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppWorldBenchmark]:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stand-in":
            make_data(folder)
            patch.setenv("APPWORLD_PYTHON", str(install(folder)))
        else:
            make_world(folder)
        patch.setenv("APPWORLD_ROOT", str(folder))
        patch.setenv("OPENAI_API_KEY", "sk-very-secret")
        made = AppWorldBenchmark()
        yield made
        made.close()


def processes(benchmark: AppWorldBenchmark) -> list[int]:
    """Of the benchmark's server, itself included."""
    session = benchmark._server._process.pid
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.name))
    return found


def wait_for(benchmark: AppWorldBenchmark, count: int) -> None:
    end = time.monotonic() + 20
    while len(processes(benchmark)) != count:
        assert time.monotonic() < end, f"{len(processes(benchmark))} processes, not {count}"
        time.sleep(0.05)


def test_many_episodes_of_one_task_are_open_at_once_and_apart(benchmark: AppWorldBenchmark) -> None:
    episodes = [benchmark.make("abc1234_1", 3) for _ in range(8)]
    for episode in episodes:
        episode.reset()
    for number, episode in enumerate(episodes):
        assert episode.step(f"x = {number}") == ("Execution successful.", False)
    for number, episode in reversed(list(enumerate(episodes))):
        assert episode.step("print(x)") == (f"{number}\n", False)
    for episode in episodes[:4]:
        assert episode.step("apis.supervisor.complete_task()")[1] and episode.done
    del episode
    episodes[6:] = []  # nobody holds them any more
    wait_for(benchmark, 1 + 2)
    episodes.clear()
    wait_for(benchmark, 1)


def test_an_episode_that_is_only_asked_for_its_first_words_costs_no_world(benchmark: AppWorldBenchmark) -> None:
    kept = benchmark.make("abc1234_1", 3)
    kept.reset()
    kept.step("x = 1")
    started = time.monotonic()
    for _ in range(100):
        assert benchmark.make("abc1234_1", 3).reset().endswith(kept.task)
    assert kept.step("print(x)") == ("1\n", False)
    wait_for(benchmark, 2)
    assert time.monotonic() - started < 15  # AppWorld's 100 worlds would take a minute


def test_a_process_that_dies_costs_its_episode_only(benchmark: AppWorldBenchmark) -> None:
    dying, other = benchmark.make("abc1234_1", 3), benchmark.make("abc1234_1", 3)
    for episode in (dying, other):
        episode.reset()
        episode.step("x = 1")
    with pytest.raises(RuntimeError, match="process has ended"):
        dying.step("import os\nos.abort()")
    assert other.step("print(x)") == ("1\n", False)
    assert not dying.won and dying.score == 0.0


def test_a_process_that_hangs_is_killed(benchmark: AppWorldBenchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, other = benchmark.make("abc1234_1", 3), benchmark.make("abc1234_1", 3)
    for episode in (hanging, other):
        episode.reset()
        episode.step("x = 1")
    before = len(processes(benchmark))
    monkeypatch.setattr(appworld, "ANSWER_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within 1 s"):
        hanging.step("9 ** 9 ** 9 ** 9")  # no signal gets through to this
    assert time.monotonic() - started < 5
    wait_for(benchmark, before - 1)
    monkeypatch.undo()
    assert other.step("print(x)") == ("1\n", False)


def test_what_a_run_is_told_by_its_terminal_or_by_slurm_ends_no_world(benchmark: AppWorldBenchmark) -> None:
    episode = benchmark.make("abc1234_1", 9)
    episode.reset()
    episode.step("x = 1")
    for number in HEARD:
        for process in processes(benchmark):
            os.kill(process, number)
        assert episode.step("print(x)") == ("1\n", False)


def test_a_world_that_cannot_be_started_costs_its_episode_only(benchmark: AppWorldBenchmark) -> None:
    open_one, broken = benchmark.make("abc1234_1", 3), benchmark.make("abc1234_1", 3)
    open_one.reset()
    parent = Path(open_one.step("import os\nprint(os.getcwd())")[0].strip()).parent
    away = parent.rename(parent.with_name(parent.name + "-away"))  # no folder can be made: as on a full disk
    try:
        with pytest.raises(RuntimeError, match="process has ended"):
            broken.reset()  # here already, if the process is quicker than we are
            broken.step("print(1)")
    finally:
        away.rename(parent)
    assert open_one.step("print(1)") == ("1\n", False)


def test_a_dead_server_is_started_again(benchmark: AppWorldBenchmark) -> None:
    old = benchmark.make("abc1234_1", 3)
    old.reset()
    assert old.step("x = 1") == ("Execution successful.", False)
    os.kill(benchmark._server._process.pid, signal.SIGKILL)
    benchmark._server._process.wait()
    assert old.step("print(x)") == ("1\n", False)  # its process lives on
    new = benchmark.make("abc1234_1", 3)
    new.reset()
    assert new.step("print(2)") == ("2\n", False)


def test_code_sees_nothing_of_our_environment(benchmark: AppWorldBenchmark) -> None:
    episode = benchmark.make("abc1234_1", 9)
    episode.reset()
    said, _ = episode.step("import os\nprint(sorted(os.environ), dict(os.environ))")
    assert "APPWORLD_ROOT" in said and "KEY" not in said and "secret" not in said
    said, _ = episode.step("import pathlib\nprint(pathlib.Path('/proc/self/environ').read_text())")
    assert "APPWORLD_ROOT" in said and "KEY" not in said and "secret" not in said
    folder = episode.step("print(os.getcwd())")[0].strip()
    assert Path(folder, "data").is_dir() and Path(folder).parent.name.startswith("appworld-")
    assert "appworld" not in sys.modules and "freezegun" not in sys.modules
    del episode
    wait_for(benchmark, 1)
    assert not Path(folder).exists()


def test_code_that_tampers_with_the_tests_changes_nothing(benchmark: AppWorldBenchmark) -> None:
    episode = benchmark.make("abc1234_1", 3)
    episode.reset()
    said, _ = episode.step(
        "import appworld\nclass Passed:\n    success = True\n"
        "appworld.evaluate_task = lambda *a, **k: Passed\n"
        "if hasattr(appworld, 'evaluator'):\n"
        "    appworld.evaluator.TestTracker.success = property(lambda self: True)\n"
        "print(appworld.evaluate_task().success)"
    )
    assert said == "True\n"
    assert episode.step("apis.supervisor.complete_task()")[1]
    assert not episode.won and episode.score == 0.0


def test_the_end_of_the_suite_ends_everything(benchmark: AppWorldBenchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    own = AppWorldBenchmark()
    episode = own.make("abc1234_1", 3)
    episode.reset()
    folder = Path(episode.step("import os\nprint(os.getcwd())")[0].strip())
    assert len(processes(own)) == 2
    own.close()
    wait_for(own, 0)
    assert not folder.parent.exists()
    with pytest.raises(RuntimeError, match="process has ended"):
        episode.step("print(1)")


def test_tasks_and_their_types(benchmark: AppWorldBenchmark) -> None:
    assert benchmark.tasks("train") == {"abc1234_1": "difficulty 1", "abc1234_2": "difficulty 2"}
    assert benchmark.tasks("train", 1) == {"abc1234_1": "difficulty 1"}
    assert benchmark.tasks("dev") == {"abc1234_2": "difficulty 2"}  # without its tag
    assert benchmark.make("abc1234_2", 40).task_type == "appworld"  # the difficulty comes with the solutions
    with pytest.raises(GameError, match="no data set 'test_normal'; there are dev, train"):
        benchmark.tasks("test_normal")
    with pytest.raises(GameError, match="no task 'abc1234_3'"):
        benchmark.make("abc1234_3", 40)
    with pytest.raises(GameError, match="step limit is 0"):
        benchmark.make("abc1234_1", 0)


def test_an_episode_is_played_once_and_in_order(benchmark: AppWorldBenchmark) -> None:
    episode = benchmark.make("abc1234_2", 1)
    with pytest.raises(GameError, match=r"step\(\) before reset"):
        episode.step("print(1)")
    assert episode.reset().startswith("You act for Ada Berg (email ada@example.com, phone 555")
    with pytest.raises(GameError, match="played once"):
        episode.reset()
    assert episode.step("print(1)") == ("1\n", True) and (episode.done, episode.steps) == (True, 1)
    with pytest.raises(GameError, match=r"step\(\) after the end"):
        episode.step("print(1)")


def test_a_server_that_cannot_import_says_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(tmp_path)
    monkeypatch.setenv("APPWORLD_PYTHON", str(install(tmp_path)))
    monkeypatch.setenv("APPWORLD_ROOT", str(tmp_path))
    (tmp_path / "site/appworld/apps/supervisor/apis.py").write_text("import a_module_that_is_missing\n")
    broken = AppWorldBenchmark()
    episode = broken.make("abc1234_1", 3)
    episode.reset()
    with pytest.raises(RuntimeError, match="No module named 'a_module_that_is_missing'"):
        episode.step("print(1)")
    broken.close()


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error() -> str:
        with pytest.raises(ImportError) as caught:
            AppWorldBenchmark()
        assert "pip install appworld; appworld-env/bin/appworld install; " in str(caught.value)
        assert "appworld download data --root FOLDER; then set APPWORLD_PYTHON" in str(caught.value)
        return str(caught.value)

    monkeypatch.setenv("APPWORLD_ROOT", str(tmp_path))
    monkeypatch.setenv("APPWORLD_PYTHON", str(tmp_path / "python"))
    assert "cannot be run" in error()
    monkeypatch.delenv("APPWORLD_PYTHON")
    assert f"AppWorld is not installed for {sys.executable}" in error()
    monkeypatch.setenv("APPWORLD_PYTHON", str(install(tmp_path)))
    assert f"no AppWorld data in APPWORLD_ROOT={tmp_path}" in error()
    make_data(tmp_path)
    (tmp_path / "site/appworld/apps/supervisor").rename(tmp_path / "elsewhere")
    assert "apps are not unpacked" in error()
