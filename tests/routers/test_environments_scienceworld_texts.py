"""ScienceWorld's expert and novice as far as they are about words; the package is not needed."""

import re

from routers.environments.protocol import Step, View
from routers.environments.scienceworld.expert import Expert, essential, shorter
from routers.environments.scienceworld.novice import know, novice

KITCHEN = (
    "This room is called the kitchen. In it, you see: \n\tthe agent\n\ta substance called air\n"
    "\ta counter. On the counter is: a bowl (containing a red apple, a banana), a drawer.\n"
    "\ta cupboard. The cupboard door is closed. \n\ta glass jar (containing a substance called sodium chloride)\n"
    "\ta thermometer, currently reading a temperature of 10 degrees celsius\n\tA aluminum foil\n"
    "You also see:\n\tA door to the hallway (that is open)"
)
HALLWAY = "This room is called the hallway. In it, you see: \n\tthe agent\n\ta picture\nYou also see:\n\tA door"


# --- the expert's way


def test_ways_are_made_shorter() -> None:
    walk = ["open door to hallway", "go to hallway", "look around", "open door to kitchen", "go to kitchen"]
    assert shorter([*walk, "look around", "pick up cup", *walk]) == [
        "teleport to kitchen", "pick up cup", "teleport to kitchen",
    ]  # fmt: skip
    others = ["close door to hallway", "examine cup", "wait1"]
    assert shorter(others) == others


def test_what_is_essential_of_what_was_done() -> None:
    assert essential([]) == essential(["look around", "go to hall", "wait", "look around", "teleport to x"]) == ()
    assert essential(["wait", "teleport to hall", "wait", "look around", "pick up cup", "wait", "go to x"]) == (
        "teleport to hall", "pick up cup", "wait", "teleport to x",
    )  # fmt: skip


class Ways:
    """Ways by state, and what was asked for."""

    def __init__(self, **ways: tuple[str, ...]) -> None:
        self.ways = ways
        self.asked: list[tuple[str, ...]] = []

    def way(self, task: str, variation: int, taken: tuple[str, ...]) -> tuple[str, ...]:
        assert (task, variation) == ("melt", 3)
        self.asked.append(taken)
        return self.ways["_".join(action.split()[0] for action in taken) or "start"]


def expert(ways: Ways) -> Expert:
    return Expert(ways, "melt", 3, HALLWAY)  # type: ignore[arg-type]


def test_the_expert_goes_back_to_its_way() -> None:
    ways = Ways(start=("teleport to kitchen", "pick up cup", "focus on cup"))
    e = expert(ways)
    e.saw("teleport to foundry", "You teleport to the foundry.")
    assert e.next() == "teleport to kitchen"
    e.saw("teleport to kitchen", "You teleport to the kitchen.")
    e.saw("go to hallway", "You move to the hallway.")
    assert e.next() == "teleport to kitchen"
    e.saw("teleport to kitchen", "You teleport to the kitchen.")
    e.saw("open fridge", "The fridge is now open.")  # it may not matter: the way is kept
    assert e.next() == "pick up cup"
    e.saw("pick up cup", "You move the cup to the inventory.")
    assert e.next() == "focus on cup" and ways.asked == [()]


def test_the_expert_starts_where_the_way_starts() -> None:
    e = expert(Ways(start=("pick up picture",)))
    e.saw("teleport to foundry", "You teleport to the foundry.")
    assert e.next() == "teleport to hallway"
    e.saw("teleport to hallway", "You teleport to the hallway.")
    assert e.next() == "pick up picture"


def test_a_step_that_fails_after_others_have_acted_needs_a_new_way() -> None:
    ways = Ways(start=("pick up cup", "focus on cup"), eat_wait=("focus on picture",))
    e = expert(ways)
    assert e.next() == "pick up cup"
    e.saw("eat cup", "The cup is gone.")
    assert e.next() == "pick up cup"
    e.saw("pick up cup", "No known action matches that input.")
    e.saw("wait", "You decide to wait for 10 iterations.")
    assert e.next() == "focus on picture" and ways.asked == [(), ("eat cup", "wait")]
    e.saw("focus on picture", "No known action matches that input.")  # nobody has acted: the way is only over
    assert e.next() == "focus on picture" and len(ways.asked) == 3


