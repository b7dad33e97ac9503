"""What a provider bills, against the providers' own examples; what a prompt cache holds, and what a switch costs."""

import numpy as np
import pytest

from routers.data.billing import PriceTier, cost, highest, price, saved, total
from routers.data.catalogue import Member, load_catalogue, shared_fields, shared_member
from routers.data.prompt_cache import (
    Conversation,
    estimated_messages,
    estimated_tokens,
    expected_usd,
    switch_cost,
)
from routers.pool.usage import bill, within
from srpo.types import Usage

# Prices: https://platform.claude.com/docs/en/about-claude/pricing (Claude Opus 4.5 to 5, Sonnet 4.5, Haiku 4.5)
OPUS = Member("opus", "x", 5.0, 25.0, price_cached=0.5, price_cache_write=6.25, price_cache_write_1h=10.0)
SONNET = Member(
    "sonnet", "x", 3.0, 15.0, price_cached=0.3, price_cache_write=3.75, price_cache_write_1h=6.0, cache_seconds=300.0,
    cache_min_tokens=1024,
)  # fmt: skip
HAIKU = Member(
    "haiku", "x", 1.0, 5.0, price_cached=0.1, price_cache_write=1.25, price_cache_write_1h=2.0, cache_seconds=300.0,
    cache_min_tokens=4096,
)  # fmt: skip
# Prices and the rule of 1,024 and 128 tokens: https://openai.com/index/api-prompt-caching/
GPT_4O = Member(
    "gpt-4o", "x", 2.5, 10.0, price_cached=1.25, cache_seconds=300.0, cache_min_tokens=1024, cache_step_tokens=128
)
# Prices: https://ai.google.dev/gemini-api/docs/pricing; the minimum: https://ai.google.dev/gemini-api/docs/caching
GEMINI = Member(
    "gemini-2.5-pro", "x", 1.25, 10.0, price_cached=0.125, price_cache_hour=4.5, cache_seconds=300.0,
    cache_min_tokens=2048, price_tiers=(PriceTier(200_000, 2.5, 15.0, price_cached=0.25),),
)  # fmt: skip
# Prices: https://api-docs.deepseek.com/news/news0802
DEEPSEEK = Member("deepseek-chat", "x", 0.14, 0.28, price_cached=0.014)


def billed(usage, **document):
    found = bill({"usage": usage, **document}, prompt_bound=10**6, max_tokens=10**5, seen="a text of some words")
    assert not found.estimated and not found.bounded
    return found.usage


# ---- the providers' own examples ----


def test_anthropic_s_example_of_a_coding_session():
    """https://platform.claude.com/docs/en/about-claude/pricing: $0.705 without and $0.525 with 40,000 of 50,000 input
    tokens read from the cache; $0.08 of both is for an hour of their runtime."""
    assert cost(OPUS, 50_000, 15_000) == pytest.approx(0.705 - 0.08, abs=1e-12)
    usage = billed({"input_tokens": 10_000, "cache_read_input_tokens": 40_000, "output_tokens": 15_000})
    assert usage == Usage(50_000, 15_000, 40_000)
    assert price(OPUS, usage) == pytest.approx(0.525 - 0.08, abs=1e-12)
    assert saved(OPUS, usage) == pytest.approx(0.705 - 0.525, abs=1e-12)


def test_anthropic_s_example_of_two_times_to_live():
    """https://platform.claude.com/docs/en/build-with-claude/prompt-caching: the usage of a call with both. The sum, at
    Sonnet 4.5's prices, is ours."""
    usage = billed(
        {
            "input_tokens": 2048,
            "cache_read_input_tokens": 1800,
            "cache_creation_input_tokens": 248,
            "output_tokens": 503,
            "cache_creation": {"ephemeral_5m_input_tokens": 148, "ephemeral_1h_input_tokens": 100},
        }
    )
    assert usage == Usage(4096, 503, 1800, 248, cache_write_1h_tokens=100)
    by_hand = (2048 * 3 + 1800 * 0.3 + 148 * 3.75 + 100 * 6 + 503 * 15) / 1e6
    assert by_hand == pytest.approx(0.015384) and price(SONNET, usage) == pytest.approx(by_hand, abs=1e-12)


