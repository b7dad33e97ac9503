"""ALFWorld's PDDL problems: from text to the facts that the engine plays on. Nothing of the domain's rules is here."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache

from routers.environments.alfworld.facts import Facts, Goal, Receptacle, Thing
from routers.environments.protocol import GameError

# ALFWorld's goals without white space; 0 and 1 stand for the two types, in the order in which they first appear.
_PLACE = "(exists(?r-receptacle)(exists(?o-object)(and{}(objectType?o0)(receptacleType?r1){})))"
_GOALS = {
    _PLACE.format("(inReceptacle?o?r)", ""): "pick_and_place_simple",
    _PLACE.format("(cleanable?o)", "(isClean?o)(inReceptacle?o?r)"): "pick_clean_then_place_in_recep",
    _PLACE.format("(heatable?o)", "(isHot?o)(inReceptacle?o?r)"): "pick_heat_then_place_in_recep",
    _PLACE.format("(coolable?o)", "(isCool?o)(inReceptacle?o?r)"): "pick_cool_then_place_in_recep",
    "(exists(?r-receptacle)(exists(?o1-object)(and(objectType?o10)(receptacleType?r1)(inReceptacle?o1?r)"
    "(exists(?o2-object)(and(not(=?o1?o2))(objectType?o20)(receptacleType?r1)(inReceptacle?o2?r)))"
    ")))": "pick_two_obj_and_place",
    "(exists(?ot-object?r-receptacle?a-agent?l-location)(and(objectType?ot0)(toggleable?ot)(isToggled?ot)"
    "(receptacleAtLocation?r?l)(atLocation?a?l)(inReceptacle?ot?r)))"
    "(exists(?o-object?a-agent)(and(objectType?o1)(holds?a?o)))": "look_at_obj_in_light",
}
_TYPE = re.compile(r"((?:objectType\?o[12t]?|receptacleType\?r))([A-Za-z]+)Type\)")

_FACT = re.compile(r"\(([A-Za-z-]+)((?: [\w-]+)*) ?\)")
_FLAGS = {  # predicate in lower case -> flag of a thing
    name.lower(): name
    for name in (
        "isReceptacleObject cleanable heatable coolable pickupable toggleable sliceable "
        "isClean isHot isCool isSliced isToggled isOn moveable"
    ).split()
}
_ARGUMENTS = dict.fromkeys(_FLAGS, 1) | {
    "openable": 1,
    "opened": 1,
    "atlocation": 2,
    "receptacleatlocation": 2,
    "objectatlocation": 2,
    "inreceptacle": 2,
    "inreceptacleobject": 2,
    "receptacletype": 2,
    "objecttype": 2,
    "cancontain": 2,
    "holds": 2,
}
_IGNORED = set("distance total-cost checked examined wasinreceptacle full isreceptacleobjectfull holdsany".split())
"""Predicates that no rule of the domain reads, and `holdsAny`, which follows from `holds`."""


def parse_problem(text: str, where: str) -> Facts:
    """The facts of a PDDL problem in ALFWorld's domain; `where` names its source in errors.

    Names are ALFWorld's (`AlfredDemangler`): the kind and a number, counted down over the sorted identifiers.
    """
    init, goal = text.find("(:init"), text.find("(:goal")
    if init < 0 or goal < init:
        raise GameError(f"{where}: pddl_problem has no (:init ...) followed by (:goal ...)")
    table: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    body = " ".join(text[init + 6 : goal].lower().split())
    for predicate, text_of_arguments in _FACT.findall(body):
        if predicate in _IGNORED:
            continue
        arguments = tuple(text_of_arguments.split())
        if len(arguments) != _ARGUMENTS.get(predicate):
            raise GameError(
                f"{where}: pddl_problem has a fact unknown to ALFWorld's domain: ({predicate}{text_of_arguments})"
            )
        table[predicate].append(arguments)
    if len(table["atlocation"]) != 1:
        raise GameError(f"{where}: pddl_problem has {len(table['atlocation'])} facts atLocation; it must have one")

    names = _display_names(argument for rows in table.values() for row in rows for argument in row)
    receptacle_kind = {r: kind.removesuffix("type") for r, kind in table["receptacletype"]}
    location = {r: place for r, place in table["receptacleatlocation"]}  # noqa: C416 (rows are tuples of any length)
    if lost := sorted(set(receptacle_kind) ^ set(location)):
        raise GameError(f"{where}: receptacle {lost[0]} needs both a receptacleType and a receptacleAtLocation")
    known = {o for o, _ in table["objecttype"]}
    used = [o for o, _ in table["inreceptacle"] + table["inreceptacleobject"]] + [o for _, o in table["holds"]]
    if lost := sorted({*used} - known) or sorted({r for _, r in table["inreceptacle"]} - set(location)):
        raise GameError(f"{where}: {lost[0]} is in a fact, but has no objectType or receptacleType")
    openable, opened = ({r for (r,) in table[p]} for p in ("openable", "opened"))
    receptacles = [
        Receptacle(names[r], receptacle_kind[r], location[r], r in openable, r in opened) for r in sorted(location)
    ]
    flags: dict[str, set[str]] = defaultdict(set)
    for predicate, flag in _FLAGS.items():
        for row in table.get(predicate, ()):
            flags[row[0]].add(flag)
    at: dict[str, list[str]] = defaultdict(list)
    for o, place in table["objectatlocation"]:
        at[o].append(place)
    things = [
        Thing(names[o], kind.removesuffix("type"), frozenset(flags[o]), tuple(at[o]))
        for o, kind in sorted(table["objecttype"])
    ]
    return Facts(
        start=table["atlocation"][0][1],
        receptacles=tuple(receptacles),
        things=tuple(things),
        inside=tuple((names[o], names[r]) for o, r in sorted(table["inreceptacle"])),
        within=tuple((names[o], names[outer]) for o, outer in sorted(table["inreceptacleobject"])),
        held=next((names[row[-1]] for row in table["holds"]), None),
        can_contain=_shared(
            frozenset((r.removesuffix("type"), o.removesuffix("type")) for r, o in table["cancontain"])
        ),
        goal=_parse_goal(text[goal:], where),
    )


@lru_cache(maxsize=1024)
def _shared(pairs: frozenset[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    """One object for equal sets: the games of a scene have the same table of what may lie where."""
    return pairs


def _display_names(identifiers: Iterable[str]) -> dict[str, str]:
    """Identifier -> "mug 2": the numbers of a kind count down over its sorted identifiers, as in `AlfredDemangler`."""
    kinds = {}
    for identifier in set(identifiers):
        kind = identifier.partition("_bar_")[0]
        kinds[identifier] = kind + ("basin" if "basin" in identifier else "")
    left = Counter(kinds.values())
    names = {}
    for identifier in sorted(kinds):
        names[identifier] = f"{kinds[identifier]} {left[kinds[identifier]]}"
        left[kinds[identifier]] -= 1
    return names


def _parse_goal(text: str, where: str) -> Goal:
    kinds: list[str] = []

    def number(match: re.Match[str]) -> str:
        if match[2] not in kinds:
            kinds.append(match[2])
        return f"{match[1]}{kinds.index(match[2])})"

    shape = _TYPE.sub(number, re.sub(r"\s+", "", text))
    task_type = next((_GOALS[goal] for goal in _GOALS if shape == f"(:goal(and{goal})))"), None)
    if task_type is None or len(kinds) != 2:
        raise GameError(f"{where}: the goal is none of ALFWorld's six: {' '.join(text.split())[:300]}")
    first, second = (kind.lower() for kind in kinds)
    if task_type == "look_at_obj_in_light":
        return Goal(task_type, thing=second, lamp=first)
    return Goal(task_type, thing=first, receptacle=second)
