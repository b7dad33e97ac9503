"""Bodies that attackers and broken clients send: whatever comes, no error is the server's, and it goes on."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from agent_helpers import scripted_pool, train_policy
from chat_server import ChatServer, said, usage
from fuzzed_bodies import bodies
from serving_helpers import ByName, proxied

from routers.data.catalogue import Member
from routers.pool import Ledger
from routers.serving.agent import AgentWorker
from routers.serving.proxy import Proxy
from routers.serving.server import create_app
from routers.serving.stand_ins import NameOnly
from routers.tasks.think_route.agent import RouterAgent

PATHS = ("/v1/chat/completions", "/v1/responses")


def posted(worker: Any, number: int, seed: int) -> Counter[int]:
    """Replies by status; an exception of the application would be raised here."""

    async def post() -> Counter[int]:
        app, found, taken = create_app(worker), Counter[int](), Counter[str]()
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            for place, body in enumerate(bodies(number, seed, responses=True)):
                reply = await http.post(PATHS[place % len(PATHS)], content=body)
                found[reply.status_code] += 1
                taken[PATHS[place % 2]] += reply.status_code == 200
                assert reply.status_code < 500, (place, body[:500], reply.text[:500])
                if reply.status_code != 200:
                    error = json.loads(reply.content)["error"]
                    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 3000
            good = {"model": "router", "messages": [{"role": "user", "content": "sum"}]}
            assert (await http.post(PATHS[0], json=good)).status_code == 200
            odd = {"accept": "application/openmetrics-text; version=1.x"}
            assert "router_in_flight 0" in (await http.get("/metrics", headers=odd)).text
        await worker.aclose()
        assert min(taken[path] for path in PATHS) > 0
        return found

    return asyncio.run(post())


@pytest.mark.parametrize("number", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_proxy_is_never_at_fault(number: int) -> None:
    members = [Member("small", "s", 1.0, 1.0), Member("large", "l", 2.0, 2.0)]
    found = posted(Proxy(ByName(members), {m.name: NameOnly(m.name) for m in members}, Ledger()), number, 0)
    assert found[200] > number / 100 and found[400] > number / 10 and found.total() == number


@pytest.mark.slow
def test_an_agent_is_never_at_fault(tmp_path: Path) -> None:
    agent = RouterAgent.from_pretrained(train_policy(tmp_path), scripted_pool())
    found = posted(AgentWorker(agent), 1000, 1)
    assert found[200] + found[422] > 5 and found[400] > 100


def test_members_behind_real_sockets_get_what_is_left() -> None:
    with ChatServer(said("fine", usage(3, 1))) as member, proxied({"small": (member, {})}) as served:
        found = Counter[int]()
        with httpx.Client(timeout=60) as http:
            for place, body in enumerate(bodies(300, 2, responses=True)):
                reply = http.post(f"{served.address}{PATHS[place % len(PATHS)]}", content=body)
                found[reply.status_code] += 1
                assert reply.status_code < 500, (place, body[:500], reply.text[:500])
        assert found[200] > 5 and served.ledger.account.reserved == 0
        assert served.post({"messages": [{"role": "user", "content": "fine?"}]}).status_code == 200
