"""What converters share: entries of files, one after the other, into columns on disk, and a table that trains at once.

A query whose text came before, under another key, is left out, in all files of a source; so are replies that came
before, and queries without a reply of every member of the pool. All of it is counted by reason and listed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from routers.data import cells
from routers.data.catalogue import Member, member_names, read_member
from routers.data.columns import check
from routers.data.converters import EVALUATION_ONLY
from routers.data.files import FORMATS, BadRow, Chunk, Row, files_of, format_of, rows_of
from routers.data.table import ReplyTable, normalise_query, split_of
from routers.data.table_rows import HIGHEST_USD
from srpo.quarantine import MAX_BAD_SHARE, Quarantine

logger = logging.getLogger(__name__)

CHARS_PER_TOKEN = 4
UNKNOWN_REPLY_TOKENS = 128
_AT_ONCE = 64 << 20
"""Bytes; larger files of text are read row by row, and only as their suffix says."""
_BATCH = 20_000
_READERS = {
    "correct": lambda value: cells.number(value, 1.0, truth=True),
    "cost": lambda value: cells.number(value, HIGHEST_USD),
    "prompt_tokens": cells.count,
    "completion_tokens": cells.count,
    "seconds": cells.number,
    "reply": cells.words,
}
_OTHER_FORM = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What a reader raises where an entry is not as the set has it."""
_TYPES = {cells.count: pa.int64(), cells.words: pa.large_string()}
_CELLS = pa.schema(
    {"number": pa.int32(), "member": pa.int16()}
    | {name: _TYPES.get(read, pa.float64()) for name, read in _READERS.items()}
)


def estimated_tokens(text: str) -> int:
    """About how many tokens ``text`` has, at least 1."""
    return max(1, math.ceil(len(text) / CHARS_PER_TOKEN))


def find(source: Path, *patterns: str, parts: bool = False) -> list[Path]:
    """The source itself, if it is a file; else what the first pattern with any match finds beneath it, sorted.

    Args:
        parts: the set's split is in the names of its files, so that one alone will not do.

    Raises:
        FileNotFoundError: nothing.
    """
    if source.is_file():
        if parts:
            raise FileNotFoundError(2, "is one file; give the folder that holds the parts train and test", str(source))
        return [source]
    for pattern in patterns:
        if found := sorted(source.rglob(pattern)):
            return found
    raise FileNotFoundError(2, f"there is no {' and no '.join(patterns)}", str(source))


def find_one(source: Path, *patterns: str) -> Path:
    """`find` for sets of one file. ValueError where there are several."""
    found = find(source, *patterns)
    if len(found) > 1:
        raise ValueError(
            f"{source}: holds {len(found)} such files, {', '.join(map(str, found[:3]))}; name one of them"
        )
    return found[0]


def tables_beneath(source: Path) -> list[Path]:
    """The source, if it is a file; else all beneath it whose names say a format. FileNotFoundError: none."""
    found = [source] if source.is_file() else [path for path in sorted(source.rglob("*")) if format_of(path)]
    if not found:
        raise FileNotFoundError(2, f"there is no {', '.join(FORMATS)}", str(source))
    return found


@contextmanager
def formed(path: Path, form: str) -> Iterator[None]:
    """What a file of another form makes its reader raise inside is one ValueError that says which form it has."""
    try:
        yield
    except _OTHER_FORM as error:
        raise ValueError(f"{path}: is not {form} ({_said(error)})") from None


def _said(error: Exception) -> str:
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)


def entries(path: Path) -> Iterator[Row]:
    """The rows of a file as `routers.data.files` has them; large ones of text are never in memory as a whole."""
    suffix = path.suffix.lower()
    if path.stat().st_size <= _AT_ONCE or suffix not in (".csv", ".tsv", ".jsonl"):
        for one in files_of(path):
            yield from rows_of(one)
    elif suffix != ".jsonl":
        csv.field_size_limit(sys.maxsize)
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","), start=1):
                torn = None in row or None in row.values()
                yield Row(number, BadRow("wrong number of cells", "has not the header's cells") if torn else row)
    else:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield Row(number, json.loads(line))
                    except ValueError as error:
                        yield Row(number, BadRow("not JSON", f"is not JSON: {error}", line))


