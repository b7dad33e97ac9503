"""Prices by hand: cached, reasoning, per request, tiered; what a reply is billed for; what a price table may say."""

import asyncio
import json
import math

import pytest
from openai_server import Fault, OpenAIServer
from scripted import Fault as Odd
from scripted import Scripted

from routers.data.billing import PriceTier, cost, highest, price, total
from routers.data.catalogue import Member, load_catalogue, shared_fields, shared_member
from routers.data.prices import litellm_fields
from routers.data.table import ReplyTable
from routers.language.prompts import policy_prompt
from routers.pool import Ledger, Pool, ReplyCache, live_pool, recorded_pool
from routers.pool.endpoint import TEMPLATE_TOKENS
from routers.pool.usage import UNSTATED_REASONING, bill
from srpo.types import Reply, Usage

FULL = Member(
    "m",
    "x",
    1.0,
    10.0,
    price_cached=0.1,
    price_cache_write=1.25,
    price_reasoning=20.0,
    price_request=0.005,
    price_tiers=(PriceTier(1000, 2.0, 15.0, price_cached=0.2), PriceTier(5000, 4.0, 30.0)),
)


@pytest.mark.parametrize(
    ("prompt", "completion", "parts", "micros"),
    [
        (100, 10, {}, 100 + 100),
        (100, 10, {"cached_tokens": 60, "cache_write_tokens": 8}, 32 * 1 + 60 * 0.1 + 8 * 1.25 + 100),
        (100, 10, {"reasoning_tokens": 4}, 100 + 6 * 10 + 4 * 20),
        (1000, 10, {}, 1000 + 100),  # a tier begins above its number
        (1001, 10, {"cached_tokens": 1}, 1000 * 2 + 0.2 + 150),  # and holds for the whole call
        (5001, 10, {"cached_tokens": 1, "reasoning_tokens": 2}, 5001 * 4 + 300),  # no discount of a lower tier
    ],
)
def test_a_request_by_hand(prompt, completion, parts, micros):
    assert cost(FULL, prompt, completion, **parts) == pytest.approx(micros / 1e6 + 0.005, rel=1e-12)


def test_a_call_of_several_requests_is_priced_request_by_request():
    # Together they would be above the tier; each of them is below it, and each pays the fee.
    both = total([Usage(600, 0), Usage(600, 10)])
    assert both == Usage(1200, 10)
    assert price(FULL, both) == pytest.approx((600 + 600 + 100) / 1e6 + 2 * 0.005)
    assert price(FULL, Usage(1200, 10)) == pytest.approx((2400 + 150) / 1e6 + 0.005)
    assert price(FULL, Usage()) == 0.0
    assert price(FULL, total([Usage(), Usage(5, 5, usd=0.25)])) == 0.25


def test_the_bound_has_no_discount_the_dearest_tier_and_the_fee():
    assert highest(FULL, 1000, 10) == pytest.approx((1000 * 1.25 + 10 * 20) / 1e6 + 0.005)
    assert highest(FULL, 1001, 10) == pytest.approx((1001 * 2 + 10 * 15) / 1e6 + 0.005)
    assert highest(FULL, 6000, 10) == pytest.approx((6000 * 4 + 300) / 1e6 + 0.005)
    cheaper_above = Member("m", "x", 5.0, 5.0, price_tiers=(PriceTier(10, 1.0, 1.0),))
    assert highest(cheaper_above, 20, 0) == pytest.approx(100e-6)  # the prompt may turn out shorter


@pytest.mark.parametrize(
    "prices",
    [
        {"price_in": -1.0},
        {"price_out": math.nan},
        {"price_cached": math.inf},
        {"price_request": -0.1},
        {"price_tiers": (PriceTier(1, 1.0, -1.0),)},
        {"price_out": None},
        {"price_in": None, "price_out": None, "price_request": 1.0},
    ],
)
def test_a_price_that_is_none_is_refused(prices):
    with pytest.raises(ValueError, match=r"'m'.*USD"):
        Member("m", "x", **{"price_in": 1.0, "price_out": 1.0, **prices})


