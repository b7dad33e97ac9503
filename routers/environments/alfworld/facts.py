"""What a game in ALFWorld's domain is made of. Frozen; shared by all episodes of the game.

Source of the domain: ALFWorld (Shridhar et al. 2021, arXiv 2010.03768), `alfred.pddl` and `alfred.twl2` of the
package `alfworld` 0.4.2 (MIT).
"""

from dataclasses import dataclass

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
"""In ALFWorld's order (its task ids 1 to 6)."""

TREATMENTS = {
    "pick_clean_then_place_in_recep": "clean",
    "pick_heat_then_place_in_recep": "heat",
    "pick_cool_then_place_in_recep": "cool",
}
"""Task type -> what has to be done to the object before it is placed."""

APPLIANCES = {"clean": ("sink", "sinkbasin"), "heat": ("microwave",), "cool": ("fridge",)}
"""Treatment -> kinds of receptacle that do it."""


@dataclass(frozen=True)
class Goal:
    """What has to hold. Kinds, not names: any mug will do."""

    task_type: str
    thing: str
    """Kind of object to place, or to look at."""
    receptacle: str | None = None
    """Kind of receptacle that it goes to; None for `look_at_obj_in_light`."""
    lamp: str | None = None
    """Kind of lamp that has to be on, at the agent's place; only for `look_at_obj_in_light`."""


@dataclass(frozen=True)
class Receptacle:
    """A place to put things. Two receptacles may share a location; the agent then is at both."""

    name: str
    kind: str
    location: str
    openable: bool = False
    opened: bool = False


@dataclass(frozen=True)
class Thing:
    """An object. Flags are the domain's predicates: pickupable, cleanable, isCool, ..."""

    name: str
    kind: str
    flags: frozenset[str]
    locations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """The initial state and the goal. Receptacles and things stand in the order in which observations list them."""

    start: str
    """Location of the agent."""
    receptacles: tuple[Receptacle, ...]
    things: tuple[Thing, ...]
    inside: tuple[tuple[str, str], ...]
    """(thing, receptacle) pairs."""
    within: tuple[tuple[str, str], ...]
    """(thing, thing that holds things) pairs."""
    held: str | None
    can_contain: frozenset[tuple[str, str]]
    """(kind of receptacle, kind of thing) pairs that may be put together."""
    goal: Goal


@dataclass(frozen=True)
class Game:
    """One game: where it comes from, what it says and the facts."""

    id: str
    task: str
    """As ALFWorld words it, without "Your task is to: "."""
    walkthrough: tuple[str, ...]
    facts: Facts

    @property
    def task_type(self) -> str:
        return self.facts.goal.task_type
