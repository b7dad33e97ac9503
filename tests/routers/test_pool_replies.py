"""What endpoints say with a status 200, and what of it is the member's answer: a real server in every shape in use."""

import asyncio
import json
import logging
import time
from typing import Any

import pytest
from openai_server import Fault, OpenAIServer

from routers.data.catalogue import Member
from routers.pool import Pool, ReplyCache, Retry, kind, live_pool
from srpo.types import Reply

USAGE = {"prompt_tokens": 10, "completion_tokens": 5}


@pytest.fixture
def server():
    with OpenAIServer() as running:
        yield running


def pool_of(server: OpenAIServer, **options: Any) -> Pool:
    return live_pool({"a": Member("a", "x", 1.0, 2.0, base_url=server.url)}, retry=Retry(base=0.01), **options)


def ask(pool: Pool, query: str = "two words", deadline: float = 10.0) -> Reply:
    async def main() -> Reply:
        async with pool:
            return await pool.ask("a", query, deadline)

    return asyncio.run(main())


def replied(server: OpenAIServer, document: Any, **fault: Any) -> Reply:
    """What the pool makes of this body, sent to every attempt."""
    server.always = Fault(raw=document if isinstance(document, bytes) else json.dumps(document).encode(), **fault)
    return ask(pool_of(server))


def completion(content: Any, finish: str | None = "stop", choice: Any = None, **message: Any) -> dict[str, Any]:
    told = {"role": "assistant", "content": content, **message}
    return {"choices": [{"index": 0, "message": told, "finish_reason": finish, **(choice or {})}], "usage": USAGE}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


# --------------------------------------------------------------------------------------------------- parts and tools


@pytest.mark.parametrize(
    ("content", "message", "expected"),
    [
        ([text("Frank "), text("Herbert")], {}, "Frank Herbert"),
        ([{"type": "output_text", "text": "Herbert"}], {}, "Herbert"),
        (["Frank ", text("Herbert")], {}, "Frank Herbert"),
        ([{"text": "Herbert"}], {}, "Herbert"),
        ([None, {"type": "text", "text": None}, text("Herbert"), {"type": "text"}], {}, "Herbert"),
        (text("Herbert"), {}, "Herbert"),
        ([{"type": "text", "text": {"value": "Herbert", "annotations": []}}], {}, "Herbert"),
        ([{"type": "refusal", "refusal": "I cannot say."}], {}, "I cannot say."),
        (None, {"refusal": "I cannot say."}, "I cannot say."),
        ("", {"refusal": "I cannot say."}, "I cannot say."),
        ("Herbert", {"refusal": None, "tool_calls": []}, "Herbert"),
    ],
)
def test_content_in_parts_and_refusals_are_the_members_words(server, content, message, expected):
    reply = replied(server, completion(content, **message))
    assert (reply.text, reply.error, len(server.requests)) == (expected, None, 1)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (10, 5)


def test_parts_that_are_no_text_are_named(server, caplog):
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    with caplog.at_level(logging.WARNING):
        assert replied(server, completion([image, text("Herbert"), image])).text == "Herbert"
    (record,) = [r for r in caplog.records if r.name.startswith("routers")]
    assert "'a'" in record.getMessage() and "image_url" in record.getMessage()
    reply = replied(server, completion([image, {"type": "audio"}]))
    assert reply.error == "empty reply: no text, parts of type image_url, audio (finish_reason stop)"


@pytest.mark.parametrize(
    ("content", "told"),
    [(7, "a number"), ([[]], "list"), ([text("a"), {"type": "text", "text": 5}], "number"), (True, "boolean")],
)
def test_content_that_is_no_text_says_what_it_is(server, content, told):
    reply = replied(server, completion(content))
    assert reply.error.startswith("malformed reply: the content is not text") and told in reply.error


