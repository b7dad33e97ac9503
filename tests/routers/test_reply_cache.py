"""The reply cache: no second call, the same words, from any process, after a crash, and never for an error."""

import asyncio
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from openai_server import Fault, OpenAIServer
from scripted import Fault as ScriptedFault
from scripted import Scripted

from routers.data.catalogue import Member
from routers.pool import Ledger, Pool, ReplyCache, Retry, kind, live_pool
from routers.pool.cache import cache_key
from srpo.types import Reply, Usage

QUERIES = [f"question {i}: ü ✓ \ud800" for i in range(20)]


def run(url: str, folder: Path, queries: list[str]) -> tuple[list[Reply], Ledger]:
    pool = live_pool({"a": Member("a", "x", 1.0, 2.0, base_url=url)}, cache=ReplyCache(folder), retry=Retry(base=0.01))

    async def main() -> list[Reply]:
        async with pool:
            return await asyncio.gather(*(pool.ask("a", query, 20.0) for query in queries))

    return asyncio.run(main()), pool.ledger


def run_and_send(url: str, folder: Path, queries: list[str], pipe) -> None:
    replies, _ = run(url, folder, queries)
    pipe.send([(reply.text, reply.usage.prompt_tokens, reply.cost, reply.cached) for reply in replies])


def test_a_second_run_asks_nobody_and_reads_the_same(tmp_path):
    with OpenAIServer(reply='an answer: "{query}" \u2028 ✓') as server:
        first, paid = run(server.url, tmp_path, QUERIES)
        assert len(server.requests) == 20 and not any(reply.cached for reply in first)
        second, free = run(server.url, tmp_path, QUERIES)
        assert len(server.requests) == 20
        assert second == [replace(reply, cost=0.0, cached=True) for reply in first]
        assert paid.spent_usd > 0 and free.spent_usd == 0.0
        assert (free.total().calls, free.total().cached, free.total().prompt_tokens) == (0, 20, 0)

        # another process, started fresh
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=run_and_send, args=(server.url, tmp_path, QUERIES, sender))
        process.start()
        third = receiver.recv()
        process.join(30)
        assert len(server.requests) == 20
        assert third == [(reply.text, reply.usage.prompt_tokens, 0.0, True) for reply in first]


def test_the_reward_price_does_not_depend_on_the_cache(tmp_path):
    pool = scripted_pool(Scripted(cached_as="s"), tmp_path)
    first, second = (asyncio.run(pool.ask("m", "q", 1.0)) for _ in range(2))
    assert (first.cost, second.cost) == (20.0, 0.0)  # 10 x 1 + 5 x 2
    assert pool.price("m", first.usage) == pool.price("m", second.usage) == 20.0


def test_errors_are_not_kept(tmp_path):
    with OpenAIServer() as server:
        server.faults = [Fault(status=400), Fault(body='{"choices":[{"message":{"content":""}}]}')]
        for expected in ("bad request", "empty reply", None, None):
            (reply,), _ = run(server.url, tmp_path, ["q"])
            assert kind(reply) == expected
        assert len(server.requests) == 3
    with pytest.raises(ValueError, match="no error"):
        ReplyCache(tmp_path).put("0" * 64, Reply("", error="timeout: x"))


def scripted_pool(backend: Scripted, folder: Path) -> Pool:
    return Pool({"m": Member("m", "x", 1e6, 2e6)}, {"m": backend}, cache=ReplyCache(folder))


def test_equal_calls_in_flight_are_one_call(tmp_path):
    backend = Scripted(lambda query: f"re: {query}", seconds=0.05, cached_as="s")
    pool = scripted_pool(backend, tmp_path)

    async def main() -> list[Reply]:
        return await asyncio.gather(*(pool.ask("m", f"q{i % 3}", 5.0) for i in range(30)))

    replies = asyncio.run(main())
    assert sorted(backend.queries) == ["q0", "q1", "q2"]
    assert [reply.text for reply in replies] == [f"re: q{i % 3}" for i in range(30)]
    assert sum(reply.cost for reply in replies) == pytest.approx(pool.ledger.spent_usd) == pytest.approx(60.0)
    assert sum(reply.cached for reply in replies) == 27 == pool.ledger.total().cached


