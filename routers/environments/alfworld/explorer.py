"""A scripted player without hidden knowledge: looks for what the task needs, in an order that its seed decides."""

import random
from collections.abc import Iterator

from routers.environments.alfworld.facts import APPLIANCES, TREATMENTS, Goal
from routers.environments.alfworld.memory import Memory, kind, remember
from routers.environments.protocol import View


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
