"""A served query router as a proxy: what the members got, what the client got, byte for byte, and what it cost."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from chat_server import ChatServer, Said, cut, events, said, usage, whole
from serving_helpers import Proxied, proxied, until

from routers.data.billing import price
from routers.pool.passthrough import Passthrough
from routers.serving.keys import Keys
from routers.serving.proxy import Proxy
from srpo.types import Usage

ODD = 'naïve ☕ 👩‍👩‍👧 "quoted" \\back\\ \u2028 \u0000 \ud83d tab\t 你好'
"""With half a pair of surrogates, which JSON may hold and UTF-8 may not."""
CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"q": "☕ \\ud83d\\ude00"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "add", "arguments": '{"a":1e0,  "b": 2}'}},
]
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def small() -> Iterator[ChatServer]:
    with ChatServer(said("small says", usage(30, 4))) as server:
        yield server


@pytest.fixture(scope="module")
def large() -> Iterator[ChatServer]:
    with ChatServer(said("large says", usage(50, 8, cached=20, reasoning=3))) as server:
        yield server


@pytest.fixture(scope="module")
def served(small: ChatServer, large: ChatServer) -> Iterator[Proxied]:
    dear = {"price_in": 10.0, "price_out": 20.0, "price_cached": 1.0, "price_reasoning": 40.0}
    with proxied({"small": (small, {}), "large": (large, dear)}) as running:
        yield running


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def chunks_in(reply: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_whole_reply_is_the_member_s_own(served: Proxied, large: ChatServer) -> None:
    message = {"content": ODD, "reasoning_content": ODD[::-1], "tool_calls": CALLS, "refusal": None, "x": {"y": [1.5]}}
    probs = {"content": [{"token": "a", "logprob": -0.12345678901234568, "bytes": [97]}]}
    document = json.loads(whole({"content": "x"}, usage(50, 8, 20, 3), "tool_calls", logprobs=probs))
    document["choices"][0]["message"] = {"role": "assistant", **message}
    large.replies = [Said(body=json.dumps(document).encode())]
    reply = served.post({"messages": user("ask large")})
    found = reply.json()
    assert reply.status_code == 200
    assert found["choices"] == document["choices"]  # content, reasoning, calls and arguments, log-probabilities
    assert {**found, "model": "theirs", "usage": document["usage"]} == {**document, "srpo": found["srpo"]}
    assert found["model"] == "router" and found["srpo"]["member"] == "large"
    assert found["srpo"]["scores"] == {"large": 0.5, "small": 0.25} and found["srpo"]["decision"] == "because"
    paid = price(served.members["large"], Usage(50, 8, cached_tokens=20, reasoning_tokens=3))
    assert paid == pytest.approx((30 * 10 + 20 * 1 + 5 * 20 + 3 * 40) / 1e6)
    decided = {"member": "large", "decision": "because", "probabilities": {"large": 0.5, "small": 0.25}}
    assert found["usage"] == {**document["usage"], "cost_usd": pytest.approx(paid), **decided}
    assert float(reply.headers["x-srpo-cost-usd"]) == pytest.approx(paid)
    assert reply.headers["x-srpo-member"] == "large" and reply.headers["x-srpo-decision"] == "because"
    assert reply.headers["x-srpo-probabilities"] == "large=0.5, small=0.25"


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_a_stream_is_the_member_s_own_however_it_is_cut(served: Proxied, small: ChatServer, size: int) -> None:
    first, second = CALLS[0]["function"], CALLS[1]["function"]
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, {"reasoning_content": "думаю 👩‍👩‍👧"}]
    deltas += [{"content": letter} for letter in "naïve ☕ 👩‍👩‍👧 你好 \u2028\u0000"]
    deltas += [{"tool_calls": [{"index": 0, **CALLS[0], "function": {**first, "arguments": ""}}]}]
    deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in first["arguments"]]
    deltas += [{"tool_calls": [{"index": 1, **CALLS[1], "function": second}]}]
    body = b": PROCESSING\n\n" + events(deltas, usage(30, 4), "tool_calls")
    halves = json.dumps({"choices": [{"index": 0, "delta": {"content": "\ud83d"}}]}).encode()
    small.replies = [Said(pieces=cut(b"data: " + halves + b"\r\n\r\n" + body, size))]
    reply = served.post({"messages": user("small"), "stream": True, "stream_options": {"include_usage": True}})
    *told, last = chunks_in(reply)
    assert [c["choices"][0]["delta"] for c in told] == [{"content": "\ud83d"}, *deltas, {}]
    assert told[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert all(c["model"] == "router" and c["usage"] is None for c in told)
    assert told[0]["srpo"]["member"] == "small" and "srpo" not in told[1]
    assert last["choices"] == [] and last["usage"]["prompt_tokens"] == 30
    assert last["usage"]["cost_usd"] == pytest.approx((30 * 1 + 4 * 2) / 1e6) == last["srpo"]["cost_usd"]
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-srpo-member"] == "small" and "x-srpo-cost-usd" not in reply.headers
    assert (last["usage"]["member"], last["usage"]["decision"]) == ("small", "because")


def test_a_stream_without_usage_has_none(served: Proxied, small: ChatServer) -> None:
    chunks = chunks_in(served.post({"messages": user("small"), "stream": True}))
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "small says"
    assert small.requests[-1]["stream_options"] == {"include_usage": True}  # the bill needs it all the same


def test_the_member_gets_the_whole_conversation(served: Proxied, large: ChatServer) -> None:
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "ask large "}, {"type": "text", "text": ODD}]},
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "call_1", "content": "small"},
        {"role": "tool", "tool_call_id": "call_2", "content": "3"},
    ]
    fields = {"tools": TOOLS, "tool_choice": "auto", "response_format": {"type": "json_object"}, "temperature": 0.7,
              "top_p": 0.9, "seed": 3, "stop": ["\n\n"], "max_completion_tokens": 50, "n": 2, "logprobs": True,
              "top_logprobs": 2, "user": "me", "parallel_tool_calls": False, "frequency_penalty": 0.5,
              "reasoning_effort": "low", "logit_bias": {"5": -1}}  # fmt: skip
    body = json.dumps({"model": "router", "messages": conversation, **fields, "presence_penalty": None}).encode()
    assert served.post(body).status_code == 200
    sent = dict(large.requests[-1])
    assert sent.pop("max_tokens") == 50 and sent.pop("model") == "large"
    del fields["max_completion_tokens"]
    assert sent == {"messages": conversation, **fields}
    # what the router reads is the user's last text: an agent's loop stays with its member
    assert served.router.read[-1].startswith("ask large naïve") and "\ud83d" not in served.router.read[-1]


def test_the_catalogue_fills_in_what_the_client_left_out() -> None:
    fields = {"model": "theirs", "system": "be good", "temperature": 0.3, "top_p": 0.8, "seed": 5, "max_tokens": 40,
              "request": {"max_tokens": None, "max_completion_tokens": 40, "seed": None, "top_k": 5}}  # fmt: skip
    with ChatServer(said("x")) as member, proxied({"one": (member, fields)}) as served:
        assert served.post({"messages": user("hi")}).status_code == 200
        assert served.post({"messages": user("hi"), "temperature": 1, "max_tokens": 7, "top_k": 9}).status_code == 200
        own = [{"role": "developer", "content": "mine"}, *user("hi")]
        assert served.post({"messages": own}).status_code == 200
        refused = served.post({"messages": user("hi"), "seed": 1})
        long = served.post({"messages": user("hi"), "max_tokens": 41})
    system = {"role": "system", "content": "be good"}
    plain = {"model": "theirs", "temperature": 0.3, "top_p": 0.8, "top_k": 5, "max_completion_tokens": 40}
    assert member.requests == [
        {**plain, "messages": [system, *user("hi")]},
        {**plain, "messages": [system, *user("hi")], "temperature": 1, "max_completion_tokens": 7, "top_k": 9},
        {**plain, "messages": own},
    ]
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "seed"
    assert "one does not take 'seed'" in refused.json()["error"]["message"]
    assert long.status_code == 400 and long.json()["error"]["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"model": "other"}, 404, "model", "there is no model 'other'"),
        ({"messages": []}, 400, "messages", "1 to"),
        ({"messages": "hi"}, 400, "messages", "a list of messages"),
        ({"messages": ["hi"]}, 400, "messages[0]", "must be an object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "'robot'"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "a text or a list"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages", "no text of the user's"),
        ({"messages": user(" ")}, 400, "messages", "no text of the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         400, "messages[0].content[0]", "'image_url'; only text is served"),
        ({"banana": 1}, 400, "banana", "there is no field 'banana'"),
        ({"\ud83d": 1}, 400, "\ud83d", "there is no field"),
        ({"service_tier": "priority"}, 400, "service_tier", "changes the price of a call"),
        ({"audio": {}}, 400, "audio", "cannot be bounded"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools", "of type 'function'"),
        ({"temperature": "hot"}, 400, "temperature", "a number from 0 to 2"),
        ({"temperature": True}, 400, "temperature", "a number from 0 to 2"),
        ({"n": 0}, 400, "n", "a whole number from 1"),
        ({"n": 17}, 400, "n", "a whole number from 1"),
        ({"stream": "yes"}, 400, "stream", "true or false"),
        ({"stream_options": {"include_obfuscation": True}}, 400, "stream_options", "include_usage"),
        ({"max_tokens": 0}, 400, "max_tokens", ">= 1"),
        ({"max_tokens": 101}, 400, "max_tokens", "writes at most 100 tokens"),
        ({"max_cost_usd": -1}, 400, "max_cost_usd", "a number of US dollars"),
        ({"max_cost_usd": True}, 400, "max_cost_usd", "a number of US dollars"),
        ({"cost_weight": "1"}, 400, "cost_weight", "a number >= 0"),
    ],
)  # fmt: skip
def test_what_is_refused_is_refused_by_name(
    served: Proxied, small: ChatServer, body: dict[str, Any], status: int, param: str, words: str
) -> None:
    before = len(small.requests)
    raw = json.dumps({"model": "router", "messages": user("small"), **body}).encode()
    reply = served.post(raw)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param) and words in error["message"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert len(small.requests) == before


@pytest.mark.parametrize("cap", ["1" + "0" * 400, "1e999", "NaN", "-Infinity"])
def test_numbers_beyond_any_are_refused(served: Proxied, cap: str) -> None:
    body = '{"model":"router","messages":[{"role":"user","content":"x"}],"max_cost_usd":' + cap + "}"
    assert served.post(body.encode()).status_code == 400


def test_failover_goes_by_the_router_s_order_and_only_where_it_helps() -> None:
    first, second, third = (ChatServer(said(name)) for name in ("one", "two", "three"))
    with first, second, third, proxied({"a": (first, {}), "b": (second, {}), "c": (third, {})}) as served:
        first.replies = [Said(429, b'{"error": {"message": "slow down"}}')]
        second.replies = [Said(500, b"oops")]
        reply = served.post({"messages": user("a")})
        found = reply.json()
        assert found["choices"][0]["message"]["content"] == "three" and found["srpo"]["member"] == "c"
        assert [(one["member"], one["status"]) for one in found["srpo"]["tried"]] == [("a", 429), ("b", 500)]
        assert reply.headers["x-srpo-tried"] == "a, b"
        # a stream fails over until its first event; an error may come in a 200, too
        first.replies = [Said(pieces=[b'data: {"error": {"message": "overloaded", "code": 529}}\n\n'])]
        chunks = chunks_in(served.post({"messages": user("a"), "stream": True}))
        assert chunks[0]["srpo"]["member"] == "b" and chunks[0]["srpo"]["tried"][0]["status"] == 529
        # the request itself is wrong: nobody else is asked, and the member's words are the client's
        before = len(second.requests)
        error = {"message": "context is too long", "type": "invalid_request_error", "param": "messages",
                 "code": "context_length_exceeded"}  # fmt: skip
        first.replies = [Said(400, json.dumps({"error": error}).encode())]
        reply = served.post({"messages": user("a")})
        assert reply.status_code == 400 and reply.json()["error"] == error and len(second.requests) == before
        assert reply.json()["srpo"]["tried"] == [{"member": "a", "error": error["message"], "status": 400}]
        # nobody answers: the first failure is told, with its status, words and time to come back
        first.replies = [Said(429, b'{"error": {"message": "slow down"}}', headers={"Retry-After": "7"})]
        second.replies, third.replies = [Said(500, b"oops")], [Said(503, b"full")]
        reply = served.post({"messages": user("a")})
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "7")
        assert reply.json()["error"]["message"] == "slow down"


def test_failover_when_nothing_comes_and_when_nobody_is_there(caplog: pytest.LogCaptureFixture) -> None:
    first, second = ChatServer(said("one")), ChatServer(said("two"))
    with first, second, proxied({"a": (first, {"timeout": 0.2}), "b": (second, {})}) as served:
        first.replies = [Said(hang=True, body=b"x"), Said(body=b"<html>"), Said(hang=True, pieces=[b": wait\n\n"])]
        for stream in (False, False, True):
            reply = served.post({"messages": user("a"), "stream": stream})
            assert reply.headers["x-srpo-member"] == "b" and reply.headers["x-srpo-tried"] == "a"
    nobody = {"base_url": "http://127.0.0.1:9/v1"}
    with second, proxied({"a": (first, nobody), "b": (second, {})}) as served:
        assert served.post({"messages": user("a")}).json()["srpo"]["tried"][0]["status"] == 502
    with proxied({"a": (first, nobody)}) as alone:
        reply = alone.post({"messages": user("a")})
        assert reply.status_code == 502 and "127.0.0.1" not in reply.text and "127.0.0.1:9" in caplog.text
        assert alone.ledger.account.reserved == 0.0


def test_a_stream_that_breaks_off_says_so(served: Proxied, small: ChatServer) -> None:
    body = events([{"role": "assistant", "content": "half of it"}, {"content": "the rest"}], None)
    body = body[: body.index(b"the rest")]
    small.replies = [Said(pieces=[body])]
    lines = served.post({"messages": user("small"), "stream": True}).text.split("\n\n")
    assert "half of it" in lines[0] and "[DONE]" not in lines
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["message"] == "the stream broke off before its end"
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="x", max_retries=0) as client:
        small.replies = [Said(pieces=[body])]
        with pytest.raises(openai.APIError, match="broke off"):
            list(client.chat.completions.create(model="router", messages=user("small"), stream=True))  # type: ignore[arg-type]


def test_budgets_choose_whom_can_be_paid(served: Proxied, small: ChatServer, large: ChatServer) -> None:
    # 100 tokens of reply: 200 and 4,000 millionths of a dollar at most, and the prompt's bytes
    reply = served.post({"messages": user("large"), "max_cost_usd": 0.001})
    assert reply.json()["srpo"]["member"] == "small"
    assert reply.json()["srpo"]["tried"][0]["error"].startswith("over budget: a call costs at most")
    assert reply.json()["usage"]["cost_usd"] <= 0.001
    reply = served.post({"messages": user("large"), "max_cost_usd": 0.001, "n": 5})  # five replies cost more
    assert reply.status_code == 402 and reply.json()["error"]["param"] == "max_cost_usd"
    before = len(small.requests) + len(large.requests)
    reply = served.post({"messages": user("large"), "max_cost_usd": 0})
    assert reply.status_code == 402 and len(small.requests) + len(large.requests) == before
    assert reply.json()["srpo"]["cost_usd"] == 0.0


def test_what_a_key_lets_a_request_cost_is_said(small: ChatServer, tmp_path: Path) -> None:
    sha = hashlib.sha256(b"secret").hexdigest()
    (tmp_path / "keys.yaml").write_text(f"keys: {{poor: {{sha256: {sha}, usd_per_day: 0.001}}}}")
    with proxied({"small": (small, {})}, keys=Keys(tmp_path / "keys.yaml")) as on:
        head, asked = {"Authorization": "Bearer secret"}, {"model": "router", "messages": user("small")}
        replies = [
            httpx.post(f"{on.address}/v1/chat/completions", json=asked | more, headers=head)
            for more in ({}, {"max_cost_usd": 1.0}, {"max_cost_usd": 1e-6})
        ]
    errors = [reply.json()["error"] for reply in replies]
    assert {reply.status_code for reply in replies} == {402}
    assert [error["param"] for error in errors] == [None, None, "max_cost_usd"]
    for error in errors[:2]:
        assert error["message"].endswith("; a request of key 'poor' may cost 1e-05 USD")


def test_a_router_that_chooses_nobody(served: Proxied) -> None:
    reply = served.post({"messages": user("nobody")})
    assert reply.status_code == 422 and "it abstains" in reply.json()["error"]["message"]


def test_what_was_spent_is_what_the_members_logged(small: ChatServer, large: ChatServer) -> None:
    small.logged.clear()
    large.logged.clear()
    dear = {"price_in": 10.0, "price_out": 20.0, "price_cached": 1.0, "price_reasoning": 40.0, "price_request": 0.001}
    with proxied({"small": (small, {}), "large": (large, dear)}) as served:
        spent = 0.0
        for name in ("small", "large", "large", "small"):
            spent += served.post({"messages": user(name)}).json()["usage"]["cost_usd"]
            options = {"stream": True, "stream_options": {"include_usage": True}}
            spent += chunks_in(served.post({"messages": user(name), **options}))[-1]["usage"]["cost_usd"]
            chunks_in(served.post({"messages": user(name), "stream": True}))  # billed all the same
        paid = sum(
            price(served.members[name], Usage(u["prompt_tokens"], u["completion_tokens"],
                  u["prompt_tokens_details"]["cached_tokens"],
                  reasoning_tokens=u["completion_tokens_details"]["reasoning_tokens"]))
            for name, server in (("small", small), ("large", large)) for u in server.logged
        )  # fmt: skip
        assert len(small.logged) == len(large.logged) == 6
        assert served.ledger.spent_usd == pytest.approx(paid, rel=1e-12) == served.ledger.total().cost
        assert spent == pytest.approx(paid * 2 / 3, rel=1e-12)
        assert served.ledger.account.reserved == 0.0 and served.ledger.total().estimated == 0


def test_a_member_that_reports_nothing_is_counted_by_what_was_possible(served: Proxied, small: ChatServer) -> None:
    body = json.loads(whole({"content": "four"}, {}))
    del body["usage"]
    small.replies = [Said(body=json.dumps(body).encode())]
    found = served.post({"messages": user("small")}).json()
    assert found["usage"]["estimated"] is True and found["usage"]["completion_tokens"] == 4  # its bytes
    assert found["usage"]["prompt_tokens"] >= len("small") and found["usage"]["cost_usd"] > 0


def test_a_client_that_leaves_ends_the_member_s_work(served: Proxied, small: ChatServer) -> None:
    body = {"model": "router", "stream": True, "messages": user("small")}
    address, before = f"{served.address}/v1/chat/completions", small.left
    pieces = [line + b"\n\n" for line in events([{"content": "x"}] * 1000, None).split(b"\n\n")]
    small.replies = [Said(pieces=pieces, pause=0.05)]
    with httpx.stream("POST", address, json=body) as reply:
        assert next(reply.iter_lines()).startswith("data: ")
    until(lambda: small.left == before + 1)
    small.replies = [Said(body=b"never", pause=60.0)]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(address, json={**body, "stream": False}, timeout=0.3)
    until(lambda: small.left == before + 2)
    until(lambda: served.ledger.account.reserved == 0.0)
    # what had come of the stream is paid for, by its bytes
    assert served.ledger.total().estimated >= 1


def test_who_leaves_before_the_reply_has_spent_what_was_set_aside(small: ChatServer, tmp_path: Path) -> None:
    sha = hashlib.sha256(b"secret").hexdigest()
    (tmp_path / "keys.yaml").write_text(f"keys: {{a: {{sha256: {sha}, usd_per_day: 1}}}}")
    keys = Keys(tmp_path / "keys.yaml")
    with proxied({"small": (small, {})}, keys=keys) as on:
        small.replies = [Said(body=b"never", pause=60.0)]
        asked = {"model": "router", "messages": user("small")}
        with pytest.raises(httpx.ReadTimeout):
            head = {"Authorization": "Bearer secret"}
            httpx.post(f"{on.address}/v1/chat/completions", json=asked, headers=head, timeout=0.3)
        most = Passthrough(on.members["small"], on.ledger).bound(asked)
        until(lambda: keys.budgets(spent=True)[("a", "day")] == pytest.approx(most))
        assert 0 < most < 0.01


def test_conversations_of_many_clients_never_mix() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def echo(request: dict[str, Any]) -> Said:
        text = request["messages"][-1]["content"]
        return said(text.replace("?", "!"), usage(len(text), 1))(request)

    def ask(number: int) -> None:
        text = f"question {number} of {'b' if number % 2 else 'a'} ?" + " x" * number
        body = {"model": "router", "messages": user(text), "stream": number % 3 == 0}
        reply = client.post(f"{served.address}/v1/chat/completions", json=body)
        found = chunks_in(reply) if number % 3 == 0 else [reply.json()]
        texts = [(c["choices"][0].get("delta") or c["choices"][0].get("message") or {}).get("content") for c in found]
        assert "".join(text for text in texts if text) == text.replace("?", "!")

    with ChatServer(echo) as a, ChatServer(echo) as b, proxied({"of a": (a, {}), "of b": (b, {})}) as served:
        with httpx.Client(timeout=60) as client, ThreadPoolExecutor(16) as threads:
            list(threads.map(ask, range(120)))
        assert len(a.requests) == len(b.requests) == 60
        assert all("of a" in r["messages"][0]["content"] for r in a.requests)


def test_no_key_of_a_member_reaches_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "canary-3f9a77d210"
    monkeypatch.setenv("MEMBER_KEY", key)
    with (
        ChatServer(said(f"the key is {key}")) as member,
        proxied({"a": (member, {"api_key_env": "MEMBER_KEY"})}) as on,
    ):
        member.replies = [Said(401, json.dumps({"error": {"message": f"bad key {key}", "code": key}}).encode())]
        refused, told = on.post({"messages": user("x")}), on.post({"messages": user("x")})
        assert member.headers[0]["authorization"] == f"Bearer {key}"
        member.replies = [Said(500, f"Authorization: Bearer {key}".encode())]
        broken = on.post({"messages": user("x")})
    assert refused.status_code == 401 and "bad key" in refused.json()["error"]["message"]
    assert told.json()["choices"][0]["message"]["content"] == "the key is [key]"
    assert not any(key in reply.text + str(reply.headers) for reply in (refused, told, broken))


def test_models_docs_and_metrics() -> None:
    with ChatServer(said("x")) as member, proxied({"a": (member, {})}, keys=Keys.single("k" * 8)) as served:
        get = lambda path, **more: httpx.get(f"{served.address}{path}", **more)  # noqa: E731
        headers = {"Authorization": "Bearer kkkkkkkk"}
        assert get("/health").json() == {"status": "ok"}
        where = get("/").json()
        assert where["name"] == "router" and "POST /v1/chat/completions" in where["paths"]
        assert get("/v1/models", headers=headers).json()["data"][0]["id"] == "router"
        assert get("/v1/models/router", headers=headers).json()["object"] == "model"
        assert get("/v1/models/gpt", headers=headers).status_code == 404
        assert get("/v1/models").status_code == get("/metrics").status_code == 401
        assert "router_in_flight 0" in get("/metrics", headers=headers).text
        assert "temperature" in get("/openapi.json").json()["components"]["schemas"]["ChatRequest"]["properties"]
        page = get("/docs").text
        assert "max_cost_usd" in page and "http" not in page.replace(
            "/openapi", ""
        )  # nothing is loaded from elsewhere
        assert get("/v1/nowhere", headers=headers).json()["error"]["type"] == "invalid_request_error"


def test_the_real_client_with_tools_and_streams(served: Proxied, large: ChatServer) -> None:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="x", max_retries=0) as client:
        large.replies = [Said(body=whole({"content": None, "tool_calls": CALLS}, usage(9, 9), "tool_calls"))]
        asked: Any = [{"role": "user", "content": "ask large"}]
        reply = client.chat.completions.create(model="router", messages=asked, tools=TOOLS)  # type: ignore[arg-type]
        calls = reply.choices[0].message.tool_calls or []
        assert [call.to_dict() for call in calls] == CALLS and reply.usage is not None
        assert reply.usage.to_dict()["cost_usd"] > 0 and reply.to_dict()["srpo"]["member"] == "large"
        asked += [reply.choices[0].message.to_dict(), {"role": "tool", "tool_call_id": "call_1", "content": "tea"}]
        stream = client.chat.completions.create(model="router", messages=asked, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in stream) == "large says"
        assert large.requests[-1]["messages"][1]["tool_calls"] == CALLS
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="router", messages=asked, modalities=["text", "audio"])
        assert refused.value.param == "modalities"


def test_a_safe_member_gets_what_the_router_abstains_from(small: ChatServer, large: ChatServer) -> None:
    with proxied({"small": (small, {}), "large": (large, {})}, safe="large") as running:
        reply = running.post({"messages": user("nobody")}).json()
        assert reply["choices"][0]["message"]["content"] == "large says"
        assert reply["srpo"]["member"] == "large" and reply["srpo"]["abstained"] == "it abstains"
    with pytest.raises(ValueError, match="no member 'someone' for what the router abstains from; there are small"):
        Proxy(running.router, {"small": None}, running.ledger, safe="someone")  # type: ignore[dict-item]
