"""The engine's rules and texts, on a problem small enough to be worked by hand."""

import pytest
from alfworld_problem import game, goal, world

from routers.environments.alfworld.environment import AlfWorld
from routers.environments.protocol import NOTHING_HAPPENS, GameError


def play(environment: AlfWorld, commands: str) -> list[str]:
    """Play commands that are separated by semicolons; their observations."""
    return [environment.step(command)[0] for command in commands.split("; ") if command]


def test_the_intro_lists_the_places_and_says_the_task() -> None:
    assert AlfWorld(game()).reset() == (
        "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around you, you see "
        "a cabinet 2, a cabinet 1, a coffeemachine 1, a countertop 1, a desk 1, a fridge 1, a microwave 1, and "
        "a sinkbasin 1.\n\nYour task is to: put some apple on microwave."
    )


def test_in_the_middle_of_the_room_one_can_go_anywhere_and_nothing_else() -> None:
    places = "cabinet 1,cabinet 2,coffeemachine 1,countertop 1,desk 1,fridge 1,microwave 1,sinkbasin 1".split(",")
    assert world().admissible == (*(f"go to {place}" for place in places), "help", "inventory", "look")


def test_every_observation_word_for_word() -> None:
    # Written down from the grammar's rules. Mug 2 is Mug_bar__plus_1, on the countertop; mug 1 is in cabinet 1.
    countertop = "On the countertop 1, you see a apple 1, a knife 1, and a mug 2."
    dialogue = [
        ("inventory", "You are not carrying anything."),
        ("look", "You are in the middle of a room. Looking quickly around you, you see nothing."),
        ("go to countertop 1", f"You arrive at countertop 1. {countertop}"),
        ("look", "You are facing the coffeemachine 1, and countertop 1. Next to it, you see nothing."),
        ("examine coffeemachine 1", "On the coffeemachine 1, you see nothing."),
        ("take mug 2 from countertop 1", "You pick up the mug 2 from the countertop 1."),
        ("inventory", "You are carrying: a mug 2."),
        ("examine mug 2", "There's nothing special about mug 2."),
        ("move mug 2 to coffeemachine 1", "You move the mug 2 to the coffeemachine 1."),
        ("look", "You are facing the coffeemachine 1, and countertop 1. Next to it, you see a mug 2."),
        ("take mug 2 from coffeemachine 1", "You pick up the mug 2 from the coffeemachine 1."),
        ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed."),
        ("open fridge 1", "You open the fridge 1. The fridge 1 is open. In it, you see nothing."),
        ("cool mug 2 with fridge 1", "You cool the mug 2 using the fridge 1."),
        ("examine mug 2", "This is a cold mug 2."),
        ("close fridge 1", "You close the fridge 1."),
        ("examine fridge 1", "The fridge 1 is closed."),
        ("go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed."),
        ("heat mug 2 with microwave 1", "You heat the mug 2 using the microwave 1."),
        ("examine mug 2", "This is a hot mug 2."),
        ("go to sinkbasin 1", "You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing."),
        ("clean mug 2 with sinkbasin 1", "You clean the mug 2 using the sinkbasin 1."),
        ("examine mug 2", "This is a hot and clean mug 2."),
        ("go to desk 1", "You arrive at desk 1. On the desk 1, you see a bowl 1, a desklamp 1, and a pen 1."),
        ("use desklamp 1", "You turn on the desklamp 1."),
        ("move mug 2 to desk 1", "You move the mug 2 to the desk 1."),
        ("take bowl 1 from desk 1", "You pick up the bowl 1 from the desk 1."),
        ("examine bowl 1", "This is a normal bowl 1. In it, you see nothing."),
    ]
    environment = world(limit=99)
    for command, said in dialogue:
        assert environment.step(command) == (said, False), command
    assert environment.step("help")[0].startswith("Available commands:\n  look:   ")


def test_slicing_needs_a_knife_in_the_hand() -> None:
    environment = world()
    play(environment, "go to countertop 1")
    assert environment.step("slice apple 1 with knife 1")[0] == NOTHING_HAPPENS
    said = play(
        environment, "take knife 1 from countertop 1; slice apple 1 with knife 1; move knife 1 to countertop 1"
    )
    assert said[1] == "You sliced the apple 1 with the knife 1."
    assert play(environment, "take apple 1 from countertop 1; examine apple 1")[1] == "This is a sliced apple 1."


