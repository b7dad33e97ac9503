"""Run every member on every query and write the table of replies that the quickstart trains on.

    python -m routers.quickstart.record --output routers/quickstart/data/quickstart_pool.parquet
    python -m routers.quickstart.record --check routers/quickstart/data/quickstart_pool.parquet --rows 8
    python -m routers.quickstart.record --report routers/quickstart/data/quickstart_pool.parquet

Needs the extra ``quickstart``. Batches are fixed (a family's queries in order, 32 at a time), so a rerun sees the same
numbers. Every finished batch is appended to ``<output>.partial.jsonl``; a second start goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from routers.data.table import ReplyTable, load_table, split_of
from routers.quickstart.members import MEMBERS
from routers.quickstart.members.lm import load
from routers.quickstart.queries import FAMILIES, Query, build_queries, grade
from srpo.ranges import at_least, ranged

BATCH = 32
Job = tuple[str, list[Query]]


def jobs() -> Iterator[Job]:
    """(member, batch of queries), family by family, so that an interrupted recording covers whole families."""
    queries = build_queries()
    for family in FAMILIES:
        mine = [query for query in queries if query.family == family]
        for member in MEMBERS:
            for start in range(0, len(mine), BATCH):
                yield member, mine[start : start + BATCH]


def run(job: Job) -> list[dict[str, Any]]:
    """Rows of one batch. ``seconds`` is the batch's wall time shared out by completion tokens."""
    member, batch = job
    start = time.perf_counter()
    replies = MEMBERS[member](load(), [query.text for query in batch])
    seconds = time.perf_counter() - start
    total = sum(reply.completion_tokens for reply in replies)
    return [
        {
            "query_id": query.query_id,
            "query": query.text,
            "family": query.family,
            "split": split_of(query.text),
            "gold": list(query.gold),
            "member": member,
            "reply": reply.reply,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "seconds": round(seconds * reply.completion_tokens / total, 4),
            "correct": grade(query.text, reply.reply, query.gold),
        }
        for query, reply in zip(batch, replies, strict=True)
    ]


def record(output: Path) -> None:
    """Record everything into ``output`` (parquet), going on from an earlier partial recording."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = output.with_suffix(".partial.jsonl")
    rows = [json.loads(line) for line in partial.read_text().splitlines()] if partial.exists() else []
    done = {(row["query_id"], row["member"]) for row in rows}
    todo = [job for job in jobs() if (job[1][0].query_id, job[0]) not in done]
    load()
    began = time.perf_counter()
    with partial.open("a", encoding="utf-8") as file:
        for number, job in enumerate(todo, start=1):
            new = run(job)
            rows += new
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
            file.flush()
            left = (time.perf_counter() - began) / number * (len(todo) - number)
            right = sum(row["correct"] for row in new) / len(new)
            print(
                f"{number}/{len(todo)} {job[1][0].family} {job[0]}: {right:.2f} right, {left / 60:.1f} min left",
                flush=True,
            )
    pq.write_table(pa.Table.from_pylist(rows), output, compression="zstd")
    partial.unlink()
    print(f"wrote {len(rows)} rows to {output}, {output.stat().st_size / 1e6:.2f} MB")


def check(table: ReplyTable, rows: int) -> int:
    """Rerun whole batches, spread over the members, that hold at least ``rows`` rows; returns how many differ."""
    todo = list(jobs())
    wanted = -(-rows // BATCH)
    step = max(1, len(todo) // wanted)
    different = compared = 0
    for job in todo[::step][:wanted]:
        for new in run(job):
            old = table.lookup(new["query_id"], new["member"])
            compared += 1
            fields = ("reply", "prompt_tokens", "completion_tokens", "correct")
            for field in fields:
                if new[field] != getattr(old, field):
                    print(f"{new['query_id']} {new['member']} {field}: {getattr(old, field)!r} became {new[field]!r}")
            different += any(new[field] != getattr(old, field) for field in fields)
    print(f"{compared - different} of {compared} rows are the same")
    return different


def report(table: ReplyTable) -> None:
    """Print accuracy per member and family, and the mean cost in USD per 1,000 queries, over all queries."""
    families = [query["family"] for query in table.queries()]
    correct, cost = table.correct_matrix(), table.cost_matrix()
    names = list(dict.fromkeys(families))
    print("| member | USD / 1,000 | all | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 3) + "|")
    columns = {name: (correct[:, i], cost[:, i]) for i, name in enumerate(table.members)}
    cheapest_right = (cost + 1e9 * (correct < correct.max(axis=1, keepdims=True))).min(axis=1)
    columns["random"] = (correct.mean(axis=1), cost.mean(axis=1))
    columns["oracle"] = (correct.max(axis=1), cheapest_right)
    for name, (right, dollars) in columns.items():
        parts = [f"{right[[f == family for f in families]].mean():.2f}" for family in names]
        print(f"| {name} | {1000 * dollars.mean():.4f} | {right.mean():.3f} | " + " | ".join(parts) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--output", type=Path, help="record everything into this parquet file")
    action.add_argument("--check", type=Path, help="rerun a few rows and compare them with this table")
    action.add_argument("--report", type=Path, help="print the accuracy and cost table of this file")
    count = ranged(at_least(1), whole=True)
    parser.add_argument("--rows", type=count, default=8, help="for --check: at least so many rows (whole batches run)")
    arguments = parser.parse_args()
    if arguments.output:
        record(arguments.output)
    elif arguments.report:
        report(load_table(arguments.report))
    else:
        return int(check(load_table(arguments.check), arguments.rows) > 0)
    return 0


if __name__ == "__main__":
    from srpo.cli import run

    run(main)