def test_without_a_cache_samples_stay_independent():
    backend = Scripted(seconds=0.01, cached_as="s")
    pool = Pool({"m": Member("m", "x", 0.0, 0.0)}, {"m": backend})

    async def main() -> None:
        await asyncio.gather(*(pool.ask("m", "q", 5.0) for _ in range(4)))

    asyncio.run(main())
    assert len(backend.queries) == 4


@pytest.mark.parametrize(
    ("settings", "calls"),
    [({"temperature": 0.7}, 3), ({"temperature": 0.0}, 1), ({"temperature": 0.7, "seed": 4}, 1)],
)
def test_independent_draws_have_their_own_places_where_the_member_samples(tmp_path, settings, calls):
    """Three runs ask the same; a resumed run asks nobody."""
    backend = Scripted(lambda query: f"reply {len(backend.queries)}", cached_as="s")
    pool = Pool({"m": Member("m", "x", 0.0, 0.0, **settings)}, {"m": backend}, cache=ReplyCache(tmp_path))
    for _ in range(2):
        replies = [asyncio.run(pool.ask("m", "q", 5.0, sample=f"run {k}")).text for k in range(3)]
        assert len(backend.queries) == calls == len(set(replies))


def test_cancelling_the_first_of_two_does_not_cancel_the_second(tmp_path):
    pool = scripted_pool(Scripted(seconds=0.1, cached_as="s"), tmp_path)

    async def main() -> Reply:
        first = asyncio.create_task(pool.ask("m", "q", 5.0))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(pool.ask("m", "q", 5.0))
        await asyncio.sleep(0.02)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await second

    assert asyncio.run(main()).error is None
    assert pool.ledger.total().calls == 1


def test_cancelling_all_ends_the_call_and_the_next_one_starts_anew(tmp_path):
    backend = Scripted(faults=[ScriptedFault(hang=True)], cached_as="s")
    pool = scripted_pool(backend, tmp_path)

    async def main() -> Reply:
        calls = [asyncio.create_task(pool.ask("m", "q", 60.0)) for _ in range(3)]
        await asyncio.sleep(0.02)
        for call in calls:
            call.cancel()
        late = asyncio.create_task(pool.ask("m", "q", 5.0))  # while the cancelled one is still unwinding
        await asyncio.gather(*calls, return_exceptions=True)
        reply = await late
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return reply

    assert asyncio.run(main()).error is None
    assert len(backend.queries) == 2 and pool.ledger.account.reserved == 0.0


def test_everybody_has_its_own_deadline(tmp_path):
    backend = Scripted(faults=[ScriptedFault(hang=True)], cached_as="s")
    pool = scripted_pool(backend, tmp_path)

    async def main() -> list[Reply]:
        return await asyncio.gather(pool.ask("m", "q", 0.1), pool.ask("m", "q", 5.0))

    short, patient = asyncio.run(main())
    assert kind(short) == "timeout" and patient.error is None  # it asked again with its own time
    reverse = scripted_pool(Scripted(seconds=0.4, cached_as="other"), tmp_path)

    async def other() -> list[Reply]:
        return await asyncio.gather(reverse.ask("m", "q", 5.0), reverse.ask("m", "q", 0.1))

    patient, short = asyncio.run(other())
    assert patient.error is None and kind(short) == "timeout" and short.seconds == pytest.approx(0.1, abs=0.2)


SETTINGS = {"model": "m", "base_url": "u", "agent_prompt": "p", "system": None, "temperature": 0.0, "seed": 1}


def test_every_setting_is_part_of_the_key():
    keys = {cache_key(SETTINGS, "q"), cache_key(SETTINGS, "q ")}
    keys |= {cache_key({**SETTINGS, name: "other"}, "q") for name in SETTINGS}
    assert len(keys) == 2 + len(SETTINGS)
    assert cache_key(dict(reversed(SETTINGS.items())), "q") in keys


