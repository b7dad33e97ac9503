"""A table of recorded replies: what each pool member answered to each query, and what it cost.

One row per (query, member). Required columns: ``query_id, query, member, correct``, and ``prompt_tokens`` and
``completion_tokens`` unless every reply has a cost or is free. Optional: ``reply`` (a table without it trains a
router, but nothing that reads replies), ``family`` (default ""), ``split`` ("train" or "heldout"; test, validation,
val, dev and eval are held out; default: ``split_of``), ``gold`` (accepted answers: a list or one; default empty),
``seconds`` (default 0.0), ``cost`` (USD of the reply as its source states it, as RouterBench publishes; without it the
catalogue's prices count). Values may be written as files of any format hold them (``routers.data.cells``).

A table that loads is complete and consistent: every query has exactly one reply of every member, and no query text
stands in both splits. Bad rows are left out with their reasons, and their queries with them; too many are an error.
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from routers.data.catalogue import Member, cost, load_catalogue
from routers.data.cells import HELDOUT_SPLITS
from routers.data.files import BadRow, Row, names_a_file, read_rows
from routers.data.table_rows import TOKENS, BadCell, incomplete_message, query_id_of, read_row, readers
from srpo.quarantine import MAX_BAD_SHARE, BadRows, Quarantine

logger = logging.getLogger(__name__)

SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 4


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
        rows: dicts with the columns above, or what ``routers.data.files.read_rows`` returns.
        catalogue: prices; its order is the order of ``members``. Members without any row are left out.
        source: how messages call the table.
        max_bad_share: above this share of bad rows (unreadable, contradicting or repeating an earlier one, of a
            member without a price) the table is refused; up to it they are left out with their queries.
        drop_incomplete: leave out queries that lack a row of some member, though no row of theirs was bad.
        quarantine_path: where bad rows are written with their reasons; None: warnings only.

    Attributes:
        has_replies: whether there is a column ``reply``; without it every reply reads "".
        bad_rows: what was left out, as ``srpo.quarantine`` writes it.
        incomplete: ids of the queries that were left out, by bad rows or for want of a member.

    Raises:
        ValueError: names the source, the rows (from 1), the fields and what is wrong.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any] | Row],
        catalogue: Mapping[str, Member],
        source: str = "rows",
        *,
        max_bad_share: float = MAX_BAD_SHARE,
        drop_incomplete: bool = False,
        quarantine_path: str | Path | None = None,
    ) -> None:
        self._queries: dict[str, dict[str, Any]] = {}
        self._gold: dict[str, tuple[str, ...]] = {}
        self._replies: dict[tuple[str, str], Recorded] = {}
        self._catalogue = catalogue
        numbered = [row if isinstance(row, Row) else Row(n, row) for n, row in enumerate(rows, start=1)]
        if not numbered:
            raise ValueError(f"{source}: the table has no rows")
        columns = readers(numbered, catalogue, source)
        self.has_replies = "reply" in columns
        bad = Quarantine(f"rows of {source}", quarantine_path, max_bad_share, label=f"{Path(source).name}: ")
        touched: set[str] = set()
        anonymous, members = 0, set()
        for number, raw in numbered:
            try:
                row = read_row(raw, columns)
                self._add(row)
                members.add(row["member"])
            except BadCell as problem:
                bad.add(number, problem.reason, problem.detail, raw.content if isinstance(raw, BadRow) else raw)
                query_id = query_id_of(raw)
                anonymous += query_id is None
                touched.add(query_id or "")
        touched |= self._mixed_splits(numbered, bad)
        self.bad_rows = bad.entries
        self.catalogue: dict[str, Member] = {name: m for name, m in catalogue.items() if name in members}
        self.members: list[str] = list(self.catalogue)
        _warn_of_splits(numbered, source)
        missing = self._missing()
        unexplained = [query_id for query_id in missing if query_id not in touched]
        self.incomplete = list(missing)
        for query_id in missing:
            bad.note("incomplete query", f"query {query_id!r} has no reply of {missing[query_id]}")
        refused = ""
        if len(unexplained) > anonymous and not drop_incomplete:
            refused = incomplete_message(source, {name: missing[name] for name in unexplained}, len(self))
        try:
            bad.settle(len(numbered))
        except BadRows as error:  # all that is wrong in one run
            raise BadRows(f"{error}. {refused}" if refused else str(error)) from None
        if refused:
            raise ValueError(refused)
        self._drop(missing)
        if not self._queries:
            raise ValueError(f"{source}: no query has a reply of every member ({', '.join(self.members)})")
        if missing:
            logger.warning(
                "%s: %d of %d queries are left out, because they lack a row of some member (%d of them had bad rows)",
                source, len(missing), len(missing) + len(self), len(missing) - max(0, len(unexplained) - anonymous),
            )  # fmt: skip

    def _add(self, row: dict[str, Any]) -> None:
        query_id, name = row["query_id"], row["member"]
        member = self._catalogue.get(name)
        if member is None:
            known = ", ".join(sorted(self._catalogue))
            raise BadCell("member without a price", f"member {name!r} has no price; add it to the catalogue ({known})")
        if row["split"] is None:
            row["split"] = split_of(row["query"])
        if row["cost"] is None and not member.priced:
            told = f"field 'cost' is missing, and member {name!r} has no price_in and price_out in the catalogue"
            raise BadCell("neither cost nor price", f"{told}; give one of them")
        if row["cost"] is None and not member.free_tokens:
            for field in TOKENS:
                if row[field] is None:
                    told = f"field {field!r} is None; it must be an integer >= 0 where the reply has no cost"
                    raise BadCell(f"missing {field}", told)
        known_query = self._queries.get(query_id)
        if (query_id, name) in self._replies:
            raise BadCell("repeated row", f"query {query_id!r} has two rows for member {name!r}; keep one")
        if known_query is not None:
            for field in ("query", "family", "split"):
                if known_query[field] != row[field]:
                    told = (
                        f"{field} {row[field]!r} differs from {known_query[field]!r} in an earlier row of {query_id!r}"
                    )
                    raise BadCell("contradicts an earlier row", told)
            if self._gold[query_id] != row["gold"]:
                told = f"gold {row['gold']!r} differs from an earlier row of query {query_id!r}"
                raise BadCell("contradicts an earlier row", told)
        else:
            self._queries[query_id] = {name: row[name] for name in ("query_id", "query", "family", "split")}
            self._gold[query_id] = row["gold"]
        prompt, completion = row["prompt_tokens"] or 0, row["completion_tokens"] or 0
        usd = cost(member, prompt, completion) if row["cost"] is None else row["cost"]
        self._replies[(query_id, name)] = Recorded(
            row["reply"], prompt, completion, row["seconds"], row["correct"], usd
        )

    def _missing(self) -> dict[str, list[str]]:
        """Queries that lack members -> those members."""
        lacking = {}
        for query_id in self._queries:
            if names := [name for name in self.members if (query_id, name) not in self._replies]:
                lacking[query_id] = names
        return lacking

    def _mixed_splits(self, rows: Iterable[Row], bad: Quarantine) -> set[str]:
        """Drop training queries whose text is held out too, for nothing is trained on and tested on."""
        first: dict[str, dict[str, Any]] = {}
        dropped: dict[str, str] = {}
        for query in self._queries.values():
            other = first.setdefault(normalise_query(query["query"]), query)
            if other["split"] != query["split"]:
                train, heldout = sorted((other, query), key=lambda each: each["split"] == "heldout")
                first[normalise_query(query["query"])] = heldout
                dropped[train["query_id"]] = heldout["query_id"]
        if dropped:
            for number, raw in rows:
                query_id = query_id_of(raw)
                if query_id in dropped:
                    both = f"queries {query_id!r} and {dropped[query_id]!r}"
                    told = f"{both} have the same text but stand in different splits; drop one"
                    bad.add(number, "same text in both splits", told, raw)
            self._drop(dropped)
        return set(dropped)

    def _drop(self, query_ids: Collection[str]) -> None:
        if query_ids:
            self._queries = {key: query for key, query in self._queries.items() if key not in query_ids}
            self._replies = {key: reply for key, reply in self._replies.items() if key[0] not in query_ids}
            self._gold = {key: gold for key, gold in self._gold.items() if key not in query_ids}

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


def load_table(
    source: str | Path,
    catalogue: str | Path | Mapping[str, Member] | None = None,
    *,
    max_bad_share: float = MAX_BAD_SHARE,
    drop_incomplete: bool = False,
    quarantine_path: str | Path | None = None,
) -> ReplyTable:
    """Read a file or a dataset of the Hugging Face Hub as a ``ReplyTable``.

    Args:
        source: a ``.parquet``, ``.jsonl``, ``.json``, ``.csv`` or ``.tsv`` file (packed or not;
        ``routers.data.files``), a
            folder of them, or a Hub id such as ``"user/replies"``, of which all splits are read: the ``split`` column
            decides, else the Hub's own where there are several. What exists here is never looked for on the Hub.
        catalogue: prices, as a YAML file or loaded. ``None`` reads ``catalogue.yaml`` beside the file, or in
            the folder.
        max_bad_share, drop_incomplete, quarantine_path: see ``ReplyTable``.

    Raises:
        FileNotFoundError: no such file, or nothing on the Hub.
        ValueError: bad rows or a missing catalogue; see ``ReplyTable``.
    """
    path = Path(source).expanduser()
    local = names_a_file(source)
    if local and not path.exists():
        raise FileNotFoundError(f"{source}: no such table")
    if isinstance(catalogue, Mapping):
        prices = catalogue
    else:
        own = path / "catalogue.yaml"  # in a folder of files
        beside = own if own.is_file() else path.with_name("catalogue.yaml")
        if catalogue is None and not (local and beside.is_file()):
            raise ValueError(f"{source}: no prices; pass catalogue=... or put a catalogue.yaml beside the table")
        prices = load_catalogue(beside if catalogue is None else catalogue)
    return ReplyTable(
        read_rows(path) if local else _hub_rows(str(source)),
        prices,
        source=str(source),
        max_bad_share=max_bad_share,
        drop_incomplete=drop_incomplete,
        quarantine_path=quarantine_path,
    )


def quickstart_table() -> ReplyTable:
    """The recorded pool that ships with the package (see ``routers/quickstart/README.md``)."""
    with resources.as_file(resources.files("routers.quickstart") / "data" / "quickstart_pool.parquet") as path:
        return load_table(path)


def replies_of(
    table: str, catalogue: str | None, *, max_bad_share: float, drop_incomplete: bool, folder: Path
) -> ReplyTable:
    """Recorded replies: `quickstart`, or a table of the user's own, whose bad rows are written into `folder`."""
    if table == "quickstart":
        return quickstart_table()
    return load_table(
        table,
        catalogue,
        max_bad_share=max_bad_share,
        drop_incomplete=drop_incomplete,
        quarantine_path=folder / "quarantine_table.jsonl",
    )


