"""The served router: a real uvicorn process on loopback, asked by the real openai client."""

import asyncio
import concurrent.futures
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from agent_helpers import MEMBERS, scripted_pool, train_policy
from openai_server import Fault, OpenAIServer
from serving_helpers import running
from transformers import AutoModelForCausalLM, AutoTokenizer

from routers.data.catalogue import cost
from routers.pool.endpoint import AGENT_PROMPT
from routers.serving.agent import AgentWorker, question_of
from routers.serving.errors import RequestError
from routers.serving.server import create_app
from routers.tasks.think_route.agent import RouterAgent
from routers.tasks.think_route.settings import AgentSettings

ROOT = Path(__file__).resolve().parents[2]
KEY = "canary-key-9f2d"
Served = tuple[str, "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def members() -> Iterator[OpenAIServer]:
    with OpenAIServer(reply="two words") as server:
        yield server


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_policy(tmp_path_factory.mktemp("policy"))


def agent_of(policy: Path, **settings: Any) -> RouterAgent:
    """In this process, with a pool that answers by a script."""
    how = dataclasses.replace(AgentSettings.load(policy), **settings)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    return RouterAgent(model.eval(), tokenizer, scripted_pool(), how)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, policy: Path, members: OpenAIServer) -> Iterator[Served]:
    """(address, process) of `srpo serve` with a policy that asks real endpoints."""
    folder = tmp_path_factory.mktemp("served")
    catalogue = folder / "members.yaml"
    entries = [
        {"name": m.name, "descriptor": m.descriptor, "price_in": m.price_in, "price_out": m.price_out,
         "base_url": members.url, "max_tokens": 20, "timeout": 10}
        for m in MEMBERS
    ]  # fmt: skip
    catalogue.write_text(yaml.safe_dump({"members": entries}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "srpo", "serve", str(policy), "--catalogue", str(catalogue)]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--api_key_env", "ROUTER_KEY"],
        cwd=ROOT, env={**os.environ, "ROUTER_KEY": KEY}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        try:
            if httpx.get(f"{address}/health").json() == {"status": "ok"}:
                break
        except httpx.TransportError:
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.1)
    yield address, process
    if process.poll() is None:
        process.kill()


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, question: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="router", messages=messages, **options)


