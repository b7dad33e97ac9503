"""Conversations of step routers that outlive their server: decisions, memory and money over restarts and kills."""

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import step_helpers as steps
import yaml
from chat_server import ChatServer, Said, said, usage
from serving_helpers import until

from routers import StepRouter
from routers.data.billing import price
from routers.data.catalogue import Member
from routers.language.digest import digest
from routers.tasks.step_routing.conversations import Call, Conversations
from routers.tasks.step_routing.kept import Kept
from routers.tasks.step_routing.rule_router import RuleRouter, RuleSettings
from srpo.types import Usage

NAMES = ("small", "large")
BOUNDS = {"small": 0.01, "large": 0.1}
MEMBERS = {
    name: Member(name, name, 1.0, 2.0, cache_seconds=300, cache_min_tokens=1, cache_step_tokens=1) for name in NAMES
}


def job(number: int, calls: int) -> list[dict[str, Any]]:
    """The messages of an agent after so many calls."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"Do job {number}."}]
    for call in range(calls):
        messages += [{"role": "assistant", "content": f"step {call} \ud83d"}, {"role": "user", "content": "go on"}]
    return messages


@pytest.fixture(scope="module")
def parts() -> tuple[Any, ...]:
    """(model, tokenizer, settings)"""
    texts = [digest(job(number, 2)).text for number in range(4)]
    how = steps.settings("signs", NAMES, environment="messages", unit="usd", step_limit=4)
    return *steps.policy([*texts, "An agent acted [steps left 3]"]), how


@pytest.fixture(scope="module")
def router(parts: Any) -> Iterator[StepRouter]:
    with StepRouter(*parts) as router:
        yield router


def decide(conversations: Conversations, messages: Any, **how: Any) -> Call:
    return asyncio.run(conversations.decide(messages, bounds=BOUNDS, **how))


@contextmanager
def kept(router: StepRouter, path: Path, **how: Any) -> Iterator[Conversations]:
    conversations = Conversations(router, unit="usd", members=MEMBERS, kept=Kept(path, "mine"), **how)
    try:
        yield conversations
    finally:
        conversations.close()


def test_a_restart_after_every_call_changes_no_decision(router: StepRouter, tmp_path: Path) -> None:
    def run(restarts: bool) -> list[Any]:
        told, path = [], tmp_path / f"restarts {restarts}"
        now = [1_000_000.0]
        how: dict[str, Any] = {"cap": 1.0, "worth_usd": 0.0001, "clock": lambda: now[0]}
        conversations: Conversations | None = None
        for calls in range(7):  # more than an episode has: it is read anew after four
            for number, given in ((1, "given ☕"), (2, None)):
                if conversations is None or restarts:
                    if conversations is not None:
                        conversations.close()
                    conversations = Conversations(router, unit="usd", members=MEMBERS, kept=Kept(path, "mine"), **how)
                call = decide(conversations, job(number, calls), conversation=given, owner="me")
                if number == 2:  # its seed is its id, which is drawn
                    assert call.number == calls + 1
                else:
                    told.append((call.member, call.scores, call.reason, call.expected_usd))
                told.append((call.number, call.spent_usd, call.remaining if given else None))
                conversations.settle(call, 0.001)
                now[0] += 10
        assert conversations is not None
        conversations.close()
        return told

    for one, other in zip(run(True), run(False), strict=True):
        assert one == (other[0], pytest.approx(other[1], abs=1e-5), *other[2:])  # the policy's cache is made anew


def test_what_was_set_aside_when_it_was_killed_is_spent(router: StepRouter, tmp_path: Path) -> None:
    path = tmp_path / "conversations"
    with kept(router, path, cap=0.25) as conversations:
        first = decide(conversations, job(1, 0))
        conversations.settle(first, 0.001)
        second = decide(conversations, job(1, 1))  # and then the server is killed
        killed = BOUNDS[str(second.member)]
    assert os.stat(path).st_mode & 0o077 == 0
    with kept(router, path, cap=0.25) as conversations:
        third = decide(conversations, job(1, 1))  # the agent asks again
        assert third.conversation == first.conversation and third.number == 3
        assert third.remaining == pytest.approx(0.25 - 0.001 - killed - BOUNDS[str(third.member)])
        conversations.settle(third, 0.002)
        counts = conversations.counts()
        assert counts["restored"] == counts["retried"] == 1 and counts["begun"] == 0
    with kept(router, path, cap=0.005) as conversations:  # a smaller one than it has spent
        assert decide(conversations, job(1, 2)).reason == "budget"


def test_no_conversation_overspends_over_many_kills(tmp_path: Path) -> None:
    told = steps.settings("signs", NAMES, environment="messages", unit="usd", step_limit=4)
    rule = RuleRouter(RuleSettings("escalate", 1.0, told))
    dice, cap, spent = random.Random(0), 0.5, Counter[str]()
    answered = refused = 0
    for _ in range(25):  # servers, one after the other
        conversations = Conversations(rule, cap=cap, unit="usd", kept=Kept(tmp_path / "file", "mine"))

        async def agent(name: str, conversations: Conversations = conversations) -> None:
            nonlocal answered, refused
            for _ in range(dice.randrange(4)):
                calls = dice.randrange(6)
                call = await conversations.decide(job(1, calls), bounds=BOUNDS, conversation=name)
                while call.member is not None:
                    usd = dice.random() * BOUNDS[call.member]
                    await asyncio.sleep(0)
                    fate = dice.random()
                    if fate < 0.1:  # the server is killed: the member may bill all of it
                        spent[name] += BOUNDS[call.member]
                        return
                    spent[name] += usd
                    if fate < 0.3:
                        call = conversations.instead(call, "failed", usd)
                    else:
                        conversations.settle(call, usd)
                        answered += 1
                        break
                refused += call.member is None

        async def agents() -> None:
            await asyncio.gather(*(agent(f"{n}") for n in range(20) for _ in range(2)))

        asyncio.run(agents())
        conversations.close()
    assert max(spent.values()) <= cap and answered > 100 and refused > 100


def test_it_holds_no_more_than_is_remembered(router: StepRouter, tmp_path: Path) -> None:
    path, now = tmp_path / "conversations", [1e9]
    how: dict[str, Any] = {"max_conversations": 3, "idle_seconds": 100.0, "clock": lambda: now[0]}

    def rows() -> tuple[int, int]:
        with sqlite3.connect(path) as file:
            counted = [file.execute(f"SELECT COUNT(*) FROM {t}").fetchone()[0] for t in ("conversations", "points")]
        file.close()
        return counted[0], counted[1]

    with kept(router, path, **how) as conversations:
        for number in range(5):
            for calls in range(7):
                conversations.settle(decide(conversations, job(number, calls)), 0.0)
                now[0] += 1
    assert rows() == (3, 3 * 4)
    with kept(router, path, **{**how, "max_conversations": 2}) as conversations:
        assert conversations.counts()["open"] == 2
        now[0] += 100
        decide(conversations, job(9, 0))
        assert conversations.counts()["expired"] == 2
    assert rows() == (1, 1)


def test_files_that_are_not_ours(router: StepRouter, tmp_path: Path) -> None:
    path = tmp_path / "conversations"
    with kept(router, path) as conversations:
        decide(conversations, job(1, 0))
        with pytest.raises(ValueError, match="another server uses it"):
            Kept(path, "mine")
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            decide(conversations, job(1, 0), conversation="\ud83d")
    with pytest.raises(ValueError, match="of another router, or budgets in another unit"):
        Kept(path, "yours")
    with sqlite3.connect(path) as file:
        file.execute("UPDATE points SET document = '{}'")
    file.close()
    with pytest.raises(ValueError, match="cannot be read"):
        Conversations(router, kept=Kept(path, "mine"))
    (tmp_path / "text").write_text("no such file " * 100)
    with pytest.raises(ValueError, match="move it away"):
        Kept(tmp_path / "text", "mine")
    with pytest.raises(ValueError, match="No such file"):
        Kept(tmp_path / "no" / "folder", "mine")


def test_a_disk_that_is_full_stops_nobody(
    router: StepRouter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with kept(router, tmp_path / "conversations", cap=0.3) as conversations:
        assert conversations._kept is not None
        file = conversations._kept._file
        [pages] = file.execute("PRAGMA page_count").fetchone()
        file.execute(f"PRAGMA max_page_count = {pages}")
        for calls in range(3):
            conversations.settle(decide(conversations, job(1, calls)), 0.001)
        assert caplog.text.count("could not be written down") == 1
        file.execute("PRAGMA max_page_count = 100000")
        conversations.settle(decide(conversations, job(1, 3)), 0.001)
    with kept(router, tmp_path / "conversations", cap=0.3) as conversations:
        assert decide(conversations, job(1, 4)).spent_usd == pytest.approx(0.004)


@contextmanager
def process(folder: Path, cap: float) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "srpo", "serve", str(folder / "router"), "--catalogue", str(folder / "pool.yaml")]
    command += ["--port", "0", "--conversation_cap", str(cap), "--conversations", str(folder / "conversations")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            line = next((line for line in server.stderr if "listening on" in line), "")
            assert line, "it did not start"
            yield line.split()[-1], server
        finally:
            server.terminate()


def test_a_server_that_is_killed_in_the_middle_of_a_conversation(parts: Any, tmp_path: Path) -> None:
    model, tokenizer, how = parts
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "router")
    how.save(tmp_path / "router")
    cap, paid = 0.002, usage(30, 10)
    with ChatServer(said("small says", paid)) as small, ChatServer(said("large says", paid)) as large:
        servers = {"small": small, "large": large}
        lines = [
            {"name": name, "descriptor": name, "price_in": 1.0, "price_out": 2.0, "max_tokens": 50,
             "base_url": server.url}
            for name, server in servers.items()
        ]  # fmt: skip
        (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"members": lines}))
        each = price(Member(**lines[0]), Usage(30, 10))

        def ask(address: str, calls: int) -> httpx.Response:
            body = json.dumps({"model": "router", "messages": job(1, calls)})
            return httpx.post(f"{address}/v1/chat/completions", content=body, timeout=60)

        with process(tmp_path, cap) as (address, server):
            told = [ask(address, calls).json()["srpo"] for calls in range(2)]
            for one in servers.values():
                one.replies = [Said(pieces=[b"data: "], hang=True)]
            asked = small.requests, large.requests
            before = sum(map(len, asked))
            asking = threading.Thread(target=lambda: _quietly(ask, address, 2))
            asking.start()
            until(lambda: sum(map(len, asked)) > before)
            os.kill(server.pid, signal.SIGKILL)
            server.wait(60)
            asking.join(60)
        for one in servers.values():
            one.replies = []
        with process(tmp_path, cap) as (address, server):
            replies = [ask(address, 2)]
            again = replies[0].json()["srpo"]
            assert again["conversation"] == told[0]["conversation"] and again["number"] == 4
            assert again["spent_usd"] == pytest.approx(2 * each)
            calls = 3
            while replies[-1].status_code == 200:
                replies.append(ask(address, calls))
                calls += 1
            assert replies[-1].status_code == 402
        bound = cap - again["remaining"] - 2 * each  # of two calls: the one that was lost, and the one under way then
        answered = sum(len(one.logged) for one in servers.values())
        assert answered == 2 + len(replies) - 1
        assert answered * each + bound / 2 <= cap


def _quietly(ask: Any, *how: Any) -> None:
    with suppress(httpx.HTTPError):
        ask(*how)
