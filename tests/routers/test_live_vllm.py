"""A live vLLM as one of three members behind `srpo serve`, all real processes: what it says is what the client gets.

`bash scripts/test.sh --vllm` runs it. The router is tiny and sends what is neither a sum nor a name to vLLM's member.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import router_helpers
import yaml
from chat_server import ChatServer, said, usage
from serving_helpers import until
from vllm_server import ROOT, vllm_server

from routers.data.billing import token_usd

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]
PRICES = {"small": (0.1, 0.4), "small-maths": (0.5, 1.0), "large": (2.0, 8.0)}
QUESTIONS = ("hello there", "what is it", "hello there, what is the capital of Perú? ☕", "what is the Zürich 東京")
WEATHER = {"name": "get_weather", "parameters": {"type": "object", "required": ["city"], "properties": {
    "city": {"type": "string", "maxLength": 12}}, "additionalProperties": False}}  # fmt: skip
# of SmolLM2, whose template has no place for tools, vLLM's grammar makes a call where one is asked for
TAKES_TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
TOOLS: Any = [{"type": "function", "function": WEATHER}]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("vllm")
    with vllm_server(folder / "smollm2", folder / "server.log", *TAKES_TOOLS) as address:
        yield address


@pytest.fixture(scope="module")
def served(vllm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `srpo serve`; at its end, SIGTERM must end it well."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "router").mkdir()
    router_helpers.train_query_router(folder / "router")
    with ChatServer(said("forty-two", usage(7, 3))) as other:
        pool = [
            {"name": name, "descriptor": name, "price_in": read, "price_out": write, "base_url": other.url}
            for name, (read, write) in PRICES.items()
        ]
        pool[0] |= {"base_url": f"{vllm}/v1", "model": "smollm2", "timeout": 600, "max_tokens": 600}
        (folder / "pool.yaml").write_text(yaml.safe_dump({"members": pool}))
        command = [sys.executable, "-m", "srpo", "serve", "router", "--catalogue", "pool.yaml", "--port", "0", "--ui"]
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stderr=subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            while "listening on" not in line:
                assert line, "the server ended"
                line = process.stderr.readline()
            yield line.partition("listening on ")[2].strip()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()


def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)


def ask(address: str, question: str, **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": question}]
    name = client(address).models.list().data[0].id
    return client(address).chat.completions.create(
        model=name, messages=messages, temperature=0, **{"max_tokens": 24, **more}
    )


def cost(reply: Any, member: str = "small") -> float:
    """Of vLLM's own usage, and of the router's own tokens."""
    return token_usd(reply.usage.prompt_tokens, reply.usage.completion_tokens, *PRICES[member])


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_vllm_says_is_what_the_client_gets(question: str, vllm: str, served: str) -> None:
    """Whole and streamed, text, usage and money."""
    own, whole = ask(vllm, question), ask(served, question)
    theirs, ours = own.to_dict(), whole.to_dict()
    assert ours["choices"] == theirs["choices"] and own.usage.completion_tokens > 1
    assert {name: ours["usage"][name] for name in theirs["usage"]} == theirs["usage"]
    assert (ours["model"], ours["srpo"]["member"], ours["srpo"]["tried"]) == ("router", "small", [])
    assert ours["usage"]["cost_usd"] == pytest.approx(cost(own) + ours["srpo"]["policy_usd"], rel=1e-12)
    chunks = list(ask(served, question, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == own.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == own.choices[0].finish_reason
    last = chunks[-1].to_dict()
    assert {name: last["usage"][name] for name in ("prompt_tokens", "completion_tokens")} == {
        name: theirs["usage"][name] for name in ("prompt_tokens", "completion_tokens")
    }
    assert last["usage"]["cost_usd"] == ours["usage"]["cost_usd"]


def test_the_other_members_and_the_bill(vllm: str, served: str) -> None:
    reply = ask(served, "sum of 1 and 2")
    assert (reply.choices[0].message.content, reply.srpo["member"]) == ("forty-two", "small-maths")
    assert reply.usage.cost_usd == pytest.approx(cost(reply, "small-maths") + reply.srpo["policy_usd"], rel=1e-12)
    seen = httpx.get(f"{served}/ui/decisions").json()
    assert "small-maths" in json.dumps(seen)


def test_tools_schemas_and_refusals_in_vllm_s_own_words(vllm: str, served: str) -> None:
    """A call of a tool and a schema come as vLLM gives them, and what it refuses is refused in its own words."""
    shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": WEATHER["parameters"]}}
    named = {"type": "function", "function": {"name": "get_weather"}}
    for more in ({"response_format": shape}, {"tools": TOOLS, "tool_choice": named}):
        own, through = (ask(one, "what is the weather in Lima", max_tokens=100, **more) for one in (vllm, served))
        ours, theirs = (one.choices[0].message.to_dict() for one in (through, own))
        calls = [[call.pop("function") for call in one.pop("tool_calls", None) or ()] for one in (ours, theirs)]
        assert calls[0] == calls[1] and bool(calls[0]) == ("tools" in more)
        assert ours == theirs and "city" in json.loads(calls[0][0]["arguments"] if calls[0] else ours["content"])
        assert through.usage.cost_usd == pytest.approx(cost(own) + through.srpo["policy_usd"], rel=1e-12)
    refused = []
    for address in (vllm, served):
        with pytest.raises(openai.BadRequestError) as error:
            ask(address, "hello there", logprobs=True, top_logprobs=99)
        refused.append(error.value.body["message"])  # type: ignore[index]
    assert refused[0] == refused[1] and "99" in refused[0]


def test_a_stream_that_is_left_ends_in_vllm(vllm: str, served: str) -> None:
    stream = ask(served, "hello there", stream=True, max_tokens=600, logit_bias={"2": -100})  # never <|im_end|>
    next(iter(stream))
    assert running(vllm) == 1
    stream.close()
    until(lambda: running(vllm) == 0, 120)


def running(vllm: str) -> float:
    found = re.search(r"^vllm:num_requests_running\{.*\} ([0-9.]+)$", httpx.get(f"{vllm}/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])