# ---- what a reply is billed for ----

BOUND, LIMIT = 1000, 100


def billed(usage, seen="four words of text", **options):
    found = bill({"usage": usage}, prompt_bound=BOUND, max_tokens=LIMIT, seen=seen, **options)
    return found.usage, found.estimated, found.bounded


def test_what_adds_up_is_believed():
    assert billed({"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}) == (Usage(20, 5), False, False)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        # cached inside the prompt tokens: OpenAI, DeepSeek, Moonshot, OpenRouter
        ({"prompt_tokens": 200, "prompt_tokens_details": {"cached_tokens": 190}}, (200, 5, 190, 0, 0)),
        ({"prompt_cache_hit_tokens": 190, "prompt_cache_miss_tokens": 10}, (200, 5, 190, 0, 0)),
        ({"prompt_tokens": 200, "cached_tokens": 190}, (200, 5, 190, 0, 0)),
        ({"prompt_tokens": 200, "prompt_tokens_details": {"cached_tokens": 9, "cache_write_tokens": 3}},
         (200, 5, 9, 3, 0)),
        ({"input_tokens": 200, "input_tokens_details": {"cached_tokens": 190}}, (200, 5, 190, 0, 0)),
        # beside them: Anthropic
        ({"input_tokens": 20, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 50},
         (170, 5, 100, 50, 0)),
        ({"prompt_tokens": 20, "cache_read_input_tokens": 100, "total_tokens": 125}, (120, 5, 100, 0, 0)),
        ({"prompt_tokens": 20, "prompt_tokens_details": {"cached_tokens": 100}}, (120, 5, 100, 0, 0)),
        # nonsense is no discount
        ({"prompt_tokens": 20, "prompt_tokens_details": {"cached_tokens": -3}}, (20, 5, 0, 0, 0)),
        ({"prompt_tokens": 20, "prompt_tokens_details": [1], "cached_tokens": True}, (20, 5, 0, 0, 0)),
    ],
)  # fmt: skip
def test_cached_tokens(usage, expected):
    assert billed({"completion_tokens": 5, **usage}) == (Usage(*expected), False, False)


@pytest.mark.parametrize(
    ("completion", "total_tokens", "reasoning", "expected"),
    [
        (85, 105, 80, (85, 80)),  # inside
        (85, None, 80, (85, 80)),
        (5, 825, 800, (805, 800)),  # beside, and the total says so
        (5, None, 800, (805, 800)),  # beside, since a part is more than its whole
        (5, 25, 800, (805, 800)),
        (50, 100, 30, (80, 30)),  # beside, though it would fit inside
        (5, 65, None, (45, 40)),  # only the total tells
        (5, 10**15, None, (100, 95)),  # which is believed as far as max_tokens goes
        (0, None, 800, (800, 800)),
        (5, None, 10**15, (5 + UNSTATED_REASONING, UNSTATED_REASONING)),
        (10**15, None, 10**15, (UNSTATED_REASONING, UNSTATED_REASONING)),
    ],
)
def test_reasoning(completion, total_tokens, reasoning, expected):
    usage = {"prompt_tokens": 20, "completion_tokens": completion}
    usage |= {} if total_tokens is None else {"total_tokens": total_tokens}
    usage |= {} if reasoning is None else {"completion_tokens_details": {"reasoning_tokens": reasoning}}
    found = billed(usage)[0]
    assert (found.prompt_tokens, found.completion_tokens, found.reasoning_tokens) == (20, *expected)


@pytest.mark.parametrize(("stated", "tokens"), [(0, 100), (50, 55), (500, 505)])
def test_reasoning_beside_the_answer_ends_where_the_catalogue_says(stated, tokens):
    usage = {"prompt_tokens": 20, "completion_tokens": 5, "reasoning_tokens": 1000}
    # With 0, reasoning has what the answer leaves of max_tokens, and so it has with 50.
    assert billed(usage, reasoning_bound=stated)[0].completion_tokens == max(tokens, LIMIT)


NOTHING = [None, -1, -0.5, 1.5, math.nan, math.inf, True, False, "many", "-3", [3], {"a": 1}, 0]