def test_without_a_way_the_expert_waits_for_others_to_act() -> None:
    ways = Ways(start=(), eat=("focus on picture",))
    e = expert(ways)
    assert e.next() is None
    e.saw("", "No known action matches that input.")
    assert e.next() is None and ways.asked == [()]
    e.saw("eat cup", "The cup is gone.")
    assert e.next() == "focus on picture"


# --- the novice


def view(task: str, *steps: tuple[str, str], seed: str = "s") -> View:
    return View(f"{task}\n\n{HALLWAY}", tuple(Step(*step) for step in steps), (), None, seed)  # type: ignore[arg-type]


def kitchen(task: str, *steps: tuple[str, str], seed: str = "s") -> View:
    there = (("teleport to kitchen", "You teleport to the kitchen."), ("look around", KITCHEN))
    return view(task, *there, *steps, seed=seed)


def test_the_novice_reads_what_is_there() -> None:
    known = know(kitchen("Your task is to melt ice.", ("pick up banana", "You move the banana to the inventory.")))
    assert known.here == "kitchen" and known.carried == ["banana"] and known.focused == []
    things = known.things("kitchen")
    for name in ("red apple", "banana", "thermometer", "sodium chloride", "aluminum foil", "cupboard"):
        assert name in things
    assert not any("hallway" in name for name in things)
    assert "kitchen: pick up banana" in known.tried and "hallway: look around" in known.tried


def test_the_novice_goes_focuses_and_carries() -> None:
    task = (
        "Your task is to find a(n) non-living thing. First, focus on the thing. Then, move it to the red box in the "
        "kitchen."
    )
    assert novice(view(task.replace("non-living thing", "animal"))) == "teleport to kitchen"  # the task names it
    focus = novice(kitchen(task))
    assert focus.startswith("focus on ")
    thing = focus.removeprefix("focus on ")
    done = ((focus, f"You focus on the {thing}."),)
    assert novice(kitchen(task, *done)) == f"pick up {thing}"
    done += ((f"pick up {thing}", f"You move the {thing} to the inventory."),)
    assert novice(kitchen(task, *done)) == f"move {thing} to red box"


def test_the_novice_tries_nothing_twice_and_looks_where_it_arrives() -> None:
    task = "Your task is to melt gold."
    assert novice(view(task, ("teleport to foundry", "You teleport to the foundry."))) == "look around"
    said, seen = [], []
    for _ in range(30):
        action = novice(view(task, *said))
        move = re.fullmatch("teleport to (.+)", action)
        if move:
            said.append((action, f"You teleport to the {move[1]}."))
        else:
            said.append((action, f"This room is called the {know(view(task, *said)).here}. In it, you see: \n\ta bed"))
            seen.append(action)
    rooms = [action for action, _ in said if action.startswith("teleport")]
    assert len(rooms) == len(set(rooms)) == 9 and seen[9:] == ["wait1"] * len(seen[9:])


def test_the_novice_guesses_by_its_seed() -> None:
    task = (
        "Your task is to determine whether tall height is a dominant trait. If the trait is dominant, focus on the "
        "red box. If the trait is recessive, focus on the blue box."
    )
    look = KITCHEN.replace("a banana", "a banana, a red box, a blue box")
    there = (("teleport to kitchen", "You teleport to the kitchen."), ("look around", look))
    guesses = {novice(view(task, *there, seed=str(n))) for n in range(20)}
    assert guesses == {"focus on red box", "focus on blue box"}
    assert novice(view(task, *there, seed="7")) == novice(view(task, *there, seed="7"))