def counters(served: Served) -> str:
    return httpx.get(f"{served[0]}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text


def expected_cost(question: str, member: int = 0) -> float:
    """The loopback server counts words."""
    words = len(AGENT_PROMPT.replace("{query}", question).split())
    return cost(MEMBERS[member], words, 2)


def test_a_real_client_gets_answer_and_cost(client: openai.OpenAI, members: OpenAIServer) -> None:
    before = len(members.usage)
    reply = ask(client, "Say beta now")
    assert reply.choices[0].message.content == "ok" and reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.reasoning_content.startswith("<think>why</think><search>beta:</search>")
    usage = reply.usage.model_dump()
    # The cost in the usage is the members' own usage log times the catalogue's prices.
    assert len(members.usage) == before + 1
    assert usage["cost_usd"] == pytest.approx(cost(MEMBERS[1], *members.usage[-1]), rel=1e-12)
    assert usage["cost_usd"] == pytest.approx(expected_cost("Say beta now", 1), rel=1e-12)
    assert reply.to_dict()["srpo"] == {"members": ["beta"], "stop": "done", "cost_usd": usage["cost_usd"]}
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    assert [model.id for model in client.models.list()] == ["router"]


def test_a_stream_brings_turns_then_the_answer_then_usage(client: openai.OpenAI) -> None:
    chunks = list(ask(client, "Count to nine", stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    thoughts = [d.reasoning_content for d in deltas if getattr(d, "reasoning_content", None)]
    assert thoughts == ["<think>why</think><search>alpha:</search>", "<answer>ok</answer>"]
    assert "".join(d.content or "" for d in deltas) == "ok"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.model_dump()["cost_usd"] == pytest.approx(
        expected_cost("Count to nine")
    )
    assert len({chunk.id for chunk in chunks}) == 1


def test_sixteen_at_once(served: Served, client: openai.OpenAI, members: OpenAIServer) -> None:
    members.latency, members.most_in_flight, before = 0.3, 0, len(members.usage)
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        questions = [("beta beta" if i % 2 else "Count to nine") for i in range(32)]
        replies = list(threads.map(lambda question: ask(client, question), questions))
    members.latency = 0.0
    asked = [reply.to_dict()["srpo"]["members"] for reply in replies]
    assert asked == [["beta" if "beta" in question else "alpha"] for question in questions]
    assert members.most_in_flight >= 8  # they really were asked at the same time
    spent = sum(r.usage.model_dump()["cost_usd"] for r in replies)
    logged = members.usage[before:]
    assert len(logged) == 32
    assert spent == pytest.approx(sum(expected_cost(q, "beta" in q) for q in questions))
    metrics = counters(served)
    assert 'router_member_calls_total{member="beta",outcome="ok"}' in metrics and "router_in_flight 0" in metrics


@pytest.mark.parametrize(("cap", "called"), [(0.0, 0), (1e-5, 0), (0.01, 1)])
def test_the_cap_of_a_request_is_hard(client: openai.OpenAI, members: OpenAIServer, cap: float, called: int) -> None:
    before = len(members.usage)
    reply = ask(client, "beta beta", extra_body={"max_cost_usd": cap})
    assert len(members.usage) - before == called
    assert reply.usage.model_dump()["cost_usd"] <= cap
    assert reply.choices[0].message.content == "ok"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "other"}, 404, "there is no model 'other'"),
        ({"messages": []}, 400, "must hold 1 to"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "the last message must be the user's"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "the last message must be the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
        ({"messages": [{"role": "tool", "tool_call_id": "1", "content": "x"}]}, 400, "does not take messages[0].tool"),
        ({"n": 2}, 400, "'n' must be 1"),
        ({"tools": [{"type": "function"}]}, 400, "does not take 'tools'"),
        ({"logprobs": True}, 400, "does not take 'logprobs'"),
        ({"banana": True}, 400, "there is no field 'banana'"),
        ({"stream": "yes"}, 400, "'stream' must be true or false"),
        ({"max_cost_usd": -1}, 400, "number of US dollars"),
        ({"max_cost_usd": "1"}, 400, "number of US dollars"),
        ({"max_cost_usd": True}, 400, "number of US dollars"),
        ({"cost_weight": 0.5}, 400, "trained with: none"),
    ],
)
def test_bad_requests_in_openai_s_shape(served: Served, body: dict[str, Any], status: int, message: str) -> None:
    good = {"model": "router", "messages": [{"role": "user", "content": "q"}]}
    headers = {"Authorization": f"Bearer {KEY}"}
    reply = httpx.post(f"{served[0]}/v1/chat/completions", json={**good, **body}, headers=headers)
    error = reply.json()["error"]
    assert reply.status_code == status and message in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_s_price_sensitivity_reaches_the_prompt(policy: Path, stream: bool) -> None:
    read: list[str] = []
    agent = agent_of(policy, cost_weights=(0.1, 0.8))
    answered = agent._answer
    agent._answer = lambda found: read.append(agent._tokenizer.decode(found.prompt_ids)) or answered(found)
    body = {"model": "router", "messages": [{"role": "user", "content": "q"}], "stream": stream}

    async def post(*weights: object) -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(AgentWorker(agent)))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            bodies = [json.dumps({**body, "cost_weight": weight}) for weight in weights]
            return [await http.post("/v1/chat/completions", content=body) for body in bodies]

    reply, *refused, as_usual = asyncio.run(post(0.8, 0.9, "0.8", True, math.nan, None))
    agent.close()
    assert reply.status_code == 200 and "Price sensitivity: 0.80" in read[0]
    assert as_usual.status_code == 200 and "Price sensitivity: 0.10" in read[1] and len(read) == 2
    assert [r.status_code for r in refused] == [400] * 4
    assert "trained with: 0.1, 0.8" in refused[0].json()["error"]["message"]
    assert [r.json()["error"]["param"] for r in refused[1:3]] == ["cost_weight"] * 2


def test_a_conversation_is_a_question() -> None:
    user, said = {"role": "user", "content": "Who wrote Dune?"}, {"role": "assistant", "content": "Herbert."}
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert question_of([user]) == "Who wrote Dune?"  # as in training
    assert question_of([system, user]) == "Instructions:\nBe brief.\n\nQuestion:\nWho wrote Dune?"
    assert question_of([system, user, said, {"role": "user", "content": "When?"}]) == (
        "Instructions:\nBe brief.\n\nConversation so far:\nUser: Who wrote Dune?\nAssistant: Herbert.\n\n"
        "Question:\nWhen?"
    )
    assert question_of([{"role": "user", "content": "half \ud83d"}]) == "half \ufffd"
    with pytest.raises(RequestError, match="tool_calls"):
        question_of([user, {"role": "assistant", "content": None, "tool_calls": [{}]}, user])
    with pytest.raises(RequestError, match="must be the user's"):
        question_of([user, said])


def test_history_and_stop(client: openai.OpenAI, members: OpenAIServer) -> None:
    messages: Any = [{"role": "system", "content": "x"}, {"role": "user", "content": "beta beta"}]
    reply = client.chat.completions.create(model="router", messages=messages, stop=["k", "zz"])
    assert reply.choices[0].message.content == "o" and reply.choices[0].finish_reason == "stop"