@pytest.mark.parametrize("value", NOTHING, ids=repr)
def test_a_count_that_is_none_counts_as_what_was_possible(value):
    text = "four words of text"  # 18 bytes
    assert billed({"prompt_tokens": value, "completion_tokens": 7}, text)[0] == Usage(BOUND, 7)
    assert billed({"prompt_tokens": 7, "completion_tokens": value}, text)[0] == Usage(7, 18)
    usage, estimated, _ = billed({"prompt_tokens": value, "completion_tokens": value, "total_tokens": value}, text)
    assert (usage, estimated) == (Usage(BOUND, 18), True)
    assert billed(value, text)[0] == Usage(BOUND, 18)
    assert billed(None, "x" * 500)[0] == Usage(BOUND, LIMIT)


@pytest.mark.parametrize("value", [7, 7.0, "7"])
def test_a_count_in_another_type_is_a_count(value):
    assert billed({"prompt_tokens": value, "completion_tokens": value}) == (Usage(7, 7), False, False)


def test_more_than_was_possible_and_less_than_was_seen():
    assert billed({"prompt_tokens": 10**400, "completion_tokens": 5000}) == (Usage(BOUND, LIMIT), False, True)
    # 12,800 bytes are at least 100 tokens; above max_tokens if a server does not keep to it
    assert billed({"prompt_tokens": 9, "completion_tokens": 1}, "x" * 12_800) == (Usage(9, 100), False, True)
    assert billed({"prompt_tokens": 9, "completion_tokens": 1}, "x" * 25_600)[0] == Usage(9, 200)
    # what is not believed of a prompt is taken from its discount
    usage = {"prompt_tokens": 2000, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1900}}
    assert billed(usage)[0] == Usage(BOUND, 1, 900)


def test_an_error_is_billed_for_what_it_reports_and_nothing_else():
    def of_error(usage):
        return bill({"usage": usage}, prompt_bound=BOUND, max_tokens=LIMIT)

    assert of_error(None) is None and of_error({}) is None and of_error({"prompt_tokens": 0}) is None
    assert of_error({"prompt_tokens": 8}).usage == Usage(8, 0)
    assert of_error({"prompt_tokens": 10**9, "completion_tokens": 10**9}).usage == Usage(BOUND, LIMIT)


# ---- in the pool ----


def body(usage, text="Herbert", **message):
    return json.dumps({"choices": [{"message": {"content": text, **message}}], "usage": usage})


def ask(server, usage, cache=None, ledger=None, text="Herbert", calls=1, **fields):
    server.always = Fault(body=body(usage, text))
    member = Member("m", "x", 1.0, 10.0, base_url=server.url, **fields)
    pool = live_pool({"m": member}, ledger=ledger, cache=cache, agent_prompt="{query}")

    async def main() -> list[Reply]:
        async with pool:
            return [await pool.ask("m", "q" * 40, 10.0) for _ in range(calls)]

    return pool, asyncio.run(main())


def test_a_live_reply_costs_what_it_reports(tmp_path):
    with OpenAIServer() as server:
        beside = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 825}
        beside |= {"completion_tokens_details": {"reasoning_tokens": 800}}
        pool, (reply,) = ask(server, beside)
        assert reply.cost == pytest.approx(0.00807)  # (20 + 805 x 10) / 1e6
        assert pool.ledger.total().reasoning_tokens == 800
        assert pool.bound("m", "q" * 40) >= reply.cost  # the next call sets as much aside

        cached = {"prompt_tokens": 150, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 140}}
        dear = {"price_cached": 0.1, "price_request": 0.5}
        pool, (reply, again) = ask(server, cached, ReplyCache(tmp_path), calls=2, **dear)
        assert reply.cost == pytest.approx((10 + 14 + 50) / 1e6 + 0.5) == pool.ledger.spent_usd
        assert (again.cost, again.cached) == (0.0, True)  # our own cache is free, and its price stays
        assert pool.price("m", again.usage) == pool.price("m", reply.usage) == pytest.approx(reply.cost)
        other, (third,) = ask(server, cached, ReplyCache(tmp_path), **dear)  # off the disk
        assert other.price("m", third.usage) == pytest.approx(reply.cost) and third.cached

        pool, (reply,) = ask(server, {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})
        assert reply.cost == pytest.approx((TEMPLATE_TOKENS + 40 + 7 * 10) / 1e6)
        assert pool.ledger.total().estimated == 1


