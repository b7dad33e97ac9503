"""What an unprivileged player knows, everything that the texts of an episode have said so far and nothing else, and a
scripted player that knows no more: it looks for what the task needs, in an order that its seed decides.

Works on the official engine's text, so it also reads episodes of other engines in that format.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from routers.environments.alfworld.facts import APPLIANCES, TREATMENTS, Goal
from routers.environments.protocol import View

PHASES = ("lost", "search", "closed", "seen", "held", "ready")
"""lost: the task is not understood. search: what is needed next was not seen. closed: the same, facing a closed door.
seen: it was seen. held: in the hand, to be treated or brought under a lamp that was seen. ready: to be delivered."""
_KIND = {"clean": "clean", "hot": "heat", "heat": "heat", "cool": "cool"}
_TYPE = {verb: task_type for task_type, verb in TREATMENTS.items()}
_TASKS = (
    (r"(?:look at|examine) (?:the )?(?P<thing>\w+) (?:under|with) the (?P<lamp>\w+)", "look_at_obj_in_light"),
    (r"(?:put two|find two) (?P<thing>\w+)(?: and put them)? (?:in|on) (?P<place>\w+)", "pick_two_obj_and_place"),
    (r"(?P<how>clean|heat|cool) some (?P<thing>\w+) and put it (?:in|on) (?P<place>\w+)", ""),
    (r"put (?:a|some) (?P<how>clean|hot|cool) (?P<thing>\w+) (?:in|on) (?P<place>\w+)", ""),
    (r"put (?:a|some) (?P<thing>\w+) (?:in|on) (?P<place>\w+)", "pick_and_place_simple"),
)
_SEEN = re.compile(r"(?:On|The) (?:the )?(?P<place>\w+ \d+)(?: is open\. In it)?, you see (?P<what>[^.]*)\.")
_NAME = re.compile(r"\ba (\w+ \d+)")


def kind(name: str) -> str:
    """ "mug 2" -> "mug"."""
    return name.rsplit(" ", 1)[0]


def read_goal(text: str) -> Goal | None:
    """The goal in ALFWorld's templated task line; None for a line worded by somebody else."""
    line = text.rpartition("Your task is to: ")[2].strip()
    for pattern, task_type in _TASKS:
        if match := re.fullmatch(pattern + r"\.?", line):
            found = match.groupdict()
            task_type = task_type or _TYPE[_KIND[found["how"]]]
            return Goal(task_type, found["thing"], found.get("place"), found.get("lamp"))
    return None


@dataclass
class Memory:
    """Places in the order of the first observation. A place that is not in `seen` was never looked into."""

    goal: Goal | None
    places: list[str]
    here: str | None = None
    held: str | None = None
    seen: dict[str, set[str]] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    treated: set[tuple[str, str]] = field(default_factory=set)
    """(verb, thing): what was cleaned, heated, cooled or used."""

    def whereabouts(self, wanted: str) -> list[tuple[str, str]]:
        """(thing, place) of everything of a kind that was seen, nearest and first seen first."""
        found = [
            (thing, place) for place, what in self.seen.items() for thing in sorted(what) if kind(thing) == wanted
        ]
        return sorted(found, key=lambda pair: pair[1] != self.here)


def remember(view: View) -> Memory:
    """Read an episode from its texts."""
    room, _, _ = view.first.partition("Your task is to: ")
    memory = Memory(read_goal(view.first), _NAME.findall(room))
    for step in view.steps:
        _read(memory, step.observation)
    return memory


