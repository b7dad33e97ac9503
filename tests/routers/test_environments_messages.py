"""Agents that speak messages: steps and scores by hand, prices with prompt caches, real HTTP, the trainer's loop."""

import asyncio
import json
import math
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import step_helpers as steps
from chat_server import ChatServer, Said, usage, whole
from serving_helpers import running

from routers import Member, StepRouter
from routers.environments.messages.agent import AGENTS, CutOff, MemberFailed, Talk, agent_of
from routers.environments.messages.environment import MessagesBenchmark, MessagesEnvironment, answer
from routers.environments.messages.games import GymAgent
from routers.environments.messages.members import LiveMember
from routers.environments.messages.repairs import Job, Junior, Repairs, Senior
from routers.environments.messages.served import ServedAgent, Visitors, episode
from routers.environments.protocol import GameError, Session
from routers.language.digest import Head
from routers.pool.ledger import Ledger
from routers.pool.passthrough import Passthrough
from routers.serving.server import create_app
from routers.serving.steps import StepProxy
from routers.tasks.step_routing.conversations import Call, Conversations
from routers.tasks.step_routing.player import Job as Play
from routers.tasks.step_routing.rules import always_large, always_small, escalate, first_large
from srpo.types import CORRECT, COST, LOST

TOOLS = [{"type": "function", "function": {"name": "go"}}]


class Counting:
    """Ends after three answers; its score is how many said "yes", in thirds."""

    waits = False

    def tasks(self, split: str, count: int = 0) -> Mapping[str, str]:
        if split != "train":
            raise ValueError("there is only train")
        return {"one": "count", "two": "count"}

    def talk(self, task: str) -> Talk:
        messages: list[Any] = [{"role": "user", "content": f"count {task}"}]
        said, score = 0, 0
        while said < 3:
            try:
                reply = yield {"messages": list(messages), "tools": TOOLS}
            except MemberFailed:
                messages.append({"role": "user", "content": "again?"})
                continue
            except CutOff:
                return 0.1
            said, score = said + 1, score + (reply["content"] == "yes")
            messages += [reply, {"role": "user", "content": "more"}]
        return score / 3


@pytest.fixture
def agents() -> Any:
    before = dict(AGENTS)
    yield AGENTS
    AGENTS.clear()
    AGENTS.update(before)


def yes(text: str = "yes") -> str:
    return answer("m", {"role": "assistant", "content": text})


def test_an_episode_by_hand() -> None:
    made = MessagesEnvironment(Counting(), "counting/one", "count", 9)
    assert Head.read(made.reset()) == Head(1, "start", 0, 1, 0, 0, 1, 9) and made.task == "count one"
    text, done = made.step(yes())
    assert (Head.read(text).after, done, made.score, made.caches.last) == ("user", False, 0.0, "m")
    assert Head.read(made.step("")[0]).messages == 4, "a failed call is a step, and the agent sees it"
    assert made.step(yes("no"))[1] is False and made.step(yes()) == ("", True)
    assert made.score == pytest.approx(2 / 3) and made.done and not made.won and made.steps == 4
    with pytest.raises(GameError, match="no call is open"):
        made.step(yes())
    cut = MessagesEnvironment(Counting(), "counting/one", "count", 2)
    cut.reset()
    cut.step(yes())
    assert cut.step(yes()) == ("", True) and cut.score == 0.1 and cut.done
    with pytest.raises(GameError, match="once"):
        cut.reset()


def test_what_agents_may_not_do() -> None:
    class Odd(Counting):
        def __init__(self, score: Any) -> None:
            self.score = score

        def talk(self, task: str) -> Talk:
            yield {"messages": [{"role": "user", "content": "x"}]}
            return self.score

    for score in (2.0, -1, float("nan"), None, "1"):
        made = MessagesEnvironment(Odd(score), "odd/one", "x", 5)
        made.reset()
        with pytest.raises(GameError, match="a number from 0 to 1"):
            made.step(yes())


