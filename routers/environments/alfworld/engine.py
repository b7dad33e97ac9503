"""ALFWorld's engine on plain Python sets: which commands are possible, what they change, what is printed, what helps.

The rules are those of ALFWorld's domain. What is printed is what the official engine prints, word for word (the rules
of `alfred.twl2`, package `alfworld` 0.4.2). `plan` finds a short plan from any state to the goal, from full knowledge
of the state: every choice of thing(s), order and place is tried by writing down the commands it takes; the shortest
wins (ties: the first in the order of the facts). Plans are short, not always shortest: a plan never interleaves two
errands.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations
from typing import NamedTuple

from routers.environments.alfworld.facts import APPLIANCES, TREATMENTS, Facts, Game, Goal, Receptacle, Thing

KNIVES = ("knife", "butterknife")


class Command(NamedTuple):
    """One possible command, taken apart."""

    verb: str
    thing: Thing | None = None
    receptacle: Receptacle | None = None
    tool: Thing | None = None


class State:
    """A state of a game; changed only by `apply`."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.receptacles = {r.name: r for r in facts.receptacles}
        self.things = {t.name: t for t in facts.things}
        self.here = facts.start
        self.held: Thing | None = self.things[facts.held] if facts.held else None
        self.opened = {r.name for r in facts.receptacles if r.opened}
        self.flags = {t.name: set(t.flags) for t in facts.things}
        self.contents: dict[str, set[str]] = defaultdict(set)
        for thing, receptacle in facts.inside:
            self.contents[receptacle].add(thing)
        self.locations = {t.name: set(t.locations) for t in facts.things}
        self.taken_from: dict[str, set[str]] = defaultdict(set)
        """Thing -> receptacles it was taken from and not put back into. The official `look` lists by it."""
        self._order = {t.name: i for i, t in enumerate(facts.things)}
        self._by_location: dict[str, list[Receptacle]] = defaultdict(list)
        for r in facts.receptacles:
            self._by_location[r.location].append(r)

    def receptacles_here(self) -> list[Receptacle]:
        return self._by_location.get(self.here, [])

    def accessible(self, receptacle: Receptacle) -> bool:
        """Whether one can look and reach into it from its location."""
        return not receptacle.openable or receptacle.name in self.opened

    def inside(self, receptacle: Receptacle) -> list[Thing]:
        """Its contents, in the order in which observations list them."""
        return [self.things[name] for name in sorted(self.contents[receptacle.name], key=self._order.__getitem__)]

    def has(self, thing: Thing, flag: str) -> bool:
        return flag in self.flags[thing.name]

    def fits(self, receptacle: Receptacle, thing: Thing) -> bool:
        return (receptacle.kind, thing.kind) in self.facts.can_contain

    def commands(self) -> dict[str, Command]:
        """Text -> command, for every command that is possible.

        Two cases differ from the text of the domain and follow the official engine: only the thing in the hand can be
        examined, and going to where one stands is not possible.
        """
        found = {"look": Command("look"), "inventory": Command("inventory"), "help": Command("help")}
        for r in self.facts.receptacles:
            if r.location != self.here:
                found[f"go to {r.name}"] = Command("go", receptacle=r)
        for r in self.receptacles_here():
            found[f"examine {r.name}"] = Command("examine", receptacle=r)
            if r.openable:
                verb = "close" if r.name in self.opened else "open"
                found[f"{verb} {r.name}"] = Command(verb, receptacle=r)
            for name in self.contents[r.name]:
                thing = self.things[name]
                if self.held is None and self.accessible(r) and "pickupable" in self.flags[name]:
                    found[f"take {name} from {r.name}"] = Command("take", thing, r)
                if "toggleable" in self.flags[name]:
                    found[f"use {name}"] = Command("use", thing, r)
            if self.held is not None:
                found.update(self._with_held(self.held, r))
        if self.held is not None:
            found[f"examine {self.held.name}"] = Command("examine", self.held)
            if self.held.kind in KNIVES:
                for thing in self.facts.things:
                    if "sliceable" in self.flags[thing.name] and self.here in self.locations[thing.name]:
                        found[f"slice {thing.name} with {self.held.name}"] = Command("slice", thing, tool=self.held)
        return found

    def _with_held(self, held: Thing, r: Receptacle) -> dict[str, Command]:
        found = {}
        if self.accessible(r) and self.fits(r, held):
            found[f"move {held.name} to {r.name}"] = Command("move", held, r)
        for verb, kinds in APPLIANCES.items():
            if r.kind in kinds and self.has(held, f"{verb}able"):
                found[f"{verb} {held.name} with {r.name}"] = Command(verb, held, r)
        return found

    def apply(self, command: Command) -> None:
        """Carry out a command that `commands` returned for this state."""
        verb, thing, receptacle, _ = command
        if receptacle is not None:
            if verb == "go":
                self.here = receptacle.location
            elif verb == "open":
                self.opened.add(receptacle.name)
            elif verb == "close":
                self.opened.discard(receptacle.name)
        if thing is None:
            return
        flags = self.flags[thing.name]
        if verb == "take" and receptacle is not None:
            self.contents[receptacle.name].discard(thing.name)
            self.taken_from[thing.name].add(receptacle.name)
            self.locations[thing.name].discard(self.here)
            self.held = thing
        elif verb == "move" and receptacle is not None:
            self.contents[receptacle.name].add(thing.name)
            self.taken_from[thing.name].discard(receptacle.name)
            self.locations[thing.name].add(self.here)
            self.held = None
        elif verb == "clean":
            flags.add("isClean")
        elif verb == "heat":
            flags.add("isHot")
            flags.discard("isCool")
        elif verb == "cool":
            flags.add("isCool")
            flags.discard("isHot")
        elif verb == "use":
            flags.add("isToggled")  # and stays so: the domain has no way to take it back
        elif verb == "slice":
            flags.add("isSliced")

    def treated(self, thing: Thing, goal: Goal) -> bool:
        """Whether the thing is clean, hot or cool, where the task asks for that."""
        treatment = TREATMENTS.get(goal.task_type)
        if treatment is None:
            return True
        flag = {"clean": "isClean", "heat": "isHot", "cool": "isCool"}[treatment]
        return self.has(thing, f"{treatment}able") and self.has(thing, flag)

    def fulfilled(self) -> bool:
        """Whether the goal holds."""
        goal = self.facts.goal
        if goal.task_type == "look_at_obj_in_light":
            return self.held is not None and self.held.kind == goal.thing and self._lit(goal)
        wanted = 2 if goal.task_type == "pick_two_obj_and_place" else 1
        for receptacle in self.facts.receptacles:
            if receptacle.kind == goal.receptacle:
                things = (self.things[name] for name in self.contents[receptacle.name])
                if sum(t.kind == goal.thing and self.treated(t, goal) for t in things) >= wanted:
                    return True
        return False

    def _lit(self, goal: Goal) -> bool:
        return any(
            self.things[name].kind == goal.lamp and {"toggleable", "isToggled"} <= self.flags[name]
            for r in self.receptacles_here()
            for name in self.contents[r.name]
        )