def test_a_call_of_a_tool_is_no_answer_and_names_the_tool(server):
    call = [{"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}]
    reply = replied(server, completion(None, "tool_calls", tool_calls=call))
    assert reply.error == "empty reply: no text, calls of the tools look_up (finish_reason tool_calls)"
    assert len(server.requests) == 1


def test_the_first_choice_with_an_answer_counts(server):
    two = {"choices": [{"message": {"content": ""}}, {"message": {"content": "B"}}], "usage": USAGE}
    assert replied(server, two).text == "B"


# --------------------------------------------------------------------------------- errors that come with a status 200


@pytest.mark.parametrize(
    ("document", "expected", "words"),
    [
        ({"error": {"message": "model is down", "code": 502}}, "server error", "model is down"),
        ({"error": {"message": "who are you", "code": "401"}}, "bad request", "who are you"),
        ({"error": {"message": "no such model", "type": "invalid_request_error"}}, "bad request", "no such model"),
        ({"error": "it broke"}, "server error", "it broke"),
        ({"error": True, "message": "it broke"}, "server error", "it broke"),
        ({"object": "error", "message": "it broke", "code": 50001}, "server error", "it broke"),
        ({"detail": [{"loc": ["body"], "msg": "field required"}]}, "server error", "field required"),
        ([{"error": {"code": 400, "message": "it broke", "status": "INVALID_ARGUMENT"}}], "bad request", "it broke"),
        ({"choices": None, "base_resp": {"status_code": 1013, "status_msg": "it broke"}}, "server error", "it broke"),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, "server error", "busy"),
        ({"error": {"message": "of the provider", "code": 400, "metadata": {"raw": "no tools"}}}, "bad request",
         "of the provider (no tools)"),
        ({**completion("half an"), "error": {"message": "it broke"}}, "server error", "it broke"),
        (completion("half an", "error"), "server error", "finish_reason error"),
        (completion("half an", "error", {"error": {"code": 502, "message": "it broke"}}), "server error", "it broke"),
        (completion("half an", "stop", {"error": {"message": "it broke"}}), "server error", "it broke"),
        (completion("half an", "abort"), "server error", "abort"),
        (completion("half an", "internal_error"), "server error", "internal_error"),
        (completion("half an", {"type": "abort", "message": "x"}), "server error", "abort"),  # type: ignore[arg-type]
        (completion("half an", "insufficient_system_resource"), "server error", "insufficient_system_resource"),
        (completion("half an", "content_filter"), "filtered", "content_filter"),
        (completion(None, "content_filter"), "filtered", "content_filter"),
        (completion("half an", "SAFETY"), "filtered", "SAFETY"),
    ],
)  # fmt: skip
def test_an_error_with_status_200_is_told_in_the_providers_words_and_asked_once(
    server, tmp_path, document, expected, words
):
    server.always = Fault(raw=json.dumps(document).encode())
    pool = pool_of(server, cache=ReplyCache(tmp_path))
    reply = ask(pool)
    assert (kind(reply), reply.text, len(server.requests)) == (expected, "", 1)
    assert words in reply.error
    assert not list(tmp_path.rglob("*.json"))  # never cached: the next call asks again
    server.always = Fault()
    assert ask(pool).text == "a plain reply" and len(server.requests) == 2


@pytest.mark.parametrize(
    "beside", [{"error": None}, {"error": {}}, {"error": {"code": 0, "message": ""}}, {"type": "x"}]
)
def test_what_is_no_error_beside_an_answer_is_none(server, beside):
    document = {**completion("Herbert"), "base_resp": {"status_code": 0, "status_msg": "success"}, **beside}
    assert replied(server, document).text == "Herbert"


@pytest.mark.parametrize(
    "error",
    [{"code": 429, "message": "slow"}, {"code": "429"}, {"type": "rate_limit_error"}, {"code": "rate_limit_exceeded"}],
)
def test_a_rate_limit_with_status_200_is_waited_for(server, error):
    server.faults = [Fault(raw=json.dumps({"error": error}).encode(), headers=(("Retry-After", "0.3"),))]
    reply = ask(pool_of(server))
    assert reply.error is None and len(server.requests) == 2
    assert server.arrivals[1] - server.arrivals[0] >= 0.3


# ----------------------------------------------------------------------------------------------- no money left there


@pytest.mark.parametrize(
    ("status", "error", "headers"),
    [
        (429, {"message": "no", "type": "insufficient_quota", "code": "insufficient_quota"}, ()),
        (429, {"message": "no", "code": "insufficient_quota"}, (("Retry-After", "1"),)),
        (429, {"message": "no", "type": "insufficient_quota"}, ()),
        (429, {"message": "You exceeded your current quota, please check your plan"}, ()),
        (429, {"message": "insufficient_quota"}, ()),
        (403, {"message": "no", "code": "insufficient_user_quota"}, ()),
        (403, {"message": "Insufficient account balance"}, ()),
        (402, {"message": "Payment"}, ()),
        (400, {"message": "Your credit balance is too low to access the API", "type": "invalid_request_error"}, ()),
        (500, {"message": "no", "code": "insufficient_quota"}, ()),
        (502, {"message": "upstream", "metadata": {"raw": '{"error":{"code":"insufficient_quota"}}'}}, ()),
        (200, {"message": "Insufficient credits", "code": 402}, ()),
        (200, {"message": "no", "type": "insufficient_quota"}, ()),
        (400, {"message": "ExceededBudget: User has exceeded their budget", "type": "budget_exceeded"}, ()),
        (403, {"message": "Key limit exceeded (total limit)", "code": 403}, ()),
        (429, {"message": "\u60a8\u7684\u8d26\u6237\u5df2\u6b20\u8d39", "code": "1113"}, ()),
    ],
)
def test_no_money_at_the_provider_is_not_retried_and_opens_the_breaker(server, status, error, headers):
    server.always = Fault(status=status, raw=json.dumps({"error": error}).encode(), headers=headers)
    pool = pool_of(server)
    first, second = ask(pool), ask(pool)
    assert kind(first) == "no quota" and error["message"] in first.error
    assert kind(second) == "circuit open" and "no quota" in second.error and len(server.requests) == 1


def test_a_plain_body_may_say_it_too(server):
    server.always = Fault(status=429, raw=b"insufficient_quota", headers=(("Content-Type", "text/plain"),))
    assert kind(ask(pool_of(server))) == "no quota" and len(server.requests) == 1


def test_a_quota_of_a_minute_is_waited_for(server):
    words = {"error": {"message": "You exceeded your current quota. Please retry in 0.1s."}}
    server.faults = [Fault(status=429, raw=json.dumps(words).encode())]
    assert ask(pool_of(server)).error is None and len(server.requests) == 2


def test_a_question_about_money_that_is_repeated_in_an_error_opens_nothing(server):
    question = "What does insufficient funds mean?"
    server.always = Fault(status=400, raw=json.dumps({"error": f"cannot read: {question}"}).encode())
    pool = pool_of(server)
    assert [kind(ask(pool, question)) for _ in range(2)] == ["bad request"] * 2


# --------------------------------------------------------------------------------------- bodies that are hard to read


@pytest.mark.parametrize(
    ("body", "headers", "requests", "words"),
    [
        (b"<html>502 Bad\n  Gateway</html>", (("Content-Type", "text/html"),), 1,
         "the body (text/html) is not JSON: <html>502 Bad Gateway</html>"),
        (b"", (), 5, "the body is empty"),
        (b'data: {"choices": []}\n\ndata: [DONE]\n\n', (), 1, "a stream of events, which was not asked for"),
        (b": ping\n\n", (("Content-Type", "text/event-stream"),), 1, "a stream of events"),
        (b"[" * 100_000, (), 5, "is not JSON"),
        (b"OK", (("Content-Type", "text/plain"),), 1, "the body (text/plain) is not JSON: OK"),
        (b'{"choices": [{"mess', (), 5, "is not JSON"),
        (b"7", (), 1, "no choices"),
        (b'"text"', (), 1, "no choices"),
        (b'{"choices": {"0": 1}}', (), 1, "no choices"),
        (b'{"choices": [null, 3]}', (), 1, "no choices"),
        (b'{"choices": [{"text": "x"}]}', (), 1, "no message"),
        (b'{"choices": [{"message": null}]}', (), 5, "no message"),
        (b'{"choices": []}', (), 5, "no choices in the reply"),
        (b'{"choices": null, "id": "x"}', (), 5, "no choices in the reply"),
        (b'{"object": "response", "output": []}', (), 1, "no choices in the reply; its fields: object, output"),
        (b"null", (), 5, "no choices in the reply"),
        (b'{"choices": [{"message": {"content": 42}}]}', (), 5, "the content is not text: it is a number"),
    ],
)  # fmt: skip
def test_a_body_that_says_nothing_is_named_shortly(server, body, headers, requests, words):
    server.always = Fault(raw=body, headers=headers)
    reply = ask(pool_of(server))
    assert kind(reply) == "malformed reply" and words in reply.error and len(reply.error) <= 200
    assert len(server.requests) == requests


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"choices":[{"message":{"content":"caf\xe9"}}]}', "caf\ufffd"),
        (b'{"choices":[{"message":{"content":"a\\ud835b"}}]}', "a?b"),
        (b'{"choices":[{"message":{"content":"\\ud835\\udc00"}}]}', "\U0001d400"),
        (b'\xef\xbb\xbf{"choices":[{"message":{"content":"Herbert"}}]}', "Herbert"),
        (b'{"created":NaN,"x":-Infinity,"y":1e999,"choices":[{"message":{"content":"Herbert"}}]}', "Herbert"),
        (b'{"created":' + b"9" * 5000 + b',"choices":[{"message":{"content":"Herbert"}}]}', "Herbert"),
        (b'{"choices":[],"choices":[{"message":{"content":"Herbert"}}]}', "Herbert"),
    ],
)
def test_odd_json_with_an_answer_is_read(server, body, expected):
    reply = replied(server, body, headers=(("Content-Type", "text/plain"),))
    assert (reply.text, reply.error) == (expected, None)
    reply.text.encode("utf-8")