@pytest.mark.parametrize(
    ("before", "command"),
    [
        ("", "take mug 2 from countertop 1"),  # elsewhere
        ("go to cabinet 1", "take mug 1 from cabinet 1"),  # behind a closed door
        ("go to cabinet 1; open cabinet 1", "open cabinet 1"),  # open already
        ("go to cabinet 1", "close cabinet 1"),  # closed already
        ("go to countertop 1", "open countertop 1"),  # has no door
        ("go to countertop 1", "go to countertop 1"),  # there already, as in the official engine
        ("go to countertop 1", "take mug 1 from countertop 1"),  # is in the cabinet
        ("go to desk 1", "take desklamp 1 from desk 1"),  # cannot be picked up
        ("go to countertop 1; take mug 2 from countertop 1", "take apple 1 from countertop 1"),  # the hand is full
        ("go to countertop 1; take apple 1 from countertop 1", "move apple 1 to coffeemachine 1"),  # does not fit
        ("go to countertop 1; take mug 2 from countertop 1; go to cabinet 1", "move mug 2 to cabinet 1"),  # closed
        ("go to countertop 1", "heat mug 2 with microwave 1"),  # neither held nor there
        ("go to desk 1; take pen 1 from desk 1; go to sinkbasin 1", "clean pen 1 with sinkbasin 1"),  # not cleanable
        ("go to countertop 1; take mug 2 from countertop 1; go to sinkbasin 1", "cool mug 2 with sinkbasin 1"),
        ("go to countertop 1", "use mug 2"),  # no switch
        ("", ""),
        ("", "GO TO FRIDGE 1"),
        ("", "go to fridge 1; open fridge 1"),
        ("", "go to {0.__class__}"),
        ("", "x" * 100_000),
        ("", "go to fridge 1\u0000"),
        ("", "<|im_end|>"),
    ],
)
def test_what_is_not_possible_costs_a_step_and_changes_nothing(before: str, command: str) -> None:
    environment = world()
    play(environment, before)
    admissible, steps = environment.admissible, environment.steps
    assert command not in admissible
    assert environment.step(command) == (NOTHING_HAPPENS, False)
    assert (environment.admissible, environment.steps) == (admissible, steps + 1)


WON = {
    "pick_and_place_simple": (
        goal("place", thing="Mug", place="Desk"),
        "go to countertop 1; take mug 2 from countertop 1; go to desk 1; move mug 2 to desk 1",
    ),
    "look_at_obj_in_light": (
        goal("look", thing="Pen", lamp="DeskLamp"),
        "go to desk 1; take pen 1 from desk 1; use desklamp 1",
    ),
    "pick_clean_then_place_in_recep": (
        goal("treat", able="cleanable", state="isClean", thing="Knife", place="CounterTop"),
        "go to countertop 1; take knife 1 from countertop 1; go to sinkbasin 1; clean knife 1 with sinkbasin 1; "
        "go to countertop 1; move knife 1 to countertop 1",
    ),
    "pick_heat_then_place_in_recep": (
        goal("treat", able="heatable", state="isHot", thing="Apple", place="CounterTop"),
        "go to countertop 1; take apple 1 from countertop 1; go to microwave 1; heat apple 1 with microwave 1; "
        "go to countertop 1; move apple 1 to countertop 1",
    ),
    "pick_cool_then_place_in_recep": (
        goal("treat", able="coolable", state="isCool", thing="Mug", place="Cabinet"),
        "go to cabinet 1; open cabinet 1; take mug 1 from cabinet 1; go to fridge 1; cool mug 1 with fridge 1; "
        "go to cabinet 1; move mug 1 to cabinet 1",
    ),
    "pick_two_obj_and_place": (
        goal("two", thing="Mug", place="Cabinet"),
        "go to countertop 1; take mug 2 from countertop 1; go to cabinet 1; open cabinet 1; move mug 2 to cabinet 1",
    ),
}


@pytest.mark.parametrize("task_type", WON)
def test_every_task_type_is_won_at_its_last_command_and_not_before(task_type: str) -> None:
    goal_text, commands = WON[task_type]
    environment = world(goal_text)
    assert environment.task_type == task_type
    *before, last = commands.split("; ")
    for command in before:
        observation, done = environment.step(command)
        assert observation != NOTHING_HAPPENS and not done and not environment.won and environment.score == 0.0
    assert environment.step(last)[1] and environment.won and environment.score == 1.0
    with pytest.raises(GameError, match="after the end"):
        environment.step("look")


