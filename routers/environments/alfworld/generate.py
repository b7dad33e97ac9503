"""New games of ALFWorld's six task types: own rooms, furniture and things, solvable, from a seed. Needs no download.

A game is small or large: few places to look, most of what is wanted in plain view; or many, most of it behind doors.
So some games are easy for an executor that has to search, and some are out of its reach within the step limit.
"""

import random
from collections import defaultdict

from routers.environments.alfworld.engine import State, plan
from routers.environments.alfworld.facts import (
    APPLIANCES,
    TASK_TYPES,
    TREATMENTS,
    Facts,
    Game,
    Goal,
    Receptacle,
    Thing,
)
from routers.environments.alfworld.rooms import LAMPS, OPENABLE, ROOMS, SHARES, THINGS, ThingKind
from routers.environments.protocol import GameError

SPLITS = ("train", "validation", "test")
ATTEMPTS = 100

_LINES = {
    "pick_and_place_simple": ("put a {thing} in {place}.", "put some {thing} on {place}."),
    "look_at_obj_in_light": ("look at {thing} under the {lamp}.", "examine the {thing} with the {lamp}."),
    "pick_clean_then_place_in_recep": ("put a clean {thing} in {place}.", "clean some {thing} and put it in {place}."),
    "pick_heat_then_place_in_recep": ("put a hot {thing} in {place}.", "heat some {thing} and put it in {place}."),
    "pick_cool_then_place_in_recep": ("put a cool {thing} in {place}.", "cool some {thing} and put it in {place}."),
    "pick_two_obj_and_place": ("put two {thing} in {place}.", "find two {thing} and put them in {place}."),
}
"""ALFWorld's wordings."""


def generate(number: int, split: str = "train", task_type: str | None = None) -> Game:
    """Game `number` of a split; without `task_type` the six take turns. The same arguments give the same game.

    Its id, "generated/SPLIT/NUMBER" (and "/TASK_TYPE" if one was asked for), is all that `generated` needs.
    """
    if split not in SPLITS or number < 0 or task_type not in (None, *TASK_TYPES):
        raise GameError(f"no generated game {number} of split {split!r} and task type {task_type!r}")
    name = f"generated/{split}/{number}" + (f"/{task_type}" if task_type else "")
    chosen = task_type or TASK_TYPES[number % len(TASK_TYPES)]
    rng = random.Random(name)
    for _ in range(ATTEMPTS):
        facts = _draw(chosen, rng)
        if facts is None:
            continue
        walkthrough = plan(State(facts))
        if walkthrough:
            words = {"thing": facts.goal.thing, "place": facts.goal.receptacle, "lamp": facts.goal.lamp}
            return Game(name, rng.choice(_LINES[chosen]).format(**words), tuple(walkthrough), facts)
    raise GameError(f"{name}: no solvable game in {ATTEMPTS} attempts; this is a fault of the generator's tables")


def generated(game_id: str) -> Game:
    """The game that an id of `generate` names."""
    parts = game_id.split("/")
    if len(parts) not in (3, 4) or parts[0] != "generated" or not parts[2].isdigit():
        raise GameError(f"{game_id!r} names no generated game; expected generated/SPLIT/NUMBER")
    return generate(int(parts[2]), parts[1], parts[3] if len(parts) == 4 else None)


def generate_games(count: int, split: str = "train", first: int = 0) -> list[Game]:
    """Games `first` to `first + count - 1` of a split."""
    return [generate(number, split) for number in range(first, first + count)]


