"""What ALFWorld's official engine prints, word for word (the rules of `alfred.twl2`, package `alfworld` 0.4.2)."""

from collections.abc import Iterable, Sequence

from routers.environments.alfworld.facts import Game, Receptacle, Thing
from routers.environments.alfworld.state import Command, State

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
