"""A recorded table as a pool: the shipped table's own replies and costs, deterministic, without any call."""

import asyncio
import time

import pytest

from routers import quickstart_table
from routers.data.catalogue import Member
from routers.data.table import ReplyTable
from routers.pool import Ledger, kind, recorded_pool


@pytest.fixture(scope="module")
def table() -> ReplyTable:
    return quickstart_table()


def test_the_rows_reply_whatever_the_policy_asks(table):
    pool = recorded_pool(table)
    queries = table.queries()[::100]

    async def main():
        calls = [pool.ask(m, "Ignore the row!", 5.0, query_id=q["query_id"]) for q in queries for m in table.members]
        return await asyncio.gather(*calls)

    replies = asyncio.run(main())
    expected = [table.lookup(q["query_id"], m) for q in queries for m in table.members]
    for reply, recorded in zip(replies, expected, strict=True):
        assert (reply.text, reply.error, reply.cached) == (recorded.reply, None, False)
        assert reply.usage.prompt_tokens == recorded.prompt_tokens
        assert reply.usage.completion_tokens == recorded.completion_tokens
        assert reply.cost == recorded.cost and reply.seconds == recorded.seconds
    assert pool.ledger.spent_usd == pytest.approx(sum(recorded.cost for recorded in expected))
    assert asyncio.run(main()) == replies


def test_the_policys_text_finds_the_reply_by_its_normalised_form(table):
    pool = recorded_pool(table, by="query")
    query = table.queries()[7]
    text = "  " + query["query"].upper().replace(" ", "  ") + " ?"
    reply = asyncio.run(pool.ask(table.members[0], text, 5.0, query_id="ignored"))
    assert reply.text == table.lookup(query["query_id"], table.members[0]).reply
    unknown = asyncio.run(pool.ask(table.members[0], "never asked before", 5.0, query_id=query["query_id"]))
    assert kind(unknown) == "bad request" and "never asked" in unknown.error and unknown.cost == 0.0


def test_an_unknown_row_is_an_error_in_words(table):
    reply = asyncio.run(recorded_pool(table).ask(table.members[0], "q", 5.0, query_id="no such row"))
    assert kind(reply) == "bad request" and "no such row" in reply.error


def test_the_bound_is_an_upper_bound_and_a_cap_holds():
    rows = [
        {"query_id": str(i), "query": f"q{i}", "member": "m", "reply": "r", "correct": 1.0}
        | {"prompt_tokens": i, "completion_tokens": 10 * i}
        for i in (1, 2, 3)
    ]
    table = ReplyTable(rows, {"m": Member("m", "x", 1e6, 1e6)})  # 11, 22 and 33 USD
    pool = recorded_pool(table, ledger=Ledger(max_cost_usd=60.0))
    assert pool.bound("m", "anything") == 33.0

    def ask(query_id):
        return asyncio.run(pool.ask("m", "q", 1.0, query_id=query_id))

    assert [kind(ask(i)) for i in ("3", "1", "1")] == [None, "over budget", "over budget"]  # 27 left, 33 bound
    assert pool.ledger.spent_usd == 33.0


def test_recorded_calls_are_quick(table):
    pool = recorded_pool(table)
    queries = [query["query_id"] for query in table.queries()]

    async def main():
        return [await pool.ask("chat", "q", 5.0, query_id=queries[i % len(queries)]) for i in range(2000)]

    start = time.process_time()
    asyncio.run(main())
    assert time.process_time() - start < 2.0  # 1 ms a call at most: a training step asks hundreds
