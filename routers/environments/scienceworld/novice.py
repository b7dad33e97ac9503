"""A scripted player of ScienceWorld without hidden knowledge: goes and looks, focuses, carries, guesses.

It reads the task and what the texts have shown. It looks through the rooms for what the task names, the rooms in the
task first, the others in an order that its seed decides; opens what is closed when it has seen all rooms; warms and
cools with stove and freezer. It does no experiments: of two answers it guesses one. It has no chemistry, wires
nothing, grows nothing.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from routers.environments.protocol import View

ROOMS = ("art studio", "bathroom", "bedroom", "foundry", "greenhouse", "hallway", "kitchen", "living room", "outside",
         "workshop")  # fmt: skip
_ANIMALS = (
    r"(?:[\w-]+ )*(?:egg|hatchling|bee|butterfly|moth|turtle|tortoise|frog|toad|dove|jay|parrot|elephant|crocodile|"
    r"bear|beaver|wolf|mouse|rabbit|chipmunk|hedgehog|chameleon|dragonfly|ant)"
)
_PLANTS = r"(?:[\w-]+ )*(?:tree|plant|flower|seedling)"
_KINDS = {
    "animal": _ANIMALS,
    "plant": _PLANTS,
    "living thing": f"{_ANIMALS}|{_PLANTS}",
    "non-living thing": r"(?!.*(?:box|agent|air|door|drawer))\w.*",
}
_TOOLS = {"to boil": "stove", "to melt": "stove", "to change the state": "stove", "to freeze": "freezer"}
_FAILED = ("No known action", "Unknown action", "Ambiguous", "ERROR", "It's not clear", "Its not clear")
_NAMED = (
    r"focus on (?:the )?([\w -]+?)(?:, starting|, which|\.|,|$)",
    r"to (?:boil|melt|freeze) ([\w -]+?)\.",
    r"state of matter of ([\w -]+?)\.",
)
_PLANES = re.compile(r"inclined planes \(([^)]+)\)")
_BOX = re.compile(r"(?:move it to|place it in) the (\w+ box)(?: in the ([\w ]+))?")
_PLACES = re.compile(r"(?:You teleport to|You move to|This (?:room|outside location) is called) the ([\w ]+?)\.")
_NAMES = re.compile(r"(?:\b(?:an?|the)|substance called|\t) ?((?!an? |the |substance )[\w-][\w -]*)", re.IGNORECASE)


@dataclass
class Known:
    """What the texts have said."""

    task: str
    here: str = ""
    looks: dict[str, str] = field(default_factory=dict)
    """Place -> what was seen there last."""
    tried: set[str] = field(default_factory=set)
    """Commands that were given in places, as "place: command"."""
    carried: list[str] = field(default_factory=list)
    focused: list[str] = field(default_factory=list)

    def things(self, place: str) -> list[str]:
        """Names in what was seen there, doors apart."""
        seen = self.looks.get(place, "").split("You also see:")[0]
        lines = seen.splitlines()[1:]
        return list(dict.fromkeys(name.strip() for line in lines for name in _NAMES.findall(line)))


def know(view: View) -> Known:
    """Read an episode."""
    task, _, look = view.first.partition("\n\n")
    known = Known(task)
    for action, said in [("look around", look), *((step.action, step.observation) for step in view.steps)]:
        if place := _PLACES.search(said):
            known.here = place[1]
        if "is called the" in said:
            known.looks[known.here] = said
        known.tried.add(f"{known.here}: {action}")
        if said.startswith(_FAILED):
            continue
        if action.startswith("focus on "):
            known.focused.append(action.removeprefix("focus on "))
        if action.startswith("pick up "):
            known.carried.append(action.removeprefix("pick up "))
    return known


def novice(view: View) -> str:
    """The next command: the first wish that was not tried in this place."""
    known, dice = know(view), random.Random(f"novice/{view.seed}")
    if known.here not in known.looks:
        return "look around"
    return next((w for w in _wishes(known, dice) if f"{known.here}: {w}" not in known.tried), "wait1")


def _wishes(known: Known, dice: random.Random) -> Iterator[str]:
    rooms = [room for room in ROOMS if room in known.task]
    others = [room for room in ROOMS if room not in rooms]
    dice.shuffle(others)
    answer = _answer(known.task, dice)
    carry = known.focused[-1] if known.focused else ""
    if carry and (box := _BOX.search(known.task)):
        yield from _deliver(known, carry, answer or box[1], box[2])
    wanted = [name for name in _wanted(known.task, answer) if name not in known.focused]
    for name in wanted[:1] if "starting" in known.task or "Next, focus" in known.task else wanted:
        matches = [thing for thing in known.things(known.here) if re.fullmatch(name, thing)]
        dice.shuffle(matches)
        yield from (f"focus on {thing}" for thing in matches if not known.focused or "focus on the" in known.task)
    if carry:
        yield from _treat(known, carry)
    for room in (*rooms, *others):
        if room not in known.looks:
            yield f"teleport to {room}"
    for room in (known.here, *rooms, *others):
        for closed in re.findall(r"The ([\w ]+) door is closed", known.looks.get(room, "")):
            if f"{room}: open {closed}" not in known.tried:
                yield f"open {closed}" if room == known.here else f"teleport to {room}"
    yield "look around"


def _wanted(task: str, answer: str) -> Iterator[str]:
    """Patterns of what is to be focused on, in order."""
    if kind := re.search(r"find a\(n\) ([\w -]+)\.", task):
        yield _KINDS[kind[1]]
    elif "animal" in task:
        yield _ANIMALS
    elif _PLANES.search(task):
        yield f"inclined plane.*{answer}.*"
    else:
        names = [re.escape(name) for pattern in _NAMED for name in re.findall(pattern, task)]
        yield from (name for name in names if name != "substance" and not name.endswith("box"))
        if re.search(r"focus on the \w+ box", task):
            yield answer


def _answer(task: str, dice: random.Random) -> str:
    """A guess where the task offers answers to choose from."""
    boxes = re.findall(r"(?:place it in|focus on) the (\w+ box)", task)
    if planes := _PLANES.search(task):
        return dice.choice(planes[1].split(", "))
    return dice.choice(boxes) if len(boxes) > 1 else ""


def _deliver(known: Known, thing: str, box: str, room: str | None) -> Iterator[str]:
    if thing not in known.carried:
        yield f"pick up {thing}"
    target = room or next((place for place in known.looks if box in known.looks[place]), "")
    if target and known.here != target:
        yield f"teleport to {target}"
    yield from (f"move {thing} to {box}", f"move {thing} in inventory to {box}")


def _treat(known: Known, thing: str) -> Iterator[str]:
    """Warm or cool what is in focus."""
    tool = next((tool for words, tool in _TOOLS.items() if words in known.task), None)
    if tool:
        yield f"pick up {thing}"
        if known.here != "kitchen":
            yield "teleport to kitchen"
        yield from (f"open {tool}", f"move {thing} to {tool}", f"activate {tool}", "wait", f"examine {thing}")
