"""ScienceWorld's tasks; skipped where the package or Java is not installed."""

import shutil
from collections.abc import Iterator

import pytest

from routers.environments.protocol import GameError
from routers.environments.scienceworld import ScienceWorld, Server

pytestmark = pytest.mark.slow
TASK = "find-living-thing"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("scienceworld", reason="ScienceWorld is not installed: pip install scienceworld")
    if shutil.which("java") is None:
        pytest.skip("ScienceWorld needs a Java runtime on the path")
    started = Server()
    yield started
    started.close()


def test_the_gold_path_wins(server: Server) -> None:
    server.simulator.load(TASK, 3, "easy", generateGoldPath=True)
    gold = server.simulator.get_gold_action_sequence()
    episode = ScienceWorld(server, TASK, 3, limit=len(gold))
    first = episode.reset()
    assert "living thing" in episode.task and first.startswith(episode.task)
    scores = []
    for action in gold:
        if not episode.done:
            episode.step(action)
            scores.append(episode.score)
    assert episode.won and episode.done
    assert scores == sorted(scores) and 0 < scores[len(scores) // 2] < 1  # partial credit on the way
    with pytest.raises(GameError, match="find-living-thing/3: step\\(\\) after the end"):
        episode.step("look around")


def test_nonsense_the_limit_and_order(server: Server) -> None:
    episode = ScienceWorld(server, TASK, 0, limit=2)
    with pytest.raises(GameError, match="before reset"):
        episode.step("look around")
    episode.reset()
    with pytest.raises(GameError, match="played once"):
        episode.reset()
    assert "look around" in episode.admissible
    assert episode.step("dance\nwith me") == ("No known action matches that input.", False)
    assert episode.step("look around")[1] and not episode.won and episode.score < 0.5


def test_two_episodes_on_one_server_are_not_mixed_up(server: Server) -> None:
    first, second = ScienceWorld(server, TASK, 0), ScienceWorld(server, TASK, 1)
    first.reset()
    second.reset()
    with pytest.raises(GameError, match="find-living-thing/0: another episode has taken over"):
        first.step("look around")
    assert not second.step("look around")[1]


def test_unknown_tasks_and_variations_are_named(server: Server) -> None:
    with pytest.raises(GameError, match="no task 'juggle'; it has boil"):
        ScienceWorld(server, "juggle", 0)
    with pytest.raises(GameError, match=r"variations 0 to \d+, not 100000"):
        ScienceWorld(server, TASK, 100_000)


def test_a_failed_task_ends_with_no_score(server: Server) -> None:
    episode = ScienceWorld(server, TASK, 0)
    episode.reset()
    wrong = next(command for command in episode.admissible if command.startswith("focus on ") and "air" in command)
    assert episode.step(wrong)[1] and episode.score == 0.0 and not episode.won
