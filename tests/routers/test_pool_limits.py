"""Caps on concurrency and rate against a real server, the circuit breaker, and the pauses between attempts."""

import asyncio
import random
import subprocess
import sys
import time

import pytest
from openai_server import Fault, OpenAIServer
from scripted import Fault as ScriptedFault
from scripted import Scripted

from routers.data.catalogue import Member
from routers.pool import Pool, Retry, kind, live_pool
from routers.pool import limits as limits_module
from routers.pool.limits import Breaker, CircuitOpen, Spacing, TokenBucket


def test_the_concurrency_cap_holds_over_a_thousand_calls():
    with OpenAIServer(latency=0.002) as server:
        members = {
            name: Member(name, "x", 1.0, 1.0, base_url=server.url, concurrency=cap)
            for name, cap in [("a", 5), ("b", 3)]
        }
        pool = live_pool(members)

        async def main():
            async with pool:
                return await asyncio.gather(*(pool.ask("ab"[i % 2], "q", 60.0) for i in range(1000)))

        replies = asyncio.run(main())
        assert all(reply.error is None for reply in replies)
        assert len(server.requests) == 1000
        assert server.most_in_flight == 8  # 5 + 3: reached, and never exceeded


def test_64_calls_are_64_calls_in_flight():
    with OpenAIServer(latency=0.5) as server:
        pool = live_pool({"a": Member("a", "x", 1.0, 1.0, base_url=server.url, concurrency=64)})

        async def main():
            async with pool:
                return await asyncio.gather(*(pool.ask("a", "q", 60.0) for _ in range(128)))

        assert all(reply.error is None for reply in asyncio.run(main()))
        assert server.most_in_flight == 64


def test_three_calls_at_one_per_second_take_two_seconds():
    with OpenAIServer() as server:
        pool = live_pool({"a": Member("a", "x", 1.0, 1.0, base_url=server.url, requests_per_second=1.0)})

        async def main():
            async with pool:
                return await asyncio.gather(*(pool.ask("a", "q", 10.0) for _ in range(3)))

        start = time.monotonic()
        assert all(reply.error is None for reply in asyncio.run(main()))
        assert time.monotonic() - start >= 1.8
        assert len(server.requests) == 3


def test_retries_keep_to_the_rate_too():
    with OpenAIServer() as server:
        server.faults = [Fault(status=500)] * 2
        member = Member("a", "x", 1.0, 1.0, base_url=server.url, requests_per_second=4.0)
        pool = live_pool({"a": member}, retry=Retry(base=0.001))

        async def main():
            async with pool:
                return await pool.ask("a", "q", 10.0)

        start = time.monotonic()
        assert asyncio.run(main()).error is None
        assert len(server.requests) == 3 and time.monotonic() - start >= 0.45  # a quarter of a second apart


def test_waiting_for_a_limit_is_no_failure_of_the_member():
    pool = Pool({"a": Member("a", "x", 0.0, 0.0, requests_per_second=0.1)}, {"a": Scripted()})

    async def main():
        return await asyncio.gather(*(pool.ask("a", "q", 0.05) for _ in range(30)))

    replies = asyncio.run(main())
    assert [kind(reply) for reply in replies].count("timeout") == 29
    assert "limit" in next(reply.error for reply in replies if reply.error)  # and never "circuit open"


