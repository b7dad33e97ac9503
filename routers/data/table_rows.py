"""The rows of a table of recorded replies (``routers.data.table``): their columns, and what each cell must hold."""

from __future__ import annotations

import difflib
import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from routers.data import cells
from routers.data.catalogue import Member
from routers.data.files import BadRow

HIGHEST_USD = 1_000.0
"""Of one reply; above it a cost is in another unit."""
TOKENS = ("prompt_tokens", "completion_tokens")
REQUIRED = ("query_id", "query", "member", "correct")


HELDOUT_ONE_IN = 4


def normalise_query(query: str) -> str:
    """The text by which two queries are 'the same': NFKC, lower case, single spaces, no closing punctuation."""
    return " ".join(unicodedata.normalize("NFKC", query).casefold().split()).rstrip(" ?.!")


def split_of(query: str) -> str:
    """Split by the hash of the normalised text: about one query in four is held out, the same on every machine."""
    digest = hashlib.sha256(normalise_query(query).encode("utf-8")).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0 else "train"


class BadCell(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


UPPER = {"correct": 1.0, **dict.fromkeys(TOKENS, float(cells.HIGHEST_COUNT)), "seconds": math.inf, "cost": HIGHEST_USD}
UPPER["propensity"] = 1.0
"""The columns of numbers, each from 0 to this (a propensity is above 0)."""
_READERS: dict[str, Callable[[Any], Any]] = {
    "query_id": cells.name,
    "query": partial(cells.name, strip=False),
    "member": cells.name,
    "correct": partial(cells.number, upper=UPPER["correct"], truth=True),
    "reply": cells.words,
    **dict.fromkeys(TOKENS, cells.count),
    "family": cells.name,
    "split": cells.split,
    "gold": cells.answers,
    "seconds": cells.number,
    "cost": partial(cells.number, upper=HIGHEST_USD),
    "propensity": cells.chance,
}
FIELDS = tuple(_READERS)
NUMBERS = tuple(UPPER)
WHOLE = ("reply", "propensity")
"""Columns that a table may lack; where there is one, every row has it."""
_NEEDED = (*REQUIRED, *WHOLE)
"""Columns whose cells must hold something where the column is there."""
DEFAULTS: dict[str, Any] = {
    "reply": "", **dict.fromkeys(TOKENS), "family": "", "split": None, "gold": (), "seconds": 0.0, "cost": None,
    "propensity": None,
}  # fmt: skip


def check_columns(found: Collection[str], catalogue: Mapping[str, Member], source: str) -> list[str]:
    """The columns that are not used.

    Raises:
        ValueError: names all columns that are missing.
    """
    free = all(member.free_tokens for member in catalogue.values())
    required = REQUIRED if "cost" in found or free else (*REQUIRED, *TOKENS)
    unused = [str(name) or "(one without a name)" for name in found if name not in FIELDS]
    if missing := [name for name in required if name not in found]:
        folded = {name.strip().casefold(): name for name in unused}
        close = {name: [folded[n] for n in difflib.get_close_matches(name, folded, 1)] for name in missing}
        hints = [f"{match[0]!r} for {name!r}" for name, match in close.items() if match]
        hint = f"; do you mean {' and '.join(hints)}?" if hints else ""
        named = (
            f"column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))} {'are' if len(missing) > 1 else 'is'}"
        )
        if "member" in missing:
            known = ", ".join(list(catalogue)[:5])
            hint += f"; or give one row per query and one column of scores per member of the catalogue ({known}, ...)"
        if set(missing) <= set(TOKENS):
            per_call = "members with a price per call (price_in: 0, price_out: 0, price_request: USD)"
            hint += f"; without tokens give a column cost (of a wide table NAME:cost), or {per_call}"
        raise ValueError(f"{source}: {named} missing; there are {', '.join(map(str, found))}{hint}")
    return unused


def read_cell(field: str, value: Any) -> Any:
    """The value that a cell holds, or the column's default where it may hold nothing: tokens, split and cost are None.

    Raises:
        BadCell: says what it must be.
    """
    try:
        return _READERS[field](value)
    except ValueError as error:
        if not cells.missing(value) or (field == "cost" and isinstance(value, float)):
            raise BadCell(f"bad {field}", f"field {field!r} is {_shown(value)}; {error}") from None
        if field in _NEEDED:
            raise BadCell(f"missing {field}", f"field {field!r} is {value!r}; {error}") from None
    return DEFAULTS[field]


def check_row(raw: Any, fields: Collection[str], catalogue: Mapping[str, Member]) -> None:
    """Whether a row can be used, whatever else stands in the table.

    Raises:
        BadCell: the first cell that is wrong.
    """
    if isinstance(raw, BadRow):
        raise BadCell(raw.reason, raw.detail)
    if not isinstance(raw, Mapping):
        raise BadCell("no mapping", f"is {type(raw).__name__}, not a mapping of columns")
    row = dict(DEFAULTS)
    for field in fields:
        if field in raw:
            row[field] = read_cell(field, raw[field])
        elif field in _NEEDED:
            raise BadCell(f"missing {field}", f"field {field!r} is missing")
    name = row["member"]
    member = catalogue.get(name)
    if member is None:
        known = ", ".join(sorted(catalogue))
        raise BadCell("member without a price", f"member {name!r} has no price; add it to the catalogue ({known})")
    if row["cost"] is None and not member.priced:
        told = f"field 'cost' is missing, and member {name!r} has no price_in and price_out in the catalogue"
        raise BadCell("neither cost nor price", f"{told}; give one of them")
    if row["cost"] is None and not member.free_tokens:
        for field in TOKENS:
            if row[field] is None:
                told = f"field {field!r} is None; it must be an integer >= 0 where the reply has no cost"
                raise BadCell(f"missing {field}", told)


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