def test_openai_s_example_of_a_cached_prompt():
    """https://openai.com/index/api-prompt-caching/: the usage of a call whose prompt was sent before, and the prices.
    The sum is ours."""
    said = {"total_tokens": 2306, "prompt_tokens": 2006, "completion_tokens": 300}
    usage = billed({**said, "prompt_tokens_details": {"cached_tokens": 1920, "audio_tokens": 0}})
    assert usage == Usage(2006, 300, 1920)
    by_hand = (86 * 2.5 + 1920 * 1.25 + 300 * 10) / 1e6
    assert by_hand == pytest.approx(0.005615) and price(GPT_4O, usage) == pytest.approx(by_hand, abs=1e-12)
    # 1,920 is what the model of the cache foretells: the most that is 1,024 and some times 128
    again = Conversation().then([2006], 0.0).asked("gpt-4o").then([2006], 60.0)
    assert again.expected(GPT_4O, 300).cached_tokens == 1920
    # what is written costs no more than what is fresh there
    assert expected_usd(GPT_4O, again, 300) == pytest.approx(by_hand, abs=1e-12)
    short = Conversation().then([1023], 0.0).asked("gpt-4o").then([1023], 60.0)
    assert short.expected(GPT_4O) == Usage(1023, 0)


def test_google_s_explicit_cache():
    """https://discuss.ai.google.dev/t/gemini-explicit-context-cache-creation-billing/172194, a user's sum at Google's
    prices: 100,000 tokens for 5 minutes are $0.125 to read and $0.0375 to keep. That both are due says Google's
    https://docs.cloud.google.com/vertex-ai/generative-ai/docs/context-cache/context-cache-overview."""
    first = Conversation().then([100_000], 0.0)
    assert expected_usd(GEMINI, first) == pytest.approx(0.125 + 0.0375, abs=1e-12)
    # a minute later: read at a tenth, and kept for a minute longer
    later = first.asked(GEMINI.name).then([100_000], 60.0)
    assert expected_usd(GEMINI, later) == pytest.approx(0.0125 + 0.1 * 4.5 / 60, abs=1e-12)
    # above 200,000 tokens the tier's prices hold for the whole prompt, the cached part too
    usage = billed(
        None,
        usageMetadata={
            "promptTokenCount": 300_000,
            "cachedContentTokenCount": 250_000,
            "candidatesTokenCount": 1000,
            "thoughtsTokenCount": 500,
            "totalTokenCount": 301_500,
        },
    )
    assert usage == Usage(300_000, 1500, 250_000, reasoning_tokens=500)
    by_hand = (50_000 * 2.5 + 250_000 * 0.25 + 1500 * 15) / 1e6
    assert price(GEMINI, usage) == pytest.approx(by_hand, abs=1e-12)


def test_deepseek_s_hits_and_misses():
    """https://api-docs.deepseek.com/news/news0802: $0.014 for hits and $0.14 for misses, up to 90 % less."""
    said = {"prompt_tokens": 1000, "prompt_cache_hit_tokens": 960, "prompt_cache_miss_tokens": 40}
    usage = billed({**said, "completion_tokens": 100, "total_tokens": 1100})
    assert usage == Usage(1000, 100, 960)
    assert price(DEEPSEEK, usage) == pytest.approx((40 * 0.14 + 960 * 0.014 + 100 * 0.28) / 1e6, abs=1e-12)
    assert cost(DEEPSEEK, 1000, 0, cached_tokens=1000) == pytest.approx(0.1 * cost(DEEPSEEK, 1000, 0), abs=1e-12)