def test_a_live_reply_s_cache_is_billed_by_its_time_and_what_it_saved_is_booked(tmp_path):
    times = {"ephemeral_5m_input_tokens": 30, "ephemeral_1h_input_tokens": 20}
    details = {"cached_tokens": 50, "cache_creation_token_details": times}
    usage = {"prompt_tokens": 150, "completion_tokens": 5, "total_tokens": 155, "prompt_tokens_details": details}
    prices = {"price_cached": 0.1, "price_cache_write": 1.25, "price_cache_write_1h": 2.0}
    with OpenAIServer() as server:
        pool, (reply,) = ask(server, usage, ReplyCache(tmp_path), **prices)
        assert reply.cost == pytest.approx((50 + 50 * 0.1 + 30 * 1.25 + 20 * 2 + 50) / 1e6)
        booked = pool.ledger.total()
        assert (booked.cached_tokens, booked.cache_write_tokens) == (50, 50)
        assert booked.saved == pytest.approx(200e-6 - reply.cost) and reply.cost < pool.bound("m", "q" * 40)
        other, (again,) = ask(server, usage, ReplyCache(tmp_path), **prices)  # off the disk
        assert again.cached and other.price("m", again.usage) == pytest.approx(reply.cost)
        assert other.ledger.total().saved == 0.0


@pytest.mark.parametrize("count", [10**9, 10**300, "1" * 400])
def test_no_report_takes_more_than_was_set_aside(count):
    with OpenAIServer() as server:
        ledger = Ledger(max_cost_usd=0.01)
        usage = f'{{"prompt_tokens": {count}, "completion_tokens": {count}}}'
        server.always = Fault(body=body(None).replace("null", usage))
        member = Member("m", "x", 1.0, 10.0, base_url=server.url, max_tokens=50)
        pool = live_pool({"m": member}, ledger=ledger, agent_prompt="{query}")
        most = pool.bound("m", "q")

        async def main() -> Reply:
            async with pool:
                return await pool.ask("m", "q", 10.0)

        reply = asyncio.run(main())
        assert reply.error is None and reply.cost <= most and ledger.account.overrun == 0.0


def test_a_request_with_tools_has_a_longer_prompt_and_a_provider_may_add_its_own():
    with OpenAIServer() as server:
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        extra = {"request": {"tools": tools, "top_k": 5}, "extra_prompt_tokens": 300}
        _, (reply,) = ask(server, {"prompt_tokens": 10**6, "completion_tokens": 1}, **extra)
        assert reply.usage.prompt_tokens == TEMPLATE_TOKENS + 40 + len(json.dumps(tools)) + 300


@pytest.mark.parametrize("usage", [Usage(-1, 5), Usage(5, math.nan), Usage(2, 40_000), Usage(5, 5, usd=math.nan)])
def test_no_backend_is_believed_without_limit(usage):
    pool = Pool({"m": Member("m", "x", 1.0, 2.0)}, {"m": Scripted(faults=[Odd(usage=usage)])}, ledger=Ledger(1.0))
    reply = asyncio.run(pool.ask("m", "q", 5.0))
    assert reply.error is None and 0 < reply.cost <= pool.bound("m", "q") == pytest.approx(20e-6)
    assert pool.ledger.total().bounded == 1


def test_a_fee_is_paid_by_every_request_that_was_billed():
    faults = [Odd(error="server error: 500", usage=Usage(10, 0)), Odd(error="connection: reset"), None]
    ledger = Ledger()
    pool = Pool({"m": Member("m", "x", 0.0, 0.0, price_request=0.25)}, {"m": Scripted(faults=faults)}, ledger=ledger)
    reply = asyncio.run(pool.ask("m", "q", 20.0))
    assert reply.cost == 0.5 == pool.price("m", reply.usage) == ledger.spent_usd
    assert pool.bound("m", "q") == 0.25