# ----------------------------------------------------------------------------------------------------- what is printed

HELP = """\
Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""


def intro(game: Game, state: State) -> str:
    """The first observation."""
    room = _room(state, state.facts.receptacles)
    return f"-= Welcome to TextWorld, ALFRED! =-\n\n{room}\n\nYour task is to: {game.task}"


def feedback(command: Command, state: State) -> str:
    """The answer to a command, in the state after it."""
    verb, thing, receptacle, tool = command
    if verb == "look":
        return _room(state, ())  # away from all receptacles the official `look` sees nothing, not even the room
    if verb == "inventory":
        return f"You are carrying: a {state.held.name}." if state.held else "You are not carrying anything."
    if verb == "slice" and thing and tool:
        return f"You sliced the {thing.name} with the {tool.name}."
    if verb == "use" and thing:
        return f"You turn on the {thing.name}."
    if verb == "examine" and thing:
        return _examine_thing(thing, state)
    if receptacle is None:
        return HELP
    if thing is None:
        seen = _examine_receptacle(receptacle, state)
        return {
            "go": f"You arrive at {receptacle.name}. {seen}",
            "open": f"You open the {receptacle.name}. {seen}",
            "close": f"You close the {receptacle.name}.",
            "examine": seen,
        }[verb]
    return {
        "take": f"You pick up the {thing.name} from the {receptacle.name}.",
        "move": f"You move the {thing.name} to the {receptacle.name}.",
    }.get(verb, f"You {verb} the {thing.name} using the {receptacle.name}.")


def _room(state: State, appliances: Sequence[Receptacle]) -> str:
    """The place that the agent faces; where it faces none, the appliances of the room.

    "Next to it" are, as in the official engine, things at this location that were once taken from a receptacle here.
    """
    here = state.receptacles_here()
    if not here:
        seen = _listing(f"a {r.name}" for r in appliances)
        return f"You are in the middle of a room. Looking quickly around you, you see {seen}."
    beside = [
        f"a {t.name}"
        for t in state.facts.things
        if state.here in state.locations[t.name]
        for r in here
        if r.name in state.taken_from[t.name]
    ]
    return f"You are facing the {_listing(r.name for r in here)}. Next to it, you see {_listing(beside)}."


def _examine_receptacle(receptacle: Receptacle, state: State) -> str:
    seen = _listing(f"a {t.name}" for t in state.inside(receptacle))
    if not receptacle.openable:
        return f"On the {receptacle.name}, you see {seen}."
    if receptacle.name in state.opened:
        return f"The {receptacle.name} is open. In it, you see {seen}."
    return f"The {receptacle.name} is closed."


def _examine_thing(thing: Thing, state: State) -> str:
    clean, hot, cool, is_sliced = (state.has(thing, flag) for flag in ("isClean", "isHot", "isCool", "isSliced"))
    sliced = "sliced " if is_sliced else ""
    if state.has(thing, "isReceptacleObject"):
        within = _listing(f"a {inner}" for inner, outer in state.facts.within if outer == thing.name)
        return f"This is a normal {thing.name}. In it, you see {within}."
    if clean and (hot or cool):
        return f"This is a {'hot' if hot else 'cool'} and clean {sliced}{thing.name}."
    if is_sliced and (clean or hot or cool):
        return f"This is a {'clean' if clean else 'hot' if hot else 'cool'} sliced {thing.name}."
    if clean or hot or cool:
        return f"This is a {'hot' if hot else 'clean' if clean else 'cold'} {thing.name}."
    if state.has(thing, "toggleable") and state.has(thing, "isToggled"):
        return f"This {thing.name} is on."
    if state.has(thing, "sliceable") and is_sliced:
        return f"This is a sliced {thing.name}."
    return f"There's nothing special about {thing.name}."


def _listing(names: Iterable[str]) -> str:
    words: Sequence[str] = list(names)
    if len(words) < 2:
        return words[0] if words else "nothing"
    return f"{', '.join(words[:-1])}, and {words[-1]}"


# -------------------------------------------------------------------------------------------------------------- a plan


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