def test_every_setting_of_an_endpoint_that_decides_the_reply_is_in_its_identity(monkeypatch):
    base = Member("a", "x", 1.0, 2.0, base_url="http://h/v1")
    changes = {"model": "b", "base_url": "http://i/v1", "max_tokens": 3, "temperature": 0.5, "top_p": 0.5, "seed": 7}
    changes |= {"system": "S", "request": {"top_k": 3}}
    members = {"a": base} | {name: replace(base, **{name: value}) for name, value in changes.items()}
    pool = live_pool(members)
    identities = {json.dumps(dict(caller.backend.identity), sort_keys=True) for caller in pool._callers.values()}
    assert len(identities) == 1 + len(changes)
    cheaper = live_pool({"a": replace(base, price_in=0.5, concurrency=2)})  # changes nothing in the reply
    assert cheaper._callers["a"].backend.identity == pool._callers["a"].backend.identity


@pytest.mark.parametrize("damage", [b"", b'{"text": "ha', b"\x00" * 100, b"[]", b'{"text": "x"}', b'{"text": null}'])
def test_a_damaged_file_is_a_miss_and_is_written_again(tmp_path, damage):
    cache, key = ReplyCache(tmp_path), cache_key(SETTINGS, "q")
    reply = Reply("words", Usage(3, 4), cost=1.0, seconds=0.5)
    cache.put(key, reply)
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(damage)
    assert cache.get(key) is None
    cache.put(key, reply)
    assert cache.get(key) == Reply("words", Usage(3, 4), seconds=0.5, cached=True)


def test_a_file_of_another_version_is_named_and_not_used(tmp_path):
    cache, keys = ReplyCache(tmp_path), [cache_key(SETTINGS, query) for query in "abc"]
    for key, version in zip(keys, (None, 1, 3), strict=True):
        cache.put(key, Reply("words", Usage(3, 4)))
        path = tmp_path / key[:2] / f"{key}.json"
        stored = {**json.loads(path.read_text()), "format": version}
        path.write_text(json.dumps({k: v for k, v in stored.items() if v is not None}))
    with pytest.warns(UserWarning, match=r"(?s)\.json was written by another version.*paid for again") as caught:
        assert [cache.get(key) for key in keys] == [None] * 3
    assert len(caught) == 1


def test_a_cache_that_cannot_be_written_loses_no_reply(tmp_path):
    pool = scripted_pool(Scripted("words", cached_as="a"), tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file where the folder was")
    with pytest.warns(UserWarning, match="could not be kept"):
        assert asyncio.run(pool.ask("m", "q", 5.0)).text == "words"


def hammer(folder: Path, name: str) -> None:
    cache = ReplyCache(folder)
    for i in range(200):
        key = cache_key({"n": i % 10}, "q")
        cache.put(key, Reply(f"{name} " * 500, Usage(1, 1)))
        found = cache.get(key)
        assert found is not None and len(set(found.text.split())) == 1 and len(found.text.split()) == 500


def test_processes_that_write_at_once_leave_whole_replies(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=hammer, args=(tmp_path, name)) for name in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(list(tmp_path.rglob("*.json"))) == 10 and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "change", [{"prompt_tokens": -5}, {"cached_tokens": 9}, {"reasoning_tokens": 9}, {"usd": -1.0}]
)
def test_a_usage_that_cannot_be_is_a_miss(tmp_path, change):
    cache, key = ReplyCache(tmp_path), cache_key(SETTINGS, "q")
    cache.put(key, Reply("words", Usage(3, 4, 2, 1, 3), cost=1.0, seconds=0.5))
    assert cache.get(key).usage.calls == (Usage(3, 4, 2, 1, 3),)
    (path,) = tmp_path.rglob("*.json")
    stored = json.loads(path.read_text())
    stored["requests"][0] |= change
    path.write_text(json.dumps(stored))
    assert cache.get(key) is None
