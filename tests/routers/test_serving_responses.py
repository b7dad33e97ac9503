"""`/v1/responses`: what a request means to the member, and items and events as the real client reads them."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from chat_server import ChatServer, Said, cut, events, said, usage, whole
from serving_helpers import Proxied, proxied

CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"q": "☕"}'}}
SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"], "additionalProperties": False}
TOOL: dict[str, Any] = {"type": "function", "name": "look_up", "parameters": SCHEMA, "strict": True}


@pytest.fixture(scope="module")
def member() -> Iterator[ChatServer]:
    with ChatServer(said("it says ☕", usage(30, 8, cached=10, reasoning=2))) as server:
        yield server


@pytest.fixture(scope="module")
def served(member: ChatServer) -> Iterator[Proxied]:
    with proxied({"one": (member, {})}) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Proxied) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="x", max_retries=0) as client:
        yield client


def test_a_whole_response(client: openai.OpenAI, member: ChatServer) -> None:
    body = {"content": "hello", "reasoning_content": "hm", "tool_calls": [CALL]}
    member.replies = [Said(body=whole(body, usage(30, 8, 10, 2), "tool_calls"))]
    found = client.responses.create(
        model="router", input="hi", instructions="be brief", tools=[TOOL], max_output_tokens=50, temperature=0.5  # type: ignore[list-item]
    )  # fmt: skip
    assert found.status == "completed" and found.output_text == "hello" and found.model == "router"
    assert [item.type for item in found.output] == ["reasoning", "message", "function_call"]
    call = found.output[2].to_dict()
    assert (call["call_id"], call["name"], call["arguments"]) == ("call_1", "look_up", '{"q": "☕"}')
    assert found.usage is not None and found.usage.input_tokens == 30 and found.usage.total_tokens == 38
    assert found.usage.input_tokens_details.cached_tokens == 10
    assert found.usage.to_dict()["cost_usd"] == pytest.approx((30 + 16) / 1e6)
    assert found.to_dict()["srpo"]["member"] == "one"
    function = {"name": "look_up", "parameters": SCHEMA, "strict": True}
    assert member.requests[-1] == {
        "model": "one", "max_tokens": 50, "temperature": 0.5, "tools": [{"type": "function", "function": function}],
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
    }  # fmt: skip


def test_a_loop_of_tools_sends_back_what_it_got(client: openai.OpenAI, member: ChatServer) -> None:
    member.replies = [Said(body=whole({"content": "I look", "tool_calls": [CALL]}, usage(9, 9), "tool_calls"))]
    history: Any = [{"role": "user", "content": [{"type": "input_text", "text": "look"}]}]
    first = client.responses.create(model="router", input=history, tools=[TOOL])  # type: ignore[list-item]
    history += [item.to_dict() for item in first.output]
    history += [{"type": "function_call_output", "call_id": "call_1", "output": "tea"}]
    second = client.responses.create(
        model="router", input=history, text={"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}
    )
    assert second.output_text == "it says ☕"
    sent = member.requests[-1]
    assert sent["messages"] == [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": "I look", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "tea"},
    ]
    assert sent["response_format"] == {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}


@pytest.mark.parametrize("size", [1, 100_000])
def test_events_have_the_names_and_the_order_of_openai(client: openai.OpenAI, member: ChatServer, size: int) -> None:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, {"reasoning_content": "h"}]
    deltas += [{"reasoning_content": "m"}, {"content": "it"}, {"content": " ☕"}]
    deltas += [{"tool_calls": [{"index": 0, **CALL, "function": {"name": "look_up", "arguments": ""}}]}]
    deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in ('{"q"', ': "☕"}')]
    deltas += [{"tool_calls": [{"index": 1, "id": "call_2", "function": {"name": "add", "arguments": "{}"}}]}]
    member.replies = [Said(pieces=cut(events(deltas, usage(30, 8), "tool_calls"), size))]
    told = list(client.responses.create(model="router", input="hi", stream=True))
    item = ["response.output_item.added"]
    done = ["response.output_item.done"]
    assert [event.type for event in told] == [
        "response.created", "response.in_progress",
        *item, "response.content_part.added", *["response.reasoning_text.delta"] * 2, "response.reasoning_text.done",
        "response.content_part.done", *done,
        *item, "response.content_part.added", *["response.output_text.delta"] * 2, "response.output_text.done",
        "response.content_part.done", *done,
        *item, *["response.function_call_arguments.delta"] * 2, "response.function_call_arguments.done", *done,
        *item, "response.function_call_arguments.delta", "response.function_call_arguments.done", *done,
        "response.completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in told] == list(range(len(told)))
    last = told[-1].response  # type: ignore[union-attr]
    assert last.output_text == "it ☕" and last.usage.total_tokens == 38
    assert [(c.call_id, c.arguments) for c in last.output[2:]] == [("call_1", '{"q": "☕"}'), ("call_2", "{}")]
    assert last.usage.to_dict()["cost_usd"] == pytest.approx(46e-6) == last.to_dict()["srpo"]["cost_usd"]
    started = [event for event in told if event.type == "response.output_item.added"]
    assert started[2].item.status == "in_progress" and started[2].item.arguments == ""  # type: ignore[union-attr]


def test_the_client_s_own_reader_of_streams(client: openai.OpenAI, member: ChatServer) -> None:
    with client.responses.stream(model="router", input="hi") as stream:
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == "it says ☕"
        assert stream.get_final_response().status == "completed"


def test_a_response_that_is_cut_or_fails(client: openai.OpenAI, member: ChatServer) -> None:
    member.replies = [Said(body=whole({"content": "half"}, usage(9, 9), "length"))]
    found = client.responses.create(model="router", input="hi")
    assert found.status == "incomplete" and found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    body = events([{"content": "half"}, {"content": "the rest"}], None)
    member.replies = [Said(pieces=[body[: body.index(b"the rest")]])]
    *_, last = client.responses.create(model="router", input="hi", stream=True)
    assert last.type == "response.failed" and last.response.error is not None
    assert "broke off" in last.response.error.message and last.response.output_text == "half"


@pytest.mark.parametrize("odd", [None, 5, "text", [], {}, {"index": []}, [{"function": 3}], [5], {"content": [None]}])
def test_a_member_s_nonsense_is_no_fault_of_ours(served: Proxied, member: ChatServer, odd: Any) -> None:
    message = {"role": "assistant", "content": odd, "tool_calls": odd, "reasoning_content": odd, "refusal": odd}
    for choice in ({"message": odd, "delta": odd, "finish_reason": odd}, {"message": message, "delta": message}):
        body = json.dumps({"choices": [choice, odd], "usage": odd}).encode()
        for path, asked in (("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
                            ("responses", {"input": "x"})):  # fmt: skip
            for stream in (False, True):
                member.replies = [Said(pieces=[b"data: " + body + b"\n\n"]) if stream else Said(body=body)]
                reply = served.post({**asked, "stream": stream}, path)
                assert reply.status_code == 200 and reply.text


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps nothing"),
        ({"conversation": "c"}, "conversation", "keeps nothing"),
        ({"background": True}, "background", "is waited for"),
        ({"store": True}, "store", "must be false"),
        ({"truncation": "auto"}, "truncation", "must be 'disabled'"),
        ({"include": ["file_search_call.results"]}, "include", "adds nothing"),
        ({"service_tier": "priority"}, "service_tier", "changes the price"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search' is not served"),
        ({"tools": [{"type": "function", "name": "f", "banana": 1}]}, "tools", "'banana'"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "a function by name"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "input[0].type", "'item_reference' is not served"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", "only text"),
        ({"input": None}, "input", "a text or a list"),
        ({"max_output_tokens": "5"}, "max_output_tokens", "a whole number"),
        ({"reasoning": {"effort": "low", "summary": "detailed"}}, "reasoning.summary", "not served"),
        ({"text": {"banana": 1}}, "text.banana", "not served"),
        ({"banana": 1}, "banana", "there is no field"),
        ({"model": "gpt"}, "model", "there is no model"),
    ],
)
def test_what_is_refused_is_refused_by_name(served: Proxied, body: dict[str, Any], param: str, words: str) -> None:
    reply = served.post({"input": "hi", **body}, "responses")
    error = reply.json()["error"]
    assert reply.status_code in (400, 404) and error["param"] == param and words in error["message"]


def test_values_that_change_nothing_pass(served: Proxied, member: ChatServer) -> None:
    body = {"store": False, "truncation": "disabled", "include": [], "background": False, "user": None,
            "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}}}  # fmt: skip
    reply = served.post({"input": "hi", **body}, "responses")
    assert reply.status_code == 200, json.dumps(reply.json())
    assert member.requests[-1]["reasoning_effort"] == "low" and "store" not in member.requests[-1]