def test_tokens_per_minute(monkeypatch):
    now = [0.0]

    async def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(limits_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(limits_module.asyncio, "sleep", sleep)

    async def main():
        bucket = TokenBucket(600)  # 10 a second
        assert await bucket.take(400) == 400  # a full bucket at the start
        bucket.give_back(400, used=100)  # 500 left
        await bucket.take(500)
        assert now[0] == 0.0
        await bucket.take(100)
        assert now[0] == pytest.approx(10.0, abs=0.01)
        bucket.give_back(100, used=300)  # it used more: 200 below zero
        await bucket.take(10)
        assert now[0] == pytest.approx(10.0 + 21.0, abs=0.02)
        assert await bucket.take(10_000) == 600  # more than a minute's worth takes a full bucket, not forever
        assert await TokenBucket(None).take(10**9) == 0.0

    asyncio.run(main())


def test_a_pause_holds_everybody_back(monkeypatch):
    now = [100.0]

    async def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(limits_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(limits_module.asyncio, "sleep", sleep)

    async def main():
        spacing = Spacing(2.0)
        await spacing.wait()
        assert now[0] == 100.0
        await spacing.wait()
        assert now[0] == 100.5
        spacing.pause(3.0)
        spacing.pause(1.0)  # the longer one counts
        await spacing.wait()
        assert now[0] >= 103.5

    asyncio.run(main())


def test_the_breaker_opens_probes_and_closes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(limits_module.time, "monotonic", lambda: now[0])
    breaker = Breaker(failures=3, patience=0.0, cooldown=10.0)

    def attempt(worked):
        breaker.ended(breaker.enter(), worked)

    for worked in (False, False, True, False, False):  # a success in between starts the count again
        attempt(worked)
    attempt(None)  # says nothing
    attempt(False)
    with pytest.raises(CircuitOpen, match="3 attempts failed in a row, next probe in 10 s"):
        breaker.enter()
    now[0] = 10.0
    probe = breaker.enter()
    assert probe.probe
    with pytest.raises(CircuitOpen):  # one probe at a time
        breaker.enter()
    breaker.ended(probe, None)  # the probe was cancelled: another may try
    attempt(False)
    with pytest.raises(CircuitOpen, match="next probe in 10 s"):
        breaker.enter()
    now[0] = 20.0
    attempt(True)
    assert not breaker.enter().probe and not breaker.enter().probe


def test_a_hiccup_of_many_calls_at_once_does_not_open_the_breaker(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(limits_module.time, "monotonic", lambda: now[0])
    breaker = Breaker(failures=10, patience=10.0)
    for _ in range(64):
        breaker.ended(breaker.enter(), worked=False)
    now[0] = 9.0
    breaker.ended(breaker.enter(), worked=False)
    breaker.enter()  # 65 failures within 9 seconds: a retry may still help
    hanging = [breaker.enter() for _ in range(3)]
    now[0] = 11.0
    breaker.ended(hanging[0], worked=False)  # failing since 0
    with pytest.raises(CircuitOpen):
        breaker.enter()
    breaker.ended(hanging[1], worked=True)  # an answer after all
    for _ in range(10):
        breaker.ended(breaker.enter(), worked=False)
    assert not breaker.enter().probe  # the streak began anew at 11
    hanging = [breaker.enter() for _ in range(10)]
    now[0] = 60.0  # their deadline: they failed together, but it took them long enough
    for entry in hanging:
        breaker.ended(entry, worked=False)
    with pytest.raises(CircuitOpen):
        breaker.enter()


def test_a_dead_member_is_left_alone_and_found_again(monkeypatch):
    down = [ScriptedFault(error="server error: status 500", retry=False)] * 10
    backend = Scripted(faults=[*down, None])
    pool = Pool({"a": Member("a", "x", 0.0, 0.0)}, {"a": backend})

    now = [time.monotonic()]
    monkeypatch.setattr(limits_module.time, "monotonic", lambda: now[0])

    def ask():
        now[0] += 1.5
        return asyncio.run(pool.ask("a", "q", 1.0))

    assert {kind(ask()) for _ in range(10)} == {"server error"}  # over 13.5 seconds
    assert kind(ask()) == "circuit open" and len(backend.queries) == 10
    now[0] += 31
    assert ask().error is None and ask().error is None
    assert len(backend.queries) == 12


def test_requests_that_are_wrong_do_not_open_the_breaker():
    fault = ScriptedFault(error="bad request: status 400", retry=False)
    pool = Pool({"a": Member("a", "x", 0.0, 0.0)}, {"a": Scripted(faults=[fault] * 30)})
    assert {kind(asyncio.run(pool.ask("a", "q", 1.0))) for _ in range(30)} == {"bad request"}


def test_pauses_grow_and_do_not_touch_the_global_generator():
    random.seed(5)
    state = random.getstate()
    retry = Retry(base=1.0, longest=6.0)
    for failures, longest in [(1, 1.0), (2, 2.0), (3, 4.0), (4, 6.0), (9, 6.0)]:
        pauses = [retry.pause(failures) for _ in range(200)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest
        assert len(set(pauses)) > 100
    assert random.getstate() == state


def test_an_unknown_member_is_named():
    pool = Pool({"a": Member("a", "x", 0.0, 0.0)}, {"a": Scripted()})
    with pytest.raises(KeyError, match=r"'b'.*there are a"):
        asyncio.run(pool.ask("b", "q", 1.0))
    with pytest.raises(ValueError, match="same names"):
        Pool({"a": Member("a", "x", 0.0, 0.0)}, {})


def test_a_bug_in_a_member_is_its_failure():
    pool = Pool({"a": Member("a", "x", 0.0, 0.0)}, {"a": Scripted(faults=[ScriptedFault(raises=TypeError("oops"))])})
    reply = asyncio.run(pool.ask("a", "q", 1.0))
    assert reply.error == "malformed reply: TypeError: oops"


def test_the_benchmark_prints_a_ratio(repository):
    script = repository / "scripts" / "benchmark_pool.py"
    options = ["--latency", "0.1", "--concurrency", "8", "--calls", "4", "--rounds", "1"]
    run = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=120, check=True)
    cells = [part.strip() for part in run.stdout.splitlines()[-1].strip("|").split("|")]
    flying, latency, limit, ours, ratio, _ = cells
    assert flying == "8" and float(latency) == 0.1
    assert 20 < float(limit) <= 81  # 8 in flight, 0.1 s each: at most 80 a second
    assert 0 < float(ours) <= 81 and 0 < float(ratio.strip("%")) <= 110