# ---- how usage is reported ----


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        # Gemini without a total: thoughts stand beside the candidates, tool results beside the prompt
        ({"promptTokenCount": 90, "toolUsePromptTokenCount": 10, "candidatesTokenCount": 7, "thoughtsTokenCount": 5},
         Usage(100, 12, reasoning_tokens=5)),
        # it thought, and wrote nothing
        ({"promptTokenCount": 100, "thoughtsTokenCount": 5, "totalTokenCount": 105},
         Usage(100, 5, reasoning_tokens=5)),
        # only the times say what was written, beside the input
        ({"input_tokens": 10, "output_tokens": 5, "cache_creation": {"ephemeral_1h_input_tokens": 90}},
         Usage(100, 5, 0, 90, cache_write_1h_tokens=90)),
        # a gateway that counts all in the prompt, and keeps the times
        ({"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105, "cache_read_input_tokens": 50,
          "cache_creation_input_tokens": 30, "prompt_tokens_details": {"cached_tokens": 50,
          "cache_creation_token_details": {"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 10}}},
         Usage(100, 5, 50, 30, cache_write_1h_tokens=10)),
        # nonsense is no discount
        ({"input_tokens": 100, "output_tokens": 5, "cache_creation": {"ephemeral_1h_input_tokens": -1}},
         Usage(100, 5)),
        ({"input_tokens": 100, "output_tokens": 5, "cache_creation": 9}, Usage(100, 5)),
    ],
)  # fmt: skip
def test_counts_by_other_names(usage, expected):
    assert billed(usage) == expected


def test_writes_without_a_time_are_long_where_the_member_keeps_them_for_long():
    said = {"usage": {"input_tokens": 10, "output_tokens": 5, "cache_creation_input_tokens": 90}}
    bounds = {"prompt_bound": 10**3, "max_tokens": 100, "seen": "words"}
    assert bill(said, **bounds).usage.cache_write_1h_tokens == 0
    assert bill(said, **bounds, long_writes=True).usage.cache_write_1h_tokens == 90
    # no backend makes a part larger than its whole
    kept, other = within(Usage(100, 5, 0, 90, cache_write_1h_tokens=10**6), 100, 100, 1.0)
    assert other and kept.cache_write_1h_tokens == 90


def test_long_writes_and_what_is_kept_by_hand():
    usage = Usage(1000, 0, 100, 600, cache_write_1h_tokens=200, cache_token_hours=500.0)
    kept = Member("m", "x", 1.0, 1.0, price_cached=0.1, price_cache_write=1.25, price_cache_write_1h=2.0,
                  price_cache_hour=4.0)  # fmt: skip
    assert price(kept, usage) == pytest.approx((300 + 10 + 400 * 1.25 + 200 * 2 + 500 * 4) / 1e6, abs=1e-15)
    plain = Member("m", "x", 1.0, 1.0, price_cache_write=1.25)  # a time without a price of its own costs the usual one
    assert price(plain, usage) == pytest.approx((400 + 600 * 1.25) / 1e6, abs=1e-15)
    both = total([usage, usage])
    assert (both.cache_write_1h_tokens, both.cache_token_hours) == (400, 1000.0)
    assert price(kept, both) == pytest.approx(2 * price(kept, usage))
    with pytest.raises(ValueError, match="more cached"):
        cost(kept, 10, 0, cache_write_tokens=5, cache_write_1h_tokens=6)
    with pytest.raises(ValueError, match="negative"):
        cost(kept, 10, 0, cache_token_hours=-1.0)
    assert saved(kept, Usage(10, 10, usd=0.5)) == 0.0


NAMES = (
    *("prompt_tokens", "input_tokens", "promptTokenCount", "completion_tokens", "output_tokens", "total_tokens"),
    *("candidatesTokenCount", "thoughtsTokenCount", "toolUsePromptTokenCount", "totalTokenCount", "cached_tokens"),
    *("prompt_cache_hit_tokens", "prompt_cache_miss_tokens", "cache_read_input_tokens", "cachedContentTokenCount"),
    *("cache_creation_input_tokens", "cache_write_tokens", "reasoning_tokens", "ephemeral_1h_input_tokens"),
)
PLACES = ("prompt_tokens_details", "input_tokens_details", "completion_tokens_details", "cache_creation")
VALUES = (None, -1, 0, 1, 7, 60, 300, 10**9, "40", "x", 2.0, 2.5, True, [3], float("nan"))


def test_no_report_makes_parts_larger_than_their_whole_or_a_call_dearer_than_what_was_set_aside():
    rng = np.random.default_rng(1)

    def some():
        return {str(name): VALUES[rng.integers(len(VALUES))] for name in rng.choice(NAMES, rng.integers(0, 8))}

    for number in range(10_000):
        usage = {**some(), **{str(place): some() for place in rng.choice(PLACES, rng.integers(0, 3))}}
        document = {("usage", "usageMetadata")[rng.integers(2)]: usage}
        prompt, answer = int(rng.integers(1, 500)), int(rng.integers(1, 200))
        found = bill(
            document,
            prompt_bound=prompt,
            max_tokens=answer,
            seen="four",
            reasoning_bound=0,
            long_writes=bool(number % 2),
        ).usage
        assert 0 <= found.cache_write_1h_tokens <= found.cache_write_tokens
        assert found.cached_tokens + found.cache_write_tokens <= found.prompt_tokens <= prompt
        assert 0 <= found.reasoning_tokens <= found.completion_tokens <= answer
        member = _any_member(rng, "m")
        assert price(member, found) <= highest(member, prompt, answer) * (1 + 1e-12), document


# ---- the cache of a conversation ----


def test_a_conversation_with_one_member_pays_for_its_history_once():
    talk = Conversation().then([("system", 2000), ("question", 100)], 0.0)
    assert talk.expected(SONNET, 50) == Usage(2100, 50, 0, 2100)
    talk = talk.asked("sonnet").then([("system", 2000), ("question", 100), ("answer", 50), ("more", 30)], 200.0)
    assert talk.expected(SONNET) == Usage(2180, 0, 2100, 80)
    talk = talk.asked("sonnet").then([*talk.messages, ("and", 20)], 499.0)  # reading kept it warm from 200 on
    assert talk.expected(SONNET) == Usage(2200, 0, 2180, 20)
    cut = talk.then([("system", 2000), ("a summary", 60), ("and", 20)], 499.0)  # what differs ends what is shared
    assert cut.expected(SONNET) == Usage(2080, 0, 2000, 80)


@pytest.mark.parametrize(("seconds", "cached"), [(0.0, 2000), (299.9, 2000), (300.0, 0), (301.0, 0)])
def test_a_prefix_expires(seconds, cached):
    talk = Conversation().then([2000], 0.0).asked("sonnet").then([2000, 10], seconds)
    assert talk.expected(SONNET).cached_tokens == cached
    hour = Member("sonnet", "x", 3.0, 15.0, price_cached=0.3, price_cache_write_1h=6.0, cache_seconds=3600.0)
    found = talk.expected(hour)
    assert (found.cached_tokens, found.cache_write_tokens, found.cache_write_1h_tokens) == (2000, 10, 10)


def test_what_is_too_short_or_between_two_steps_is_fresh():
    stepped = Member("m", "x", 1.0, 1.0, cache_seconds=10.0, cache_min_tokens=100, cache_step_tokens=64)
    talk = Conversation().then([300], 0.0)
    assert talk.expected(stepped) == Usage(300, 0, 0, 256)
    assert talk.asked("m").then([300, 20], 1.0).expected(stepped) == Usage(320, 0, 256, 64)
    assert Conversation().then([127], 0.0).expected(stepped) == Usage(127, 0)  # 64 is below the minimum
    assert Conversation().then([128], 0.0).expected(stepped) == Usage(128, 0, 0, 128)


def test_a_warm_dear_member_is_cheaper_than_a_cold_cheap_one():
    talk = Conversation().then([40_000], 0.0).asked("sonnet").then([40_000, 500], 60.0)
    warm, cold = expected_usd(SONNET, talk, 200), expected_usd(HAIKU, talk, 200)
    assert warm == pytest.approx((40_000 * 0.3 + 500 * 3.75 + 200 * 15) / 1e6, abs=1e-12)  # $0.016875
    assert cold == pytest.approx((40_500 * 1.25 + 200 * 5) / 1e6, abs=1e-12)  # $0.051625
    assert switch_cost(SONNET, HAIKU, talk) == pytest.approx(40_000 * (1.25 - 0.1) / 1e6, abs=1e-12)  # $0.046
    assert switch_cost(SONNET, SONNET, talk) == switch_cost(HAIKU, SONNET, talk) == 0.0
    late = Conversation(talk.messages, 300.0, talk.sent, talk.last)  # five minutes later there is nothing to lose
    assert expected_usd(HAIKU, late, 200) < expected_usd(SONNET, late, 200)
    assert switch_cost(SONNET, HAIKU, late) == 0.0


def test_switching_there_and_back():
    talk = Conversation().then([10_000], 0.0).asked("sonnet")
    talk = talk.then([10_000, 1000], 100.0)
    assert talk.expected(HAIKU) == Usage(11_000, 0, 0, 11_000)
    talk = talk.asked("haiku").then([10_000, 1000, 500], 200.0)
    assert talk.last == "haiku"
    # Sonnet still holds its own prefix; 1,000 tokens were at Haiku alone, and are what going back loses
    assert talk.expected(SONNET) == Usage(11_500, 0, 10_000, 1500)
    assert switch_cost(HAIKU, SONNET, talk) == pytest.approx(1000 * (3.75 - 0.3) / 1e6, abs=1e-12)
    assert talk.expected(HAIKU) == Usage(11_500, 0, 11_000, 500)
    assert switch_cost(SONNET, HAIKU, talk) == 0.0  # Haiku holds as much, and more
    gone = talk.then(talk.messages, 300.0)  # Sonnet's is gone, Haiku's is not
    assert gone.expected(SONNET).cached_tokens == 0 and gone.expected(HAIKU).cached_tokens == 11_000
    assert switch_cost(HAIKU, SONNET, gone) == pytest.approx(11_000 * (3.75 - 0.3) / 1e6, abs=1e-12)
    # what is warm there is held by this member's own rules: 11,000 is no multiple of 128, 10,880 is
    assert switch_cost(HAIKU, GPT_4O, gone) == pytest.approx(10_880 * (2.5 - 1.25) / 1e6, abs=1e-12)


def test_a_member_without_a_cache_costs_what_it_always_did():
    plain = Member("plain", "x", 2.0, 8.0, price_cached=0.5)
    talk = Conversation().then([5000], 0.0).asked("plain").then([5000, 100], 1.0)
    assert talk.expected(plain, 7) == Usage(5100, 7)
    assert expected_usd(plain, talk, 7) == cost(plain, 5100, 7) == (5100 * 2 + 7 * 8) / 1e6
    assert switch_cost(SONNET, plain, talk) == switch_cost(plain, SONNET, talk) == 0.0


def test_parts_add_up_and_nothing_is_above_what_was_set_aside():
    rng = np.random.default_rng(0)
    calls = 0
    while calls < 10_000:
        some = [_any_member(rng, name) for name in "abc"]
        talk, messages = Conversation(), []
        for _ in range(20):
            if messages and rng.random() < 0.1:
                messages = messages[: rng.integers(len(messages))]  # a client that forgets
            messages = [*messages, *map(int, rng.integers(0, 4000, rng.integers(1, 4)))]
            talk = talk.then(messages, talk.now + float(rng.exponential(200)))
            member, answer = some[rng.integers(3)], int(rng.integers(0, 500))
            used = talk.expected(member, answer)
            fresh = used.prompt_tokens - used.cached_tokens - used.cache_write_tokens
            assert used.prompt_tokens == sum(messages) and fresh >= 0
            assert min(used.cached_tokens, used.cache_write_tokens, used.cache_token_hours) >= 0
            assert used.cache_write_1h_tokens in (0, used.cache_write_tokens)
            paid, most = price(member, used), highest(member, sum(messages), answer)
            assert paid <= most * (1 + 1e-12), (member, used)
            assert highest(member, sum(messages) + 1, answer + 1) >= most
            talk, calls = talk.asked(member.name), calls + 1


def _any_member(rng, name):
    def some(low=0.0):
        return float(rng.uniform(low, 10)) if rng.random() < 0.6 else None

    seconds = [None, 60.0, 300.0, 3600.0, 86_400.0][rng.integers(5)]
    tiers = tuple(
        PriceTier(int(above), float(rng.uniform(0, 20)), float(rng.uniform(0, 20)), some(), some(), some(), some())
        for above in rng.choice([500, 3000, 20_000], rng.integers(0, 3), replace=False)
    )
    return Member(
        name, "x", float(rng.uniform(0, 10)), float(rng.uniform(0, 30)), price_cached=some(), price_cache_write=some(),
        price_cache_write_1h=some(), price_reasoning=some(), price_cache_hour=some() or 0.0, price_tiers=tiers,
        price_request=some() or 0.0, cache_seconds=seconds, cache_min_tokens=int(rng.integers(0, 3000)),
        cache_step_tokens=int(rng.choice([1, 64, 128])),
    )  # fmt: skip


def test_what_is_no_conversation_is_refused():
    talk = Conversation().then([5], 10.0)
    for messages in ([-1], [1.5], [True], [("text", "5")]):
        with pytest.raises(ValueError, match="whole number"):
            talk.then(messages, 11.0)
    for now in (9.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="time goes on"):
            talk.then([5], now)


def test_messages_of_a_request_are_told_apart_by_all_that_they_hold():
    ask = {"role": "user", "content": "Größe?"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    first, second = estimated_messages([ask, call])
    assert first == estimated_messages([{"content": "Größe?", "role": "user"}])[0]  # whatever the order of fields
    assert second != estimated_messages([{**call, "tool_calls": []}])[0]
    assert estimated_tokens("Größe?") == 2 and estimated_tokens("") == 0 and estimated_tokens("\ud800") == 1


# ---- in a catalogue ----

CACHE = "price_cache_write_1h: 6, price_cache_hour: 4.5, cache_seconds: 300, cache_min_tokens: 1024, "
CACHE += "cache_step_tokens: 128"


def catalogue(folder, fields):
    path = folder / "pool.yaml"
    path.write_text(f"members:\n  - {{name: m, descriptor: x, price_in: 1, price_out: 2, {fields}}}\n")
    return path


def test_the_cache_of_a_member_stands_in_a_catalogue_and_in_router_yaml(tmp_path):
    member = load_catalogue(catalogue(tmp_path, CACHE))["m"]
    assert (member.price_cache_write_1h, member.price_cache_hour, member.cache_seconds) == (6.0, 4.5, 300.0)
    assert (member.cache_min_tokens, member.cache_step_tokens) == (1024, 128)
    assert shared_member(shared_fields(member)) == member
    before = {name: value for name, value in shared_fields(member).items() if "cache" not in name}
    assert shared_member(before) == Member("m", "x", 1.0, 2.0)  # of a router that was saved before these fields


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("price_cache_write_1h: -1", "price_cache_write_1h"),
        ("price_cache_write_1h: 6e-6", "price per token"),
        ("price_cache_hour: 4500000", "price_cache_hour"),
        ("cache_seconds: 0", "seconds > 0"),
        ("cache_seconds: 1e9", "at most a week"),
        ("cache_min_tokens: -1", "cache_min_tokens"),
        ("cache_min_tokens: 1.5", "cache_min_tokens"),
        ("cache_step_tokens: 0", "cache_step_tokens"),
    ],
)
def test_a_bad_cache_field_is_named(tmp_path, fields, words):
    with pytest.raises(ValueError, match=words):
        load_catalogue(catalogue(tmp_path, fields))
