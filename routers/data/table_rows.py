"""The rows of a table of recorded replies (``routers.data.table``): their columns, and what each cell must hold."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from routers.data import cells
from routers.data.catalogue import Member
from routers.data.files import BadRow, Row

logger = logging.getLogger(__name__)

HIGHEST_USD = 1_000.0
"""Of one reply; above it a cost is in another unit."""
TOKENS = ("prompt_tokens", "completion_tokens")
REQUIRED = ("query_id", "query", "member", "correct")


class BadCell(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


_READERS: dict[str, Callable[[Any], Any]] = {
    "query_id": cells.name,
    "query": partial(cells.name, strip=False),
    "member": cells.name,
    "correct": partial(cells.number, upper=1.0, truth=True),
    "reply": cells.words,
    **dict.fromkeys(TOKENS, cells.count),
    "family": cells.name,
    "split": cells.split,
    "gold": cells.answers,
    "seconds": cells.number,
    "cost": partial(cells.number, upper=HIGHEST_USD),
}
_NEEDED = (*REQUIRED, "reply")
"""Columns whose cells must hold something where the column is there."""
_DEFAULTS: dict[str, Any] = {
    "reply": "", **dict.fromkeys(TOKENS), "family": "", "split": None, "gold": (), "seconds": 0.0, "cost": None,
}  # fmt: skip


def readers(rows: Iterable[Row], catalogue: Mapping[str, Member], source: str) -> dict[str, Callable[[Any], Any]]:
    """The table's columns that are used -> what reads their cells. Those that are not used are named in a warning.

    Raises:
        ValueError: names all columns that are missing.
    """
    shapes = dict.fromkeys(tuple(row.value) for row in rows if isinstance(row.value, Mapping))
    found = dict.fromkeys(name for shape in shapes for name in shape)
    if not found:  # every row is bad
        return _READERS
    free = all(member.free_tokens for member in catalogue.values())
    required = REQUIRED if "cost" in found or free else (*REQUIRED, *TOKENS)
    unused = [str(name) or "(one without a name)" for name in found if name not in _READERS]
    if missing := [name for name in required if name not in found]:
        folded = {name.strip().casefold(): name for name in unused}
        close = {name: [folded[n] for n in difflib.get_close_matches(name, folded, 1)] for name in missing}
        hints = [f"{match[0]!r} for {name!r}" for name, match in close.items() if match]
        hint = f"; do you mean {' and '.join(hints)}?" if hints else ""
        named = (
            f"column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))} {'are' if len(missing) > 1 else 'is'}"
        )
        raise ValueError(f"{source}: {named} missing; there are {', '.join(map(str, found))}{hint}")
    if unused:
        logger.warning("%s: columns that are not used: %s", source, ", ".join(unused))
    return {name: read for name, read in _READERS.items() if name in found}


def read_row(raw: Any, readers: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """The values of a row, with defaults for what may be missing; tokens and split that are missing are None.

    Raises:
        BadCell: the first cell that is wrong.
    """
    if isinstance(raw, BadRow):
        raise BadCell(raw.reason, raw.detail)
    if not isinstance(raw, Mapping):
        raise BadCell("no mapping", f"is {type(raw).__name__}, not a mapping of columns")
    row = dict(_DEFAULTS)
    for field, read in readers.items():
        if field not in raw:
            if field in _NEEDED:
                raise BadCell(f"missing {field}", f"field {field!r} is missing")
            continue
        value = raw[field]
        try:
            row[field] = read(value)
        except ValueError as error:
            if not cells.missing(value) or (field == "cost" and isinstance(value, float)):
                raise BadCell(f"bad {field}", f"field {field!r} is {_shown(value)}; {error}") from None
            if field in _NEEDED:
                raise BadCell(f"missing {field}", f"field {field!r} is {value!r}; {error}") from None
    return row


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def query_id_of(raw: Any) -> str | None:
    """The query that a bad row belongs to, where it says so."""
    try:
        return cells.name(raw["query_id"]) if isinstance(raw, Mapping) else None
    except (KeyError, ValueError):
        return None


def incomplete_message(source: str, lacking: Mapping[str, list[str]], queries: int) -> str:
    query_id, names = next(iter(lacking.items()))
    counts = Counter(name for members in lacking.values() for name in members)
    told = ", ".join(f"{count} of {name}" for name, count in counts.most_common())
    return (
        f"{source}: {len(lacking)} of {queries} queries lack a row of some member ({told}), the first is query "
        f"{query_id!r}, which has no reply of {names}; record them, or leave these queries out: drop_incomplete: true"
    )
