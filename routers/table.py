"""A table of recorded replies: what each pool member answered to each query, and what it cost.

One row per (query, member). Required columns: ``query_id, query, member, reply, prompt_tokens, completion_tokens,
correct``. Optional: ``family`` (default ""), ``split`` ("train" | "heldout"; default: ``split_of``), ``gold`` (list of
accepted answers; default empty), ``seconds`` (default 0.0), ``cost`` (USD of the reply as its source states it, as
RouterBench publishes; without it the catalogue's prices count). A table that loads is complete and consistent: every
query has exactly one reply of every member, and no query text stands in both splits.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from routers.catalogue import Member, cost, load_catalogue

SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 4
HIGHEST_USD = 1_000.0
"""Of one reply; above it a cost is in another unit."""
REQUIRED = ("query_id", "query", "member", "reply", "prompt_tokens", "completion_tokens", "correct")
_CSV_PARSERS: dict[str, Callable[[str], Any]] = {
    "prompt_tokens": int,
    "completion_tokens": int,
    "seconds": float,
    "cost": lambda text: float(text) if text.strip() else None,
    "correct": float,
    "gold": json.loads,
}
_DEFAULTS: dict[str, Any] = {"family": "", "split": None, "gold": (), "seconds": 0.0, "cost": None}


@dataclass(frozen=True)
class Recorded:
    """One recorded reply. ``seconds`` is wall time, ``correct`` lies in [0, 1], ``cost`` is USD."""

    reply: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    correct: float
    cost: float


def normalise_query(query: str) -> str:
    """The text by which two queries are 'the same': NFKC, lower case, single spaces, no closing punctuation."""
    return " ".join(unicodedata.normalize("NFKC", query).casefold().split()).rstrip(" ?.!")


def split_of(query: str) -> str:
    """Split by the hash of the normalised text: about one query in four is held out, the same on every machine."""
    digest = hashlib.sha256(normalise_query(query).encode("utf-8")).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0 else "train"


class ReplyTable:
    """Recorded replies with O(1) access. Build with ``load_table``, ``quickstart_table`` or from rows.

    Args:
        rows: dicts with the columns above.
        catalogue: prices; its order is the order of ``members``. Members without any row are left out.
        source: how error messages call the table.

    Raises:
        ValueError: names the source, the row (from 1), the field and what is wrong.
    """

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], catalogue: Mapping[str, Member], source: str = "rows"
    ) -> None:
        self._queries: dict[str, dict[str, Any]] = {}
        self._gold: dict[str, tuple[str, ...]] = {}
        self._replies: dict[tuple[str, str], Recorded] = {}
        seen_members: set[str] = set()
        for number, raw in enumerate(rows, start=1):
            label = f"{source}: row {number}"
            row = _checked(raw, label)
            member = row["member"]
            if member not in catalogue:
                raise ValueError(
                    f"{label}: member {member!r} has no price; add it to the catalogue ({sorted(catalogue)})"
                )
            self._add(row, catalogue[member], label)
            seen_members.add(member)
        if not self._queries:
            raise ValueError(f"{source}: the table has no rows")
        self.catalogue: dict[str, Member] = {name: m for name, m in catalogue.items() if name in seen_members}
        self.members: list[str] = list(self.catalogue)
        self._check_complete(source)
        self._check_splits(source)

    def _add(self, row: dict[str, Any], member: Member, label: str) -> None:
        key = (row["query_id"], member.name)
        if key in self._replies:
            raise ValueError(f"{label}: query {key[0]!r} has two rows for member {key[1]!r}; keep one")
        query = {name: row[name] for name in ("query_id", "query", "family", "split")}
        known = self._queries.setdefault(row["query_id"], query)
        for field, value in query.items():
            if known[field] != value:
                raise ValueError(
                    f"{label}: {field} {value!r} differs from {known[field]!r} in an earlier row of {key[0]!r}"
                )
        if self._gold.setdefault(row["query_id"], row["gold"]) != row["gold"]:
            raise ValueError(f"{label}: gold {row['gold']!r} differs from an earlier row of query {key[0]!r}")
        if row["cost"] is None and not member.priced:
            raise ValueError(
                f"{label}: field 'cost' is missing, and member {member.name!r} has no price_in and price_out in the "
                "catalogue; give one of them"
            )
        self._replies[key] = Recorded(
            reply=row["reply"],
            prompt_tokens=row["prompt_tokens"],
            completion_tokens=row["completion_tokens"],
            seconds=row["seconds"],
            correct=row["correct"],
            cost=cost(member, row["prompt_tokens"], row["completion_tokens"]) if row["cost"] is None else row["cost"],
        )

    def _check_complete(self, source: str) -> None:
        for query_id in self._queries:
            missing = [name for name in self.members if (query_id, name) not in self._replies]
            if missing:
                raise ValueError(
                    f"{source}: query {query_id!r} has no reply of {missing}; record it or drop the query"
                )

    def _check_splits(self, source: str) -> None:
        first: dict[str, dict[str, Any]] = {}
        for query in self._queries.values():
            other = first.setdefault(normalise_query(query["query"]), query)
            if other["split"] != query["split"]:
                raise ValueError(
                    f"{source}: queries {other['query_id']!r} and {query['query_id']!r} have the same text "
                    "but stand in different splits; drop one"
                )

    def __len__(self) -> int:
        """Number of queries."""
        return len(self._queries)

    def queries(self, split: str | None = None) -> list[dict[str, Any]]:
        """Queries of a split (``None``: all) in table order: dicts of query_id, query, family, split.

        Raises:
            ValueError: unknown split.
        """
        if split is not None and split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; use one of {SPLITS} or None")
        return [dict(query) for query in self._queries.values() if split in (None, query["split"])]

    def gold(self, query_id: str) -> tuple[str, ...]:
        """Accepted answers of a query (empty when the table has none). KeyError for an unknown query."""
        return self._gold[query_id]

    def lookup(self, query_id: str, member: str) -> Recorded:
        """The reply recorded for this pair.

        Raises:
            KeyError: unknown query or member.
        """
        try:
            return self._replies[(query_id, member)]
        except KeyError:
            raise KeyError(f"no reply of member {member!r} to query {query_id!r}; members: {self.members}") from None

    def correct_matrix(self, split: str | None = None) -> np.ndarray:
        """Correctness, float64 ``[queries, members]``; rows as ``queries(split)``, columns as ``members``."""
        return self._matrix(split, "correct")

    def cost_matrix(self, split: str | None = None) -> np.ndarray:
        """Cost in USD, float64 ``[queries, members]``; rows as ``queries(split)``, columns as ``members``."""
        return self._matrix(split, "cost")

    def _matrix(self, split: str | None, field: str) -> np.ndarray:
        ids = [query["query_id"] for query in self.queries(split)]
        values = [[getattr(self._replies[(i, name)], field) for name in self.members] for i in ids]
        return np.array(values, dtype=np.float64).reshape(len(ids), len(self.members))

    @cached_property
    def max_cost(self) -> float:
        """Scale of the cost in rewards, USD: the mean cost of the dearest member on the train split.

        A mean and not a maximum, so that one long reply does not shrink every penalty: a normalised cost can exceed 1.
        It is fixed by the table (no running state). A table without train rows uses all rows, and a table in which
        every reply is free gives 1.0, so that dividing by it is always safe.
        """
        costs = self.cost_matrix("train" if self.queries("train") else None)
        dearest = float(costs.mean(axis=0).max())
        return dearest if dearest > 0 else 1.0


def load_table(source: str | Path, catalogue: str | Path | Mapping[str, Member] | None = None) -> ReplyTable:
    """Read a ``.parquet``, ``.jsonl`` or ``.csv`` file, or a dataset of the Hugging Face Hub, as a ``ReplyTable``.

    Args:
        source: a file (in a CSV, ``gold`` is a JSON list), or a Hub id such as ``"user/replies"``, of which all splits
            are read and the ``split`` column decides.
        catalogue: prices, as a YAML file or loaded. ``None`` reads ``catalogue.yaml`` beside the file.

    Raises:
        FileNotFoundError: a path with a known suffix that does not exist.
        ValueError: bad rows or a missing catalogue; see ``ReplyTable``.
    """
    path = Path(source)
    reader = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv}.get(path.suffix, _read_hub)
    if reader is not _read_hub and not path.is_file():
        raise FileNotFoundError(f"{source}: no such table")
    if isinstance(catalogue, Mapping):
        prices = catalogue
    else:
        beside = path.with_name("catalogue.yaml")
        if catalogue is None and not beside.is_file():
            raise ValueError(f"{source}: no prices; pass catalogue=... or put a catalogue.yaml beside the table")
        prices = load_catalogue(beside if catalogue is None else catalogue)
    return ReplyTable(reader(path), prices, source=str(source))


def quickstart_table() -> ReplyTable:
    """The recorded pool that ships with the package (see ``routers/data/README.md``)."""
    with resources.as_file(resources.files("routers") / "data" / "quickstart_pool.parquet") as path:
        return load_table(path)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq  # here, because reading rows from memory should not need arrow

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as file:  # not splitlines(), which also cuts at U+2028 inside a reply
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [_from_csv(row, f"{path}: row {n}") for n, row in enumerate(csv.DictReader(file), start=1)]


def _from_csv(row: dict[str, Any], label: str) -> dict[str, Any]:
    for field, parse in _CSV_PARSERS.items():
        if row.get(field) is not None:
            try:
                row[field] = parse(row[field])
            except ValueError as error:
                raise ValueError(f"{label}: field {field!r} is {row[field]!r}: {error}") from error
    return row


def _read_hub(path: Path) -> list[dict[str, Any]]:
    from datasets import load_dataset

    return [row for part in load_dataset(path.as_posix()).values() for row in part]


def _checked(raw: Mapping[str, Any], label: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{label}: is {type(raw).__name__}, not a mapping of columns")
    for field in REQUIRED:
        if field not in raw:
            raise ValueError(f"{label}: field {field!r} is missing; required are {', '.join(REQUIRED)}")
    row = _DEFAULTS | {field: raw[field] for field in (*REQUIRED, *_DEFAULTS) if field in raw}
    for field in ("query_id", "query", "member", "reply", "family"):
        if not isinstance(row[field], str):
            raise ValueError(f"{label}: field {field!r} is {row[field]!r}; it must be text")
    for field in ("query_id", "query", "member"):
        if not row[field].strip():
            raise ValueError(f"{label}: field {field!r} is empty")
    for field in ("prompt_tokens", "completion_tokens"):
        value = row[field]
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{label}: field {field!r} is {value!r}; it must be an integer >= 0")
        row[field] = int(value)
    row["seconds"] = _number(row["seconds"], "seconds", label, math.inf)
    row["correct"] = _number(row["correct"], "correct", label, 1.0)
    if row["cost"] is not None:
        if isinstance(row["cost"], (bool, np.bool_)):
            raise ValueError(f"{label}: field 'cost' is {row['cost']!r}; it must be USD of the reply")
        row["cost"] = _number(row["cost"], "cost", label, HIGHEST_USD)
    if row["split"] is None:
        row["split"] = split_of(row["query"])
    if row["split"] not in SPLITS:
        raise ValueError(f"{label}: field 'split' is {row['split']!r}; it must be one of {SPLITS}")
    gold = row["gold"]
    if not isinstance(gold, (list, tuple)) or not all(isinstance(answer, str) for answer in gold):
        raise ValueError(f"{label}: field 'gold' is {gold!r}; it must be a list of texts")
    row["gold"] = tuple(gold)
    return row


def _number(value: Any, field: str, label: str, upper: float) -> float:
    """``value`` as a float if it lies in [0, upper]; a bool counts as 0 or 1 (correctness is often stored so)."""
    if not isinstance(value, (int, float, np.number, np.bool_)) or not math.isfinite(value) or not 0 <= value <= upper:
        raise ValueError(f"{label}: field {field!r} is {value!r}; it must be a number from 0 to {upper:g}")
    return float(value)
