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
from transformers import AutoModelForCausalLM, AutoTokenizer

from routers.data.catalogue import cost
from routers.pool.endpoint import AGENT_PROMPT
from routers.serving.errors import RequestError
from routers.serving.server import create_app, read_request
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
def served(tmp_path_factory: pytest.TempPathFactory, members: OpenAIServer) -> Iterator[Served]:
    """(address, process) of `srpo serve` with a policy that asks real endpoints."""
    folder = tmp_path_factory.mktemp("served")
    policy = train_policy(folder)
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
        [*command, "--port", str(port), "--api-key-env", "ROUTER_KEY"],
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
    assert usage["members"] == ["beta"]
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
    asked = [reply.usage.model_dump()["members"] for reply in replies]
    assert asked == [["beta" if "beta" in question else "alpha"] for question in questions]
    assert members.most_in_flight >= 8  # they really were asked at the same time
    spent = sum(r.usage.model_dump()["cost_usd"] for r in replies)
    logged = members.usage[before:]
    assert len(logged) == 32
    assert spent == pytest.approx(sum(expected_cost(q, "beta" in q) for q in questions))
    metrics = httpx.get(f"{served[0]}/metrics").text
    assert 'router_member_calls_total{member="beta"}' in metrics and "router_in_flight 0" in metrics


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
        ({"messages": []}, 400, "exactly one message"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "must be 'user'"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "not empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
        ({"n": 2}, 400, "'n' must be 1"),
        ({"tools": [{"type": "function"}]}, 400, "'tools' is not supported"),
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


@pytest.mark.parametrize("weight", [0.9, "0.8", True, math.nan])
def test_a_price_sensitivity_must_be_one_of_the_policy_s(weight: object) -> None:
    body = {"model": "r", "messages": [{"role": "user", "content": "q"}], "cost_weight": weight}
    with pytest.raises(RequestError, match=r"trained with: 0\.1, 0\.8"):
        read_request(body, "r", (0.1, 0.8))
    assert read_request({**body, "cost_weight": 0.8}, "r", (0.1, 0.8)).cost_weight == 0.8
    assert read_request({**body, "cost_weight": None}, "r", (0.1, 0.8)).cost_weight is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_s_price_sensitivity_reaches_the_prompt(tmp_path: Path, stream: bool) -> None:
    policy = train_policy(tmp_path)
    settings = dataclasses.replace(AgentSettings.load(policy), cost_weights=(0.1, 0.8))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    read: list[str] = []
    agent = RouterAgent(model, tokenizer, scripted_pool(), settings)
    answered = agent._answer
    agent._answer = lambda found: read.append(tokenizer.decode(found.prompt_ids)) or answered(found)
    body = {"model": "router", "messages": [{"role": "user", "content": "q"}], "cost_weight": 0.8, "stream": stream}

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(agent))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            return await http.post("/v1/chat/completions", json=body)

    reply = asyncio.run(post())
    agent.close()
    assert reply.status_code == 200 and "Price sensitivity: 0.80" in read[0]


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
    assert reply.choices[0].message.content == "ok" and reply.usage.model_dump()["members"] == ["beta"]


def test_a_client_that_leaves_is_forgotten(served: Served, members: OpenAIServer) -> None:
    members.latency = 1.0
    body = {"model": "router", "stream": True, "messages": [{"role": "user", "content": "Count to nine"}]}
    with httpx.stream(
        "POST", f"{served[0]}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}
    ) as reply:
        assert next(reply.iter_lines()).startswith("data: ")
    members.latency = 0.0
    for _ in range(100):
        if "router_in_flight 0" in httpx.get(f"{served[0]}/metrics").text:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the request of a client that left is still in work")


def test_it_ends_when_told_and_leaves_nothing(served: Served) -> None:
    """The last test of this module: stops the server."""
    address, process = served
    numbers = httpx.get(f"{address}/metrics").text
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGTERM), output
    assert "Traceback" not in output and KEY not in output and KEY not in numbers
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{address}/health", timeout=2)
    assert json.dumps(numbers)  # plain text
