"""A query router on the command line and behind a server: decisions alone, and the replies of real endpoints."""

import argparse
import asyncio
import dataclasses
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from agent_helpers import train_policy
from openai_server import Fault, OpenAIServer
from router_helpers import MEMBERS, SETTINGS, right, train_query_router
from serving_helpers import ByName

from routers.baselines import BASELINES
from routers.baselines.online import OnlineRouter, OnlineSettings
from routers.data.catalogue import cost
from routers.data.table import ReplyTable
from routers.evaluation.episodes import Outcomes, RewardRule
from routers.pool import recorded_pool
from routers.serving.commands import main as serve
from routers.serving.forward import forwarding_pool
from routers.serving.making import make_worker, router_arguments, serving_arguments
from routers.serving.proxy import Proxy
from routers.serving.route import main
from routers.serving.server import create_app
from routers.serving.stand_ins import RecordedReplies
from routers.tasks.query_routing.encoder.training import train_encoder

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
    assert main([str(policy), QUESTION, "--cost_weight", "0.8"]) == 0
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
    assert main([str(policy), QUESTION, "--catalogue", str(catalogue), "--max_cost_usd", "0"]) == 1
    assert "no answer: over budget" in capsys.readouterr().out and len(server.usage) == before + 1


def test_what_cannot_be_served_says_so(policy: Path, tmp_path: Path, catalogue: Path) -> None:
    (tmp_path / "router.yaml").write_text("kind: step_routing\nsettings: {}\n")
    with pytest.raises(ValueError, match="is a step router, which decides inside an agent's loop"):
        main([str(tmp_path), "q"])
    with pytest.raises(ValueError, match="a step router passes the calls of agents on to the members"):
        serve([str(tmp_path)])
    with pytest.raises(ValueError, match="kind query_routing keeps no conversations: leave --conversation_cap"):
        serve([str(policy), "--conversation_cap", "1"])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match=r"in use.*; choose another"):
        serve([str(tmp_path / "nobody"), "--port", str(taken.getsockname()[1])])
    with pytest.raises(ValueError, match="nobody: there is no such folder; give the folder of a router, or a Hub id"):
        main(["nobody", "q"])
    with pytest.raises(ValueError, match="not both"):
        main([str(policy), "q", "--catalogue", str(catalogue), "--table", "quickstart"])
    with pytest.raises(ValueError, match="there is no member 'gpt-34' to route to"):
        main([str(policy), "q", "--members", "gpt-34"])
    with pytest.raises(ValueError, match="give a query, or --file"):
        main([str(policy)])
    agent = train_policy(tmp_path / "agent", steps=150)
    with pytest.raises(ValueError, match="an agent answers with a pool: give --catalogue or --table"):
        serve([str(agent)])
    with pytest.raises(ValueError, match="keeps no replies: leave --reply_cache out"):
        serve([str(policy), "--catalogue", str(catalogue), "--reply_cache", str(tmp_path)])
    half = [dataclasses.replace(MEMBERS[0], base_url="http://host/v1"), MEMBERS[1]]
    with pytest.raises(ValueError, match="member 'small-maths' has no base_url in the catalogue"):
        forwarding_pool(half, None)  # type: ignore[arg-type]


