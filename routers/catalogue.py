"""The price list of the pool: who the members are, what one line says about them, what a token costs.

Prices are USD per million tokens, as API vendors quote them. ``cost`` is the one place that turns tokens into
dollars; nothing else in the repository multiplies a price.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TOKENS_PER_PRICE = 1_000_000
_REQUIRED = ("name", "descriptor", "price_in", "price_out")


@dataclass(frozen=True)
class Member:
    """One pool member. Prices are USD per million tokens, finite and not negative."""

    name: str
    descriptor: str
    price_in: float
    price_out: float


def cost(member: Member, prompt_tokens: int, completion_tokens: int) -> float:
    """Price of one reply in USD: every prompt token at ``price_in``, every completion token at ``price_out``.

    Raises:
        ValueError: a token count is negative.
    """
    if prompt_tokens < 0 or completion_tokens < 0:
        raise ValueError(f"{member.name}: token counts are negative ({prompt_tokens}, {completion_tokens})")
    return (prompt_tokens * member.price_in + completion_tokens * member.price_out) / TOKENS_PER_PRICE


def load_catalogue(path: str | Path) -> dict[str, Member]:
    """Read a catalogue YAML (``members:`` is a list of mappings) into ``{name: Member}``, in file order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names the file, the member, the field and what to do.
    """
    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(document, dict) or set(document) != {"members"} or not isinstance(document["members"], list):
        raise ValueError(f"{path}: write one top-level key 'members' that holds a list of members")
    if not document["members"]:
        raise ValueError(f"{path}: 'members' is empty; list at least one member")
    members: dict[str, Member] = {}
    for position, entry in enumerate(document["members"]):
        member = _member(entry, path, position)
        if member.name in members:
            raise ValueError(f"{path}: member {member.name!r} is listed twice; rename or remove one entry")
        members[member.name] = member
    return members


def _member(entry: Any, path: Path, position: int) -> Member:
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: entry {position} of 'members' is not a mapping; write {', '.join(_REQUIRED)}")
    label = f"{path}: member {entry.get('name', f'number {position}')!r}"
    unknown = [str(key) for key in entry if key not in _REQUIRED]
    if unknown:
        raise ValueError(f"{label}: unknown field {unknown[0]!r}; the fields are {', '.join(_REQUIRED)}")
    for field in _REQUIRED:
        if entry.get(field) is None:
            raise ValueError(f"{label}: field {field!r} is missing or null; {_advice(field)}")
    return Member(
        name=_text(entry, "name", label),
        descriptor=_text(entry, "descriptor", label),
        price_in=_price(entry, "price_in", label),
        price_out=_price(entry, "price_out", label),
    )


def _text(entry: dict[str, Any], field: str, label: str) -> str:
    value = entry[field]
    if not isinstance(value, str) or not value.strip() or "\n" in value.strip():
        raise ValueError(f"{label}: field {field!r} is {value!r}; {_advice(field)}")
    return value.strip()


def _price(entry: dict[str, Any], field: str, label: str) -> float:
    value = entry[field]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{label}: field {field!r} is {value!r}; {_advice(field)}")
    return float(value)


def _advice(field: str) -> str:
    if field.startswith("price"):
        return "write a number >= 0 in USD per million tokens (0 if it is really free)"
    return "write one line of text"
