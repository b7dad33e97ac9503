"""A table of recorded replies as columns: checked a hundred thousand rows at a time, stored once, mapped by all.

What a cell may hold is the rule of ``routers.data.table_rows``, cell by cell. Here every *distinct* value of a column
goes through it once, columns of plain numbers go through its ranges as arrays, and a row in which something is wrong
goes through it alone, for the words.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from routers.data import billing
from routers.data.catalogue import Member
from routers.data.cells import HELDOUT_SPLITS
from routers.data.distinct import distinct, first_of
from routers.data.files import BadRow, Chunk
from routers.data.table_rows import (
    DEFAULTS,
    FIELDS,
    NUMBERS,
    REQUIRED,
    TOKENS,
    UPPER,
    WHOLE,
    BadCell,
    check_columns,
    check_row,
    normalise_query,
    query_id_of,
    read_cell,
    split_of,
)
from routers.data.wide import Layout, fields_of, layout, long, unused
from srpo.quarantine import EXCERPT

TEXTS = ("query_id", "query", "family", "split", "gold", "member")
SPLITS = ("train", "heldout")
_Bad = tuple[int, str, str, str]
"""Number of a row, reason, detail, content."""


_QUERY_SCHEMA = pa.schema(
    [
        *((name, pa.large_string()) for name in ("query_id", "query", "family", "split")),
        ("gold", pa.list_(pa.string())),
    ]
)


@dataclass
class Columns:
    """The complete queries of a table, and all that is to be said of the others.

    ``correct``, ``cost`` (USD), ``seconds`` and ``propensity`` (NaN: not told) are float64, tokens int32 and
    ``reply_row`` (of ``replies``) int64, all ``[queries, members]``; ``queries`` has the columns query_id,
    query, family, split, gold.
    """

    members: list[str]
    queries: pa.Table
    correct: np.ndarray
    cost: np.ndarray
    seconds: np.ndarray
    propensity: np.ndarray
    prompt_tokens: np.ndarray
    completion_tokens: np.ndarray
    reply_row: np.ndarray
    replies: pa.Table | None
    total: int
    """Rows, good and bad."""
    bad: list[_Bad] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)
    """Queries that lack members -> those members."""
    unexplained: list[str] = field(default_factory=list)
    """Those of which no row was bad; ``anonymous`` bad rows, which name no query, may be theirs."""
    anonymous: int = 0
    repeated: dict[str, str] = field(default_factory=dict)
    """Queries with the text of an earlier one of their split -> that one."""
    log: bool = False
    """Each query has the row of one member only: the others' numbers are NaN (of tokens 0), their ``reply_row`` -1."""

    def priced(self, catalogue: Mapping[str, Member]) -> Columns:
        """The same, with a price for each reply whose cost the table does not tell."""
        for j, name in enumerate(self.members):
            untold = np.isnan(self.cost[:, j]) & ~np.isnan(self.correct[:, j])  # of a log: only who was asked
            if untold.any():
                tokens = (self.prompt_tokens[untold, j], self.completion_tokens[untold, j])
                self.cost[untold, j] = billing.costs(catalogue[name], *tokens)
        return self

    def save(self, folder: Path) -> None:
        """Write all but the replies, which `check` wrote into the same folder."""
        told = {}
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                np.save(folder / f"{name}.npy", value)
            elif name == "queries":
                _write(folder / "queries.arrow", [value])
            elif name != "replies":
                told[name] = value
        (folder / "table.json").write_text(json.dumps(told), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Columns:
        """The same, mapped into memory: all processes of a machine share one copy."""
        told = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        replies = folder / "replies.arrow"
        told["bad"] = [tuple(each) for each in told["bad"]]
        return cls(
            queries=_mapped(folder / "queries.arrow"), replies=_mapped(replies) if replies.exists() else None,
            **arrays, **told,
        )  # fmt: skip


def _write(path: Path, tables: Iterable[pa.Table]) -> None:
    """Into an arrow file, one after the other; no file without a table."""
    rest = iter(tables)
    for first in rest:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
            for table in itertools.chain([first], rest):
                writer.write_table(table)


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _text_codes(name: str, column: Any, known: dict[Any, int]) -> np.ndarray:
    """Places of a column's values in `known`, int32 ``[rows]``, which gets the new ones; -1: a bad cell."""
    codes, values = distinct(column)
    places = np.full(len(values), -1, dtype=np.int32)
    for i, value in enumerate(values):
        with suppress(BadCell):
            places[i] = known.setdefault(read_cell(name, value), len(known))
    return places[codes]


def _numbers(name: str, column: Any) -> tuple[np.ndarray, np.ndarray]:
    """float64 values and which of them are bad, ``[rows]``; NaN: tokens or a cost that are not told."""
    plain = _plain(column, name == "correct")
    values = np.full(len(column), np.nan) if plain is None else plain
    with np.errstate(invalid="ignore"):
        good = (values >= 0) & (values <= UPPER[name]) & (values < np.inf)
        if name == "propensity":
            good &= values > 0
        if name in TOKENS:
            good &= values == np.floor(values)
    rest, bad = np.flatnonzero(~good), np.zeros(len(values), dtype=bool)
    if len(rest):  # texts, nulls, and what is wrong
        some = column.take(pa.array(rest)) if isinstance(column, pa.Array) else [column[i] for i in rest]
        codes, cells = distinct(some)
        found, wrong = np.full(len(cells), np.nan), np.zeros(len(cells), dtype=bool)
        for i, cell in enumerate(cells):
            try:
                value = read_cell(name, cell)
                found[i] = np.nan if value is None else value
            except BadCell:
                wrong[i] = True
        values[rest], bad[rest] = found[codes], wrong[codes]
    return values, bad


def _plain(column: Any, truth: bool) -> np.ndarray | None:
    """A column of numbers, null is NaN; None: something else is in it."""
    if isinstance(column, pa.Array):
        kind = column.type
        if pa.types.is_boolean(kind) and truth:
            column = column.cast(pa.int8())
        elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            return None
        return np.array(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
    try:
        return np.array(column, dtype=np.float64) if {*map(type, column)} <= {int, float} else None
    except OverflowError:
        return None


def _replies(column: Any) -> tuple[pa.Array, np.ndarray]:
    """Texts, and which of them are bad, ``[rows]``."""
    if isinstance(column, pa.Array) and (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column.cast(pa.large_string()), column.is_null().to_numpy(zero_copy_only=False)
    codes, cells = distinct(column)
    read: list[str | None] = []
    for cell in cells:
        try:
            read.append(read_cell("reply", cell))
        except BadCell:
            read.append(None)
    texts = pa.array(read, pa.large_string()).take(pa.array(codes))
    return texts, texts.is_null().to_numpy(zero_copy_only=False)


def check(
    chunks: Iterable[Chunk], catalogue: Mapping[str, Member], source: str, folder: Path | None = None
) -> Columns:
    """Check the rows of a table.

    Args:
        chunks: of `routers.data.files`.
        catalogue: who may stand in it, and prices.
        source: how errors call it.
        folder: where the columns are stored; None: they stay in memory.

    Raises:
        ValueError: the table as a whole cannot be read.
    """
    reader = _Reader(catalogue, source)
    tables = reader.read(chunks)
    if folder is None:
        parts = list(tables)
        return reader.columns(pa.concat_tables(parts) if parts else None)
    _write(folder / "replies.arrow", tables)
    reader.columns(None).save(folder)
    return Columns.load(folder)


class _Reader:
    """One pass over the chunks of a table (`read`), then its rows put together (`columns`)."""

    def __init__(self, catalogue: Mapping[str, Member], source: str) -> None:
        self.catalogue, self.source = catalogue, source
        self.known: dict[str, dict[Any, int]] = {name: {} for name in TEXTS}
        self.known["split"] = {name: i for i, name in enumerate((*SPLITS, None))}
        self.known["member"] = {name: i for i, name in enumerate(catalogue)}
        members = [*catalogue.values()]
        self.priced = np.array([*(member.priced for member in members), False])  # the last: of who is not in it
        self.free = np.array([*(member.free_tokens for member in members), False])
        self.found: dict[str, None] = {}
        self.unused: dict[str, None] = {}
        self.wide: Layout | None = None
        kinds = {**dict.fromkeys((*TEXTS, *TOKENS), np.int32), "number": np.int64, "reply_row": np.int64}
        self.parts = {name: [np.empty(0, kinds.get(name))] for name in (*TEXTS, *NUMBERS, "number", "reply_row")}
        self.bad: list[_Bad] = []
        self.touched: set[str] = set()
        self.split_names: set[str] = set()
        self.anonymous = self.total = self.replies = 0

    @property
    def log(self) -> bool:
        """Whether it is a log of decisions: such a table alone has propensities."""
        return "propensity" in self.found

    def add_bad(self, number: int, problem: BadCell, raw: Any) -> None:
        content = raw.content if isinstance(raw, BadRow) else raw
        text = content if isinstance(content, str) else repr(content)
        whose = f"member {raw['member']!r}: " if self.wide and isinstance(raw, Mapping) else ""
        self.bad.append((int(number), problem.reason, whose + problem.detail, text[:EXCERPT]))
        query_id = query_id_of(raw)
        self.anonymous += query_id is None
        self.touched.add(query_id or "")

    def judge(self, number: int, raw: Any, fields: Collection[str]) -> None:
        """Add a row that is known to be bad."""
        try:
            check_row(raw, fields, self.catalogue)
        except BadCell as problem:
            self.add_bad(number, problem, raw)
        else:
            raise AssertionError(f"{self.source}: row {number} is good alone and bad among others: {raw}")

    def read(self, chunks: Iterable[Chunk]) -> Iterator[pa.Table]:
        """The replies of each chunk that has any."""
        for number, chunk in enumerate(chunks):
            if not number:
                self.wide = layout(chunk.columns, self.catalogue, self.source)
            if self.wide:
                self.unused |= dict.fromkeys(unused(chunk.columns, self.wide))
            self.found |= dict.fromkeys(fields_of(chunk.columns, self.wide) if self.wide else chunk.columns)
            if chunk.rows is None:  # its columns are those of the whole file
                self.check_columns()
            for part in long(chunk, self.wide) if self.wide else (chunk,):
                self.total += len(part.numbers) + len(part.bad)
                for row in part.bad:
                    self.judge(*row, FIELDS)
                if len(part.numbers):
                    yield from self.read_chunk(part)

    def check_columns(self) -> list[str]:
        members = {name: self.catalogue[name] for name in self.wide or self.catalogue}
        return [*check_columns(self.found, members, self.source), *self.unused]

    def read_chunk(self, chunk: Chunk) -> Iterator[pa.Table]:
        count, columns = len(chunk.numbers), chunk.columns
        values: dict[str, np.ndarray] = {"number": np.asarray(chunk.numbers, dtype=np.int64)}
        bad = np.zeros(count, dtype=bool)
        for name in TEXTS:
            if name in columns:
                values[name] = _text_codes(name, columns[name], self.known[name])
                bad |= values[name] < 0
            else:
                known = self.known[name]
                default = -1 if name in REQUIRED else known.setdefault(DEFAULTS[name], len(known))
                values[name] = np.full(count, default, dtype=np.int32)
                bad |= default < 0
        for name in NUMBERS:
            if name in columns:
                values[name], wrong = _numbers(name, columns[name])
                bad |= wrong
            else:
                values[name] = np.full(count, 0.0 if name == "seconds" else np.nan)
                bad |= name in REQUIRED
        values["reply_row"] = np.full(count, -1, dtype=np.int64)
        if "reply" in columns:
            texts, wrong = _replies(columns["reply"])
            bad |= wrong
            values["reply_row"] = np.arange(self.replies, self.replies + count)
            self.replies += count
            yield pa.table({"reply": texts})
        if "split" in columns:
            self.split_names |= {str(name).strip().lower() for name in distinct(columns["split"])[1]}
        member = np.minimum(values["member"], len(self.catalogue))
        untold = np.isnan(values["prompt_tokens"]) | np.isnan(values["completion_tokens"])
        bad |= member == len(self.catalogue)
        bad |= np.isnan(values["cost"]) & (~self.priced[member] | (untold & ~self.free[member]))
        fields = [name for name in FIELDS if name not in WHOLE or name in columns]
        for i in np.flatnonzero(bad):
            self.judge(chunk.numbers[i], chunk.row(int(i)), fields)
        for name in TOKENS:  # where a cost is told or tokens are free, none are needed
            values[name] = np.nan_to_num(values[name]).astype(np.int32)
        for name, part in values.items():
            self.parts[name].append(part[~bad])

    def columns(self, replies: pa.Table | None) -> Columns:
        if not self.total:
            raise ValueError(f"{self.source}: the table has no rows")
        not_used = self.check_columns() if self.found else []
        warnings = [f"columns that are not used: {', '.join(not_used)}"] if not_used else []
        if len(merged := sorted(self.split_names & HELDOUT_SPLITS)) > 1:
            warnings.append(f"the splits {' and '.join(merged)} are held out together, as one")
        rows = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        self.parts.clear()
        self.said = {name: list(known) for name, known in self.known.items()}
        for name in WHOLE:
            if name in self.found:
                lacks = rows["reply_row"] < 0 if name == "reply" else np.isnan(rows[name])
                self.leave_out(rows, np.flatnonzero(lacks), BadCell(f"missing {name}", f"field {name!r} is missing"))
                rows = {column: values[~lacks] for column, values in rows.items()}
        self.choose_splits(rows)
        present = np.unique(rows["member"])
        members = [self.said["member"][i] for i in present]
        if absent := [name for name in self.catalogue if name not in members]:
            warnings.append(f"not in the pool, for no row is theirs: {', '.join(absent)}")
        first, at = self.cells_of(rows, present)
        queries = {name: [self.said[name][i] for i in rows[name][first]] for name in TEXTS[:-1]}
        kept, repeated, missing = self.kept(rows, queries, members, at)
        at = at[kept]
        numbers = {name: rows[name][at] for name in (*NUMBERS, "reply_row")}
        for name, values in numbers.items() if self.log else ():
            values[at < 0] = -1 if name == "reply_row" else 0 if name in TOKENS else np.nan
        by_number = sorted(range(len(self.bad)), key=lambda i: self.bad[i][0])
        return Columns(
            members,
            pa.table({name: [values[i] for i in kept] for name, values in queries.items()}, _QUERY_SCHEMA),
            **numbers,
            replies=replies,
            total=self.total,
            bad=[self.bad[i] for i in by_number],
            warnings=warnings,
            missing=missing,
            unexplained=[name for name in missing if name not in self.touched],
            anonymous=self.anonymous,
            repeated=repeated,
            log=self.log,
        ).priced(self.catalogue)

    def leave_out(self, rows: Mapping[str, np.ndarray], some: Iterable[int], problem: BadCell) -> None:
        for i in map(int, some):
            told = {name: self.said[name][rows[name][i]] for name in ("query_id", "query", "member")}
            self.add_bad(rows["number"][i], problem, told)

    def choose_splits(self, rows: dict[str, np.ndarray]) -> None:
        """By the text, where the table says none."""
        unsaid = rows["split"] == len(SPLITS)
        texts = np.unique(rows["query"][unsaid])
        chosen = np.zeros(len(self.said["query"]), dtype=np.int32)
        chosen[texts] = [SPLITS.index(split_of(self.said["query"][i])) for i in texts]
        rows["split"][unsaid] = chosen[rows["query"][unsaid]]

    def cells_of(self, rows: Mapping[str, np.ndarray], present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the first row of each query, the row of each query and member, -1: none). Rows that contradict the first of
        their query, or repeat one, are bad."""
        first = first_of(rows["query_id"], len(self.said["query_id"]))
        ids = np.flatnonzero(first >= 0)
        ids = ids[np.argsort(first[ids])]
        place = np.zeros(len(first), dtype=np.int64)
        place[ids] = np.arange(len(ids))
        same = {name: rows[name] == rows[name][first[rows["query_id"]]] for name in TEXTS[1:-1]}
        good = np.logical_and.reduce(list(same.values()))
        pair = place[rows["query_id"]] * len(present) + np.searchsorted(present, rows["member"])
        usable = np.flatnonzero(good)
        at = first_of(pair[usable], len(ids) * len(present))
        at[at >= 0] = usable[at[at >= 0]]

        def problem(i: int) -> BadCell:
            query_id, member = self.said["query_id"][rows["query_id"][i]], self.said["member"][rows["member"][i]]
            if 0 <= at[pair[i]] < i:
                return BadCell("repeated row", f"query {query_id!r} has two rows for member {member!r}; keep one")
            name = next(name for name in same if not same[name][i])
            now, before = (self.said[name][rows[name][j]] for j in (i, first[rows["query_id"][i]]))
            if name == "gold":
                told = f"gold {now!r} differs from an earlier row of query {query_id!r}"
            else:
                told = f"{name} {now!r} differs from {before!r} in an earlier row of {query_id!r}"
            return BadCell("contradicts an earlier row", told)

        for i in map(int, np.flatnonzero(at[pair] != np.arange(len(pair)))):
            self.leave_out(rows, [i], problem(i))
        return first[ids], at.reshape(len(ids), len(present))

    def kept(
        self, rows: Mapping[str, np.ndarray], queries: Mapping[str, list[Any]], members: list[str], at: np.ndarray
    ) -> tuple[list[int], dict[str, str], dict[str, list[str]]]:
        """(places of the queries that stay; those that repeat the text of another; those that lack members).

        A training query whose text is held out too is dropped, for nothing is trained on and tested on; its rows are
        bad. Of the complete ones with one text the first stays: a router sees the text alone, and a mean of several
        recordings would be nobody's reply. In a log one text may be asked often, and of each query one member only.
        """
        ids, split = queries["query_id"], queries["split"]
        texts = [normalise_query(text) for text in queries["query"]]
        first: dict[str, int] = {}
        dropped: dict[int, int] = {}
        for i, text in enumerate(texts):
            other = first.setdefault(text, i)
            if split[other] != split[i]:
                train, heldout = sorted((other, i), key=lambda each: split[each] == "heldout")
                first[text] = heldout
                dropped[train] = heldout
        for i, other in dropped.items():
            told = f"queries {ids[i]!r} and {ids[other]!r} have the same text but stand in different splits; drop one"
            self.leave_out(rows, at[i][at[i] >= 0], BadCell("same text in both splits", told))
        if self.log:
            several = np.flatnonzero((at >= 0).sum(axis=1) > 1)
            for i in several:
                told = f"query {ids[i]!r} has the rows of several members; every decision needs a query_id of its own"
                self.leave_out(rows, at[i][at[i] >= 0], BadCell("several rows of one decision", told))
            out = {*dropped, *several.tolist()}
            return [i for i in range(len(ids)) if i not in out], {}, {}
        missing = {
            ids[i]: [members[j] for j in np.flatnonzero(at[i] < 0)]
            for i in np.flatnonzero((at < 0).any(axis=1))
            if i not in dropped
        }
        kept: dict[str, int] = {}
        repeated = {}
        for i, text in enumerate(texts):
            if i not in dropped and ids[i] not in missing and kept.setdefault(text, i) != i:
                repeated[ids[i]] = ids[kept[text]]
        return list(kept.values()), repeated, missing
