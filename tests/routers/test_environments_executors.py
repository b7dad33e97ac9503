"""The scripted executors: the planner's plans, the explorer's honesty, and what they cost."""

import asyncio
import dataclasses
import itertools

import pytest
from alfworld_problem import COOK, data, game, goal, play, world

from routers.environments.alfworld.engine import plan
from routers.environments.alfworld.environment import AlfWorld
from routers.environments.alfworld.explorer import Memory, explore, read_goal, remember
from routers.environments.alfworld.games import load_games
from routers.environments.alfworld.generate import generate_games
from routers.environments.protocol import Executor, GameError, Session, View
from routers.environments.scripted import EXPLORER_USD, PLANNER_USD, Explorer, Planner, RandomActor

# --- the planner


@pytest.mark.parametrize(
    ("goal_text", "before", "commands"),
    [
        (
            COOK,
            "",
            "go to countertop 1; take apple 1 from countertop 1; go to microwave 1; open microwave 1; "
            "move apple 1 to microwave 1",
        ),
        # The hand is full of something else: it is put down where we stand, on the way.
        (
            COOK,
            "go to countertop 1; take mug 2 from countertop 1",
            "move mug 2 to coffeemachine 1; "
            "take apple 1 from countertop 1; go to microwave 1; open microwave 1; move apple 1 to microwave 1",
        ),
        # Of two mugs the one in plain view, and the door is opened on arrival.
        (
            goal("place", thing="Mug", place="Fridge"),
            "",
            "go to countertop 1; take mug 2 from countertop 1; go to fridge 1; open fridge 1; move mug 2 to fridge 1",
        ),
        (
            goal("treat", able="heatable", state="isHot", thing="Mug", place="Cabinet"),
            "",
            "go to countertop 1; take mug 2 from countertop 1; go to microwave 1; heat mug 2 with microwave 1; "
            "go to cabinet 2; open cabinet 2; move mug 2 to cabinet 2",
        ),
        # One mug lies in cabinet 1 already, so the other goes there too.
        (
            goal("two", thing="Mug", place="Cabinet"),
            "",
            "go to countertop 1; take mug 2 from countertop 1; go to cabinet 1; "
            "open cabinet 1; move mug 2 to cabinet 1",
        ),
        (
            goal("look", thing="Apple", lamp="DeskLamp"),
            "",
            "go to countertop 1; take apple 1 from countertop 1; go to desk 1; use desklamp 1",
        ),
        (
            goal("look", thing="Apple", lamp="DeskLamp"),
            "go to desk 1; use desklamp 1; go to countertop 1",
            "take apple 1 from countertop 1; go to desk 1",
        ),
    ],
)
def test_shortest_plans(goal_text: str, before: str, commands: str) -> None:
    environment = world(goal_text)
    for command in before.split("; ") if before else ():
        environment.step(command)
    found = plan(environment.state)
    assert found == commands.split("; ")
    for command in found:
        environment.step(command)
    assert environment.won


def test_without_a_plan_the_planner_says_so_and_looks() -> None:
    environment = world(goal("place", thing="Pen", place="Fridge"))  # a pen may not lie in the fridge
    assert plan(environment.state) is None
    view = View("", (), environment.admissible, environment, "s")
    assert asyncio.run(Planner().act(view, 1.0)).action == "look"


class NoExpert:
    seed = "plain"


def test_the_planner_refuses_environments_without_an_expert() -> None:
    view = View("", (), (), NoExpert(), "s")
    with pytest.raises(GameError, match="plain: this environment has no expert"):
        asyncio.run(Planner().act(view, 1.0))


# --- the explorer


class Sealed:
    """An environment that nobody may look into."""

    seed = "sealed"

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"read hidden state: {name}")


def honest(view: View) -> View:
    return dataclasses.replace(view, environment=Sealed())


def test_the_explorer_never_reads_hidden_state() -> None:
    for played in generate_games(24):
        session = Session(AlfWorld(played), "s")
        session.start()
        while not session.environment.done:
            session.take(explore(honest(session.view)))


def test_the_explorer_walks_as_worked_by_hand() -> None:
    session = Session(AlfWorld(game(), limit=40), "s")
    session.start()
    said = ["go to countertop 1", "take apple 1 from countertop 1", "go to microwave 1", "open microwave 1"]
    for command in said[:1]:
        session.take(command)  # somebody else took this step; the explorer uses what it has shown
    for command in [*said[1:], "move apple 1 to microwave 1"]:
        assert explore(honest(session.view)) == command
        session.take(command)
    assert session.environment.won


def test_the_explorer_opens_what_it_stands_at_and_searches_every_place_once() -> None:
    wanted = game(goal("place", thing="Pen", place="CounterTop"), "put some pen on countertop.")
    session = Session(AlfWorld(wanted, limit=60), "s")
    session.start()
    while not session.environment.done:
        session.take(explore(honest(session.view)))
    assert session.environment.won
    commands = [step.action for step in session.view.steps]
    searched = commands[: commands.index("take pen 1 from desk 1")]
    assert len(set(searched)) == len(searched)
    for command, following in itertools.pairwise(searched):
        if command in ("go to fridge 1", "go to microwave 1", "go to cabinet 1", "go to cabinet 2"):
            assert following == f"open {command.removeprefix('go to ')}"


def test_the_explorer_looks_first_where_another_executor_brought_it() -> None:
    for seed in "abcdef":
        session = Session(
            AlfWorld(game(goal("place", thing="Pen", place="CounterTop"), "put a pen in countertop."), 40), seed
        )
        session.start()
        session.take("go to fridge 1")
        assert explore(honest(session.view)) == "open fridge 1"