@pytest.mark.parametrize("count", ["NaN", "Infinity", "1" * 5000, "-3", '"many"', "[7]"])
def test_absurd_counts_are_no_usage(server, count):
    body = '{"choices":[{"message":{"content":"abc"}}],"usage":{"prompt_tokens":COUNT,"completion_tokens":1}}'
    pool = pool_of(server)
    server.always = Fault(raw=body.replace("COUNT", count).encode())
    assert ask(pool).text == "abc" and pool.ledger.total().estimated == 1


def test_a_deep_body_ends_soon(server):
    deep = b'{"error":' * 900 + b'"x"' + b"}" * 900
    start = time.monotonic()
    assert kind(replied(server, deep)) in ("server error", "malformed reply")
    assert time.monotonic() - start < 5


# ---------------------------------------------------------------------------------------------- waiting as one is told


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ((("retry-after-ms", "400"), ("Retry-After", "9")), 0.4),
        ((("Retry-After", "-5"),), 0.0),
        ((("Retry-After", "Wed, 21 Oct 2015 07:28:00 -0000"),), 0.0),
        ((("Retry-After", "Mon, 01 Jan 0001 00:00:00 -0000"),), 0.0),
        ((("Retry-After", "9" * 400),), 0.0),
        ((("Retry-After", "in a minute"),), 0.0),
    ],
)
def test_times_to_come_back_in_every_form(server, headers, seconds):
    server.faults = [Fault(status=429, headers=headers)]
    reply = ask(pool_of(server))
    assert reply.error is None and seconds <= server.arrivals[1] - server.arrivals[0] < seconds + 2


def test_an_absurd_time_to_come_back_ends_the_call_and_holds_others_a_minute_at_most(server):
    server.faults = [Fault(status=429, headers=(("Retry-After", "1e300"),))]
    pool = pool_of(server)
    reply = ask(pool)
    assert kind(reply) == "rate limit" and "no time left" in reply.error and reply.seconds < 2
    assert pool._callers["a"]._spacing._paused_until - time.monotonic() <= 60
