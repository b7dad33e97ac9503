"""A small problem in ALFWorld's domain, written by hand, how executors play it, and where the real data lies."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from routers.environments.alfworld.environment import AlfWorld
from routers.environments.alfworld.facts import Game
from routers.environments.alfworld.pddl import parse_problem
from routers.environments.protocol import AgentEnvironment, Executor, Session, Step, View

_GOALS = {
    "place": "(inReceptacle ?o ?r) (objectType ?o {thing}Type) (receptacleType ?r {place}Type)",
    "treat": """({able} ?o) (objectType ?o {thing}Type) (receptacleType ?r {place}Type) ({state} ?o)
                (inReceptacle ?o ?r)""",
    "two": """(objectType ?o1 {thing}Type) (receptacleType ?r {place}Type) (inReceptacle ?o1 ?r)
              (exists (?o2 - object) (and (not (= ?o1 ?o2)) (objectType ?o2 {thing}Type)
                      (receptacleType ?r {place}Type) (inReceptacle ?o2 ?r)))""",
    "look": """(exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and (objectType ?ot {lamp}Type)
                  (toggleable ?ot) (isToggled ?ot) (receptacleAtLocation ?r ?l) (atLocation ?a ?l)
                  (inReceptacle ?ot ?r)))
               (exists (?o - object ?a - agent) (and (objectType ?o {thing}Type) (holds ?a ?o)))""",
}


def goal(kind: str, **words: str) -> str:
    """ "place", "treat", "two" or "look" as ALFWorld writes it."""
    text = _GOALS[kind].format(**words)
    if kind in ("place", "treat"):
        text = f"(exists (?r - receptacle) (exists (?o - object) (and {text})))"
    elif kind == "two":
        text = f"(exists (?r - receptacle) (exists (?o1 - object) (and {text})))"
    return f"(:goal (and {text}))"


COOK = goal("place", thing="Apple", place="Microwave")
TASK = "put some apple on microwave."

_PLACES = {  # identifier -> (type, location)
    "Cabinet_bar__plus_1": ("Cabinet", "loc_bar_1"),
    "Cabinet_bar__plus_2": ("Cabinet", "loc_bar_2"),
    "CounterTop_bar__plus_1": ("CounterTop", "loc_bar_3"),
    "CoffeeMachine_bar__plus_1": ("CoffeeMachine", "loc_bar_3"),  # stands on the countertop
    "Fridge_bar__plus_1": ("Fridge", "loc_bar_4"),
    "Microwave_bar__plus_1": ("Microwave", "loc_bar_5"),
    "Sink_bar__plus_1_bar_SinkBasin": ("SinkBasin", "loc_bar_6"),
    "Desk_bar__plus_1": ("Desk", "loc_bar_7"),
}
_THINGS = {  # identifier -> (type, flags, receptacle)
    "Mug_bar__plus_1": ("Mug", "pickupable cleanable heatable coolable", "CounterTop_bar__plus_1"),
    "Mug_bar__plus_2": ("Mug", "pickupable cleanable heatable coolable", "Cabinet_bar__plus_2"),
    "Apple_bar__plus_1": ("Apple", "pickupable cleanable heatable coolable sliceable", "CounterTop_bar__plus_1"),
    "Knife_bar__plus_1": ("Knife", "pickupable cleanable", "CounterTop_bar__plus_1"),
    "Bowl_bar__plus_1": ("Bowl", "pickupable cleanable isReceptacleObject", "Desk_bar__plus_1"),
    "Pen_bar__plus_1": ("Pen", "pickupable", "Desk_bar__plus_1"),
    "DeskLamp_bar__plus_1": ("DeskLamp", "toggleable", "Desk_bar__plus_1"),
}
_CONTAIN = """Cabinet:Mug,Bowl CounterTop:Mug,Apple,Knife,Bowl,Pen CoffeeMachine:Mug Fridge:Mug,Apple,Bowl
              Microwave:Mug,Apple SinkBasin:Mug,Apple,Knife Desk:Bowl,Pen,Mug"""


def problem(goal_text: str = COOK, extra: str = "") -> str:
    """The PDDL text. Cabinets 2 and 1 are Cabinet_bar__plus_1 and _2: ALFWorld counts down."""
    facts = ["(atLocation agent1 loc_bar_9)", "(openable Fridge_bar__plus_1)", "(openable Microwave_bar__plus_1)"]
    facts += ["(openable Cabinet_bar__plus_1)", "(openable Cabinet_bar__plus_2)", "(= (total-cost) 0)"]
    for name, (kind, location) in _PLACES.items():
        facts += [f"(receptacleType {name} {kind}Type)", f"(receptacleAtLocation {name} {location})"]
    for name, (kind, flags, place) in _THINGS.items():
        facts += [f"(objectType {name} {kind}Type)", f"(inReceptacle {name} {place})"]
        facts += [f"(objectAtLocation {name} {_PLACES[place][1]})", *(f"({flag} {name})" for flag in flags.split())]
    for entry in _CONTAIN.split():
        place, kinds = entry.split(":")
        facts += [f"(canContain {place}Type {kind}Type)" for kind in kinds.split(",")]
    return f"(define (problem p) (:domain alfred) (:init {' '.join(facts)} {extra}) {goal_text})"


def game(goal_text: str = COOK, task: str = TASK, extra: str = "") -> Game:
    return Game("hand", task, (), parse_problem(problem(goal_text, extra), "hand"))


def world(goal_text: str = COOK, limit: int = 50, extra: str = "") -> AlfWorld:
    """A started episode of the hand-written problem."""
    environment = AlfWorld(game(goal_text, extra=extra), limit)
    environment.reset()
    return environment


@dataclass(frozen=True)
class Played:
    """An episode that executors played to its end."""

    won: bool
    steps: tuple[Step, ...]
    calls: tuple[int, ...]
    """Index of the executor of each step."""
    costs: tuple[float, ...]
    """USD of each step."""

    @property
    def cost(self) -> float:
        return sum(self.costs)


async def play(
    environment: AgentEnvironment, executors: Sequence[Executor], choose: Callable[[View], int], seed: str
) -> Played:
    """Executors alone, without a policy's prompts and budget; `choose` picks that of every step."""
    session = Session(environment, seed)
    session.start()
    calls: list[int] = []
    costs: list[float] = []
    while not environment.done:
        view = session.view
        calls.append(choose(view))
        act = await executors[calls[-1]].act(view, 60.0)
        costs.append(act.cost)
        await session.advance(partial(session.take, act.action))
    return Played(environment.won, session.view.steps, tuple(calls), tuple(costs))


def data(name: str) -> Path:
    """A file of the real games; skips the test where it is absent."""
    folder = Path(os.environ.get("SRPO_DATA_DIR") or Path(__file__).resolve().parents[3] / "shared" / "data")
    path = folder / "alfworld" / name
    if not path.exists():
        pytest.skip(f"needs ALFWorld's games: {name} in the folder alfworld of SRPO_DATA_DIR")
    return path
