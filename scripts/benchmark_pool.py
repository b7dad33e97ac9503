"""Throughput of the pool client beside the limit of a loopback server.

    python scripts/benchmark_pool.py --concurrency 16 64 256 512 --latency 0.2

The server (`tests/support/openai_server.py`) runs in its own process and takes a fixed time for every reply, as a
model does. Its limit is what a minimal client measures in the same run: raw sockets, one prepared request, no JSON, no
retries. With a latency the limit is close to concurrency / latency; at latency 0 it is how fast Python answers on
loopback, and the ratio then only says how much CPU time the client takes beside that. Clients take turns, and the
median of the rounds counts: machines are noisy. On a machine whose cores are taken by others the raw client, which
needs almost no CPU, keeps its rate and ours does not; the CPU time per call is then the number to read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from routers.data.catalogue import Member
from routers.pool import Pool, live_pool
from srpo.garbage import set_imports_aside
from srpo.ranges import at_least, ranged

SERVER = Path(__file__).resolve().parents[1] / "tests" / "support" / "openai_server.py"
QUERY = "Which country has the capital Lima? " * 8


async def raw_connection(url: str, count: int) -> None:
    parts = urlsplit(url)
    message = {"model": "m", "messages": [{"role": "user", "content": QUERY}], "max_tokens": 512}
    body = json.dumps(message).encode()
    head = (
        f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    for _ in range(count):
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(answer.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
    writer.close()
    await writer.wait_closed()


async def pool_connection(pool: Pool, count: int) -> None:
    for _ in range(count):
        reply = await pool.ask("m", QUERY, 60.0)
        if reply.error is not None:
            raise RuntimeError(reply.error)


async def measure(url: str, concurrency: int, each: int, rounds: int) -> tuple[float, float, float]:
    """Medians: calls per second of the raw client, of the pool, and the pool's CPU milliseconds per call; in each
    round ``each`` calls follow one another on every connection."""
    pool = live_pool({"m": Member("m", "x", 1.0, 1.0, base_url=url, concurrency=concurrency)})
    raw, ours, cpu = [], [], []
    async with pool:
        await asyncio.gather(*(pool_connection(pool, 2) for _ in range(concurrency)))  # opens the connections
        for _ in range(rounds):
            start = time.perf_counter()
            await asyncio.gather(*(raw_connection(url, each) for _ in range(concurrency)))
            raw.append(each * concurrency / (time.perf_counter() - start))
            start, used = time.perf_counter(), time.process_time()
            await asyncio.gather(*(pool_connection(pool, each) for _ in range(concurrency)))
            ours.append(each * concurrency / (time.perf_counter() - start))
            cpu.append((time.process_time() - used) / (each * concurrency) * 1000)
    return statistics.median(raw), statistics.median(ours), statistics.median(cpu)


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the table that it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    seconds = ranged(at_least(0))
    parser.add_argument("--latency", type=seconds, nargs="+", default=[0.2], help="Seconds of every reply.")
    count = ranged(at_least(1), whole=True)
    parser.add_argument("--concurrency", type=count, nargs="+", default=[64, 512], help="Calls in flight.")
    parser.add_argument("--calls", type=count, default=20, help="Per round, client and call in flight.")
    parser.add_argument("--rounds", type=count, default=3)
    args = parser.parse_args(argv)
    set_imports_aside()  # as `srpo train` and `srpo serve` do
    lines = [
        "| in flight | reply s | server's limit /s | pool /s | ratio | pool's CPU ms per call |",
        "|" + "---|" * 6,
    ]
    for concurrency in args.concurrency:
        for latency in args.latency:
            command = [sys.executable, str(SERVER), "--latency", str(latency)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                try:
                    assert server.stdout is not None
                    url = server.stdout.readline().strip()
                    raw, ours, cpu = asyncio.run(measure(url, concurrency, args.calls, args.rounds))
                finally:
                    server.terminate()
            lines.append(f"| {concurrency} | {latency:g} | {raw:.0f} | {ours:.0f} | {ours / raw:.1%} | {cpu:.2f} |")
            print(lines[-1], flush=True)
    print("\n".join(lines))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