def test_agents_and_tasks_by_name(agents: Any) -> None:
    agents["counting"] = Counting()
    benchmark = MessagesBenchmark()
    assert benchmark.tasks("counting/train", 1) == {"counting/one": "count"}
    assert benchmark.make("counting/one", 5).limit == 5
    for which, told in (("counting/test", "only train"), ("nobody/x", "there are repairs, alfworld, .*, counting")):
        with pytest.raises(GameError, match=told):
            benchmark.tasks(which)
    with pytest.raises(GameError, match="tasks\\(\\) comes first"):
        benchmark.make("counting/two", 5)
    kinds = list(agent_of("repairs").tasks("test").values())
    assert len(kinds) == 2000 and {kinds.count(kind) for kind in kinds} == {400}
    assert not set(agent_of("repairs").tasks("test")) & set(agent_of("repairs").tasks("train"))


def repairs(train: str = "repairs/train", **more: Any) -> Any:
    given = {"executors": ["junior", "senior"], "executor_usd": [0.0, 0.0], "observation": "signs", "step_limit": 14}
    return steps.world(
        20, 20, environment="messages", train_tasks=train, heldout_tasks=["repairs/test"], **given | more
    )


def test_what_a_switch_costs_by_hand() -> None:
    """Every prompt and reply in tokens, as they are billed: a member that comes back reads what it has missed."""
    made = MessagesEnvironment(Repairs(), "repairs/typo-0", "typo", 14)
    session = Session(made, "s")
    session.start()
    members = {"junior": Junior(), "senior": Senior()}
    warm, found = dict.fromkeys(members, 0), []
    for name in ("senior", "senior", "junior", "senior"):
        prompt, member = made.caches.prompt_tokens, members[name].member
        act = asyncio.run(members[name].act(session.view, 1.0))
        whole = prompt - prompt % 128
        cached, written = warm[name], whole - warm[name]
        assert act.reply.usage.prompt_tokens == prompt > 1024
        assert (act.reply.usage.cached_tokens, act.reply.usage.cache_write_tokens) == (cached, written)
        out = act.reply.usage.completion_tokens
        p_in, p_out = (0.1, 0.4) if name == "junior" else (2.0, 8.0)
        assert act.cost == pytest.approx((cached * p_in / 4 + (prompt - cached) * p_in + out * p_out) / 1e6)
        assert act.cost <= members[name].bound(session.view) and member.max_tokens >= out > 10
        session.take(act.action)
        warm[name] = whole  # messages are whole: what was sent is shared
        found.append(round(1e6 * act.cost))
    assert found[1] < found[0] / 2 and found[2] < found[1] / 5 and found[3] > found[1]


def drive(world: Any, rule: Any, tasks: Any, seed: str = "") -> list[Any]:
    return steps.drive_all(world.environment(), [Play(name, {"task": name}, f"{seed}{name}", rule) for name in tasks])


def test_members_of_different_strength() -> None:
    """Skills show by kind; the senior alone solves all; seeds decide the junior's luck, and nothing else does."""
    world = repairs()
    tasks = world.tasks("repairs/test", 50)
    large, small = drive(world, always_large, tasks), drive(world, always_small, tasks)
    assert all(driven.columns[CORRECT] == 1.0 for driven in large)
    by_kind: dict[str, list[float]] = {}
    for driven, kind in zip(small, tasks.values(), strict=True):
        by_kind.setdefault(kind, []).append(driven.columns[CORRECT])
    means = {kind: sum(scores) / len(scores) for kind, scores in by_kind.items()}
    assert means["typo"] == means["flaky"] == 1.0 and means["migrate"] <= 0.3 and means["refactor"] <= 0.6
    assert sum(d.columns[COST] for d in small) < 0.15 * sum(d.columns[COST] for d in large)
    again = drive(world, always_small, tasks)
    assert [d.columns for d in again] == [d.columns for d in small]
    assert [d.columns for d in drive(world, always_small, tasks, "other")] != [d.columns for d in small]
    flaky = next(name for name, kind in tasks.items() if kind == "flaky")
    [driven] = drive(world, escalate(1), [flaky])
    assert driven.columns["large_calls"] >= Job(int(flaky.rpartition("-")[2])).unrelated > 0  # for nothing


def over_http(base_url: str, task: str) -> float:
    """The agent of the quickstart as a script of its own: the same talk, by a client of OpenAI's API."""
    talk = Repairs().talk(task)
    request = next(talk)
    while True:
        status, reply = post(f"{base_url}/chat/completions", {"model": "router", **request, "stream": False})
        if status == 503:  # all steps are used
            return 0.0
        assert status == 200 and reply["usage"]["prompt_tokens"] > 1000
        try:
            request = talk.send(reply["choices"][0]["message"])
        except StopIteration as end:
            return float(end.value)


