"""Clients as people install them, against a served query router over a loopback member.

    python -m venv CLIENTS && CLIENTS/bin/pip install openai litellm langchain-openai openai-agents \
        "smolagents[openai]" "pydantic-ai-slim[openai]"
    (cd NODE && npm i openai ai @ai-sdk/openai-compatible zod)
    SRPO_CLIENTS_PYTHON=CLIENTS/bin/python SRPO_CLIENTS_NODE=NODE pytest -n0 tests/routers/test_real_clients.py

Each client runs in a process of its own (tests/support/clients), calls every feature it has, and says what came of it.
A cancelled stream counts where the member saw the connection go. The table of recipes/RESULTS.md is what `-rP` prints.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Said, cut, events, usage, whole
from serving_helpers import Proxied, proxied

CLIENTS = Path(__file__).resolve().parents[1] / "support" / "clients"
PYTHON, NODE = os.environ.get("SRPO_CLIENTS_PYTHON"), os.environ.get("SRPO_CLIENTS_NODE")
SCRIPTS = sorted(path.name for path in CLIENTS.glob("client_*"))
PEOPLE = '{"city": "Lima", "people": 11}'
pytestmark = pytest.mark.slow


def respond(request: dict[str, Any]) -> Said:
    """A member that uses the tools it is given, keeps to a schema, and can be slow."""
    messages = request["messages"]
    asked = next(_text(m) for m in reversed(messages) if m["role"] == "user" and "?" in _text(m) + "?")
    results = [_text(message) for message in messages if message["role"] == "tool"]
    # smolagents tells results as text of the user's
    results += [t.split("Observation:")[1].strip() for t in map(_text, messages) if t.startswith("Observation:")]
    offered = [tool["function"]["name"] for tool in request.get("tools", [])]
    everything = " ".join(map(_text, messages))
    text, call = "It is Lima.", None
    if "slowly" in everything:
        told = [{"role": "assistant", "content": ""}, *({"content": f"{i} "} for i in range(600))]
        return Said(pieces=cut(events(told, None), 200), pause=0.1)
    if "weather in Lima" in everything and offered:
        done = [result for result in results if "sunny" in result]
        if len(done) < 2:
            call = ("get_weather", {"city": ("Lima", "Quito")[len(done)]})
        else:
            text = f"Done: {', '.join(done)}"
            call = ("final_answer", {"answer": text}) if "final_answer" in offered else None
    elif "how many people" in asked:
        text = PEOPLE
        call = (offered[0], json.loads(PEOPLE)) if offered else None
    used = usage(20, 10)
    made = None if call is None else {"name": call[0], "arguments": json.dumps(call[1])}
    named = {"id": f"call_{len(results)}", "type": "function", "function": made}
    if not request.get("stream"):
        message = {"content": text} if call is None else {"content": None, "tool_calls": [named]}
        return Said(body=whole(message, used, "stop" if call is None else "tool_calls"))
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": "" if call is None else None}]
    if made is None:
        deltas += [{"content": letter} for letter in text]
    else:
        deltas.append({"tool_calls": [{"index": 0, **named, "function": {**made, "arguments": ""}}]})
        deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in made["arguments"]]
    wanted = used if (request.get("stream_options") or {}).get("include_usage") else None
    return Said(pieces=cut(events(deltas, wanted, "stop" if call is None else "tool_calls"), 300))


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or [])


@pytest.fixture(scope="module")
def member() -> Iterator[ChatServer]:
    with ChatServer(respond) as server:
        yield server


@pytest.fixture(scope="module")
def served(member: ChatServer) -> Iterator[Proxied]:
    with proxied({"small": (member, {"timeout": 60.0, "max_tokens": 8000})}) as running:
        yield running


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_client_s_features_work(script: str, served: Proxied, member: ChatServer) -> None:
    ours = script.endswith(".py")
    if not (PYTHON if ours else NODE):
        pytest.skip(f"set {'SRPO_CLIENTS_PYTHON' if ours else 'SRPO_CLIENTS_NODE'}")
    command = [str(PYTHON) if ours else "node", str(CLIENTS / script), f"{served.address}/v1"]
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    left = member.left
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    end = time.monotonic() + 30
    while member.left == left and time.monotonic() < end:
        time.sleep(0.05)
    if told.get("cancellation") == "ok" and member.left == left:
        told["cancellation"] = "the member's stream went on"
    print(f"| {script} | " + " | ".join(f"{name}: {result}" for name, result in told.items()) + " |")
    assert set(told.values()) == {"ok"}, f"{told}\n{done.stderr[-6000:]}"
