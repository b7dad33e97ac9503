"""Wide tables of recorded replies: one row per query, one column per member, as many public sets have them.

Columns of the query: ``query``, and as in every table ``query_id`` (default: the number of the row), ``family``,
``split``, ``gold``. Columns of a member that stands in the catalogue: ``NAME`` or ``NAME:correct``, its scores from 0
to 1, and as far as there are any ``NAME:cost`` (USD), ``NAME:prompt_tokens``, ``NAME:completion_tokens``,
``NAME:reply``, ``NAME:seconds``. An empty score means that this member has no row of this query.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from routers.data import cells
from routers.data.distinct import distinct
from routers.data.files import Chunk
from routers.data.table_rows import FIELDS, NUMBERS

_OF_QUERIES = ("query_id", "query", "family", "split", "gold")
_OF_MEMBERS = (*NUMBERS, "reply")

Layout = dict[str, dict[str, str]]
"""Member -> field -> its column."""


def layout(found: Collection[str], members: Collection[str], source: str) -> Layout | None:
    """Where a table's columns hold what of whom; None: it is no wide table.

    Raises:
        ValueError: columns that may mean two things, or belong to a member without scores.
    """
    if "member" in found:
        return None
    told: Layout = {}
    for column in found:
        name, colon, field = column.rpartition(":")
        meant = [(column, "correct")] if column in members and column not in FIELDS else []
        meant += [(name, field)] if colon and name in members and field in _OF_MEMBERS else []
        if len(meant) > 1:
            both = f"the score of member {column!r} or the {field} of member {name!r}"
            raise ValueError(f"{source}: the column {column!r} may be {both}; rename one of the members")
        for member, of in meant:
            other = told.setdefault(member, {}).setdefault(of, column)
            if other != column:
                raise ValueError(f"{source}: the columns {other!r} and {column!r} hold the same scores; keep one")
    for member, columns in told.items():
        if "correct" not in columns:
            one = next(iter(columns.values()))
            raise ValueError(f"{source}: beside {one!r} there is no column {member!r} or '{member}:correct' of scores")
    return {member: told[member] for member in members if member in told} or None


def fields_of(found: Collection[str], where: Layout) -> list[str]:
    """The columns of the long form."""
    of_queries = [name for name in _OF_QUERIES if name in found or name == "query_id"]
    return [*of_queries, "member", *dict.fromkeys(field for columns in where.values() for field in columns)]


def unused(found: Collection[str], where: Layout) -> list[str]:
    """The columns that belong neither to a query nor to a member."""
    used = {column for columns in where.values() for column in columns.values()}
    return [str(name) or "(one without a name)" for name in found if name not in used and name not in _OF_QUERIES]


def long(chunk: Chunk, where: Layout) -> Iterator[Chunk]:
    """The same with one row per query and member, a chunk for each member; rows keep their numbers."""
    shared: dict[str, Any] = {"query_id": [str(number) for number in chunk.numbers]}
    shared |= {name: chunk.columns[name] for name in _OF_QUERIES if name in chunk.columns}
    yield Chunk([], {}, [], chunk.bad)
    for member, columns in where.items():
        there = {field: chunk.columns[column] for field, column in columns.items() if column in chunk.columns}
        if "correct" in there:
            codes, scores = distinct(there["correct"])
            some = np.flatnonzero(~np.array([cells.missing(score) for score in scores], dtype=bool)[codes])
            whole = {**shared, "member": pa.repeat(member, len(chunk.numbers)), **there}
            yield Chunk(
                [chunk.numbers[i] for i in some], {name: _take(column, some) for name, column in whole.items()}
            )


def _take(column: Any, some: np.ndarray) -> Any:
    if len(some) == len(column):
        return column
    return column.take(pa.array(some)) if isinstance(column, pa.Array) else [column[i] for i in some]