def check_split(table: ReplyTable, split: str = "heldout") -> None:
    """ValueError for a split without queries."""
    if not table.queries(split):
        raise ValueError(f"the table has no query in the split {split!r}; its splits are chosen by its 'split' column")


def spread(count: int, limit: int | None) -> np.ndarray:
    """`limit` indices spread evenly over `count` rows, so that a part of a table holds every family; None: all."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    return np.unique(np.linspace(0, count - 1, min(limit or count, count)).astype(int))


def _warn_of_splits(rows: Iterable[Row], source: str) -> None:
    """Say it where parts of several names are put together: they are evaluated on as one."""
    names = Counter(str(row.value.get("split")).strip().lower() for row in rows if isinstance(row.value, Mapping))
    if len(merged := sorted(names.keys() & HELDOUT_SPLITS)) > 1:
        logger.warning("%s: the splits %s are held out together, as one", source, " and ".join(merged))


def _hub_rows(name: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        parts = load_dataset(name)
    except Exception as error:  # the Hub's libraries have no common class for what is not there or out of reach
        first = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{name}: is no file here, and cannot be read from the Hub ({type(error).__name__}: {first})"
        ) from None
    return [{**({"split": part} if len(parts) > 1 else {}), **row} for part, rows in parts.items() for row in rows]
