"""`srpo record`: ask every member of a catalogue every query once, grade the replies, and write the reply table.

    srpo record --catalogue pool.yaml --queries queries.jsonl --grade em --max_cost_usd 5

`pool.yaml` names OpenAI-compatible endpoints (`routers.data.catalogue`; a vLLM server is one). A query is a row with
`query` (or `question`), `gold` (or `golden_answers`: a list, or one) unless `--grade none`, and, where there are any,
`query_id`, `family` and `split`. Members are told the query and their `system` prompt, and nothing else: where answers
are compared as texts, let `system` ask for the answer alone.

Replies are kept in OUTPUT.replies/ as they come. The same command goes on from there: it pays for what is missing, and
grades what is there by another `--grade` for nothing. Money is set aside before every attempt and settled after it, as
in training; the cap holds over all starts. Delete the folder when the table is good.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from routers.data import cells
from routers.data.catalogue import cost, load_catalogue
from routers.data.files import BadRow, read_rows
from routers.data.questions import question_of, read_cell, without_duplicates
from routers.data.table import split_of
from routers.evaluation.answers import GRADES, gold_problem, score
from routers.pool import Ledger, Pool, ReplyCache, kind, live_pool
from routers.pool.protocol import CIRCUIT_OPEN, NO_QUOTA, OVER_BUDGET
from srpo.cli import Parser
from srpo.quarantine import MAX_BAD_SHARE, Quarantine
from srpo.ranges import above, between, ranged
from srpo.types import Reply

DEADLINE = 3600.0
"""Seconds of one call. Attempts end by the member's own timeout; this bounds what they wait for its limits."""
SECONDS_PER_LINE = 10.0
SECONDS_OF_REST = 30.0
"""Before a member whose circuit breaker is open is asked again; the third time, it is left alone in this start."""
CHARS_PER_TOKEN = 4
SPENDING = "spending.json"
_OPTIONAL = (("query_id", cells.name), ("family", cells.name), ("split", cells.split))


def say(text: str) -> None:
    print(f"[record] {text}", flush=True)


def load_queries(path: Path, grade: str, max_bad_share: float = MAX_BAD_SHARE) -> list[dict[str, Any]]:
    """Rows `{query_id, query, family, split, gold}`; a text that stands twice is kept once.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no rows or too many bad ones; names file, row and field.
    """
    raw = read_rows(path)
    if not raw:
        raise ValueError(f"{path}: there are no rows")
    bad = Quarantine(f"rows of {path}", max_share=max_bad_share, label=f"{path.name}: ")
    rows: dict[str, dict[str, Any]] = {}
    for number, entry in raw:
        try:
            row = question_of(entry, needs_answers=grade != "none")
            row = {"query_id": f"{path.stem}-{number}", "family": "", "split": split_of(row["query"]), **row}
            row |= {
                name: read_cell(entry, name, read) for name, read in _OPTIONAL if not cells.missing(entry.get(name))
            }
            if row["query_id"] in rows:
                raise ValueError(f"query_id {row['query_id']!r} stands twice; give every query its own")
            if grade != "none" and (problem := gold_problem(row["gold"], grade)):  # type: ignore[arg-type]
                raise ValueError(problem)
            rows[row["query_id"]] = row
        except ValueError as error:
            bad.add(number, entry.reason if isinstance(entry, BadRow) else "not a query", str(error), entry)
    bad.settle(len(raw))
    once = without_duplicates(rows.values())
    if len(once) < len(rows):
        say(f"{len(rows) - len(once)} queries repeat the text of another one and are left out")
    return once


