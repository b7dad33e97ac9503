"""`recipes/catalogues/agent_live.yaml`, served by `srpo serve` with the endpoints that its comment tells to write in.

Two providers on loopback speak as OpenAI's do, prompt caching included: each keeps what it read, and bills the longest
beginning that it knows as cached, in steps of 128 tokens from 1,024 on.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import step_helpers as steps
import yaml
from chat_server import ChatServer, Said, cut, events, whole

from routers.data.catalogue import Member, load_catalogue
from routers.language.digest import digest

ROOT = Path(__file__).resolve().parents[2]
TOOLS: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
SYSTEM = "You repair what is broken. " * 240
MODELS = {"junior": "gpt-4.1-nano", "senior": "gpt-4.1"}


class Provider(ChatServer):
    """Calls a tool until three results are there, then answers. Whole, or streamed as it is asked."""

    def __init__(self) -> None:
        super().__init__(self._respond)
        self._read: list[str] = []

    def _respond(self, request: dict[str, Any]) -> Said:
        text = json.dumps([request["tools"], request["messages"]])
        known = max((_common(text, read) // 4 for read in self._read), default=0)
        self._read.append(text)
        results = sum(message["role"] == "tool" for message in request["messages"])
        used = {
            "prompt_tokens": len(text) // 4,
            "completion_tokens": 17 + results,
            "total_tokens": len(text) // 4 + 17 + results,
            "prompt_tokens_details": {"cached_tokens": known // 128 * 128 if known >= 1024 else 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "accepted_prediction_tokens": 0},
        }
        call = {"id": f"call_{results}", "type": "function", "function": {"name": "look", "arguments": '{"q": "☕"}'}}
        calls = results < 3
        if not request.get("stream"):
            message: dict[str, Any] = {"content": None, "tool_calls": [call]} if calls else {"content": "mended ☕"}
            return Said(body=whole(message, used, "tool_calls" if calls else "stop"))
        assert request["stream_options"] == {"include_usage": True}
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None if calls else "mended ☕"}]
        if calls:
            deltas += [{"tool_calls": [{"index": 0, **call}]}]
        return Said(pieces=cut(events(deltas, used, "tool_calls" if calls else "stop"), 60))


def _common(one: str, other: str) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.fixture
def providers() -> Iterator[dict[str, Provider]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(Provider()) for name in MODELS}


@pytest.fixture
def served(providers: dict[str, Provider], tmp_path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Its address, and the members of the catalogue as a user mends it."""
    how = steps.settings("signs", ("junior", "senior"), environment="messages", unit="usd", policy_price=(0.02, 0.06))
    conversation = [{"role": "user", "content": "Mend it."}, {"role": "tool", "tool_call_id": "a", "content": "tea"}]
    (tmp_path / "router").mkdir()
    for part in steps.policy([digest(conversation, TOOLS).text, "An agent acted [steps left 3]"]):
        part.save_pretrained(tmp_path / "router")
    how.save(tmp_path / "router")
    pool = yaml.safe_load((ROOT / "recipes/catalogues/agent_live.yaml").read_text(encoding="utf-8"))
    for member in pool["members"]:
        name = member["name"]
        member |= {"base_url": providers[name].url, "model": MODELS[name], "api_key_env": f"KEY_OF_{name.upper()}"}
    path = tmp_path / "agent_live.yaml"
    path.write_text(yaml.safe_dump(pool), encoding="utf-8")
    command = [sys.executable, "-m", "srpo", "serve", "router", "--catalogue", str(path), "--port", "0"]
    command += ["--conversation_cap", "0.2", "--conversation_unit", "usd", "--public_metrics"]
    keys = {f"KEY_OF_{name.upper()}": f"sk-{name}" for name in MODELS}
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, **keys, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "listening on" in line)
        yield line.split()[-1], load_catalogue(path)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
        assert process.returncode == 0 and "sk-" not in told, told
    finally:
        process.kill()
        process.wait()