def post(url: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as reply:
            text = reply.read().decode()
            return reply.status, json.loads(text) if text.startswith(("{", "n")) else text
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_an_agent_behind_http_is_the_same_agent(agents: Any) -> None:
    """Token for token: what the policy reads, who acts, money and score, for many episodes at once."""
    agents["served"] = ServedAgent(over_http, {"train": Repairs().tasks("train")})
    here, there = repairs(), repairs("served/train")
    assert there.environment().waits and not here.environment().waits
    names = list(there.tasks("served/train", 15))
    for rule in (first_large(1), escalate(1)):
        plain = drive(here, rule, here.tasks("repairs/train", 15))
        jobs = [Play(n, {"task": n}, n.replace("served", "repairs"), rule) for n in names]
        served = steps.drive_all(there.environment(), jobs)
        assert [d.columns[LOST] for d in served] == [None] * 15
        assert [(d.decisions, d.columns, d.stop) for d in served] == [(d.decisions, d.columns, d.stop) for d in plain]


def test_visitors_play_a_training_from_the_outside(agents: Any) -> None:
    agents["visited"] = Visitors({"train": Repairs().tasks("train")}, port=0)
    agents["visited"]._port = 0
    url = agents["visited"]._server().url
    world = repairs("visited/train")
    names = list(world.tasks("visited/train", 6))

    def visit(number: int) -> str:
        with episode(url, 60.0) as played:
            if number == 0:
                raise OSError("the visitor broke")
            played.score = over_http(played.base_url, played.task)
        return played.task

    with ThreadPoolExecutor(6) as threads:
        coming = [threads.submit(visit, number) for number in range(6)]
        found = steps.drive_all(
            world.environment(), [Play(n, {"task": n}, n, always_large) for n in names], seconds=60.0
        )
        assert sum(future.exception() is not None for future in coming) == 1
    lost = [d.columns[LOST] for d in found if d.columns[LOST]]
    assert len(lost) == 1 and "OSError: the visitor broke" in lost[0]
    assert [d.columns[CORRECT] for d in found if not d.columns[LOST]] == [1.0] * 5
    with pytest.raises(urllib.error.URLError), episode("http://127.0.0.1:9"):
        pass


def test_what_an_agent_may_meet(agents: Any) -> None:
    """Failed members, the step limit, streams, bodies that are none, a client that leaves, an agent that raises."""
    seen: list[Any] = []

    def rough(base_url: str, task: str) -> float:
        chat = f"{base_url}/chat/completions"
        if task == "raises":
            raise KeyError("a bug")
        body = {"messages": [{"role": "user", "content": "go"}], "tools": TOOLS}
        for bad in (b"{", b"[1]", {"messages": []}, {"messages": ["x"]}):
            seen.append(post(chat, bad)[0])
        seen.append(post(f"{base_url}/embeddings", {})[0])
        seen.append(post(chat.replace(base_url.split("/")[3], "other"), body)[0])
        seen.append(post(chat, body))  # the member failed
        seen.append(post(chat, {**body, "stream": True, "stream_options": {"include_usage": True}})[1])
        with ThreadPoolExecutor(2) as threads:  # two at once
            seen.append([reply[0] for reply in threads.map(lambda _: post(chat, body), range(2))])
        seen.append(post(chat, body))  # cut off
        seen.append(post(chat, body)[0])
        return 0.5

    made = MessagesEnvironment(ServedAgent(rough, {}), "rough/x", "x", 5)
    made.reset()
    made.step("")
    made.step(answer("m", {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {}}]}))
    made.step(yes())
    made.step(yes())
    assert made.step(yes()) == ("", True) and made.score == 0.5, "cut off, it ended with a score"
    assert seen[:6] == [400, 400, 400, 400, 404, 404]
    assert seen[6][0] == 502 and "did not answer" in seen[6][1]["error"]["message"]
    chunks = [json.loads(line[6:]) for line in seen[7].split("\n\n")[:-2]]
    assert chunks[0]["choices"][0]["delta"]["tool_calls"] == [{"index": 0, "id": "1", "function": {}}]
    assert chunks[1]["choices"][0]["finish_reason"] == "tool_calls" and chunks[2]["usage"]["total_tokens"] > 0
    assert seen[7].endswith("data: [DONE]\n\n") and seen[8] == [200, 200]
    assert seen[9][0] == 200 and seen[10] in (503, 404), "the fifth answer came, then the end"

    raising = MessagesEnvironment(ServedAgent(rough, {}), "rough/raises", "x", 5)
    with pytest.raises(RuntimeError, match="the agent raised KeyError: 'a bug'"):
        raising.reset()
    silent = threading.Event()
    left = MessagesEnvironment(ServedAgent(lambda u, t: float(silent.wait(9)), {}), "left/x", "x", 5)
    threading.Timer(0.2, silent.set).start()
    with pytest.raises(GameError, match="ended without a call"):
        left.reset()