class _Layout:
    """Receptacles of a room, and what was put where; names are given at the end."""

    def __init__(self, room: str, size: float, rng: random.Random) -> None:
        self.rng = rng
        self.counts = {f.kind: f.least + round(size * rng.uniform(0.6, 1.0) * (f.most - f.least)) for f in ROOMS[room]}
        self.things: dict[str, list[tuple[frozenset[str], str]]] = defaultdict(list)
        """Kind -> (flags, name of its receptacle)."""

    def names(self, kinds: tuple[str, ...]) -> list[str]:
        return [f"{kind} {n}" for kind in kinds for n in range(1, self.counts.get(kind, 0) + 1)]

    def put(self, kind: ThingKind, hidden: float, avoid: str = "") -> bool:
        """Put one more of a kind somewhere: behind a door with probability `hidden`; False where there is no place."""
        places = tuple(place for place in kind.places if place != avoid)
        doors = [name for name in self.names(places) if name.split()[0] in OPENABLE]
        plain = [name for name in self.names(places) if name.split()[0] not in OPENABLE]
        choice = doors if doors and (not plain or self.rng.random() < hidden) else plain
        if choice:
            self.things[kind.kind].append((kind.flags, self.rng.choice(choice)))
        return bool(choice)


def _draw(task_type: str, rng: random.Random) -> Facts | None:
    """A room with what the task needs; None where the dice made that impossible."""
    treatment = TREATMENTS.get(task_type)
    looks, wanted = task_type == "look_at_obj_in_light", 1 + (task_type == "pick_two_obj_and_place")
    rooms = [r for r in ROOMS if (not looks or r in LAMPS) and (not treatment or _has(r, treatment))]
    room = rng.choice(rooms)
    large = rng.random() < 0.5
    layout = _Layout(room, rng.uniform(0.7, 1.0) if large else rng.uniform(0.0, 0.35), rng)
    hidden = 0.85 if large else 0.3

    kinds = [k for k in THINGS[room] if not treatment or f"{treatment}able" in k.flags]
    kind = rng.choice(kinds)
    targets = [p for p in kind.places if layout.counts.get(p) and p not in APPLIANCES.get(treatment or "", ())]
    if not targets:
        return None
    lamp_kind, stands = LAMPS.get(room, ("", ()))
    target = None if looks else rng.choice(targets)
    # A treated thing may start where it has to end; an untreated one must not.
    for _ in range(wanted + (not large and rng.random() < 0.5)):
        if not layout.put(kind, hidden, avoid="" if treatment or looks else target or ""):
            return None
    for other in THINGS[room]:
        if other.kind != kind.kind:
            for _ in range(rng.choice((0, 1, 1, 2, 3) if large else (0, 1, 1))):
                layout.put(other, hidden=0.5)
    if lamp_kind and (looks or rng.random() < 0.5):
        lamp = ThingKind(lamp_kind, frozenset({"toggleable"}), stands)
        if not layout.put(lamp, hidden=0.0) and looks:
            return None
    return _facts(layout, room, Goal(task_type, kind.kind, target, lamp_kind if looks else None))


def _has(room: str, treatment: str) -> bool:
    return any(f.kind in APPLIANCES[treatment] for f in ROOMS[room]) and any(
        f"{treatment}able" in k.flags for k in THINGS[room]
    )


def _facts(layout: _Layout, room: str, goal: Goal) -> Facts:
    """Names and locations; kinds in alphabetical order, numbers downwards, as ALFWorld lists them."""
    receptacles = []
    for kind in sorted(layout.counts):
        for number in range(layout.counts[kind], 0, -1):
            name = f"{kind} {number}"
            host = SHARES.get(kind, "")
            location = f"{host} 1" if layout.counts.get(host) else name
            receptacles.append(Receptacle(name, kind, f"at {location}", kind in OPENABLE))
    locations = {r.name: r.location for r in receptacles}
    things, inside = [], []
    for kind in sorted(layout.things):
        for number, (flags, place) in reversed(list(enumerate(layout.things[kind], 1))):
            things.append(Thing(f"{kind} {number}", kind, flags, (locations[place],)))
            inside.append((f"{kind} {number}", place))
    can_contain = frozenset((place, k.kind) for k in THINGS[room] for place in k.places)
    return Facts("middle", tuple(receptacles), tuple(things), tuple(inside), (), None, can_contain, goal)