def billed(member: Member, used: dict[str, Any]) -> float:
    """USD, by hand."""
    cached = used["prompt_tokens_details"]["cached_tokens"]
    assert member.price_in and member.price_out and member.price_cached
    read = (used["prompt_tokens"] - cached) * member.price_in + cached * member.price_cached
    return (read + used["completion_tokens"] * member.price_out) / 1e6


def test_one_conversation_with_tools_is_billed_to_the_token(
    served: tuple[str, dict[str, Member]], providers: dict[str, Provider]
) -> None:
    """Whoever answers first is down from the third call on, so that both answer some of it."""
    address, members = served
    assert [(m.price_in, m.price_cached, m.price_out) for m in members.values()] == [(0.1, 0.025, 0.4), (2, 0.5, 8)]
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Mend it."}]
    ids: set[str] = set()
    asked: list[str] = []
    cost = policy = 0.0
    down = Said(503, body=b'{"error": {"message": "overloaded", "type": "server_error"}}')
    with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
        for turn in range(4):
            if turn == 2:
                providers[asked[0]].replies = [down] * 9
            if turn == 1:  # streamed
                with client.chat.completions.stream(
                    model="router", messages=messages, tools=TOOLS, stream_options={"include_usage": True}
                ) as stream:
                    said = [event.chunk.to_dict() for event in stream if event.type == "chunk"]
                    reply = stream.get_final_completion()
                told: Any = {**said[-1], "choices": reply.to_dict()["choices"]}
            else:
                reply = client.chat.completions.create(model="router", messages=messages, tools=TOOLS)
                told = reply.to_dict()
            ids.add(told["srpo"]["conversation"])
            asked.append(told["srpo"]["member"])
            mine = billed(members[asked[-1]], providers[asked[-1]].logged[-1])
            assert told["usage"]["cost_usd"] == pytest.approx(mine + told["srpo"]["policy_usd"], rel=1e-9)
            assert (
                told["usage"]["prompt_tokens_details"]["cached_tokens"]
                == (providers[asked[-1]].logged[-1]["prompt_tokens_details"]["cached_tokens"])
            )
            cost, policy = cost + told["usage"]["cost_usd"], policy + told["srpo"]["policy_usd"]
            message = reply.choices[0].message
            messages.append({k: v for k, v in message.to_dict().items() if k in ("role", "content", "tool_calls")})
            for call in message.tool_calls or ():
                messages.append({"role": "tool", "tool_call_id": call.id, "content": "tea"})
    assert message.content == "mended ☕" and len(ids) == 1 and set(asked) == set(MODELS)
    logs = {name: provider.logged for name, provider in providers.items()}
    assert sum(map(len, logs.values())) == 4 and [len(logs[name]) for name in MODELS] == [*map(asked.count, MODELS)]
    bill = {name: sum(billed(members[name], used) for used in logged) for name, logged in logs.items()}
    assert cost == pytest.approx(sum(bill.values()) + policy, rel=1e-9)
    assert any(used["prompt_tokens_details"]["cached_tokens"] for logged in logs.values() for used in logged)
    for name, provider in providers.items():
        assert {request["model"] for request in provider.requests} <= {MODELS[name]}
        assert {head["authorization"] for head in provider.headers} <= {f"Bearer sk-{name}"}
    text = httpx.get(f"{address}/metrics").text
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for name, logged in logs.items():
        assert float(numbers[f'router_cost_usd_total{{owner="{name}"}}']) == pytest.approx(bill[name], rel=1e-9)
        for kind, tokens in (
            ("prompt", [used["prompt_tokens"] for used in logged]),
            ("cached", [used["prompt_tokens_details"]["cached_tokens"] for used in logged]),
            ("completion", [used["completion_tokens"] for used in logged]),
        ):
            assert float(numbers[f'router_tokens_total{{kind="{kind}",owner="{name}"}}']) == sum(tokens)