def _read(memory: Memory, text: str) -> None:
    if match := re.match(r"You arrive at (\w+ \d+)\.", text):
        memory.here = match[1]
    if match := re.search(r"The (\w+ \d+) is closed\.", text):
        memory.closed.add(match[1])
    if match := re.match(r"You close the (\w+ \d+)\.", text):
        memory.closed.add(match[1])
    if match := _SEEN.search(text):
        memory.seen[match["place"]] = set(_NAME.findall(match["what"]))
        memory.closed.discard(match["place"])
    if match := re.match(r"You pick up the (\w+ \d+) from the (\w+ \d+)\.", text):
        memory.held = match[1]
        memory.seen.get(match[2], set()).discard(match[1])
    if match := re.match(r"You move the (\w+ \d+) to the (\w+ \d+)\.", text):
        memory.held = None
        memory.seen.setdefault(match[2], set()).add(match[1])
    if match := re.match(r"You (clean|heat|cool|turn on) the (\w+ \d+)", text):
        if match[1] in ("heat", "cool"):
            memory.treated -= {("heat", match[2]), ("cool", match[2])}
        memory.treated.add(("use" if match[1] == "turn on" else match[1], match[2]))


def phase(memory: Memory) -> str:
    """One of `PHASES`."""
    goal = memory.goal
    if goal is None:
        return "lost"
    treatment = TREATMENTS.get(goal.task_type)
    if memory.held is not None and kind(memory.held) == goal.thing:
        if goal.lamp is not None:
            return "held" if memory.whereabouts(goal.lamp) else _searching(memory)
        return "ready" if treatment is None or (treatment, memory.held) in memory.treated else "held"
    for thing, place in memory.whereabouts(goal.thing):
        done = kind(place) == goal.receptacle and (treatment is None or (treatment, thing) in memory.treated)
        if not done:
            return "seen"
    return _searching(memory)


def _searching(memory: Memory) -> str:
    return "closed" if memory.here in memory.closed else "search"


def explore(view: View) -> str:
    """The next command: the first wish that is admissible; "look" where none is."""
    memory = remember(view)
    order = sorted(memory.places)
    random.Random(f"explorer/{view.seed}").shuffle(order)
    possible = set(view.admissible)
    return next((wish for wish in _wishes(memory, order) if wish in possible), "look")


def _wishes(memory: Memory, order: list[str]) -> Iterator[str]:
    """Commands in order of preference; those that are not possible are passed over."""
    goal = memory.goal
    if goal is None:
        yield from _search(memory, order)
        return
    if memory.held is not None and kind(memory.held) == goal.thing:
        yield from _use_held(memory, memory.held, goal, order)
    elif memory.held is not None:  # somebody else took it
        yield from (f"move {memory.held} to {place}" for place in memory.places)
    else:
        target = _target(memory, goal)
        for thing, place in memory.whereabouts(goal.thing):
            if not (place == target and _ready(memory, thing, goal)):
                yield f"take {thing} from {place}"
                yield from _reach(memory, place)
    yield from _search(memory, order)


def _use_held(memory: Memory, held: str, goal: Goal, order: list[str]) -> Iterator[str]:
    if goal.lamp is not None:
        for lamp, place in memory.whereabouts(goal.lamp):
            yield from (f"use {lamp}", f"go to {place}")
    elif not _ready(memory, held, goal):
        treatment = TREATMENTS[goal.task_type]
        for place in memory.places:
            if kind(place) in APPLIANCES[treatment]:
                yield from (f"{treatment} {held} with {place}", f"go to {place}")
    elif target := _target(memory, goal):
        yield f"move {held} to {target}"
        yield from _reach(memory, target)


def _ready(memory: Memory, thing: str, goal: Goal) -> bool:
    treatment = TREATMENTS.get(goal.task_type)
    return treatment is None or (treatment, thing) in memory.treated


def _target(memory: Memory, goal: Goal) -> str | None:
    """Where to bring things: the place of the right kind that was seen with the most of them already."""
    right = [place for place in memory.places if kind(place) == goal.receptacle]
    return max(right, key=lambda place: sum(kind(t) == goal.thing for t in memory.seen.get(place, ())), default=None)


def _reach(memory: Memory, place: str) -> Iterator[str]:
    """To look and reach into a place: be there, and have it open."""
    if memory.here == place:
        yield f"open {place}"
    yield f"go to {place}"


def _search(memory: Memory, order: list[str]) -> Iterator[str]:
    """Places never looked into: where we stand first."""
    for place in sorted(order, key=lambda place: place != memory.here):
        if place not in memory.seen:
            yield from _reach(memory, place)
