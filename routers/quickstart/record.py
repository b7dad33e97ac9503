"""Run every member on every query of the shipped pool again: to write its table anew, or to compare some rows.

    python -m routers.quickstart.record --output pool.parquet
    python -m routers.quickstart.record --check --rows 8

Needs the extra ``quickstart``. The queries are those of the shipped table. Batches are fixed (a family's queries in
order, 32 at a time), so a rerun sees the same numbers. Every finished batch is appended to
``OUTPUT.partial.jsonl``; a second start goes on from there. Your own members are recorded by ``srpo record``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from routers.data.table import ReplyTable, quickstart_table
from routers.pool.record import write
from routers.quickstart.grade import grade
from routers.quickstart.members import MEMBERS
from routers.quickstart.members.lm import load
from srpo.cli import run as run_script
from srpo.ranges import at_least, ranged

BATCH = 32
Job = tuple[str, list[dict[str, Any]]]


def jobs(table: ReplyTable) -> Iterator[Job]:
    """(member, batch of queries), family by family, so that an interrupted recording covers whole families."""
    for _, family in groupby(table.queries(), key=lambda query: query["family"]):
        mine = list(family)
        for member in MEMBERS:
            for start in range(0, len(mine), BATCH):
                yield member, mine[start : start + BATCH]


def run(table: ReplyTable, job: Job) -> list[dict[str, Any]]:
    """Rows of one batch. ``seconds`` is the batch's wall time shared out by completion tokens."""
    member, batch = job
    start = time.perf_counter()
    replies = MEMBERS[member](load(), [query["query"] for query in batch])
    seconds = time.perf_counter() - start
    total = sum(reply.completion_tokens for reply in replies)
    rows = []
    for query, reply in zip(batch, replies, strict=True):
        gold = table.gold(query["query_id"])
        answer = {"member": member, "reply": reply.reply, "prompt_tokens": reply.prompt_tokens}
        answer |= {"completion_tokens": reply.completion_tokens}
        answer |= {"seconds": round(seconds * reply.completion_tokens / total, 4)}
        rows.append({**query, "gold": list(gold), **answer, "correct": grade(query["query"], reply.reply, gold)})
    return rows


def record(output: Path) -> None:
    """Record everything into ``output`` (parquet), going on from an earlier partial recording."""
    table, partial = quickstart_table(), output.with_suffix(".partial.jsonl")
    rows = [json.loads(line) for line in partial.read_text().splitlines()] if partial.exists() else []
    done = {(row["query_id"], row["member"]) for row in rows}
    todo = [job for job in jobs(table) if (job[1][0]["query_id"], job[0]) not in done]
    with partial.open("a", encoding="utf-8") as file:
        for number, job in enumerate(todo, start=1):
            new = run(table, job)
            rows += new
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
            file.flush()
            right = sum(row["correct"] for row in new) / len(new)
            print(f"{number}/{len(todo)} {job[1][0]['family']} {job[0]}: {right:.2f} right", flush=True)
    write(rows, output)
    partial.unlink()
    print(f"wrote {len(rows)} rows to {output}")


def check(rows: int) -> int:
    """Rerun whole batches, spread over the members, that hold at least ``rows`` rows; returns how many differ."""
    table = quickstart_table()
    todo, wanted = list(jobs(table)), -(-rows // BATCH)
    different = compared = 0
    for job in todo[:: max(1, len(todo) // wanted)][:wanted]:
        for new in run(table, job):
            old = table.lookup(new["query_id"], new["member"])
            changed = {
                field: (getattr(old, field), new[field])
                for field in ("reply", "prompt_tokens", "completion_tokens", "correct")
                if new[field] != getattr(old, field)
            }
            compared += 1
            different += bool(changed)
            if changed:
                print(f"{new['query_id']} {new['member']}: {changed}")
    print(f"{compared - different} of {compared} rows are the same")
    return different


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--output", type=Path, help="record everything into this parquet file")
    action.add_argument("--check", action="store_true", help="rerun some rows of the shipped table and compare")
    count = ranged(at_least(1), whole=True)
    parser.add_argument("--rows", type=count, default=8, help="for --check: at least so many rows (whole batches run)")
    arguments = parser.parse_args(argv)
    if arguments.check:
        return int(check(arguments.rows) > 0)
    record(arguments.output)
    return 0


if __name__ == "__main__":
    run_script(main)
