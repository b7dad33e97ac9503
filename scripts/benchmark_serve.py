"""What `srpo serve` adds to a call of a member, and what it holds up to: latency, and memory under many clients.

    python scripts/benchmark_serve.py latency --kind encoder                  # overhead of a decision: p50, p99
    python scripts/benchmark_serve.py latency --router outputs/quickstart/router   # of a router of your own
    python scripts/benchmark_serve.py load --kind encoder --clients 200 --minutes 10

Members are one loopback server (`tests/support/openai_server.py`) in a process of its own that answers at once; the
router serves from another. `latency`: every client takes turns between the member itself and the router, so that both
are measured on the same machine at the same time; the overhead is the difference of the medians, and of the 99th
percentiles. The decision alone, without HTTP, is timed in this process before. `router_cpu_ms` is what the server
computes for a request, decision included, which other work on the machine changes little. `load`: clients ask without
a pause; memory is the server's resident memory, and its growth is from the median of the second tenth of the time,
when all is warm, to that of the last.

Without --router, a router of the kind is made first, from the quickstart table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from routers.data.table import quickstart_table
from routers.evaluation.episodes import RewardRule
from routers.router import load_router
from srpo.ranges import above, at_least, ranged

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
QUESTION = "sum of 1 and 2"


def make_router(kind: str, folder: Path) -> Path:
    """A small router, in a folder."""
    table = quickstart_table()
    if kind == "fitted":
        from routers.baselines.ridge import Ridge

        Ridge().fit(table).save(folder)
    else:
        from routers.tasks.query_routing.encoder.training import train_encoder

        train_encoder(table, RewardRule(table.max_cost, 0.2), max_steps=40).save(folder)
    return folder


@contextmanager
def member_server() -> Iterator[str]:
    """Its address."""
    process = subprocess.Popen([sys.executable, SUPPORT / "openai_server.py"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


@contextmanager
def router_server(router: Path, catalogue: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Its address and process id."""
    command = [sys.executable, "-m", "srpo", "serve", str(router), "--catalogue", str(catalogue), "--port", "0"]
    process = subprocess.Popen([*command, "--public_metrics", *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "listening on" in line:
                yield line.split()[-1], process.pid
                return
        raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait()


def write_catalogue(router: Path, url: str, path: Path) -> None:
    """The router's members, all behind one address."""
    with load_router(router) as loaded:
        members = [
            {"name": m.name, "descriptor": m.descriptor, "price_in": m.price_in or 1, "price_out": m.price_out or 1,
             "base_url": url, "concurrency": 256}
            for m in loaded.members
        ]  # fmt: skip
    path.write_text(yaml.safe_dump({"members": members}), encoding="utf-8")


def cpu_seconds(process: int) -> float:
    """That a process has computed for, in all its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def decision_seconds(router: Path, calls: int) -> float:
    """Median of a decision in this process, without HTTP."""
    with load_router(router) as loaded:
        taken = []
        for _ in range(calls):
            started = time.perf_counter()
            loaded.route(QUESTION)
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


async def ask(http: httpx.AsyncClient, url: str, model: str) -> float:
    """Seconds of one request."""
    started = time.perf_counter()
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16}
    reply = await http.post(f"{url}/chat/completions", json=body)
    if reply.status_code != 200:
        raise RuntimeError(f"{reply.status_code}: {reply.text[:300]}")
    return time.perf_counter() - started


async def latencies(member: str, router: str, clients: int, requests: int) -> tuple[list[float], list[float]]:
    """Seconds of calls of the member and of the router, taken in turns by every client."""
    direct: list[float] = []
    routed: list[float] = []

    async def client() -> None:
        async with httpx.AsyncClient(timeout=120) as http:
            for number in range(requests + 5):
                for url, model, into in ((member, "m", direct), (f"{router}/v1", "router", routed)):
                    seconds = await ask(http, url, model)
                    if number >= 5:  # warm
                        into.append(seconds)

    await asyncio.gather(*(client() for _ in range(clients)))
    return direct, routed


async def load(router: str, clients: int, minutes: float) -> tuple[Counter[int], list[float], list[float]]:
    """Replies by status, their seconds, and the server's resident MiB, ten times a minute."""
    end, statuses, taken, memory = time.monotonic() + 60 * minutes, Counter[int](), list[float](), list[float]()

    async def client(number: int) -> None:
        async with httpx.AsyncClient(timeout=300) as http:
            while time.monotonic() < end:
                body = {"model": "router", "messages": [{"role": "user", "content": f"{QUESTION} ({number})"}]}
                started = time.perf_counter()
                reply = await http.post(f"{router}/v1/chat/completions", json=body | {"stream": number % 2 == 0})
                statuses[reply.status_code] += 1
                taken.append(time.perf_counter() - started)

    async def watch() -> None:
        async with httpx.AsyncClient(timeout=300) as http:
            while time.monotonic() < end:
                lines = (await http.get(f"{router}/metrics")).text.splitlines()
                [line] = [line for line in lines if line.startswith("process_resident_memory_bytes ")]
                memory.append(float(line.split()[1]) / 2**20)
                await asyncio.sleep(6)

    await asyncio.gather(watch(), *(client(number) for number in range(clients)))
    return statuses, taken, memory


def growth(memory: list[float]) -> float:
    """Of the median of the last tenth over that of the second."""
    tenth = max(1, len(memory) // 10)
    return statistics.median(memory[-tenth:]) / statistics.median(memory[tenth : 2 * tenth]) - 1


def at(values: list[float], share: float) -> float:
    """A quantile, in milliseconds."""
    return 1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Command line."""
    several = ranged(at_least(1), whole=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["latency", "load"])
    parser.add_argument("--kind", choices=["encoder", "fitted"], default="encoder")
    parser.add_argument("--router", type=Path, help="folder; without it one is made")
    parser.add_argument("--clients", type=several, nargs="+", default=None, help="at once; latency: 1 8, load: 200")
    parser.add_argument("--requests", type=several, default=200, help="of each client (latency)")
    parser.add_argument("--minutes", type=ranged(above(0)), default=10.0, help="of load")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, member_server() as member:
        router = args.router or make_router(args.kind, Path(temporary, "router"))
        catalogue = Path(temporary, "pool.yaml")
        write_catalogue(router, member, catalogue)
        found: dict[str, Any] = {"router": str(args.router or args.kind), "cores": os.cpu_count()}
        if args.what == "latency":
            found["decision_ms"] = round(1000 * decision_seconds(router, 100), 3)
        with router_server(router, catalogue) as (address, process):
            for clients in args.clients or ([1, 8] if args.what == "latency" else [200]):
                found["clients"] = clients
                if args.what == "latency":
                    before = cpu_seconds(process)
                    direct, routed = asyncio.run(latencies(member, address, clients, args.requests))
                    found["router_cpu_ms"] = round(1000 * (cpu_seconds(process) - before) / len(routed), 3)
                    for name, share in (("p50", 0.5), ("p99", 0.99)):
                        found[f"direct_{name}_ms"] = round(at(direct, share), 3)
                        found[f"routed_{name}_ms"] = round(at(routed, share), 3)
                        found[f"overhead_{name}_ms"] = round(at(routed, share) - at(direct, share), 3)
                else:
                    statuses, taken, memory = asyncio.run(load(address, clients, args.minutes))
                    found |= {"minutes": args.minutes, "replies": dict(statuses), "growth": round(growth(memory), 4)}
                    found |= {"p50_ms": round(at(taken, 0.5), 1), "p99_ms": round(at(taken, 0.99), 1)}
                    found["memory_mib"] = [round(value, 1) for value in memory]
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