def test_an_agent_without_an_answer_is_an_error_with_a_reason(policy: Path) -> None:
    agent = agent_of(policy, turns=1)  # it asks, and may not answer any more
    messages: Any = [{"role": "user", "content": "Count to nine"}]
    with (
        running(create_app(AgentWorker(agent))) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client,
    ):
        for stream in (False, True):  # after the first turn a stream has its status: an event says it
            with pytest.raises(openai.APIError, match="no answer within its limit of turns") as refused:
                list(client.chat.completions.create(model="router", messages=messages, stream=stream))
            assert isinstance(refused.value, openai.UnprocessableEntityError) != stream


def test_temperature_seed_and_length_are_those_of_the_answer(policy: Path) -> None:
    agent = agent_of(policy)
    with running(create_app(AgentWorker(agent))) as address:

        def transcript(**fields: Any) -> str:
            body = {"model": "router", "messages": [{"role": "user", "content": "Count to nine"}], **fields}
            reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
            return (
                str(reply["choices"][0]["message"]["reasoning_content"]) if "choices" in reply else f"{reply['error']}"
            )

        greedy = transcript()
        assert greedy == "<think>why</think><search>alpha:</search><answer>ok</answer>" == transcript(temperature=0)
        # a hot policy writes what its seed says, and another seed something else; next to it the others stay cool
        hot = [transcript(temperature=2, seed=seed) for seed in (1, 1, 2)]
        assert hot[0] == hot[1] != hot[2]
        assert transcript(temperature=2, top_p=1e-9, seed=3) == greedy == transcript(seed=5)
        assert "within its limit of tokens" in transcript(max_tokens=12)
        assert "top_p" in transcript(top_p=0)


def test_other_refusals(served: Served) -> None:
    address, headers = f"{served[0]}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(address, content=b"{", headers=headers).json()["error"]["message"] == "the body is not JSON"
    assert httpx.post(address, content=b"[" * 100_000, headers=headers).status_code == 400
    assert httpx.post(address, content=b" " * 1_000_001, headers=headers).status_code == 413
    assert httpx.get(f"{served[0]}/v1/nowhere", headers=headers).json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(address, headers=headers).status_code == 405
    for key in ("wrong", KEY + "x", ""):
        wrong = openai.OpenAI(base_url=f"{served[0]}/v1", api_key=key or "none", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            ask(wrong, "q")
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()


def test_a_broken_pool_is_told_to_the_policy_not_to_the_client(client: openai.OpenAI, members: OpenAIServer) -> None:
    members.faults = [Fault(400)]
    reply = ask(client, "beta beta")
    assert reply.choices[0].message.content == "ok" and reply.to_dict()["srpo"]["members"] == ["beta"]


def test_a_client_that_leaves_is_forgotten(served: Served, members: OpenAIServer) -> None:
    members.latency = 1.0
    body = {"model": "router", "stream": True, "messages": [{"role": "user", "content": "Count to nine"}]}
    with httpx.stream(
        "POST", f"{served[0]}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}
    ) as reply:
        assert next(reply.iter_lines()).startswith("data: ")
    members.latency = 0.0
    for _ in range(100):
        if "router_in_flight 0" in counters(served):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the request of a client that left is still in work")


def test_responses_of_an_agent(client: openai.OpenAI) -> None:
    """What it thought is reasoning, its answer the message; what an agent does not take is refused by name."""
    found = client.responses.create(model="router", input="Say beta now", include=[], tools=[])
    assert [item.type for item in found.output] == ["reasoning", "message"] and found.output_text == "ok"
    assert found.usage is not None and found.usage.to_dict()["cost_usd"] == found.to_dict()["srpo"]["cost_usd"] > 0
    with client.responses.stream(model="router", input="Count to nine", text={"format": {"type": "text"}}) as stream:
        kinds = [event.type for event in stream]
        last = stream.get_final_response()
    assert (last.status, last.output_text) == ("completed", "ok") and kinds.count("response.reasoning_text.delta") == 2
    assert last.usage is not None and last.usage.to_dict()["cost_usd"] == pytest.approx(expected_cost("Count to nine"))
    with pytest.raises(openai.BadRequestError, match="does not take 'tools'"):
        client.responses.create(
            model="router", input="hi", tools=[{"type": "function", "name": "f", "parameters": None}]
        )  # type: ignore[list-item,typeddict-item]


def test_it_ends_when_told_and_leaves_nothing(served: Served) -> None:
    """The last test of this module: stops the server."""
    address, process = served
    numbers = counters(served)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped; nothing was dropped" in output, output
    assert "Traceback" not in output and KEY not in output and KEY not in numbers
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{address}/health", timeout=2)
    assert json.dumps(numbers)  # plain text