def asked(folder: Path, catalogue: Path | None = None, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    router_arguments(parser)
    serving_arguments(parser)
    pool = [] if catalogue is None else ["--catalogue", str(catalogue)]
    return parser.parse_args([str(folder), *pool, *more])


def ask(worker: Any, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """Through the real application, in process; it is closed at the end."""

    async def post() -> list[httpx.Response]:
        app = create_app(worker)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as http:
            posts = [
                http.post("/v1/chat/completions", json={"model": "router", "messages": messages(), **body})
                for body in bodies
            ]
            found = await asyncio.gather(*posts)
            found.append(await http.get("/metrics"))
        await worker.aclose()
        return found

    return asyncio.run(post())


def messages(question: str = QUESTION) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_a_server_without_endpoints_answers_with_the_decision(policy: Path) -> None:
    worker = make_worker(asked(policy), "router")
    *replies, metrics = ask(
        worker,
        {},
        {"cost_weight": 0.8},
        {"cost_weight": 0.95},
        {"messages": messages("sum of 1 and 2")},
        {"tools": [{"type": "function"}]},
    )
    assert [r.status_code for r in replies] == [200, 200, 400, 200, 400]
    chosen = [r.json()["choices"][0]["message"]["content"] for r in replies if r.status_code == 200]
    assert chosen == ["large", "small", "small-maths"] == [right(QUESTION), right(QUESTION, 0.8), right("sum")]
    found = replies[0].json()
    assert found["srpo"]["member"] == "large" and sum(found["srpo"]["scores"].values()) == pytest.approx(1.0)
    assert found["usage"]["cost_usd"] == found["srpo"]["policy_usd"] > 0
    assert "trained with: 0.2, 0.8" in replies[2].json()["error"]["message"]
    assert "cannot honour 'tools'" in replies[4].json()["error"]["message"]
    assert 'router_decisions_total{member="large"} 2' in metrics.text


def test_the_policy_s_own_tokens_are_paid_for_too(policy: Path, catalogue: Path, server: OpenAIServer) -> None:
    before = len(server.usage)
    worker = make_worker(asked(policy, catalogue), "router")
    whole, capped, metrics = ask(worker, {}, {"max_cost_usd": 0.0})
    assert len(server.usage) == before + 1
    body = whole.json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "two words"}
    assert body["srpo"]["member"] == "large" and body["srpo"]["decision"] == "<think>why</think><route>large</route>"
    member = cost(MEMBERS[2], *server.usage[-1])
    assert body["usage"]["cost_usd"] == pytest.approx(member + body["srpo"]["policy_usd"], rel=1e-12)
    # the decision of a request that nobody may answer was made all the same
    assert capped.status_code == 402 and capped.json()["srpo"]["cost_usd"] == body["srpo"]["policy_usd"] > 0
    assert isinstance(worker, Proxy)
    spent = body["usage"]["cost_usd"] + capped.json()["srpo"]["cost_usd"]
    assert worker.ledger.total().usd == pytest.approx(spent, rel=1e-9)
    assert "router_in_flight 0" in metrics.text


def fitted(folder: Path) -> None:
    rows = [
        {"query_id": f"{n}", "query": f"sum of {n}" if n % 2 else f"name river {n}", "member": m.name, "family": "x",
         "split": "train", "correct": float((m.name == "large") != bool(n % 2)), "cost": 1e-5}
        for n in range(20) for m in MEMBERS
    ]  # fmt: skip
    router = BASELINES["TF-IDF ridge"].how()  # type: ignore[misc]
    router.fit(ReplyTable(rows, {m.name: m for m in MEMBERS})).save(folder)


def online(folder: Path) -> None:
    settings = OnlineSettings("LinUCB", MEMBERS, RewardRule(0.01, 0.2), {})
    OnlineRouter(settings, [f"name river {n}" for n in range(20)]).save(folder)


def encoder(folder: Path) -> None:
    items = [{"query_id": str(n), "query": f"name river {n} of {n * n}"} for n in range(20)]
    score, usd = np.tile([0.0, 0.0, 1.0], (20, 1)), np.tile([0.001, 0.002, 0.003], (20, 1))
    known, rule = ["small", "small-maths", "large"], RewardRule(0.01)
    outcomes = Outcomes(items, known, score, usd, rule(score, usd), rule=rule)
    catalogue = {member.name: member for member in MEMBERS}
    train_encoder(outcomes, rule, catalogue=catalogue, cost_weights=(0.2,), max_steps=2, queries=8).save(folder)


@pytest.mark.parametrize("make", [fitted, online, encoder])
def test_every_kind_is_a_proxy(make: Any, tmp_path: Path, catalogue: Path, server: OpenAIServer) -> None:
    make(tmp_path / "router")
    before = len(server.requests)
    bodies = [{}, {"messages": messages("sum of 7"), "temperature": 0.5}, {"stream": True}]
    *replies, _ = ask(make_worker(asked(tmp_path / "router", catalogue), "router"), *bodies)
    assert [r.status_code for r in replies] == [200] * 3
    assert {r.headers["x-srpo-member"] for r in replies} <= {m.name for m in MEMBERS}
    assert replies[0].json()["choices"][0]["message"]["content"] == "two words" in replies[2].text
    sent = sorted((request["model"], request["messages"][-1]["content"]) for request in server.requests[before:])
    asked_for = [
        (r.headers["x-srpo-member"], q) for r, q in zip(replies, (QUESTION, "sum of 7", QUESTION), strict=True)
    ]
    assert sent == sorted(asked_for)


def test_a_fitted_router_without_probabilities_is_asked_again(
    tmp_path: Path, catalogue: Path, server: OpenAIServer
) -> None:
    fitted(tmp_path / "router")
    server.faults = [Fault(500), Fault(503)]
    reply, _ = ask(make_worker(asked(tmp_path / "router", catalogue), "router"), {})
    tried = [one["member"] for one in reply.json()["srpo"]["tried"]]
    assert reply.status_code == 200 and tried[0] == "large"
    assert sorted([*tried, reply.json()["srpo"]["member"]]) == sorted(m.name for m in MEMBERS)


def test_recorded_replies_answer_what_is_recorded() -> None:
    known = {"query_id": "1", "query": QUESTION, "family": "x", "split": "train", "correct": 1.0}
    tokens = {"prompt_tokens": 5, "completion_tokens": 3}
    rows = [{**known, **tokens, "member": m.name, "reply": f"the {m.name} Rhine"} for m in MEMBERS]
    pool = recorded_pool(ReplyTable(rows, {m.name: m for m in MEMBERS}), by="query")
    lines = {m.name: RecordedReplies(pool, m.name) for m in MEMBERS}
    whole, streamed, other, long, _ = ask(
        Proxy(ByName(MEMBERS), lines, pool.ledger),
        {},
        {"stream": True},
        {"messages": messages("name a lake")},
        {"messages": [*messages(), *messages()]},
    )
    assert whole.json()["choices"][0]["message"]["content"] == "the small Rhine"
    assert whole.json()["usage"]["cost_usd"] == pytest.approx(cost(MEMBERS[0], 5, 3))
    assert '"content":"the small Rhine"' in streamed.text and streamed.text.endswith("data: [DONE]\n\n")
    assert other.status_code == 404 and "nothing is recorded" in other.json()["error"]["message"]
    assert long.status_code == 400 and "one message" in long.json()["error"]["message"]