class TableBuilder:
    """Collects queries and replies of one source; `prices` may be filled at any time before `finish`."""

    def __init__(self, name: str, max_bad_share: float = MAX_BAD_SHARE) -> None:
        self.name, self.max_bad_share = name, max_bad_share
        self.prices: dict[str, Member] = {}
        self.dropped: list[dict[str, Any]] = []
        """Dicts of file, row (from 1; None: no single one), reason, detail."""
        self.ids: list[str] = []
        """Of the queries, where the source has some that are to stay; else they are numbered."""
        self._members: dict[str, int] = {}
        self._queries: list[tuple[str, str, str, list[str]]] = []
        self._answered: list[int] = []
        """Per query the members that replied, as bits."""
        self._texts: dict[bytes, int] = {}
        self._keys: dict[Hashable, int | None] = {}
        self._unpriced: set[int] = set()
        self._textless = 0
        self._unused: dict[str, None] = {}
        self._told = {"prompt_tokens", "completion_tokens"}
        """What any reply has."""
        self._columns: dict[str, list[Any]] = {name: [] for name in _CELLS.names}
        self._spill = tempfile.TemporaryFile()  # noqa: SIM115 (gone with this object)
        self._writer = pa.ipc.new_stream(self._spill, _CELLS)
        self._at = ("", 0)

    def read(self, path: Path, add: Callable[[dict[str, Any]], None]) -> None:
        """Add every entry of a file; one that fails leaves nothing behind.

        Raises:
            FileNotFoundError: no such file.
            BadRows: too many entries are not as the set has them.
        """
        if not path.exists():
            raise FileNotFoundError(2, "there is no such file", str(path))
        self.add_all(path.name, entries(path), add, f"rows of {path}")

    def add_all(self, file: str, rows: Iterable[Row], add: Callable[[dict[str, Any]], None], what: str) -> None:
        """`read` for rows that are in memory."""
        bad, total = Quarantine(what, max_share=self.max_bad_share, label=f"{file}: "), 0
        for number, item in rows:
            total += 1
            self._at = (file, number)
            mark = len(self._queries), len(self._columns["number"]), len(self._keys)
            try:
                if isinstance(item, BadRow):
                    raise ValueError(item.detail)
                if not isinstance(item, dict):
                    raise ValueError(f"is {type(item).__name__}, not a mapping of fields")
                add(item)
            except _OTHER_FORM as error:
                self._undo(*mark)
                bad.add(number, "another form", _said(error), item)
            if len(self._columns["number"]) >= _BATCH:
                self._flush()
        bad.settle(total)
        self.dropped += [{"file": file, **entry} for entry in bad.entries]

    def drop(self, reason: str, detail: str) -> None:
        """Something that is left out and no fault of the file."""
        file, row = self._at
        self.dropped.append({"file": file, "row": row or None, "reason": reason, "detail": detail[:200]})

    def query(
        self, text: Any, family: Any = "", gold: Any = (), split: str | None = None, key: Hashable = None
    ) -> int | None:
        """The number of a query, which is new unless its `key` came before.

        Returns:
            None: its text came before under another key, or without one.
        """
        if key is not None and key in self._keys:
            return self._keys[key]
        text = _read("query", lambda value: cells.name(value, strip=False), text)
        digest = hashlib.blake2b(normalise_query(text).encode("utf-8"), digest_size=16).digest()
        number: int | None = len(self._queries)
        if self._texts.setdefault(digest, len(self._queries)) != number:
            self.drop("repeated text", text)
            number = None
        else:
            family = "" if cells.missing(family) else _read("family", cells.words, family)
            split = split_of(text) if cells.missing(split) else _read("split", cells.split, split)
            self._queries.append((text, family, split, _read("gold", _answers, gold)))
            self._answered.append(0)
        if key is not None:
            self._keys[key] = number
        return number

    def reply(self, number: int | None, member: str, correct: Any, **values: Any) -> None:
        """One reply to a query; None: the query was left out.

        Args:
            values: `reply` (None: it was not published), `prompt_tokens` and `completion_tokens` (estimated where
                absent), `seconds`, `cost` (USD; not None where it is given: then a price is needed).
        """
        if number is None:
            return
        row = {"correct": correct, **{name: v for name, v in values.items() if name == "cost" or not cells.missing(v)}}
        row = {name: _read(f"{name} of {member}", _READERS[name], value) for name, value in row.items()}
        code = self._members.setdefault(_read("the member", cells.name, member), len(self._members))
        if self._answered[number] >> code & 1:
            self.drop("repeated reply", f"of {member} to: {self._queries[number][0]}")
            return
        self._answered[number] |= 1 << code
        self._told |= row.keys()
        self._textless += "reply" not in row
        if "cost" not in row:
            self._unpriced.add(code)
        row.setdefault("prompt_tokens", estimated_tokens(self._queries[number][0]))
        if "completion_tokens" not in row:
            row["completion_tokens"] = estimated_tokens(row["reply"]) if "reply" in row else UNKNOWN_REPLY_TOKENS
        for name, column in self._columns.items():
            column.append(number if name == "number" else code if name == "member" else row.get(name))

    def reply_if_scored(self, number: int | None, member: str, correct: Any, **values: Any) -> None:
        """`reply`, of sets in which an empty score says that the member has none."""
        if not cells.missing(correct):
            self.reply(number, member, correct, **values)
        elif number is not None:
            self._members.setdefault(cells.name(member), len(self._members))  # its place is that of its column
            self.drop("no score", f"of {member} to: {self._queries[number][0]}")

    def _undo(self, queries: int, replies: int, keys: int) -> None:
        for number, code in zip(self._columns["number"][replies:], self._columns["member"][replies:], strict=True):
            self._answered[number] &= ~(1 << code)
        for column in self._columns.values():
            del column[replies:]
        for known, length in ((self._texts, queries), (self._keys, keys)):
            while len(known) > length:
                known.popitem()
        del self._queries[queries:], self._answered[queries:]

    def _flush(self) -> None:
        self._writer.write_batch(pa.record_batch(list(self._columns.values()), schema=_CELLS))
        for column in self._columns.values():
            column.clear()

    def finish(self, members: list[str] | None = None, evaluation_only: bool = False) -> Converted:
        """The table of all queries that every member of a pool answered.

        Args:
            members: the pool; None: of the pools that some query has, the one that keeps most replies.

        Raises:
            ValueError: no such member, or no query that all of them answered.
        """
        self._flush()
        self._writer.close()
        self._at = ("", 0)
        names = list(self._members)
        if not names:
            raise ValueError(f"{self.name}: no reply was read; left out: {self.left_out()}")
        members = member_names(members or (), self._members)
        if unknown := [name for name in members if name not in self._members]:
            raise ValueError(f"{self.name} has no member {unknown[0]!r}; it has {', '.join(names)}")
        pools = Counter(self._answered)
        pool = sum(1 << self._members[name] for name in members) if members else _fullest(pools)
        kept = np.array([mask & pool == pool for mask in self._answered], dtype=bool)
        if not kept.any():
            raise ValueError(f"{self.name}: no query has a reply of every member ({', '.join(members or names)})")
        for number in np.flatnonzero(~kept):
            lacking = [name for name, code in self._members.items() if (pool & ~self._answered[number]) >> code & 1]
            self.drop("no reply of every member", f"none of {', '.join(lacking[:5])} to: {self._queries[number][0]}")
        for name, code in self._members.items():
            if not pool >> code & 1:
                self.drop("member outside the pool", name)
        inside = {name: code for name, code in self._members.items() if pool >> code & 1}
        catalogue = {name: self._member(name, code) for name, code in inside.items()}
        for i, member in enumerate(catalogue.values()):  # what is written must load
            read_member(_told(member), dict, Path(f"{self.name}'s price list"), i)
        if self.prices and (free := [name for name, code in inside.items() if self._free(name, code)]):
            logger.warning(
                "%s: no price is known of %s, so it counts as free, until you write price_in and price_out into "
                "catalogue.yaml", self.name, ", ".join(free),
            )  # fmt: skip
        if self._unused:
            logger.warning("%s: columns that are not used: %s", self.name, ", ".join(self._unused))
        return Converted(self, catalogue, kept, inside, evaluation_only)

    def not_used(self, columns: Iterable[str]) -> None:
        """Columns that hold nothing for a table: `finish` names them."""
        self._unused |= dict.fromkeys(columns)

    def left_out(self) -> str:
        """How much, by reason."""
        reasons = Counter(one["reason"] for one in self.dropped)
        return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common()) or "nothing"

    def _free(self, name: str, code: int) -> bool:
        return code in self._unpriced and name not in self.prices

    def _member(self, name: str, code: int) -> Member:
        free = Member(name, name, 0.0, 0.0) if self._free(name, code) else Member(name, name)
        return self.prices.get(name, free)


