"""`srpo serve` as people start it, for every kind of router: it starts, answers in both dialects, and ends well."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import agent_helpers
import httpx
import pytest
import router_helpers
import step_helpers as steps
import test_encoder
import yaml
from baselines.test_online import outcomes
from chat_server import ChatServer, said, usage

from routers.baselines import BASELINES
from routers.baselines.stream import online_router
from routers.data.billing import token_usd
from routers.data.table import quickstart_table
from routers.serving.making import make_worker, router_arguments, serving_arguments
from routers.tasks.step_routing.rule_router import RuleRouter, RuleSettings

ROOT = Path(__file__).resolve().parents[2]
READ, WROTE = 30, 8
Prices = dict[str, tuple[float, float]]


def priced(names: Iterable[str]) -> Prices:
    """Members at other prices each."""
    return {name: (1.0 + place, 2.0) for place, name in enumerate(names)}


def language_model(folder: Path) -> Prices:
    router_helpers.train_query_router(folder)
    return priced(member.name for member in router_helpers.MEMBERS)


def encoder(folder: Path) -> Prices:
    made, _, _ = test_encoder.tiny(max_steps=5)
    made.save(folder)  # type: ignore[attr-defined]
    return {m.name: (m.price_in, m.price_out) for m in made.members}  # type: ignore[attr-defined]


def fitted(folder: Path) -> Prices:
    table = quickstart_table()
    BASELINES["TF-IDF ridge"].how().fit(table).save(folder)  # type: ignore[operator,union-attr]
    return priced(list(table.catalogue)[:3])


def online(folder: Path) -> Prices:
    known = outcomes(60)
    online_router("LinUCB", known, {}).save(folder)
    return priced(known.members)


def step_router(folder: Path) -> Prices:
    how = steps.settings("signs", ("small", "large"), environment="messages", unit="usd")
    for part in steps.policy():
        part.save_pretrained(folder)
    how.save(folder)
    return priced(("small", "large"))


def step_rule(folder: Path) -> Prices:
    how = steps.settings("signs", ("small", "large"), environment="messages", unit="usd")
    RuleRouter(RuleSettings("escalate", math.inf, how)).save(folder)
    return priced(("small", "large"))


def agent(folder: Path) -> Prices:
    agent_helpers.train_policy(folder)
    return priced(member.name for member in agent_helpers.MEMBERS)


KINDS = [encoder, fitted, online, step_router, step_rule]
TRAINED = [pytest.param(make, marks=pytest.mark.slow) for make in (language_model, agent)]


def test_a_cap_in_calls_is_a_whole_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = steps.settings("signs", ("small", "large"), environment="messages", unit="large_calls")
    RuleRouter(RuleSettings("escalate", math.inf, how)).save(tmp_path)
    names = (*how.executors, "spare")
    pool = [{"name": n, "descriptor": n, "price_in": 1, "price_out": 1, "base_url": "http://x"} for n in names]
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"members": pool}))
    parser = argparse.ArgumentParser()
    router_arguments(parser)
    serving_arguments(parser)

    def made(*words: str) -> object:
        return make_worker(parser.parse_args([str(tmp_path), "--catalogue", str(tmp_path / "pool.yaml"), *words]), "r")

    with pytest.raises(ValueError, match=r"0.5: calls of the expensive .* --conversation_unit usd"):
        made("--conversation_cap", "0.5")
    made("--conversation_cap", "2")
    made("--conversation_cap", "0.5", "--conversation_unit", "usd")
    told = capsys.readouterr().err
    assert "a conversation may spend 2 large_calls" in told and "a conversation may spend 0.5 usd" in told
    assert "never asks spare: the router was trained with small, large" in told


@pytest.fixture(scope="module")
def member() -> Iterator[ChatServer]:
    with ChatServer(said("it says ☕", usage(READ, WROTE))) as server:
        yield server


@pytest.mark.parametrize("make", [*KINDS, *TRAINED], ids=lambda make: make.__name__)
def test_every_kind_is_served_by_a_process(make: Callable[[Path], Prices], tmp_path: Path, member: ChatServer) -> None:
    (tmp_path / "router").mkdir()
    prices = make(tmp_path / "router")
    pool = [
        {"name": name, "descriptor": name, "price_in": read, "price_out": write, "base_url": member.url}
        for name, (read, write) in prices.items()
    ]
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"members": pool}))
    command = [sys.executable, "-m", "srpo", "serve", "router", "--catalogue", "pool.yaml", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--drain_seconds", "5"], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        told = list(iter_until(process.stdout, "listening on http://127.0.0.1:"))
        if make is fitted:
            assert "routes among fewshot, chat, calculator; without lookup, python of its training" in told[-2]
        line = told[-1]
        answers(line.partition("listening on ")[2].split()[0], prices, member)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    finally:
        process.kill()
        process.wait()


def iter_until(lines: Iterable[str], words: str) -> Iterator[str]:
    for line in lines:
        yield line
        if words in line:
            return
    raise AssertionError("the process ended")


def answers(address: str, prices: Prices, member: ChatServer) -> None:
    """Health, a chat completion, a response whole and streamed; money is the member's own log times its price."""
    with httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/health").json() == {"status": "ok"}
        asked = {"model": "router", "messages": [{"role": "user", "content": "What is one?"}]}
        before = len(member.logged)
        chat = client.post("/v1/chat/completions", json=asked).raise_for_status().json()
        told, said_there = chat["srpo"], chat["choices"][0]["message"]["content"]
        asked_members = told["members"] if "members" in told else [told["member"]]
        assert (
            asked_members and set(asked_members) <= set(prices) and len(member.logged) - before == len(asked_members)
        )
        assert said_there == ("ok" if "members" in told else "it says ☕")
        usd = sum(token_usd(READ, WROTE, *prices[name]) for name in asked_members)
        assert chat["usage"]["cost_usd"] == pytest.approx(usd + told.get("policy_usd", 0.0))

        asked = {"model": "router", "input": "What is one?"}
        response = client.post("/v1/responses", json=asked).json()
        text = next(item for item in response["output"] if item["type"] == "message")["content"][0]["text"]
        assert (response["status"], text) == ("completed", said_there)
        assert response["usage"]["cost_usd"] == pytest.approx(chat["usage"]["cost_usd"], rel=0.2)  # of step routers
        lines = client.post("/v1/responses", json={**asked, "stream": True}).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        last: dict[str, Any] = events[-1]
        assert last["type"] == "response.completed", last
        assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == said_there
        assert last["response"]["usage"]["cost_usd"] > 0 and last["response"]["srpo"]["cost_usd"] > 0
