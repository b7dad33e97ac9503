"""What a table of recorded replies costs to load: seconds and peak memory of a process, the first time and the next.

    python scripts/benchmark_table.py --queries 100000 --members 50

makes a parquet file of queries x members rows (all columns; texts of ~100 and replies of ~40 characters) and loads it
in processes of their own: the first checks every row and stores the columns, the next map them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from routers.data.catalogue import Member
from routers.data.table import load_table


def catalogue(members: int) -> dict[str, Member]:
    return {f"model-{j}": Member(f"model-{j}", "made", 0.1 * (j + 1), 0.3 * (j + 1)) for j in range(members)}


def make(path: Path, queries: int, members: int, seed: int = 0) -> None:
    """A table whose rows stand query by query, written a thousand queries at a time."""
    rng, names, writer = np.random.default_rng(seed), list(catalogue(members)), None
    words = np.array([f"w{i:04x}" for i in range(5000)])
    for start in range(0, queries, 1000):
        ids = np.arange(start, min(start + 1000, queries))
        texts = [f"{' '.join(words[rng.integers(0, 5000, 15)])} number {i}?" for i in ids]
        rows = np.repeat(np.arange(len(ids)), members)
        part = pa.table(
            {
                "query_id": [f"q{ids[i]}" for i in rows],
                "query": [texts[i] for i in rows],
                "family": [f"family-{ids[i] % 14}" for i in rows],
                "gold": [[f"answer {ids[i]}"] for i in rows],
                "member": names * len(ids),
                "reply": [f"the answer of this member is number {n}" for n in rng.integers(0, 10**6, len(rows))],
                "prompt_tokens": rng.integers(20, 400, len(rows)),
                "completion_tokens": rng.integers(1, 600, len(rows)),
                "correct": (rng.random(len(rows)) < 0.6).astype(float),
                "cost": rng.random(len(rows)) / 1000,
            }
        )
        writer = writer or pq.ParquetWriter(path, part.schema)
        writer.write_table(part)
    if writer is not None:
        writer.close()


def load(path: Path, members: int) -> dict[str, float]:
    """Seconds to load a table, to look replies up and to read its matrices; the peak memory of this process, GB."""
    start = time.perf_counter()
    table = load_table(path, catalogue(members))
    loaded = time.perf_counter()
    ids = [query["query_id"] for query in table.queries()]
    for i in range(10_000):
        table.lookup(ids[i * 7919 % len(ids)], table.members[i % members])
    looked = time.perf_counter()
    table.correct_matrix("train"), table.cost_matrix("heldout"), table.max_cost
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": loaded - start,
        "peak_gb": peak,
        "microseconds_a_lookup": (looked - loaded) * 100,
        "seconds_of_matrices": done - looked,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=100_000)
    parser.add_argument("--members", type=int, default=50)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)  # of the processes that this one starts
    args = parser.parse_args()
    if args.table:
        print(json.dumps(load(args.table, args.members)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.parquet"
        make(path, args.queries, args.members)
        print(
            f"{args.queries} x {args.members} = {args.queries * args.members} rows, {path.stat().st_size / 1e6:.0f} MB"
        )
        command = [sys.executable, __file__, "--table", str(path), "--members", str(args.members)]
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        for name in ("first load", "next load"):
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            print(f"{name}: " + ", ".join(f"{k} {v:.3g}" for k, v in json.loads(done.stdout).items()))


if __name__ == "__main__":
    main()