# ---- a table with costs ----


def test_recorded_costs_need_no_prices_and_are_what_the_pool_bills():
    members = {"a": Member("a", "first"), "b": Member("b", "second", 1.0, 1.0)}
    base = {"query_id": "q", "query": "who?", "reply": "r", "prompt_tokens": 3, "completion_tokens": 4, "correct": 1}
    rows = [{**base, "member": "a", "cost": 0.5}, {**base, "member": "b"}]
    table = ReplyTable(rows, members)
    assert table.cost_matrix().tolist() == [[0.5, 7e-6]]
    pool = recorded_pool(table, ledger=Ledger(max_cost_usd=0.6))
    first, second = (asyncio.run(pool.ask("a", "x", 5.0, query_id="q")) for _ in range(2))
    assert (first.cost, pool.price("a", first.usage), pool.bound("a", "x")) == (0.5, 0.5, 0.5)
    assert second.error.startswith("over budget")
    text = policy_prompt("who?", list(table.catalogue.values()))[0]["content"]
    assert "\na: first\n" in text and "\nb $1/1: second\n" in text
    with pytest.raises(ValueError, match=r"row 1: field 'cost' is missing.*'a' has no price_in"):
        ReplyTable([{**base, "member": "a"}], members)
    with pytest.raises(ValueError, match="'a' has no prices"):
        Pool({"a": members["a"]}, {"a": Scripted()})


@pytest.mark.parametrize(
    ("prices", "free"),
    [
        ({}, True),
        ({"price_request": 1.0}, True),  # of the request, not of its tokens
        ({"price_reasoning": 1.0}, False),
        ({"price_tiers": (PriceTier(9, 0.0, 1.0),)}, False),
        ({"price_in": None, "price_out": None}, False),
    ],
)
def test_free_tokens(prices, free):
    assert Member("m", "x", **{"price_in": 0.0, "price_out": 0.0, **prices}).free_tokens is free


# ---- a catalogue and a price table ----


def catalogue(folder, fields):
    path = folder / "pool.yaml"
    path.write_text(f"members:\n  - {{name: m, descriptor: x, {fields}}}\n")
    return path


def test_every_price_in_a_catalogue(tmp_path):
    tiers = "[{above: 5000, price_in: 4, price_out: 30}, {above: 1000, price_in: 2, price_out: 15, price_cached: 0.2}]"
    fields = "price_in: 1e0, price_out: 10, price_cached: 0.1, price_cache_write: 1.25, price_reasoning: 20"
    loaded = load_catalogue(catalogue(tmp_path, f"{fields}, price_request: 5e-3, price_tiers: {tiers}"))["m"]
    assert loaded == FULL
    assert shared_member(shared_fields(loaded)) == FULL  # and in a checkpoint's files


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("price_in: 1.5e-07, price_out: 1", ["price_in", "price per token", "USD per million"]),
        ("price_in: 1, price_out: 2000000", ["price_out", "no model costs more"]),
        ("price_in: 1, price_out: 1, price_cached: -1", ["price_cached", "-1"]),
        ("price_in: 1, price_out: 1, price_request: 500", ["price_request", "500"]),
        ("price_in: 1, price_out: 1, price_request: .nan", ["price_request", "nan"]),
        ("price_in: 1, price_out: 1, price_tiers: []", ["price_tiers", "above"]),
        ("price_in: 1, price_out: 1, price_tiers: [{above: 9, price_in: 1}]", ["price_tiers", "price_out"]),
        ("price_in: 1, price_out: 1, price_tiers: [{above: 9, price_in: 1, price_out: .inf}]", ["price_tiers"]),
        ("price_in: 1, price_out: 1, price_tiers: [{above: 9, price_in: 1, price_out: 1, prize: 1}]", ["price_tiers"]),
        ("price_in: 1, price_out: 1, price_tiers: [{above: 9, price_in: 1, price_out: 1},"
         " {above: 9, price_in: 1, price_out: 1}]", ["two tiers"]),
        ("price_request: 1", ["price_in"]),
    ],
)  # fmt: skip
def test_a_bad_price_is_named(tmp_path, fields, words):
    with pytest.raises(ValueError) as caught:
        load_catalogue(catalogue(tmp_path, fields))
    assert all(word in str(caught.value) for word in ["pool.yaml", "'m'", *words])


