"""Endpoints against a real server on loopback that fails in every way a server can."""

import asyncio
import logging
import random
import socket
import threading
import time
import traceback

import pytest
from openai_server import Fault, OpenAIServer

from routers.data.catalogue import Member
from routers.pool import Ledger, Pool, ReplyCache, Retry, kind, live_pool
from routers.pool.endpoint import TEMPLATE_TOKENS, Endpoint, retry_after
from srpo.types import Reply

CANARY = "sk-canary-7f3d1c0b9a"


@pytest.fixture
def server():
    with OpenAIServer() as running:
        yield running


def member(server: OpenAIServer, name: str = "a", **fields) -> Member:
    return Member(name, "x", 1.0, 2.0, base_url=server.url, **fields)


def pool_of(*members: Member, **options) -> Pool:
    options.setdefault("retry", Retry(base=0.02))
    return live_pool({m.name: m for m in members}, **options)


def ask(pool: Pool, query: str = "two words", deadline: float = 5.0) -> Reply:
    async def main() -> Reply:
        async with pool:
            reply = await pool.ask("a", query, deadline)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return reply

    return asyncio.run(main())


def check_ledger(pool: Pool, server: OpenAIServer, tokens: bool = True) -> None:
    """What we booked is what the server says it used, to the token."""
    total = pool.ledger.total()
    if tokens:
        assert total.prompt_tokens == sum(prompt for prompt, _ in server.usage)
        assert total.completion_tokens == sum(completion for _, completion in server.usage)
    # prices of `member`: 1 and 2 USD per million
    assert total.cost == pytest.approx((total.prompt_tokens + 2 * total.completion_tokens) / 1e6, abs=1e-12)
    assert pool.ledger.spent_usd == pytest.approx(total.cost, abs=1e-12)
    assert pool.ledger.account.reserved == 0.0


GARBAGE = Fault(body='{"choices": [{"message": {"cont')
NO_CHOICES = Fault(body='{"choices": []}', billed=True)


@pytest.mark.parametrize(
    ("faults", "expected", "requests"),
    [
        ([], None, 1),
        ([Fault(status=500)], None, 2),
        ([Fault(status=500, billed=True), Fault(status=503, billed=True)], None, 3),
        ([Fault(status=408)], None, 2),
        ([Fault(status=409)], None, 2),
        ([Fault(status=429)], None, 2),
        ([Fault(status=500, billed=True)] * 5, "server error", 5),
        ([Fault(status=503)] * 5, "server error", 5),
        ([Fault(status=429)] * 5, "rate limit", 5),
        ([Fault(status=400)], "bad request", 1),
        ([Fault(status=401)], "bad request", 1),
        ([Fault(status=404)], "bad request", 1),
        ([Fault(status=422, billed=True)], "bad request", 1),
        ([GARBAGE], None, 2),
        ([GARBAGE] * 5, "malformed reply", 5),
        ([NO_CHOICES], None, 2),
        ([NO_CHOICES] * 5, "malformed reply", 5),
        ([Fault(body="[" * 100_000)] * 5, "malformed reply", 5),
        ([Fault(body="null")] * 5, "malformed reply", 5),
        ([Fault(body='{"choices": [{"message": {"content": [1]}}]}', billed=True)] * 5, "malformed reply", 5),
        ([Fault(body='{"choices": [{"message": {"content": " "}}]}', billed=True)], "empty reply", 1),
        ([Fault(body='{"choices": [{"message": {"content": null}}]}', billed=True)], "empty reply", 1),
        ([Fault(reset=True)], None, 2),
        ([Fault(reset=True)] * 5, "connection", 5),
    ],
)
def test_every_fault_is_retried_or_told(server, faults, expected, requests):
    server.faults = list(faults)
    pool = pool_of(member(server))
    reply = ask(pool)
    assert kind(reply) == expected
    assert len(server.requests) == requests
    assert reply.text == ("a plain reply" if expected is None else "")
    assert reply.usage.prompt_tokens == sum(prompt for prompt, _ in server.usage)
    assert reply.cost == pytest.approx(pool.price("a", reply.usage))
    check_ledger(pool, server)
    assert pool.ledger.total().failed == (expected is not None)


def test_the_ledger_agrees_with_the_servers_log_over_300_calls_with_every_fault(server):
    faults = [
        Fault(status=500, billed=True),
        Fault(status=503),
        Fault(status=429, billed=True),
        Fault(status=400, billed=True),
        GARBAGE,
        NO_CHOICES,
        Fault(reset=True),
        Fault(body='{"choices": [{"message": {"content": ""}}]}', billed=True),
    ]
    chosen = random.Random(0)
    server.faults = [chosen.choice(faults) if chosen.random() < 0.4 else Fault() for _ in range(400)]
    pool = pool_of(member(server, "a"), member(server, "b"), retry=Retry(base=0.002))

    async def main() -> list[Reply]:
        async with pool:
            calls = [pool.ask("ab"[i % 2], "word " * (i % 9), 30.0, query_id=str(i % 40)) for i in range(300)]
            return await asyncio.gather(*calls)

    replies = asyncio.run(main())
    assert len({kind(reply) for reply in replies}) >= 3
    check_ledger(pool, server)
    assert pool.ledger.total().calls == 300
    assert pool.ledger.total().failed == sum(reply.error is not None for reply in replies)
    queries = [pool.ledger.query(str(i)) for i in range(40)]
    assert sum(query.prompt_tokens for query in queries) == sum(prompt for prompt, _ in server.usage)
    assert sum(query.cost for query in queries) == pytest.approx(sum(reply.cost for reply in replies))


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    reply = ask(pool_of(Member("a", "x", 1.0, 2.0, base_url=url)))
    assert kind(reply) == "connection"