class ByItsMessages(Junior):
    """Its luck hangs on what it is asked, and on nothing that only a simulator knows: it is the same behind HTTP."""

    def say(self, request: Mapping[str, Any], seed: str = "") -> dict[str, Any]:
        return super().say(request, f"{request['messages'][1]}/{len(request['messages'])}")


class Heard(Conversations):
    """What the policy had read and written at every decision, by conversation."""

    ids: dict[str, tuple[int, ...]]

    async def decide(self, *given: Any, **named: Any) -> Call:
        call = await super().decide(*given, **named)
        self.ids[call.conversation] = call._session.ids  # type: ignore[union-attr]
        return call


def test_training_play_and_server_decide_alike() -> None:
    """Token for token, for the same conversations: what the policy reads, whom it chooses and how surely. Training's
    rollout and `play` simulate the members; the agent asks a server by HTTP, which asks members on loopback."""
    tasks = list(repairs().tasks("repairs/test", 10))
    model, tokenizer = steps.policy([Job(number).text for number in range(50)])
    how = steps.settings("signs", ("junior", "senior"), environment="messages", step_limit=14, unit="usd")
    both = {"junior": ByItsMessages(), "senior": Senior()}
    for cap in (None, 0.02):
        rolled = steps.rollout(model, tokenizer, how, tasks, cap, members=list(both.values()))
        with StepRouter(model, tokenizer, how) as router:
            for task, trajectory in zip(tasks, rolled, strict=True):
                played = router.play(MessagesEnvironment(Repairs(), task, "", 14), list(both.values()), cap, seed=task)
                assert played.error is None and played.ids == steps.ids_of(trajectory)
                assert [step.executor for step in played.steps] == trajectory.columns["members"]
                assert played.executor_usd == pytest.approx(trajectory.columns[COST], rel=1e-12)
                assert cap is None or played.executor_usd <= cap
        if cap is None:
            free = rolled

    def respond(member: Any) -> Any:
        return lambda request: Said(body=whole(member.say(request, ""), usage(100, 10), "tool_calls"))

    with ChatServer(respond(both["junior"])) as junior, ChatServer(respond(both["senior"])) as senior:
        urls = {"junior": junior.url, "senior": senior.url}
        made = {name: replace(one.member, base_url=urls[name], timeout=30.0) for name, one in both.items()}
        ledger, router = Ledger(), StepRouter(model, tokenizer, how)
        lines = {name: Passthrough(member, ledger) for name, member in made.items()}
        heard = Heard(router, members=made)
        heard.ids = {}
        with running(create_app(StepProxy(heard, lines, ledger))) as address:  # it closes the router
            for task, trajectory in zip(tasks, free, strict=True):
                policy = [turn for turn in trajectory.turns if turn.owner == "policy"]
                told, score = asked_by_http(address, task, len(policy))
                assert [one["member"] for one in told] == trajectory.columns["members"], task
                assert score in (None, trajectory.columns[CORRECT])
                ids = heard.ids[task]
                assert ids == steps.ids_of(trajectory)[: len(ids)] and ids[-1] == policy[-1].ids[-1]
                sure = [one["scores"][one["member"]] for one in told]
                assert sure == pytest.approx([math.exp(turn.logprobs[0]) for turn in policy], rel=1e-4)


def asked_by_http(address: str, task: str, most: int) -> tuple[list[dict[str, Any]], float | None]:
    """What a served router said of each call of an agent's loop, and the score; None: cut off after `most` calls."""
    talk, told = Repairs().talk(task.partition("/")[2]), list[dict[str, Any]]()
    request = next(talk)
    while len(told) < most:
        body = {"model": "router", **request, "metadata": {"conversation_id": task}}
        status, reply = post(f"{address}/v1/chat/completions", body)
        assert status == 200, reply
        told.append(reply["srpo"])
        try:
            request = talk.send(reply["choices"][0]["message"])
        except StopIteration as end:
            return told, float(end.value)
    return told, None