PLAIN = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "mode": "chat"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"cache_read_input_token_cost": 1e-7}, {"price_cached": 0.1}),
        ({"input_cost_per_token_cache_hit": 1e-7}, {"price_cached": 0.1}),
        ({"cache_creation_input_token_cost": 1.25e-6}, {"price_cache_write": 1.25}),
        ({"cache_creation_input_token_cost_above_1hr": 2e-6}, {"price_cache_write_1h": 2.0}),
        ({"cache_creation_input_token_cost_above_12hr": 2e-6, "prompt_cache_min_tokens": 6144.0},
         {"price_cache_write_1h": 2.0, "cache_min_tokens": 6144}),
        # writing costs nothing on top, and is not cheaper than the prompt
        ({"cache_creation_input_token_cost": 0.0, "cache_creation_input_token_cost_above_1hr": 1e-7}, {}),
        (
            {"input_cost_per_token_above_200k_tokens": 2e-6, "cache_creation_input_token_cost_above_200k_tokens": 1e-7,
             "cache_creation_input_token_cost_above_1hr_above_200k_tokens": 4e-6},
            {"price_tiers": [
                {"above": 200_000, "price_in": 2.0, "price_out": 2.0, "price_cache_write_1h": 4.0}
            ]},
        ),
        ({"output_cost_per_reasoning_token": 8e-6}, {"price_reasoning": 8.0}),
        ({"input_cost_per_request": 0.01}, {"price_request": 0.01}),
        (
            {"input_cost_per_token_above_200k_tokens": 2.5e-6, "output_cost_per_token_above_200k_tokens": 3e-6,
             "cache_read_input_token_cost_above_200k_tokens": 2e-7, "input_cost_per_token_above_272k_tokens": 5e-6},
            {"price_tiers": [
                {"above": 200_000, "price_in": 2.5, "price_out": 3.0, "price_cached": 0.2},
                {"above": 272_000, "price_in": 5.0, "price_out": 2.0},
            ]},
        ),
        (
            {"tiered_pricing": [
                {"range": [0, 32000], "input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6},
                {"range": [32000, 1e6], "input_cost_per_token": 3e-6, "output_cost_per_token": 4e-6},
            ]},
            {"price_tiers": [{"above": 32_000, "price_in": 3.0, "price_out": 4.0}]},
        ),
        ({"input_cost_per_token": "1e-6"}, {}),
        # of no concern to a text chat call
        ({"input_cost_per_audio_token": 1e-4, "input_cost_per_image": 0.1, "output_cost_per_token_batches": 1e-7,
          "input_cost_per_token_priority": 9e-6, "cache_creation_input_token_cost_above_1hr_batches": 2e-6,
          "search_context_cost_per_query": {"search_context_size_low": 0.03}, "rpm": 5, "supports_vision": True,
          "file_search_cost_per_1k_calls": 2.5, "max_output_tokens": 9, "deprecation_date": "2024-01-01"}, {}),
        ({"a_new_fact": "fast", "another": True, "input_cost_per_furlong": 0.0}, {}),
    ],
)  # fmt: skip
def test_what_a_price_table_says_is_read_or_ignored_by_name(more, expected):
    assert litellm_fields({"k": {**PLAIN, **more}}, "k") == {"price_in": 1.0, "price_out": 2.0, **expected}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"input_cost_per_second": 0.001}, "input_cost_per_second"),
        ({"input_cost_per_character": 1e-7}, "input_cost_per_character"),
        ({"citation_cost_per_token": 1e-7}, "citation_cost_per_token"),
        ({"off_peak_pricing": {"input_cost_per_token": 1e-7}}, "off_peak_pricing"),
        ({"surcharge": "0.5 USD"}, "surcharge"),
        ({"anything_new": [{"deep": 3}]}, "anything_new"),
        ({"tiered_pricing": [{"range": [0, 9], "input_cost_per_query": 1}]}, "input_cost_per_query"),
        ({"tiered_pricing": [{"range": [5, 9], "input_cost_per_token": 1e-6}]}, "no prices"),
        ({"tiered_pricing": [{"input_cost_per_token": 1e-6, "output_cost_per_token": 1e-6}]}, "no range"),
        ({"input_cost_per_token": -1e-6}, "no price"),
        ({"output_cost_per_reasoning_token": math.nan}, "no price"),
        ({"cache_read_input_token_cost": True}, "no price"),
        ({"cache_read_input_token_cost": 1e-7, "input_cost_per_token_cache_hit": 2e-7}, "differ"),
        ({"prompt_cache_min_tokens": "many"}, "prompt_cache_min_tokens: 'many'"),
        ({"prompt_cache_min_tokens": 10.5}, "no number of tokens"),
        ({"mode": "embedding"}, "no text chat model"),
    ],
)
def test_what_a_catalogue_cannot_express_is_an_error(more, words):
    with pytest.raises(ValueError, match=words):
        litellm_fields({"k": {**PLAIN, **more}}, "k")
    stated = {"price_in": 1, "price_out": 2}
    if more.get("mode") != "embedding":
        assert litellm_fields({"k": {**PLAIN, **more}}, "k", stated) == {}  # the user has said it all


