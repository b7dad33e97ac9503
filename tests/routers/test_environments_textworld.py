"""TextWorld's games; skipped where the package is not installed."""

import shutil
from pathlib import Path

import pytest
from step_helpers import drive

from routers.environments.protocol import GameError
from routers.environments.registry import benchmark
from routers.environments.scripted import Planner, RandomActor
from routers.environments.textworld import TextWorld
from routers.tasks.step_routing.environment import StepRoutingEnvironment
from routers.tasks.step_routing.prompts import OBSERVATIONS
from routers.tasks.step_routing.rules import always_large, always_small
from srpo.types import CORRECT, COST

INSTALL = "TextWorld is not installed: pip install textworld"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(GameError, match=r"none\.z8: no such .z8 game file"):
        TextWorld(tmp_path / "none.z8")


@pytest.fixture(scope="module")
def game(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A game of four commands, as `tw-make` makes it."""
    textworld = pytest.importorskip("textworld", reason=INSTALL)
    options = textworld.GameOptions()
    options.seeds, options.nb_rooms, options.nb_objects, options.quest_length = 3, 3, 5, 4
    options.path = str(tmp_path_factory.mktemp("textworld") / "train" / "game.z8")
    textworld.make(options)
    return Path(options.path)


@pytest.mark.slow
def test_a_suite_of_a_folder(game: Path, tmp_path: Path) -> None:
    """Through the benchmark: many open at once, scripted executors of three strengths, and files that are missing."""
    made = benchmark("textworld")
    copies = [shutil.copytree(game.parent, tmp_path / name) for name in ("heldout", "other/train")]
    assert made.tasks(str(game.parent)) == {"train/game": "textworld"} == made.tasks(str(game.parent), 1)
    assert list(made.tasks(str(copies[0]))) == ["heldout/game"]
    with pytest.raises(GameError, match="is called train/game too; rename the folder"):
        made.tasks(str(copies[1]))
    with pytest.raises(GameError, match="make some with tw-make"):
        made.tasks(str(tmp_path))
    with pytest.raises(GameError, match="no folder with it was listed"):
        made.make("train/other", 5)
    environment = StepRoutingEnvironment(
        lambda row: made.make(row["task"], 12), [RandomActor(0.001), Planner(1.0)], OBSERVATIONS["progress"].describe
    )
    many = [environment.episode({"task": "train/game"}, f"s{n}") for n in range(40)]
    assert len({episode.situation.view.first for episode in many}) == 1
    drives = {rule: drive(environment, {"task": "heldout/game"}, "s", rule) for rule in (always_small, always_large)}
    assert drives[always_large].columns[CORRECT] == 1.0 and drives[always_large].columns[COST] == 4.0
    assert len(drives[always_small].decisions) > 4
    (copies[0] / "game.json").unlink()
    with pytest.raises(GameError, match=r"the \.json that tw-make writes beside it is missing"):
        made.make("heldout/game", 5)


@pytest.mark.slow
def test_the_expert_wins_in_the_length_of_the_quest(game: Path) -> None:
    episode = TextWorld(game)
    first = episode.reset()
    assert "$$" not in first and episode.task in first
    while not episode.done:
        command = episode.expert()
        assert command in episode.admissible
        episode.step(command or "")
    assert episode.won and episode.score == 1.0 and episode.steps == 4
    with pytest.raises(GameError, match="after the end"):
        episode.step("look")


@pytest.mark.slow
def test_nonsense_costs_a_step_and_the_expert_plans_on_from_there(game: Path) -> None:
    episode = TextWorld(game, limit=6)
    episode.reset()
    before = episode.admissible
    for hostile in ("fly to the moon", "look\ngo south\n"):
        assert not episode.step(hostile)[1] and episode.admissible == before
    while not episode.done:
        episode.step(episode.expert() or "look")
    assert episode.won and episode.steps == 6


@pytest.mark.slow
def test_order_and_limit(game: Path) -> None:
    episode = TextWorld(game, limit=1)
    with pytest.raises(GameError, match="before reset"):
        episode.step("look")
    episode.reset()
    with pytest.raises(GameError, match="played once"):
        episode.reset()
    assert episode.step("look")[1] and not episode.won and episode.score == 0.0
