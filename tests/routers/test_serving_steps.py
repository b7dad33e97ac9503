"""A served step router: one decision per call, budgets and conversations over HTTP, members' words as they are."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import step_helpers as steps
from chat_server import ChatServer, Said, said, usage, whole
from serving_helpers import running, until

from routers import StepRouter
from routers.data.catalogue import Member
from routers.language.digest import digest
from routers.pool import Ledger
from routers.pool.passthrough import Passthrough
from routers.serving.server import create_app
from routers.serving.steps import StepProxy
from routers.tasks.step_routing.conversations import Conversations

NAMES = ("small", "large")
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"q": "☕"}'}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def router() -> Iterator[StepRouter]:
    texts = [digest(job(number, 2), TOOLS).text for number in range(4)]
    model, tokenizer = steps.policy([*texts, "An agent acted [steps left 3]"])
    how = steps.settings("signs", NAMES, environment="messages", unit="usd", policy_price=(0.5, 1.0))
    with StepRouter(model, tokenizer, how) as router:
        yield router


@pytest.fixture(scope="module")
def members() -> Iterator[dict[str, ChatServer]]:
    with ChatServer(said("small says", usage(30, 4))) as small, ChatServer(said("large says", usage(50, 8))) as large:
        yield {"small": small, "large": large}


def job(number: int, calls: int) -> list[dict[str, Any]]:
    """The messages of an agent after so many calls."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"Do job {number}."}]
    for _ in range(calls):
        messages += [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
        messages += [{"role": "tool", "tool_call_id": "call_1", "content": "tea"}]
    return messages


class Steps:
    def __init__(self, address: str, proxy: StepProxy, ledger: Ledger) -> None:
        self.address, self.conversations, self.ledger = address, proxy.conversations, ledger

    def post(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        whole = {"model": "router", "tools": TOOLS, **body}
        return httpx.post(f"{self.address}/v1/chat/completions", json=whole, headers=headers, timeout=60)


class Open:
    """A router of the module, which a server that ends leaves open."""

    def __init__(self, router: StepRouter) -> None:
        self._router = router

    def __getattr__(self, name: str) -> Any:
        return getattr(self._router, name)

    async def aclose(self) -> None:
        pass


@contextmanager
def served(router: StepRouter, members: dict[str, ChatServer], **how: Any) -> Iterator[Steps]:
    """With prices of $1 and $10 a million tokens, and replies of at most 100 tokens."""
    prices = {"small": (1.0, 2.0), "large": (10.0, 20.0)}
    made = {
        name: Member(name, name, *prices[name], base_url=members[name].url, max_tokens=100, timeout=5.0)
        for name in NAMES
    }
    ledger = Ledger(None, router.settings.policy_price)
    lines = {name: Passthrough(member, ledger) for name, member in made.items()}
    proxy = StepProxy(Conversations(Open(router), members=made, **how), lines, ledger)  # type: ignore[arg-type]
    with running(create_app(proxy)) as address:
        yield Steps(address, proxy, ledger)


def test_every_call_is_a_decision_of_its_conversation(router: StepRouter, members: dict[str, ChatServer]) -> None:
    with served(router, members, cap=0.5) as on:
        told = []
        for calls in range(3):
            reply = on.post({"messages": job(1, calls)})
            told.append(reply.json()["srpo"])
            assert reply.json()["choices"][0]["message"]["content"] == f"{told[-1]['member']} says"
            assert reply.headers["x-srpo-conversation"] == told[-1]["conversation"]
            assert sum(told[-1]["scores"].values()) == pytest.approx(1.0)
        other = on.post({"messages": job(2, 0)}).json()["srpo"]
        again = on.post({"messages": job(9, 0)}, **{"x-srpo-conversation": told[0]["conversation"]}).json()["srpo"]
    assert len({one["conversation"] for one in told}) == 1 != other["conversation"]
    assert [one["number"] for one in told] == [1, 2, 3] and again["number"] == 4  # whatever its messages say
    paid = {"small": (30 + 8) / 1e6, "large": (500 + 160) / 1e6}
    assert told[2]["spent_usd"] == pytest.approx(sum(paid[one["member"]] for one in told[:2]))
    assert again["spent_usd"] == pytest.approx(sum(paid[one["member"]] for one in told))
    assert told[0]["policy_usd"] > 0
    sent = members[told[2]["member"]].requests
    assert job(1, 2) in [request["messages"] for request in sent] and sent[-1]["tools"] == TOOLS


def test_decisions_are_those_without_a_server(router: StepRouter, members: dict[str, ChatServer]) -> None:
    """The same conversation by id, with the same budget, decided by `Conversations` alone."""
    import asyncio

    with served(router, members, cap=0.5) as on:
        found = [
            on.post({"messages": job(3, calls), "metadata": {"conversation_id": "mine"}}).json()["srpo"]
            for calls in range(5)
        ]
        lines = {name: on.conversations._members[name] for name in NAMES}

    async def alone() -> list[tuple[str | None, dict[str, float]]]:
        decisions = Conversations(router, cap=0.5, members=lines)
        told = []
        for calls in range(5):
            fields = {"messages": job(3, calls), "tools": TOOLS}
            bounds = {name: Passthrough(member, Ledger()).bound(fields) for name, member in lines.items()}
            call = await decisions.decide(job(3, calls), TOOLS, conversation="mine", bounds=bounds)
            decisions.settle(call, 38e-6 if call.member == "small" else 660e-6)
            told.append((call.member, dict(call.scores)))
        return told

    assert [(one["member"], one["scores"]) for one in found] == asyncio.run(alone())


def test_a_budget_holds_and_then_nobody_is_asked(router: StepRouter, members: dict[str, ChatServer]) -> None:
    before = sum(len(server.requests) for server in members.values())
    with served(router, members, cap=0.002) as on:
        replies = [on.post({"messages": job(4, calls)}) for calls in range(40)]
        last = replies[-1]
        spent = on.ledger.total()
    answered = [reply for reply in replies if reply.status_code == 200]
    assert 0 < len(answered) < 40 and {reply.status_code for reply in replies} == {200, 402}
    assert sum(len(server.requests) for server in members.values()) - before == len(answered)
    assert spent.cost <= 0.002 and last.json()["error"]["code"] == "over_budget"
    assert "no room for another call" in last.json()["error"]["message"]


def test_streams_failover_and_the_request_s_own_cap(router: StepRouter, members: dict[str, ChatServer]) -> None:
    with served(router, members) as on:
        for server in members.values():
            server.replies = []
        first = on.post({"messages": job(5, 0)}).json()["srpo"]["member"]
        other = next(name for name in NAMES if name != first)
        members[first].replies = [Said(429, b'{"error": {"message": "slow down"}}')]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        reply = on.post({"messages": job(5, 0), "metadata": {"conversation_id": "f", "mine": "1"}, **options})
        lines = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
        told = lines[-1]["srpo"]
        tried = [] if told["reason"] == "policy" else [{"member": first, "error": "slow down", "status": 429}]
        assert told["tried"] == tried and told["member"] in NAMES
        assert members[told["member"]].requests[-1]["metadata"] == {"mine": "1"}
        used = lines[-1]["usage"]
        assert used["cost_usd"] == pytest.approx(told["cost_usd"])
        assert (used["member"], used["decision"], used["probabilities"]) == tuple(
            told[name] for name in ("member", "reason", "scores")
        )
        assert reply.headers["x-srpo-decision"] == told["reason"]
        members[first].replies = []
        # only the small one fits into the request's cap
        capped = on.post({"messages": job(6, 0), "max_cost_usd": 0.001}).json()["srpo"]
        assert capped["member"] == "small" and capped["scores"] == {"small": 1.0}
        nothing = on.post({"messages": job(6, 0), "max_cost_usd": 1e-6})
        assert nothing.status_code == 402 and nothing.json()["error"]["param"] == "max_cost_usd"
        # all fail: the first failure is told, and both were tried
        for server in members.values():
            server.replies = [Said(500, b"oops")]
        broken = on.post({"messages": job(7, 0)})
        tried = {one["member"] for one in broken.json()["srpo"]["tried"]}
        assert broken.status_code == 500 and tried == {first, other}
        # a request that is wrong is nobody else's
        for server in members.values():
            server.replies = [Said(400, b'{"error": {"message": "too long"}}')]
        wrong = on.post({"messages": job(8, 0)})
        assert wrong.status_code == 400 and len(wrong.json()["srpo"]["tried"]) == 1
        for server in members.values():
            server.replies = []
        assert on.conversations.counts()["abandoned"] == 0
        assert all(home.open == 0 for home in on.conversations._known.values())


def test_a_client_that_leaves_pays_and_frees_the_budget(router: StepRouter, members: dict[str, ChatServer]) -> None:
    with served(router, members, cap=0.05) as on:
        for server in members.values():
            server.replies = [Said(body=whole({"content": "late"}, usage(1, 1)), pause=60.0)]
        with pytest.raises(httpx.ReadTimeout):
            body = {"model": "router", "messages": job(1, 0), "metadata": {"conversation_id": "gone"}}
            httpx.post(f"{on.address}/v1/chat/completions", json=body, timeout=1.0)
        until(lambda: on.conversations.counts()["failed"] == 1)
        for server in members.values():
            server.replies = []
        told = on.post({"messages": job(1, 0), "metadata": {"conversation_id": "gone"}}).json()["srpo"]
        assert told["spent_usd"] > 0  # its whole bound: nobody knows what the member went on to do
        assert on.ledger.account.reserved == 0.0


def test_ids_that_are_none(router: StepRouter, members: dict[str, ChatServer]) -> None:
    with served(router, members) as on:
        for metadata in ({"conversation_id": 5}, {"conversation_id": ""}, {"conversation_id": "x" * 257}):
            assert on.post({"messages": job(1, 0), "metadata": metadata}).json()["error"]["param"] == "metadata"
        two = on.post({"messages": job(1, 0), "metadata": {"conversation_id": "a"}}, **{"x-srpo-conversation": "b"})
        assert two.status_code == 400 and "name two conversations" in two.json()["error"]["message"]


def test_the_real_client_in_an_agent_s_loop(router: StepRouter, members: dict[str, ChatServer]) -> None:
    for server in members.values():
        server.replies = [Said(body=whole({"content": None, "tool_calls": [CALL]}, usage(9, 9), "tool_calls"))] * 3
    with (
        served(router, members, cap=0.5) as on,
        openai.OpenAI(base_url=f"{on.address}/v1", api_key="x", max_retries=0) as client,
    ):
        messages: Any = [{"role": "user", "content": "Do it."}]
        ids = set()
        for _ in range(3):
            reply = client.chat.completions.create(model="router", messages=messages, tools=TOOLS)  # type: ignore[arg-type]
            ids.add(reply.to_dict()["srpo"]["conversation"])  # type: ignore[index]
            messages += [reply.choices[0].message.to_dict()]
            messages += [{"role": "tool", "tool_call_id": "call_1", "content": "tea"}]
        assert len(ids) == 1
    for server in members.values():
        server.replies = []


FUNCTION: Any = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}


def test_a_loop_of_responses_is_one_conversation(router: StepRouter, members: dict[str, ChatServer]) -> None:
    """Items that come back as they were given, whole and streamed; the budget's end in its own shape."""
    for server in members.values():
        server.replies = [
            Said(body=whole({"content": "I look", "tool_calls": [CALL]}, usage(30, 4), "tool_calls")) for _ in range(2)
        ]
    with (
        served(router, members, cap=0.5) as on,
        openai.OpenAI(base_url=f"{on.address}/v1", api_key="x", max_retries=0) as client,
    ):
        items: Any = [{"role": "user", "content": "Do it."}]
        told = []
        for _ in range(2):
            response = client.responses.create(model="router", input=items, tools=[FUNCTION])
            told.append(response.to_dict()["srpo"])
            assert [item.type for item in response.output] == ["message", "function_call"]
            assert response.usage is not None and response.usage.to_dict()["cost_usd"] == told[-1]["cost_usd"]
            items += [item.to_dict() for item in response.output]
            items += [{"type": "function_call_output", "call_id": "call_1", "output": "tea"}]
        for server in members.values():
            server.replies = []
        with client.responses.stream(model="router", input=items, tools=[FUNCTION]) as stream:
            last = stream.get_final_response()
        told.append(last.to_dict()["srpo"])
        assert last.output_text == f"{told[2]['member']} says"
        assert len({one["conversation"] for one in told}) == 1 and [one["number"] for one in told] == [1, 2, 3]
        assert told[2]["spent_usd"] == pytest.approx(sum(one["cost_usd"] - one["policy_usd"] for one in told[:2]))
        sent = members[told[2]["member"]].requests[-1]
        assert sent["messages"] == [{"role": "user", "content": "Do it."}, *[
            {"role": "assistant", "content": "I look", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "tea"},
        ] * 2]  # fmt: skip
    with served(router, members, cap=1e-6) as on:
        refused = httpx.post(f"{on.address}/v1/responses", json={"model": "router", "input": "Do it."}, timeout=60)
        assert refused.status_code == 402 and refused.json()["error"]["code"] == "over_budget"