def test_a_hanging_server_ends_at_the_deadline(server):
    server.always = Fault(hang=True)
    pool = pool_of(member(server))
    reply = ask(pool, deadline=0.4)
    assert kind(reply) == "timeout" and 0.4 <= reply.seconds < 2.4
    assert pool.ledger.total().unmetered == 1  # whether the provider bills it is unknown, and said so
    assert pool.ledger.account.reserved == 0.0


def test_an_attempt_has_its_own_timeout(server):
    server.faults = [Fault(hang=True)]
    reply = ask(pool_of(member(server, timeout=1.0)), deadline=20.0)
    assert reply.error is None and 1.0 <= reply.seconds < 5.0
    assert len(server.requests) == 2


def test_slow_bytes_end_at_the_deadline(server):
    server.always = Fault(slow=0.05)  # a byte now and then resets every read timeout; about 15 s in all
    reply = ask(pool_of(member(server)), deadline=0.5)
    assert kind(reply) == "timeout" and reply.seconds < 2.5


def test_retry_after_in_seconds_is_honoured_by_all_calls_of_the_member(server):
    pool = pool_of(member(server))

    async def main():
        async with pool:
            server.faults = [Fault.retry_after_seconds(0.7)]
            first = asyncio.create_task(pool.ask("a", "one", 5.0))
            await asyncio.sleep(0.3)
            return await asyncio.gather(first, pool.ask("a", "two", 5.0))

    for reply in asyncio.run(main()):
        assert reply.error is None
    refused, *others = server.arrivals
    assert len(others) == 2 and min(others) - refused >= 0.7


def test_retry_after_as_a_date_is_honoured(server):
    server.faults = [Fault.retry_after_date(2)]  # dates have whole seconds: between 1 and 2 from now
    assert ask(pool_of(member(server))).error is None
    assert server.arrivals[1] - server.arrivals[0] >= 0.9


def test_retry_after_beyond_the_deadline_ends_at_once(server):
    server.faults = [Fault.retry_after_seconds(60)]
    reply = ask(pool_of(member(server)), deadline=3.0)
    assert kind(reply) == "rate limit" and "no time left" in reply.error
    assert reply.seconds < 2.5


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("3", 3.0), ("0.5", 0.5), ("-4", 0.0), ("soon", None), ("inf", None), ("nan", None)],
)
def test_reading_retry_after(value, seconds):
    assert retry_after({} if value is None else {"retry-after": value}) == seconds


def test_a_date_in_the_past_asks_for_nothing():
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0


def test_missing_usage_is_counted_at_its_bound_and_marked(server):
    server.always = Fault(usage=False)
    server.reply = "çé"  # 2 characters, 4 bytes: at most 4 tokens
    pool = live_pool({"a": member(server, system="S")}, agent_prompt="Q: {query}")
    reply = ask(pool, query="ü")
    # bytes: "S" 1, "Q: ü" 5
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (TEMPLATE_TOKENS + 6, 4)
    assert pool.ledger.total().estimated == 1
    check_ledger(pool, server, tokens=False)


def test_a_report_above_what_is_possible_counts_as_what_is(server):
    server.always = Fault(
        body='{"choices":[{"message":{"content":"x"}}],"usage":{"prompt_tokens":1,"completion_tokens":90000}}'
    )
    pool = pool_of(member(server, max_tokens=10), ledger=Ledger(max_cost_usd=0.1))
    for calls in (1, 2, 3):
        assert ask(pool).cost == pytest.approx(21e-6)  # 1 x 1 + 10 x 2
        assert pool.ledger.spent_usd == pytest.approx(calls * 21e-6)
    assert pool.ledger.account.overrun == 0.0 and pool.ledger.total().bounded == 3


def test_one_of_eight_members_hanging_costs_its_deadline_only(server):
    with OpenAIServer() as dead:
        dead.always = Fault(hang=True)
        members = [member(server, f"m{i}") for i in range(7)] + [member(dead, "dead")]
        pool = pool_of(*members)
        threads = set(threading.enumerate())

        async def step() -> list[Reply]:
            async with pool:
                await asyncio.gather(*(pool.ask(m.name, "warm up", 30.0) for m in members if m.name != "dead"))
                start = time.monotonic()
                calls = [pool.ask(m.name, f"query {i}", 2.0) for i in range(8) for m in members]
                replies = await asyncio.gather(*calls)
                assert time.monotonic() - start <= 2.0 + 2
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return replies

        replies = asyncio.run(step())
        assert [reply.error is None for reply in replies] == [m.name != "dead" for _ in range(8) for m in members]
        assert set(threading.enumerate()) <= threads