def test_a_model_that_always_searches_pays_for_it_and_a_request_that_changes_prices_is_refused():
    fee = {"search_context_cost_per_query": {"search_context_size_low": 0.005, "search_context_size_high": 0.012}}
    assert litellm_fields({"perplexity/sonar": {**PLAIN, **fee}}, "perplexity/sonar")["price_request"] == 0.012
    for request in ({"service_tier": "priority"}, {"web_search_options": {}}):
        with pytest.raises(ValueError, match=f"request sets '{next(iter(request))}'"):
            litellm_fields({"k": PLAIN}, "k", {"request": request})
    assert litellm_fields({"k": PLAIN}, "k", {"request": {"service_tier": "default"}})["price_in"] == 1.0
    caching = {
        "request": {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    }  # its prices are known, its time is not
    with pytest.raises(ValueError, match="cache_seconds: 300, or 3600"):
        litellm_fields({"k": PLAIN}, "k", caching)
    assert litellm_fields({"k": PLAIN}, "k", {**caching, "cache_seconds": 3600})["price_in"] == 1.0


def test_another_name_of_a_model_has_its_prices():
    table = {"latest": {"alias_of": "k"}, "k": PLAIN, "lost": {"alias_of": "gone"}, "self": {"alias_of": "self"}}
    assert litellm_fields(table, "latest") == litellm_fields(table, "k")
    with pytest.raises(ValueError, match="litellm's table has no model 'gone'"):
        litellm_fields(table, "lost")
    with pytest.raises(ValueError, match="litellm's table has no input_cost_per_token of 'self'"):
        litellm_fields(table, "self")


def test_a_key_that_a_price_table_holds_twice(tmp_path):
    (tmp_path / "prices.json").write_text('{"k": {"input_cost_per_token": 1, "input_cost_per_token": 2}}')
    path = tmp_path / "pool.yaml"
    path.write_text("price_table: prices.json\nmembers:\n  - {name: m, descriptor: x, price_from: 'litellm:k'}\n")
    with pytest.raises(ValueError, match=r"prices\.json: the key 'input_cost_per_token' is written twice"):
        load_catalogue(path)


def test_a_tier_with_a_field_that_there_is_not_names_those_that_there_are(tmp_path):
    path = tmp_path / "pool.yaml"
    tier = "{above: 200000, price_in: 2, price_out: 4, price_request: 1}"
    path.write_text(f"members:\n  - {{name: m, descriptor: x, price_in: 1, price_out: 2, price_tiers: [{tier}]}}\n")
    with pytest.raises(ValueError, match="a tier has no 'price_request'; it may have above, price_in, price_out"):
        load_catalogue(path)