def test_a_live_member_gets_the_request_as_it_is() -> None:
    """Tools and all; paid for as reported, cached tokens too; refusals, errors and silence are failed steps."""
    told = {"content": "yes", "extra": {"kept": True}}
    good = Said(body=whole(told, usage(100, 10, cached=60)))
    with ChatServer(lambda request: good) as server:
        member = Member(
            "m", "x", 1.0, 2.0, price_cached=0.1, base_url=server.url, max_tokens=50, request={"stop": None}
        )
        ledger = Ledger()
        live = LiveMember(member, ledger)
        session = Session(MessagesEnvironment(Counting(), "counting/one", "count", 9), "s")
        session.start()
        act = asyncio.run(live.act(session.view, 5.0))
        sent = server.requests[-1]
        assert sent["tools"] == TOOLS and sent["messages"] == session.environment.request["messages"]  # type: ignore[attr-defined]
        assert act.cost == pytest.approx((60 * 0.1 + 40 * 1.0 + 10 * 2.0) / 1e6) == ledger.spent_usd
        assert json.loads(act.action)["message"]["extra"] == {"kept": True} and act.reply.error is None
        assert live.bound(session.view) >= act.cost
        session.take(act.action)
        for bad, kind in (
            (Said(429, body=b'{"error": {"message": "slow down"}}'), "rate limit: 429"),
            (Said(500, body=b"{}"), "server error: 500"),
            (Said(body=b'{"choices": []}'), "malformed reply"),
            (Said(pause=9.0), "timeout"),
        ):
            server.replies = [bad]
            act = asyncio.run(live.act(session.view, 1.0))
            assert act.action == "" and str(act.reply.error).startswith(kind), act
        session.environment.request = {**session.environment.request, "stop": "x"}  # type: ignore[attr-defined]
        act = asyncio.run(live.act(session.view, 1.0))
        assert act.reply.error == "bad request: m does not take 'stop'" and act.cost == 0.0


def test_a_benchmark_by_messages() -> None:
    """ALFWorld's planner, asked by chat; what is no command is the environment's answer, as ever."""
    [(task, kind)] = MessagesBenchmark().tasks("alfworld/generated/test", 1).items()
    made = MessagesEnvironment(agent_of("alfworld"), task, kind, 50)
    made.reset()
    opening = made.request["messages"]
    assert [m["role"] for m in opening] == ["system", "user"] and "Possible commands: " in opening[1]["content"]
    game = steps.benchmark("alfworld").make(task.partition("/")[2], 50)
    game.reset()
    text, done = made.step(answer("m", {"role": "assistant", "content": "Action: dance"}))
    assert "Nothing happens." in text and not done
    game.step("dance")
    while not done:
        command = game.expert()
        game.step(command)
        _, done = made.step(answer("m", {"role": "assistant", "content": f"Thought: well.\nAction: {command}"}))
    assert made.won and made.steps == game.steps


class Frozen:
    """A lake of four fields, in gymnasium's manner."""

    def __init__(self, task: str) -> None:
        self.at, self.closed = 0, False

    def reset(self, seed: int | None = None) -> tuple[int, dict[str, Any]]:
        return self.at, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.at += action
        return self.at, float(self.at == 3), self.at == 3, False, {}

    def close(self) -> None:
        self.closed = True


def test_gymnasium_s_environments_by_messages() -> None:
    worlds: list[Frozen] = []

    def make(task: str) -> Frozen:
        worlds.append(Frozen(task))
        return worlds[-1]

    agent = GymAgent(make, {"train": {"lake": "lake"}}, "Say how far you go.", int, lambda at: f"You are at {at}.")
    made = MessagesEnvironment(agent, "gym/lake", "lake", 9)
    made.reset()
    assert Head.read(made.step(answer("m", {"role": "assistant", "content": "far"}))[0]).after == "user"
    assert "Error: invalid literal" in made.request["messages"][-1]["content"]
    made.step(answer("m", {"role": "assistant", "content": "1"}))
    assert made.step(answer("m", {"role": "assistant", "content": "2"})) == ("", True)
    assert made.won and worlds[0].closed and made.request["messages"][-1]["content"] == "You are at 1."
