"""A table of recorded replies: what each pool member answered to each query, and what it cost.

One row per (query, member). Required columns: ``query_id, query, member, correct``, and ``prompt_tokens`` and
``completion_tokens`` unless every reply has a cost or a price per call. Optional: ``reply`` (a table without it trains
a router, but nothing that reads replies), ``family`` (default ""), ``split`` ("train" or "heldout"; test, validation,
val, dev and eval are held out; default: ``split_of``), ``gold`` (accepted answers: a list or one; default empty),
``seconds`` (default 0.0), ``cost`` (USD of the reply as its source states it, as RouterBench publishes; without it the
catalogue's prices count). A table without a column ``member`` may be wide: one row per query, one column per member
(``routers.data.wide``). Values may be written as files of any format hold them (``routers.data.cells``).

A table with a column ``propensity`` is a *log*: each query has one row, of the member that was asked, and the
probability (above 0, at most 1) with which whoever decided chose it; one text may be asked often. What the others had
made of it is not known: `ReplyTable.matrix` refuses, and `routers.evaluation.off_policy` estimates.

Any other table that loads is complete and consistent: every query has exactly one reply of every member, and no query
text stands twice. Bad rows are left out with their reasons, and their queries with them; too many are an error. Of
queries with one text (``normalise_query``) in one split the first complete one stays; a warning names the others.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from routers.data.catalogue import Member, load_catalogue
from routers.data.columns import SPLITS, Columns, check
from routers.data.converters import refuse_training
from routers.data.files import Row, chunks_of, names_a_file
from routers.data.stored import columns_of
from routers.data.table_rows import incomplete_message
from routers.data.table_rows import normalise_query as normalise_query  # the public names
from routers.data.table_rows import split_of as split_of
from srpo.quarantine import MAX_BAD_SHARE, BadRows, Quarantine

logger = logging.getLogger(__name__)

_SHOWN = 3


@dataclass(frozen=True)
class Recorded:
    """One recorded reply. ``seconds`` is wall time, ``correct`` lies in [0, 1], ``cost`` is USD."""

    reply: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    correct: float
    cost: float


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
        log: whether it is a log of decisions.
        bad_rows: what was left out, as ``srpo.quarantine`` writes it.
        incomplete: ids of the queries that were left out, by bad rows or for want of a member.
        repeated: ids of those left out because an earlier query of their split has the same text, and its id.

    Raises:
        ValueError: names the source, the rows (from 1), the fields and what is wrong.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any] | Row] | Columns,
        catalogue: Mapping[str, Member],
        source: str = "rows",
        *,
        max_bad_share: float = MAX_BAD_SHARE,
        drop_incomplete: bool = False,
        quarantine_path: str | Path | None = None,
    ) -> None:
        columns = rows if isinstance(rows, Columns) else check(chunks_of(_numbered(rows)), catalogue, source)
        bad = Quarantine(f"rows of {source}", quarantine_path, max_bad_share, label=f"{Path(source).name}: ")
        for row in columns.bad:
            bad.add(*row)
        missing, repeated, count = columns.missing, columns.repeated, len(columns.queries)
        for query_id, names in missing.items():
            bad.note("incomplete query", f"query {query_id!r} has no reply of {names}")
        for query_id, other in repeated.items():
            bad.note("repeated query", f"query {query_id!r} has the text of {other!r}, which stays")
        unexplained = {query_id: missing[query_id] for query_id in columns.unexplained}
        refused = ""
        if len(unexplained) > columns.anonymous and not drop_incomplete:
            refused = incomplete_message(source, unexplained, count + len(repeated) + len(missing))
        for warning in columns.warnings:
            logger.warning("%s: %s", source, warning)
        try:
            bad.settle(columns.total)
        except BadRows as error:  # all that is wrong in one run
            raise BadRows(f"{error}. {refused}" if refused else str(error)) from None
        if refused:
            raise ValueError(refused)
        if not count:
            raise ValueError(f"{source}: no query has a reply of every member ({', '.join(columns.members)})")
        if missing:
            logger.warning(
                "%s: %d of %d queries are left out, because they lack a row of some member (%d of them had bad rows)",
                source, len(missing), len(missing) + count + len(repeated),
                len(missing) - max(0, len(unexplained) - columns.anonymous),
            )  # fmt: skip
        if repeated:
            logger.warning(
                "%s: left out, because an earlier query of their split has the same text: %d, such as %s", source,
                len(repeated), ", ".join(f"{i!r} (of {other!r})" for i, other in [*repeated.items()][:_SHOWN]),
            )  # fmt: skip
        self._columns = columns
        self.members: list[str] = columns.members
        self.catalogue: dict[str, Member] = {name: catalogue[name] for name in self.members}
        self.has_replies, self.log, self.source = columns.replies is not None, columns.log, source
        self._replies = None if columns.replies is None else columns.replies["reply"]
        self.bad_rows, self.incomplete, self.repeated = bad.entries, list(missing), repeated
        self._queries = columns.queries.select(["query_id", "query", "family", "split"]).to_pylist()
        self._row = {query["query_id"]: i for i, query in enumerate(self._queries)}
        self._column = {name: j for j, name in enumerate(self.members)}

    def __len__(self) -> int:
        """Number of queries."""
        return len(self._queries)

    def queries(self, split: str | None = None) -> list[dict[str, Any]]:
        """Queries of a split (``None``: all) in table order: dicts of query_id, query, family, split.

        Raises:
            ValueError: unknown split.
        """
        return [dict(self._queries[i]) for i in self._rows(split)]

    def _rows(self, split: str | None) -> np.ndarray:
        if split is not None and split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; use one of {SPLITS} or None")
        chosen = [split in (None, query["split"]) for query in self._queries]
        return np.flatnonzero(chosen)

    def gold(self, query_id: str) -> tuple[str, ...]:
        """Accepted answers of a query (empty when the table has none). KeyError for an unknown query."""
        return tuple(self._columns.queries["gold"][self._row[query_id]].as_py())

    def lookup(self, query_id: str, member: str) -> Recorded:
        """The reply recorded for this pair.

        Raises:
            KeyError: unknown query or member.
        """
        try:
            at = (self._row[query_id], self._column[member])
        except KeyError:
            raise KeyError(f"no reply of member {member!r} to query {query_id!r}; members: {self.members}") from None
        found = self._columns
        if np.isnan(found.correct[at]):
            raise KeyError(f"{member!r} was not asked {query_id!r} in this log")
        return Recorded(
            "" if self._replies is None else self._replies[int(found.reply_row[at])].as_py(),
            int(found.prompt_tokens[at]),
            int(found.completion_tokens[at]),
            float(found.seconds[at]),
            float(found.correct[at]),
            float(found.cost[at]),
        )

    def matrix(self, field: str, split: str | None = None) -> np.ndarray:
        """A field of `Recorded` that is a number, ``[queries, members]``; rows as ``queries(split)``, columns as
        ``members``; float64, tokens int32.

        Raises:
            ValueError: it is a log.
        """
        if self.log:
            raise ValueError(
                f"{self.source}: has a column propensity, so it is a log of decisions, of which the outcome of the "
                "member that was asked alone is known; here those of all members are needed. A log can train and "
                "evaluate an encoder (srpo train quickstart/encoder --table LOG)"
            )
        return self._matrix(field, split)

    def _matrix(self, field: str, split: str | None) -> np.ndarray:
        found: np.ndarray = getattr(self._columns, field)[self._rows(split)]
        return found

    def asked(self, split: str | None = None) -> np.ndarray:
        """Of a log: columns of the members that were asked, ``[queries]``."""
        return np.asarray((~np.isnan(self._matrix("correct", split))).argmax(axis=1))

    def told(self, field: str, split: str | None = None) -> np.ndarray:
        """Of a log: a field of `Recorded` that is a number, or ``propensity``, of who was asked, ``[queries]``."""
        found = self._matrix(field, split)
        return np.asarray(found[np.arange(len(found)), self.asked(split)])

    def means(self, field: str, split: str | None = None) -> np.ndarray:
        """A field's mean over the queries, ``[members]``. Of a log it is estimated by the rows weighted by 1 /
        propensity (self-normalised); 0 for a member that was never asked there."""
        if not self.log:
            return np.asarray(self.matrix(field, split).mean(axis=0))
        weight = np.nan_to_num(1 / self._matrix("propensity", split))
        total = (weight * np.nan_to_num(self._matrix(field, split))).sum(axis=0)
        return np.asarray(total / np.maximum(weight.sum(axis=0), 1e-300))

    def correct_matrix(self, split: str | None = None) -> np.ndarray:
        """Correctness, float64 ``[queries, members]``; as `matrix`."""
        return self.matrix("correct", split)

    def cost_matrix(self, split: str | None = None) -> np.ndarray:
        """Cost in USD, float64 ``[queries, members]``; as `matrix`."""
        return self.matrix("cost", split)

    @cached_property
    def max_cost(self) -> float:
        """Scale of the cost in rewards, USD: the mean cost of the dearest member on the train split.

        A mean and not a maximum, so that one long reply does not shrink every penalty: a normalised cost can exceed 1.
        It is fixed by the table (no running state). A table without train rows uses all rows, and a table in which
        every reply is free gives 1.0, so that dividing by it is always safe.
        """
        dearest = float(self.means("cost", "train" if self.queries("train") else None).max())
        return dearest if dearest > 0 else 1.0


def load_table(
    source: str | Path | Sequence[str | Path],
    catalogue: str | Path | Mapping[str, Member] | None = None,
    *,
    max_bad_share: float = MAX_BAD_SHARE,
    drop_incomplete: bool = False,
    quarantine_path: str | Path | None = None,
) -> ReplyTable:
    """Read a file or a dataset of the Hugging Face Hub as a ``ReplyTable``.

    Args:
        source: a ``.parquet``, ``.jsonl``, ``.json``, ``.csv`` or ``.tsv`` file (packed or not;
            ``routers.data.files``), a folder of them, several of these as one table, or a Hub id such as
            ``"user/replies"``, of which all splits are read: the ``split`` column decides, else the Hub's own where
            there are several. What exists here is never looked for on the Hub.
        catalogue: prices, as a YAML file or loaded. ``None`` reads ``catalogue.yaml`` beside the (first) file, or in
            the folder.
        max_bad_share, drop_incomplete, quarantine_path: see ``ReplyTable``.

    Raises:
        FileNotFoundError: no such file, or nothing on the Hub.
        ValueError: bad rows or a missing catalogue; see ``ReplyTable``.
    """
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    if not sources:
        raise ValueError("give the files of the table")
    paths, name = [Path(each).expanduser() for each in sources], ", ".join(map(str, sources))
    local = names_a_file(sources[0]) or len(sources) > 1
    if missing := [each for each, path in zip(sources, paths, strict=True) if local and not path.exists()]:
        raise FileNotFoundError(f"{missing[0]}: no such table")
    if isinstance(catalogue, Mapping):
        prices = catalogue
    else:
        own = paths[0] / "catalogue.yaml"  # in a folder of files
        beside = own if own.is_file() else paths[0].with_name("catalogue.yaml")
        if catalogue is None and not (local and beside.is_file()):
            raise ValueError(f"{name}: no prices; pass catalogue=... or put a catalogue.yaml beside the table")
        prices = load_catalogue(beside if catalogue is None else catalogue)
    return ReplyTable(
        columns_of(paths, prices, name) if local else _hub_rows(name),
        prices,
        source=name,
        max_bad_share=max_bad_share,
        drop_incomplete=drop_incomplete,
        quarantine_path=quarantine_path,
    )


def quickstart_table(catalogue: str | Path | None = None) -> ReplyTable:
    """The recorded pool that ships with the package (see ``routers/quickstart/README.md``); at these prices, or at its
    own."""
    with resources.as_file(resources.files("routers.quickstart") / "data" / "quickstart_pool.parquet") as path:
        return load_table(path, catalogue)


def replies_of(
    table: str, catalogue: str | None, *, max_bad_share: float, drop_incomplete: bool, folder: Path
) -> ReplyTable:
    """Recorded replies: `quickstart`, or a table of the user's own.

    Args:
        table, catalogue, max_bad_share, drop_incomplete: as in `load_table`.
        folder: where its bad rows are written, and what its held-out queries share with the training
            (`routers.data.leaks`; by the main process).
    """
    if table == "quickstart":
        return quickstart_table(catalogue)
    refuse_training(table)
    found = load_table(
        table,
        catalogue,
        max_bad_share=max_bad_share,
        drop_incomplete=drop_incomplete,
        quarantine_path=folder / "quarantine_table.jsonl",
    )
    if os.environ.get("RANK", "0") == "0":
        from routers.data.leaks import leaks

        shared = leaks(found)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "leaks.json").write_text(json.dumps(asdict(shared), indent=1), encoding="utf-8")
        logger.log(logging.WARNING if shared.near else logging.INFO, "%s: %s", table, shared)
    return found


def check_split(table: ReplyTable, split: str = "heldout") -> None:
    """ValueError for a split without queries."""
    if not table.queries(split):
        raise ValueError(f"the table has no query in the split {split!r}; its splits are chosen by its 'split' column")


def spread(count: int, limit: int | None) -> np.ndarray:
    """`limit` indices spread evenly over `count` rows, so that a part of a table holds every family; None: all."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    return np.unique(np.linspace(0, count - 1, min(limit or count, count)).astype(int))


def _numbered(rows: Iterable[Any]) -> Iterator[Row]:
    return (row if isinstance(row, Row) else Row(n, row) for n, row in enumerate(rows, start=1))


def _hub_rows(name: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        parts = load_dataset(name)
    except Exception as error:  # the Hub's libraries have no common class for what is not there or out of reach
        first = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{name}: is no file here, and cannot be read from the Hub ({type(error).__name__}: {first})"
        ) from None
    return ({**({"split": part} if len(parts) > 1 else {}), **row} for part, rows in parts.items() for row in rows)