class Recording:
    """One start of the recorder.

    Args:
        pool: with a ledger that has the cap, and the cache.
        cache: keeps the replies, and what was spent.
        queries: of `load_queries`.
    """

    def __init__(self, pool: Pool, cache: ReplyCache, queries: list[dict[str, Any]]) -> None:
        self.pool, self.queries = pool, queries
        self._spending = cache.folder / SPENDING
        found = {(q["query_id"], name): pool.kept(name, q["query"]) for q in queries for name in pool.members}
        self.replies: dict[tuple[str, str], Reply] = {pair: reply for pair, reply in found.items() if reply}
        self.missing = {name: [q for q in queries if found[q["query_id"], name] is None] for name in pool.members}
        self.failed: dict[str, Counter[str]] = {}
        """Member -> kinds of failure."""
        self.last: dict[str, str] = {}
        """Member -> its last error."""
        self.left_alone: Counter[str] = Counter()
        """Member -> calls that were not made, because it does not work or the money is spent."""
        self.broke = False
        self._finished = 0
        if self._spending.exists():  # failed attempts cost money too
            pool.ledger.load_state_dict(json.loads(self._spending.read_text(encoding="utf-8")))
        kept = sum(pool.price(name, reply.usage) for (_, name), reply in self.replies.items())
        pool.ledger.account.restart(max(kept, pool.ledger.spent_usd))

    @property
    def calls(self) -> int:
        """That are missing at the start."""
        return sum(map(len, self.missing.values()))

    def estimate(self) -> float:
        """Say what the missing calls may take; returns their upper bound in USD, if none has to be repeated."""
        total = 0.0
        for name, queries in self.missing.items():
            bound = sum(self.pool.bound(name, query["query"]) for query in queries)
            tokens = sum(len(query["query"]) for query in queries) // CHARS_PER_TOKEN
            answers = len(queries) * self.pool.members[name].max_tokens
            say(f"  {name}: {len(queries)} calls, about {tokens:,} + at most {answers:,} tokens, at most ${bound:.4f}")
            total += bound
        return total

    async def ask(self) -> None:
        """Make the missing calls, as many at once as each member allows."""
        began = time.monotonic()
        lines = asyncio.create_task(self._lines(began))
        try:
            async with self.pool, asyncio.TaskGroup() as group:
                for name, queries in self.missing.items():
                    left = iter(queries)
                    for _ in range(min(self.pool.members[name].concurrency, len(queries))):
                        group.create_task(self._work(name, left))
        finally:
            lines.cancel()
            self._keep_spending()
            self._line(began, "\n")

    async def _work(self, name: str, left: Iterator[dict[str, Any]]) -> None:
        for query in left:
            if self.broke or name in self.left_alone:
                self.left_alone[name] += 1
            else:
                await self._one(name, query)
            self._finished += 1

    async def _one(self, name: str, query: dict[str, Any]) -> None:
        rests = 0
        while True:
            reply = await self.pool.ask(name, query["query"], DEADLINE, query_id=query["query_id"])
            if kind(reply) == OVER_BUDGET and self.pool.ledger.account.reserved:  # calls under way will give some back
                await asyncio.sleep(0.1)
            elif kind(reply) == CIRCUIT_OPEN and rests < 2:
                rests += 1
                await asyncio.sleep(SECONDS_OF_REST)
            else:
                break
        if reply.error is None:
            self.replies[query["query_id"], name] = reply
            return
        failure = str(kind(reply))
        self.last[name] = reply.error
        if failure == OVER_BUDGET:
            self.broke = True
            self.left_alone[name] += 1
            return
        self.failed.setdefault(name, Counter())[failure] += 1
        if failure in (CIRCUIT_OPEN, NO_QUOTA):
            self.left_alone[name] += 0  # it is named there from now on

    async def _lines(self, began: float) -> None:
        terminal = sys.stdout.isatty()
        while True:
            await asyncio.sleep(1.0 if terminal else SECONDS_PER_LINE)
            self._keep_spending()
            self._line(began, "\r" if terminal else "\n")

    def _line(self, began: float, end: str) -> None:
        failed = sum(kinds.total() for kinds in self.failed.values())
        rate = self._finished / max(time.monotonic() - began, 1e-6)
        left = (self.calls - self._finished) / rate if self._finished else float("nan")
        spent = f"${self.pool.ledger.spent_usd:.4f}"
        line = f"{self._finished}/{self.calls} calls, {failed} failed, {spent}, {rate:.1f} calls/s, {left:.0f} s left"
        print(f"[record] {line}   ", end=end, flush=True)

    def _keep_spending(self) -> None:
        draft = self._spending.with_suffix(".part")
        draft.write_text(json.dumps(self.pool.ledger.state_dict()), encoding="utf-8")
        os.replace(draft, self._spending)

    def rows(self, grade: str) -> list[dict[str, Any]]:
        """The table's rows, query by query; `correct` is null where nothing grades."""
        rows = []
        for query in self.queries:
            for name in self.pool.members:
                if (reply := self.replies.get((query["query_id"], name))) is not None:
                    right = None if grade == "none" else score(reply.text, query["gold"], grade)  # type: ignore[arg-type]
                    used = {"prompt_tokens": reply.usage.prompt_tokens,
                            "completion_tokens": reply.usage.completion_tokens}  # fmt: skip
                    answer = {"member": name, "reply": reply.text, "correct": right, "seconds": reply.seconds}
                    rows.append({**query, **answer, **used, "cost": self.pool.price(name, reply.usage)})
        plain = (cost(self.pool.members[r["member"]], r["prompt_tokens"], r["completion_tokens"]) for r in rows)
        if all(abs(usd - row["cost"]) < 1e-12 for usd, row in zip(plain, rows, strict=True)):
            for row in rows:  # tokens say it, and then a catalogue with other prices can be tried on the table
                del row["cost"]
        return rows


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """As parquet, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    draft = path.with_name(f"{path.name}.part")
    pq.write_table(pa.Table.from_pylist(rows), draft, compression="zstd")
    os.replace(draft, path)


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when every pair has a reply, 1 when some are missing, 130 when it was stopped by Ctrl-C."""
    given = _parser().parse_args(argv)
    folder = given.output.with_name(f"{given.output.stem}.replies")
    if given.output.exists() and not folder.exists():
        raise ValueError(f"{given.output} is there, and was not recorded here ({folder} is missing); name another one")
    if given.output.suffix != ".parquet":
        raise ValueError(f"--output {given.output}: write the name of a .parquet file")
    catalogue = load_catalogue(given.catalogue)
    queries = load_queries(given.queries, given.grade, given.max_bad_share)
    ledger, cache = Ledger(given.max_cost_usd), ReplyCache(folder)
    recording = Recording(live_pool(catalogue, ledger=ledger, cache=cache, agent_prompt="{query}"), cache, queries)
    calls = len(queries) * len(catalogue)
    say(f"{len(queries)} queries x {len(catalogue)} members = {calls} calls; {len(recording.replies)} are there")
    if recording.calls:
        bound = recording.estimate()
        say(f"at most ${bound:.4f} for these; spent before: ${ledger.spent_usd:.4f}; the cap: ${given.max_cost_usd:g}")
        try:
            asyncio.run(recording.ask())
        except KeyboardInterrupt:
            say(f"stopped; what came is kept in {folder}, and the same command goes on")
            return 130
    rows = recording.rows(given.grade)
    _say_what_failed(recording, given.max_cost_usd)
    if not rows:
        say("nothing was answered: no table is written")
        return 1
    write(rows, given.output)
    return _say_what_next(given, rows, calls, recording)