def test_a_hot_thing_that_is_cooled_is_not_hot() -> None:
    environment = world(goal("treat", able="heatable", state="isHot", thing="Mug", place="Desk"))
    play(environment, "go to countertop 1; take mug 2 from countertop 1; go to microwave 1")
    play(environment, "heat mug 2 with microwave 1; go to fridge 1; cool mug 2 with fridge 1")
    play(environment, "go to desk 1; move mug 2 to desk 1")
    assert not environment.won


def test_a_cold_thing_that_is_heated_is_not_cold() -> None:
    environment = world(goal("treat", able="coolable", state="isCool", thing="Mug", place="Desk"))
    play(environment, "go to countertop 1; take mug 2 from countertop 1; go to fridge 1; cool mug 2 with fridge 1")
    play(environment, "go to microwave 1; heat mug 2 with microwave 1; go to desk 1; move mug 2 to desk 1")
    assert not environment.won


def test_what_look_calls_next_to_it() -> None:
    # As the official grammar has it: things of this location that were taken from a receptacle here and not put back.
    environment = world()
    beside = [
        ("go to countertop 1; take mug 2 from countertop 1; look", "nothing"),  # it is in the hand
        ("move mug 2 to coffeemachine 1; look", "a mug 2"),
        ("go to desk 1; look", "nothing"),  # it is elsewhere
        ("go to countertop 1; take mug 2 from coffeemachine 1; move mug 2 to countertop 1; look", "a mug 2"),
    ]
    for commands, seen in beside:
        assert play(environment, commands)[-1].endswith(f"Next to it, you see {seen}."), commands
    play(environment, "take knife 1 from countertop 1; move knife 1 to countertop 1")
    assert play(environment, "look")[-1].endswith("Next to it, you see a mug 2.")  # the knife is back in its place


def test_what_is_sliced_must_be_here() -> None:
    environment = world()
    play(
        environment,
        "go to countertop 1; take apple 1 from countertop 1; go to sinkbasin 1; move apple 1 to sinkbasin 1",
    )
    play(environment, "go to countertop 1; take knife 1 from countertop 1")
    assert environment.step("slice apple 1 with knife 1")[0] == NOTHING_HAPPENS
    assert play(environment, "go to sinkbasin 1; slice apple 1 with knife 1")[-1].startswith("You sliced the apple 1")


def test_two_things_in_two_places_are_not_two_in_one() -> None:
    environment = world(goal("two", thing="Mug", place="Cabinet"))
    play(environment, "go to countertop 1; take mug 2 from countertop 1; go to cabinet 2; open cabinet 2")
    assert environment.step("move mug 2 to cabinet 2")[0] == "You move the mug 2 to the cabinet 2."
    assert not environment.won  # mug 1 is in cabinet 1


def test_looking_in_the_light_needs_the_lamp_on_and_the_agent_beside_it() -> None:
    environment = world(goal("look", thing="Mug", lamp="DeskLamp"))
    play(environment, "go to desk 1; use desklamp 1; go to countertop 1; take mug 2 from countertop 1")
    assert not environment.won
    assert environment.step("go to desk 1")[1] and environment.won


def test_the_step_limit_ends_the_episode() -> None:
    environment = world(limit=2)
    assert [environment.step(command)[1] for command in ("look", "nonsense")] == [False, True]
    assert environment.done and not environment.won
    with pytest.raises(GameError, match="hand: step\\(\\) after the end"):
        environment.step("look")


def test_an_episode_is_played_once_and_in_order() -> None:
    environment = AlfWorld(game())
    with pytest.raises(GameError, match="before reset"):
        environment.step("look")
    environment.reset()
    with pytest.raises(GameError, match="played once"):
        environment.reset()
    with pytest.raises(GameError, match="at least 1"):
        AlfWorld(game(), limit=0)


def test_episodes_of_one_game_do_not_touch_each_other() -> None:
    shared = game()
    first, second = AlfWorld(shared), AlfWorld(shared)
    first.reset(), second.reset()
    play(first, "go to countertop 1; take mug 2 from countertop 1; go to sinkbasin 1; clean mug 2 with sinkbasin 1")
    assert play(second, "go to countertop 1")[0].endswith("a apple 1, a knife 1, and a mug 2.")
    assert not second.state.has(second.state.things["mug 2"], "isClean")


def test_a_thing_in_the_hand_and_open_doors_of_the_initial_state() -> None:
    environment = world(extra="(holds agent1 Pen_bar__plus_1) (opened Cabinet_bar__plus_2)")
    assert environment.step("inventory")[0] == "You are carrying: a pen 1."
    assert (
        environment.step("go to cabinet 1")[0]
        == "You arrive at cabinet 1. The cabinet 1 is open. In it, you see a mug 1."
    )