def _told(member: Member) -> dict[str, Any]:
    """What a catalogue says of a member."""
    told = {fact: getattr(member, fact) for fact in ("name", "descriptor", "price_in", "price_out")}
    return {fact: value for fact, value in told.items() if value is not None}


def _read(field: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{field} is {str(value)[:80]!r}; {error}") from None


def _answers(gold: Any) -> list[str]:
    """As tables have them; a text that looks like a list and is none, such as an interval, is an answer."""
    try:
        return list(cells.answers(gold))
    except ValueError:
        if isinstance(gold, str):
            return [cells.text(gold)]
        raise


def _fullest(pools: Mapping[int, int]) -> int:
    """The set of members that keeps most replies, among those that most queries have exactly."""
    common = sorted(pools, key=lambda pool: -pools[pool] * pool.bit_count())[:200]
    kept = {one: one.bit_count() * sum(n for other, n in pools.items() if other & one == one) for one in common}
    return max(kept, key=lambda pool: kept[pool], default=0)


class Converted:
    """A converted set: its rows in the table's format, and the price list that belongs to them.

    Attributes:
        catalogue: members in the order in which the source has them.
        dropped: what was left out, dicts of file, row, reason, detail.
    """

    def __init__(
        self, built: TableBuilder, catalogue: dict[str, Member], kept: np.ndarray, codes: dict[str, int], alone: bool
    ) -> None:
        self.catalogue, self.dropped, self.evaluation_only = catalogue, built.dropped, alone
        self._built, self._kept, self._codes = built, kept, codes
        texts, families, splits, golds = zip(*built._queries, strict=True)
        width = len(str(len(texts)))
        ids = built.ids or [f"{built.name}-{number:0{max(5, width)}d}" for number in range(1, len(texts) + 1)]
        self._facts = pa.table(
            {"query_id": ids, "query": pa.array(texts, pa.large_string()), "family": families, "split": splits}
            | {"gold": pa.array(golds, pa.list_(pa.string()))}
        )

    def batches(self) -> Iterator[pa.Table]:
        """The rows, some thousands at a time, in the order of the source."""
        spill = self._built._spill
        spill.seek(0)
        reader = pa.ipc.open_stream(spill)
        names = pa.array(self._built._members, pa.string())
        inside = np.array(list(self._codes.values()))
        for batch in reader:
            table = pa.Table.from_batches([batch])
            number, member = table["number"].to_numpy(), table["member"].to_numpy()
            table = table.filter(pa.array(self._kept[number] & np.isin(member, inside)))
            if table.num_rows:
                facts, who = self._facts.take(table["number"]), names.take(table["member"].combine_chunks())
                columns = dict(zip(facts.column_names, facts.columns, strict=True)) | {"member": who}
                columns |= {name: table[name] for name in _CELLS.names if name in self._built._told}
                if "reply" in columns:
                    columns["reply"] = columns["reply"].fill_null("")
                yield pa.table(columns)

    def rows(self) -> list[dict[str, Any]]:
        """The rows as dicts."""
        return [row for table in self.batches() for row in table.to_pylist()]

    def table(self) -> ReplyTable:
        """Checked and ready for use."""
        chunks = (
            Chunk(range(table.num_rows), {name: table[name].combine_chunks() for name in table.column_names})
            for table in self.batches()
        )
        return ReplyTable(check(chunks, self.catalogue, self._built.name), self.catalogue, self._built.name)

    def write(self, path: Path) -> list[Path]:
        """Write the table as parquet; beside it `catalogue.yaml`, and what was left out as JSON lines.

        Returns:
            The files.

        Raises:
            ValueError: another `catalogue.yaml` is there; nothing has been written.
        """
        prices = path.with_name("catalogue.yaml")
        priced = yaml.safe_dump(
            {"members": [_told(one) for one in self.catalogue.values()]}, sort_keys=False, allow_unicode=True
        )
        if prices.exists() and prices.read_text(encoding="utf-8") != priced:
            raise ValueError(
                f"{prices} is there and says something else: prices of another table, or edited ones. Write into "
                "another folder, or remove it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = None
        for table in self.batches():
            if self.evaluation_only:
                table = table.replace_schema_metadata({EVALUATION_ONLY: self._built.name})
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()
        prices.write_text(priced, encoding="utf-8")
        listed = path.with_suffix(".quarantine.txt")
        listed.unlink(missing_ok=True)
        if self.dropped:
            listed.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in self.dropped), "utf-8")
        return [path, prices, *([listed] if self.dropped else [])]

    def summary(self) -> str:
        """What was kept and left out, in one line."""
        splits = Counter(self._facts["split"].filter(pa.array(self._kept)).to_pylist())
        silent = self._built._textless if "reply" in self._built._told else 0
        told = f"; {silent:,} replies were published without a text, which is empty here" if silent else ""
        return (
            f"kept {sum(splits.values()):,} queries ({splits['train']:,} train, {splits['heldout']:,} held out) x "
            f"{len(self.catalogue)} members; left out: {self._built.left_out()}{told}"
        )