def test_cancelling_goes_through_and_frees_the_place(server):
    server.faults = [Fault(hang=True)]
    pool = pool_of(member(server, concurrency=1))

    async def main() -> Reply:
        async with pool:
            call = asyncio.create_task(pool.ask("a", "one", 30.0))
            while not server.requests:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert pool.ledger.account.reserved == 0.0
            return await pool.ask("a", "two", 5.0)

    assert asyncio.run(main()).error is None


def test_the_pool_works_in_one_event_loop_after_another(server):
    pool = pool_of(member(server, concurrency=1))

    async def main() -> list[Reply]:  # without aclose, as somebody will forget it; and with a wait for the one place
        return await asyncio.gather(pool.ask("a", "one", 5.0), pool.ask("a", "two", 5.0))

    for _ in range(3):
        assert [reply.error for reply in asyncio.run(main())] == [None, None]


def test_what_is_sent(server):
    settings = {"max_tokens": 77, "temperature": 0.3, "top_p": 0.9, "seed": 42, "system": "Be brief.", "model": "big"}
    ask(pool_of(member(server, **settings), agent_prompt="Help: {query}!"), query="a {query} b")
    (request,) = server.requests
    assert {name: request[name] for name in ("max_tokens", "temperature", "top_p", "seed", "model")} == {
        "max_tokens": 77,
        "temperature": 0.3,
        "top_p": 0.9,
        "seed": 42,
        "model": "big",
    }
    assert request["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Help: a {query} b!"},
    ]


def test_more_body_fields_and_fields_left_out(server):
    request = {"max_tokens": None, "max_completion_tokens": 512, "temperature": None}
    request["chat_template_kwargs"] = {"enable_thinking": False}
    ask(pool_of(member(server, request=request)))
    (sent,) = server.requests
    assert sent.keys() - {"authorization", "path"} == {
        "model",
        "messages",
        "max_completion_tokens",
        "chat_template_kwargs",
    }
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}


def test_lone_surrogates_and_control_characters_do_not_break_a_call(server):
    assert ask(pool_of(member(server)), query="a\x00b\ud800c").error is None


@pytest.mark.parametrize("fault", [None, Fault(status=401, body="KEY"), Fault(body="KEY"), Fault(reset=True)])
def test_the_key_appears_nowhere(server, fault, tmp_path, monkeypatch, caplog, capfd):
    """Not in logs at the lowest level, errors, tracebacks, cache, ledger or repr; also if the server sends it back."""
    monkeypatch.setenv("POOL_TEST_KEY", CANARY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-somebody-elses")
    caplog.set_level(logging.DEBUG)
    server.reply = f"your key is {CANARY}"
    if fault is not None:
        body = None if fault.body is None else f'{{"error": {{"message": "wrong key {CANARY}"}}}}'
        server.always = Fault(status=fault.status, body=body, reset=fault.reset)
    ledger = Ledger(1.0)
    pool = pool_of(member(server, api_key_env="POOL_TEST_KEY"), cache=ReplyCache(tmp_path), ledger=ledger)
    reply = ask(pool)
    assert {request["authorization"] for request in server.requests} == {f"Bearer {CANARY}"}

    server.always, server.faults, texts = Fault(), [Fault(hang=True)], []

    async def cancelled() -> None:
        call = asyncio.create_task(pool.ask("a", "another", 30.0))
        await asyncio.sleep(0.3)
        call.cancel()
        try:
            await call
        except asyncio.CancelledError as error:
            texts.extend(traceback.TracebackException.from_exception(error, capture_locals=True).format())
        await pool.aclose()

    asyncio.run(cancelled())
    assert texts
    backend = pool._callers["a"].backend
    texts += [repr(reply), repr(pool), repr(vars(pool)), repr(backend), repr(vars(backend)), repr(backend.identity)]
    texts += [repr(pool.members), repr(ledger.state_dict()), repr(ledger.metrics()), caplog.text, *capfd.readouterr()]
    texts += [path.read_text() for path in tmp_path.rglob("*.json")]
    assert CANARY not in "\n".join(texts)
    assert caplog.records  # the client does log at this level: the check had something to look at


def test_without_a_key_nobody_elses_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    ask(pool_of(member(server)))
    assert CANARY not in str(server.requests)


def test_start_up_errors_name_the_member_and_what_to_do(monkeypatch):
    monkeypatch.delenv("POOL_TEST_KEY", raising=False)
    with pytest.raises(ValueError, match=r"'a'.*base_url"):
        live_pool({"a": Member("a", "x", 1.0, 2.0)})
    with pytest.raises(ValueError, match=r"'a'.*POOL_TEST_KEY.*export"):
        live_pool({"a": Member("a", "x", 1.0, 2.0, base_url="http://h/v1", api_key_env="POOL_TEST_KEY")})
    with pytest.raises(ValueError, match="query"):
        Endpoint(Member("a", "x", 1.0, 2.0, base_url="http://h/v1"), agent_prompt="no place for it")
