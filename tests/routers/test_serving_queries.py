"""A query router on the command line and behind a server: decisions alone, and the replies of real endpoints."""

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from agent_helpers import train_policy
from openai_server import Fault, OpenAIServer
from router_helpers import MEMBERS, SETTINGS, right, train_query_router

from routers.data.catalogue import cost
from routers.router import load_router
from routers.serving.commands import main as serve
from routers.serving.forward import Forwarder, forwarding_pool
from routers.serving.route import main
from routers.serving.server import create_app

QUESTION = "name a river"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_query_router(tmp_path_factory.mktemp("router"))


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(reply="two words") as running:
        yield running


@pytest.fixture
def catalogue(server: OpenAIServer, tmp_path: Path) -> Path:
    entries = [
        {"name": m.name, "descriptor": m.descriptor, "price_in": m.price_in, "price_out": m.price_out,
         "base_url": server.url, "max_tokens": 20}
        for m in MEMBERS
    ]  # fmt: skip
    path = tmp_path / "pool.yaml"
    path.write_text(yaml.safe_dump({"members": entries}))
    return path


def test_the_command_line_prints_member_probabilities_and_cost(policy: Path, capsys: Any, tmp_path: Path) -> None:
    assert main([str(policy), QUESTION]) == 0
    plain = capsys.readouterr().out
    assert "member: large" in plain and "probabilities: large 0." in plain
    assert "cost: $0.000120 expected for the call" in plain
    (tmp_path / "q.txt").write_text("sum of 1 and 2\n\nhello there\n")
    assert main([str(policy), "--file", str(tmp_path / "q.txt"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["query"], r["members"]) for r in rows] == [
        ("sum of 1 and 2", ["small-maths"]),
        ("hello there", ["small"]),
    ]
    assert main([str(policy), QUESTION, "--cost-weight", "0.8"]) == 0
    assert "member: small\n" in capsys.readouterr().out
    assert main([str(policy), QUESTION, "--members", "small,small-maths"]) == 0
    assert "member: small" in capsys.readouterr().out


def test_the_command_line_asks_the_chosen_member(
    policy: Path, catalogue: Path, server: OpenAIServer, capsys: Any
) -> None:
    before = len(server.usage)
    assert main([str(policy), QUESTION, "--catalogue", str(catalogue), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["answer"], found["members"], len(server.usage)) == ("two words", ["large"], before + 1)
    assert server.usage[-1][0] == len(QUESTION.split())  # the query as it is, without a prompt around it
    own = SETTINGS.policy_usd(found["prompt_tokens"], found["completion_tokens"])
    assert found["cost_usd"] == pytest.approx(cost(MEMBERS[2], *server.usage[-1]) + own, rel=1e-12)
    assert main([str(policy), QUESTION, "--catalogue", str(catalogue), "--max-cost-usd", "0"]) == 1
    assert "no answer: over budget" in capsys.readouterr().out and len(server.usage) == before + 1


def test_what_cannot_be_served_says_so(policy: Path, tmp_path: Path, catalogue: Path) -> None:
    (tmp_path / "router.yaml").write_text("kind: step_routing\nsettings: {}\n")
    for command in (main, serve):
        with pytest.raises(ValueError, match="is a step router, which decides inside an agent's loop"):
            command([str(tmp_path)] + ["q"] * (command is main))
    with pytest.raises(ValueError, match="not both"):
        main([str(policy), "q", "--catalogue", str(catalogue), "--table", "quickstart"])
    with pytest.raises(ValueError, match="there is no member 'gpt-34' to route to"):
        main([str(policy), "q", "--members", "gpt-34"])
    with pytest.raises(ValueError, match="give a query, or --file"):
        main([str(policy)])
    agent = train_policy(tmp_path / "agent", steps=150)
    with pytest.raises(ValueError, match="an agent answers with a pool: give --catalogue or --table"):
        serve([str(agent)])
    half = [dataclasses.replace(MEMBERS[0], base_url="http://host/v1"), MEMBERS[1]]
    with pytest.raises(ValueError, match="member 'small-maths' has no base_url in the catalogue"):
        forwarding_pool(half, None)  # type: ignore[arg-type]


def ask(policy: Path, pool: Any, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """Through the real application, in process; it is closed at the end."""

    async def post() -> list[httpx.Response]:
        router = Forwarder(load_router(policy), pool)
        app = create_app(router)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as http:
            posts = [
                http.post("/v1/chat/completions", json={"model": "router", "messages": messages(), **body})
                for body in bodies
            ]
            found = await asyncio.gather(*posts)
            found.append(await http.get("/metrics"))
        await router.aclose()
        return found

    return asyncio.run(post())


def messages(question: str = QUESTION) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_a_server_without_endpoints_answers_with_the_decision(policy: Path) -> None:
    *replies, metrics = ask(
        policy, None, {}, {"cost_weight": 0.8}, {"cost_weight": 0.95}, {"messages": messages("sum of 1 and 2")}
    )
    assert [r.status_code for r in replies] == [200, 200, 400, 200]
    chosen = [r.json()["choices"][0]["message"]["content"] for r in replies if r.status_code == 200]
    assert chosen == ["large", "small", "small-maths"] == [right(QUESTION), right(QUESTION, 0.8), right("sum")]
    usage = replies[0].json()["usage"]
    assert usage["members"] == ["large"] and sum(usage["scores"].values()) == pytest.approx(1.0)
    assert usage["cost_usd"] == pytest.approx(SETTINGS.policy_usd(usage["prompt_tokens"], usage["completion_tokens"]))
    assert "trained with: 0.2, 0.8" in replies[2].json()["error"]["message"]
    assert 'router_member_calls_total{member="large"} 1' in metrics.text


def test_a_server_with_endpoints_forwards(policy: Path, server: OpenAIServer) -> None:
    from routers.pool import Ledger

    live = [dataclasses.replace(m, base_url=server.url, max_tokens=20) for m in MEMBERS]
    before = len(server.usage)
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    pool = forwarding_pool(live, Ledger(None, SETTINGS.policy_price))
    whole, streamed, capped, metrics = ask(policy, pool, {}, stream, {"max_cost_usd": 0.0})
    assert len(server.usage) == before + 2 and pool is not None
    body = whole.json()
    assert body["choices"][0]["message"]["content"] == "two words" and body["usage"]["members"] == ["large"]
    assert body["choices"][0]["message"]["reasoning_content"] == "<think>why</think><route>large</route>"
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "two words"
    assert events[-1]["usage"]["scores"] == pytest.approx(body["usage"]["scores"], abs=1e-4)
    spent = body["usage"]["cost_usd"] + events[-1]["usage"]["cost_usd"] + capped.json()["usage"]["cost_usd"]
    assert pool.ledger.total().usd == pytest.approx(spent, rel=1e-9)
    assert capped.json()["choices"][0]["finish_reason"] == "length" and capped.json()["usage"]["members"] == []
    assert "router_in_flight 0" in metrics.text


def test_a_failing_member_is_an_error_of_the_server(policy: Path, server: OpenAIServer) -> None:
    from routers.pool import Ledger

    live = [dataclasses.replace(m, base_url=server.url, max_tokens=20) for m in MEMBERS]
    server.faults = [Fault(400)]
    reply, _ = ask(policy, forwarding_pool(live, Ledger()), {})
    assert reply.status_code == 502 and "bad request" in reply.json()["error"]["message"]