def test_the_explorer_leaves_what_it_has_delivered() -> None:
    session = Session(world_of_mugs(), "s")
    session.start()
    for command in "go to countertop 1; take mug 2 from countertop 1; go to desk 1; move mug 2 to desk 1".split("; "):
        session.take(command)
    while not session.environment.done:
        command = explore(honest(session.view))
        assert not command.startswith("take mug 2")
        session.take(command)
    assert session.environment.won


def test_the_explorer_puts_down_what_another_executor_took() -> None:
    session = Session(AlfWorld(game(), limit=40), "s")
    session.start()
    for command in ("go to countertop 1", "take knife 1 from countertop 1"):
        session.take(command)
    assert explore(honest(session.view)) == "move knife 1 to countertop 1"


def test_the_seed_decides_the_search_and_nothing_else_does() -> None:
    def commands(seed: str) -> list[str]:
        played = generate_games(1, "test")[0]
        return [s.action for s in asyncio.run(play(AlfWorld(played), [Explorer()], lambda view: 0, seed)).steps]

    assert commands("a") == commands("a")
    assert len({tuple(commands(seed)) for seed in "abcdefgh"}) > 1


def test_memory_is_what_the_texts_said() -> None:
    session = Session(world_of_mugs(), "s")
    session.start()
    for command in (
        "go to countertop 1; take mug 2 from countertop 1; go to microwave 1; heat mug 2 with microwave 1; "
        "go to fridge 1; cool mug 2 with fridge 1; open fridge 1; move mug 2 to fridge 1; close fridge 1; nonsense; "
        "go to cabinet 1; open cabinet 1; go to desk 1"
    ).split("; "):
        session.take(command)
    memory = remember(honest(session.view))
    assert memory == Memory(
        goal=read_goal(session.view.first),
        places="cabinet 2,cabinet 1,coffeemachine 1,countertop 1,desk 1,fridge 1,microwave 1,sinkbasin 1".split(","),
        here="desk 1",
        held=None,
        seen={
            "countertop 1": {"apple 1", "knife 1"},
            "fridge 1": {"mug 2"},
            "cabinet 1": {"mug 1"},
            "desk 1": {"bowl 1", "desklamp 1", "pen 1"},
        },
        closed={"microwave 1", "fridge 1"},
        treated={("cool", "mug 2")},  # heated, then cooled
    )


def world_of_mugs() -> AlfWorld:
    return AlfWorld(game(goal("two", thing="Mug", place="Desk"), "find two mug and put them in desk."), limit=40)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("put a mug in shelf.", ("pick_and_place_simple", "mug", "shelf", None)),
        ("put some mug on shelf.", ("pick_and_place_simple", "mug", "shelf", None)),
        ("find two cup and put them in shelf.", ("pick_two_obj_and_place", "cup", "shelf", None)),
        ("put two cup in shelf.", ("pick_two_obj_and_place", "cup", "shelf", None)),
        ("put a hot egg in fridge.", ("pick_heat_then_place_in_recep", "egg", "fridge", None)),
        ("cool some egg and put it in microwave.", ("pick_cool_then_place_in_recep", "egg", "microwave", None)),
        ("put a clean egg in microwave.", ("pick_clean_then_place_in_recep", "egg", "microwave", None)),
        ("look at box under the desklamp.", ("look_at_obj_in_light", "box", None, "desklamp")),
        ("examine the box with the floorlamp.", ("look_at_obj_in_light", "box", None, "floorlamp")),
    ],
)
def test_goals_are_read_from_the_task_line(line: str, wanted: tuple[str, str, str | None, str | None]) -> None:
    found = read_goal(f"You are in a room.\n\nYour task is to: {line}")
    assert found is not None and dataclasses.astuple(found) == wanted


def test_a_task_in_other_words_is_searched_for_without_a_goal() -> None:
    session = Session(AlfWorld(game(task="Would you mind warming the fruit?")), "s")
    session.start()
    assert read_goal(session.view.first) is None
    assert explore(honest(session.view)).startswith("go to ")


def test_goals_of_all_real_task_lines_are_read() -> None:
    for real in load_games(data("valid_unseen.jsonl.xz")):
        assert read_goal(f"Your task is to: {real.task}") == real.facts.goal


# --- prices, mixtures, and the real games


def test_the_costs_of_an_episode_are_those_of_its_calls() -> None:
    executors: list[Executor] = [Explorer(), Planner()]
    result = asyncio.run(play(AlfWorld(game(), 40), executors, lambda view: int(not view.steps), "s"))
    assert result.won and result.calls == (1, 0, 0, 0, 0)  # shown where the apple is, the explorer needs no search
    assert result.costs == (PLANNER_USD, *[EXPLORER_USD] * 4)
    assert result.cost == pytest.approx(0.0024 + 4 * 0.00006)
    view = View("", (), ("look",), Sealed(), "s")
    assert [executor.bound(view) for executor in executors] == [EXPLORER_USD, PLANNER_USD]


def test_scripted_executors_on_the_134_unseen_games() -> None:
    # The planner in few calls, the explorer far below it, random commands at nothing.
    games = load_games(data("valid_unseen.jsonl.xz"))
    executors: list[Executor] = [Planner(), Explorer(), RandomActor()]
    won, steps = [], []
    for index in range(len(executors)):
        played = [asyncio.run(play(AlfWorld(g), executors, lambda view, i=index: i, f"s/{g.id}")) for g in games]
        won.append(sum(p.won for p in played) / 134)
        steps.append(sum(len(p.steps) for p in played) / 134)
    assert won[0] == 1.0 and steps[0] < 6.0
    assert 0.65 < won[1] < 0.85
    assert won[2] < 0.03
