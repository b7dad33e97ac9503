"""What an unprivileged player knows: everything that the texts of an episode have said so far, and nothing else.

Works on the official engine's text, so it also reads episodes of other engines in that format.
"""

import re
from dataclasses import dataclass, field

from routers.environments.alfworld.facts import TREATMENTS, Goal
from routers.environments.protocol import View

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
