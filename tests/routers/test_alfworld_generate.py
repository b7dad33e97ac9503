"""Generated games: solvable, distinct, balanced, reproducible, and hard in the intended way."""

import asyncio
import hashlib
from collections import Counter

import pytest
from alfworld_problem import play

from routers.environments.alfworld.environment import AlfWorld
from routers.environments.alfworld.explorer import read_goal
from routers.environments.alfworld.facts import TASK_TYPES, Game
from routers.environments.alfworld.generate import generate, generate_games, generated
from routers.environments.protocol import NOTHING_HAPPENS, Executor, GameError
from routers.environments.scripted import Explorer, Planner


def test_the_walkthroughs_of_300_games_lead_to_success_within_the_limit() -> None:
    for game in generate_games(300):
        environment = AlfWorld(game, limit=20)
        assert not environment.won, f"{game.id} is won before it starts"
        environment.reset()
        for command in game.walkthrough:
            assert environment.step(command)[0] != NOTHING_HAPPENS, f"{game.id}: {command}"
        assert environment.won, game.id


def test_task_types_take_turns_and_can_be_asked_for() -> None:
    assert Counter(game.task_type for game in generate_games(60)) == dict.fromkeys(TASK_TYPES, 10)
    for task_type in TASK_TYPES:
        assert generate(5, task_type=task_type).task_type == task_type


def test_games_are_distinct_and_the_splits_share_none() -> None:
    facts = [game.facts for split in ("train", "test") for game in generate_games(300, split)]
    assert len(set(facts)) == 600
    ids = [game.id for split in ("train", "test") for game in generate_games(300, split)]
    assert len(set(ids)) == 600


def test_a_game_is_a_function_of_its_id() -> None:
    for game in (generate(17), generate(17, "test"), generate(4, task_type=TASK_TYPES[1])):
        assert generated(game.id) == game
    assert generate(0).task == "put some watch on desk."


def test_games_stay_what_they_are() -> None:
    # Results name games by id, so an id must mean the same game in every version; a change here starts a new format.
    told = []
    for game in generate_games(12):
        facts = game.facts
        flags = [(thing.name, sorted(thing.flags)) for thing in facts.things]
        told.append((game.id, game.task, game.walkthrough, facts.receptacles, flags, facts.inside, facts.goal))
    text = repr((told, sorted(facts.can_contain)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "f07efbf2f8ad9d43"


@pytest.mark.parametrize("game_id", ["generated/train", "generated/dev/3", "generated/train/-1", "real/train/3", ""])
def test_ids_that_name_no_game(game_id: str) -> None:
    with pytest.raises(GameError, match=r"no generated game"):
        generated(game_id)
    with pytest.raises(GameError, match="task type 'juggle'"):
        generate(0, task_type="juggle")


def test_what_a_game_says_is_what_it_wants() -> None:
    for game in generate_games(60):
        assert read_goal(AlfWorld(game).reset()) == game.facts.goal


def test_places_and_contents_are_in_alfworlds_order() -> None:
    for game in generate_games(30):
        for entities in (game.facts.receptacles, game.facts.things):
            named = [(entity.kind, -int(entity.name.split()[-1])) for entity in entities]
            assert named == sorted(named)


def won(games: list[Game], executors: list[Executor], first: int) -> float:
    """Share won with executor 1 for the first steps and executor 0 after them."""
    results = [
        asyncio.run(play(AlfWorld(game), executors, lambda view: int(len(view.steps) < first), f"seed/{game.id}"))
        for game in games
    ]
    return sum(result.won for result in results) / len(results)


def test_small_games_are_easy_for_the_explorer_large_ones_are_not_and_the_planner_wins_all() -> None:
    games = generate_games(180, "test")
    small = [game for game in games if len(game.facts.receptacles) < 18]
    large = [game for game in games if len(game.facts.receptacles) >= 18]
    assert min(len(small), len(large)) > 50
    executors: list[Executor] = [Explorer(), Planner()]
    assert won(small, executors, 0) > 0.75
    assert won(large, executors, 0) < 0.45
    assert won(games, executors, 20) == 1.0
    # A late second search is what planner calls at the start do not help with.
    late = [game for game in large if game.task_type in ("pick_two_obj_and_place", "look_at_obj_in_light")]
    assert won(late, executors, 3) < 0.6