def _say_what_failed(recording: Recording, cap: float) -> None:
    for name, kinds in recording.failed.items():
        counted = ", ".join(f"{count} {failure}" for failure, count in kinds.most_common())
        say(f"{name}: {kinds.total()} calls failed ({counted}); the last: {recording.last[name]}")
    if recording.broke:
        say(f"the cap of ${cap:g} leaves no room for {recording.left_alone.total()} calls: raise --max_cost_usd")
    elif left := recording.left_alone.total():
        say(f"{left} calls were not made, for their members failed: {', '.join(recording.left_alone)}")


def _say_what_next(given: argparse.Namespace, rows: list[dict[str, Any]], calls: int, recording: Recording) -> int:
    spent = f"${recording.pool.ledger.spent_usd:.4f}"
    say(f"wrote {len(rows)} of {calls} replies to {given.output} ({spent} in all)")
    for name in recording.pool.members:
        if given.grade != "none" and (mine := [row["correct"] for row in rows if row["member"] == name]):
            say(f"  {name}: {sum(mine) / len(mine):.3f} by {given.grade}, {len(mine)} replies")
    train = f"srpo train quickstart/own_pool --table {given.output} --catalogue {given.catalogue}"
    if given.grade == "none":
        say(f"fill the column 'correct' (0 to 1), then: {train}")
    elif len(rows) == calls:
        say(f"next: {train}")
    else:
        say(f"the same command asks for the {calls - len(rows)} that are missing; or train on the queries that every "
            f"member has answered: {train} --drop_incomplete true")  # fmt: skip
    return int(len(rows) < calls)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("srpo record", description=__doc__, formatter_class=_Raw)
    parser.add_argument("--catalogue", required=True, type=Path, help="YAML: members, prices, endpoints")
    parser.add_argument("--queries", required=True, type=Path, help="jsonl, json, csv, tsv or parquet: query, gold")
    parser.add_argument("--grade", default="em", choices=(*GRADES, "none"), help="how a reply is graded (em)")
    parser.add_argument("--output", type=Path, default=Path("table.parquet"), help="the table (table.parquet)")
    share, usd = ranged(between(0, 1)), ranged(above(0))
    parser.add_argument("--max_bad_share", type=share, default=MAX_BAD_SHARE, help="of the queries, left out (.05)")
    parser.add_argument("--max_cost_usd", type=usd, default=5.0, help="USD that all starts may spend together (5)")
    return parser


_Raw: Any = argparse.RawDescriptionHelpFormatter
