"""The rules of ALFWorld's domain on plain Python sets: which commands are possible, and what they change."""

from collections import defaultdict
from typing import NamedTuple

from routers.environments.alfworld.facts import APPLIANCES, TREATMENTS, Facts, Goal, Receptacle, Thing

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
