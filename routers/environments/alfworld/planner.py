"""A short plan from any state of a game to its goal, from full knowledge of the state.

Every choice of thing(s), order and place is tried by writing down the commands it takes; the shortest wins (ties: the
first in the order of the facts). Plans are short, not always shortest: a plan never interleaves two errands.
"""

from collections.abc import Iterator, Sequence
from itertools import permutations

from routers.environments.alfworld.facts import APPLIANCES, TREATMENTS, Receptacle, Thing
from routers.environments.alfworld.state import State


class _Route:
    """Commands written down so far, and where they would leave the agent."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.commands: list[str] = []
        self.here = state.here
        self.held = state.held
        self.opened = set(state.opened)

    def visit(self, place: Receptacle, inside: bool = True) -> None:
        """Go there and, if its inside is needed, see that it is open."""
        if self.here != place.location:
            self.commands.append(f"go to {place.name}")
            self.here = place.location
        if inside and place.openable and place.name not in self.opened:
            self.commands.append(f"open {place.name}")
            self.opened.add(place.name)

    def hold(self, thing: Thing, place: Receptacle | None) -> bool:
        """Take the thing from where it is; False where the hand cannot be freed for it."""
        if self.held is not None and self.held.name == thing.name:
            return True
        if self.held is not None:
            spots = [r for r in self.state.facts.receptacles if self.state.fits(r, self.held)]
            if not spots:
                return False
            # Where we are is best, then where we are going, then a place that needs no opening.
            spot = min(spots, key=lambda r: (self._way(r), place is None or r.location != place.location))
            self.place(self.held, spot)
        if place is None:
            return False
        self.visit(place)
        self.commands.append(f"take {thing.name} from {place.name}")
        self.held = thing
        return True

    def place(self, thing: Thing, place: Receptacle) -> None:
        self.visit(place)
        self.commands.append(f"move {thing.name} to {place.name}")
        self.held = None

    def _way(self, place: Receptacle) -> int:
        return (self.here != place.location) + (place.openable and place.name not in self.opened)


def plan(state: State) -> list[str] | None:
    """Commands from this state to the goal; [] where it holds, None where no plan was found."""
    if state.fulfilled():
        return []
    looks = state.facts.goal.task_type == "look_at_obj_in_light"
    plans = list(_plans_to_look(state) if looks else _plans_to_place(state))
    return min(plans, key=len, default=None)


def _places(state: State) -> dict[str, Receptacle]:
    """Thing -> a receptacle that it lies in: the one that can be reached with the fewest commands."""
    nearest: dict[str, tuple[int, Receptacle]] = {}
    for r in state.facts.receptacles:
        way = (r.location != state.here) + (not state.accessible(r))
        for name in state.contents[r.name]:
            if name not in nearest or way < nearest[name][0]:
                nearest[name] = way, r
    return {name: r for name, (_, r) in nearest.items()}


def _candidates(state: State, flag: str) -> list[Thing]:
    """Things of the wanted kind that can be had and treated."""
    found = []
    for thing in state.facts.things:
        available = state.has(thing, "pickupable") or (state.held is not None and state.held.name == thing.name)
        if thing.kind == state.facts.goal.thing and available and (not flag or state.has(thing, flag)):
            found.append(thing)
    return found


def _plans_to_place(state: State) -> Iterator[list[str]]:
    goal = state.facts.goal
    treatment = TREATMENTS.get(goal.task_type, "")
    things = _candidates(state, f"{treatment}able" if treatment else "")
    places = _places(state)
    kinds = APPLIANCES.get(treatment, ())
    appliances: list[Receptacle | None] = [r for r in state.facts.receptacles if r.kind in kinds]
    wanted = 2 if goal.task_type == "pick_two_obj_and_place" else 1
    for target in state.facts.receptacles:
        if target.kind != goal.receptacle:
            continue
        there = {t.name for t in state.inside(target) if t.kind == goal.thing and state.treated(t, goal)}
        rest = [t for t in things if t.name not in there and state.fits(target, t)]
        for chosen in permutations(rest, wanted - len(there)):
            for appliance in appliances or [None]:
                route = _errands(state, chosen, target, appliance, places, treatment)
                if route is not None:
                    yield route


def _errands(
    state: State,
    chosen: Sequence[Thing],
    target: Receptacle,
    appliance: Receptacle | None,
    places: dict[str, Receptacle],
    treatment: str,
) -> list[str] | None:
    route = _Route(state)
    for thing in chosen:
        if not route.hold(thing, places.get(thing.name)):
            return None
        if treatment and not state.treated(thing, state.facts.goal):
            if appliance is None:
                return None
            route.visit(appliance, inside=False)
            route.commands.append(f"{treatment} {thing.name} with {appliance.name}")
        route.place(thing, target)
    return route.commands


def _plans_to_look(state: State) -> Iterator[list[str]]:
    places = _places(state)
    lamps = [t for t in state.facts.things if t.kind == state.facts.goal.lamp and state.has(t, "toggleable")]
    for thing in _candidates(state, ""):
        for lamp in lamps:
            if lamp.name not in places:
                continue
            route = _Route(state)
            if route.hold(thing, places.get(thing.name)):
                route.visit(places[lamp.name], inside=False)
                if not state.has(lamp, "isToggled"):
                    route.commands.append(f"use {lamp.name}")
                yield route.commands
