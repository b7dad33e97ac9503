"""Who is let into a server, in which order, and what it may cost: in process, by hand and with hostile bodies."""

import asyncio
import hashlib
import json
import logging
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from gated_app import Gated, SlowRouter

from routers.serving.decisions import Decisions
from routers.serving.errors import RequestError
from routers.serving.fair_queue import FairQueue
from routers.serving.gate import CHARACTERS, Gate, GateLimits, current_ticket, read_json
from routers.serving.keys import Key, KeyLimits, Keys, Refused, read_keys
from routers.serving.metrics import ServerMetrics

SECRET = "canary-key-77aa-secret"


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def written(path: Path, **keys: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"keys": keys}))
    return path


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


# ---------------------------------------------------------------- the queue


def drained(queue: FairQueue[str]) -> str:
    return "".join(queue.pop() for _ in range(len(queue)))


def test_keys_take_turns_whatever_the_length_of_their_queues() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in "aaaaaa":
        queue.push("greedy", 1, item)
    for item in "bb":
        queue.push("modest", 1, item)
    queue.push("third", 1, "c")
    assert drained(queue) == "abcabaaaa"


def test_work_not_number_is_shared() -> None:
    """Accounts after each item: a 30 | b 10 20 30 (equal now, a began first) | a 60 | b 40 50 60 | ..."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(3):
        queue.push("large", 30, "a")
    for _ in range(7):
        queue.push("small", 10, "b")
    assert drained(queue) == "abbbabbbab"


def test_nobody_saves_up_time_and_nobody_starves() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.push("busy", 1, "a")
    for _ in range(50):
        queue.pop()
    for _ in range(10):
        queue.push("late", 1, "b")  # asked for nothing so far: begins at the time of now, not at 0
    first = "".join(queue.pop() for _ in range(20))
    assert first.count("b") == 10 and "bbb" not in first and "aaa" not in first
    with pytest.raises(IndexError, match="nothing waits"):
        FairQueue().pop()


def test_who_leaves_the_queue_is_neither_served_nor_charged() -> None:
    queue: FairQueue[str] = FairQueue()
    gone = [queue.push("a", 1000, "x") for _ in range(3)]
    queue.push("a", 1, "a")
    queue.push("b", 1, "b")
    for waiting in gone:
        queue.discard(waiting)
        queue.discard(waiting)
    assert drained(queue) == "ab" and len(queue) == 0


def test_random_work_is_shared_within_one_item() -> None:
    """Of keys that wait all the time, what two were given never differs by more than two items of the largest work."""
    draw, queue = random.Random(1), FairQueue[tuple[str, float]]()
    given = dict.fromkeys("abc", 0.0)
    for name in given:
        for _ in range(300):
            work = draw.uniform(1, 50)
            queue.push(name, work, (name, work))
    for _ in range(400):
        name, work = queue.pop()
        given[name] += work
        assert max(given.values()) - min(given.values()) <= 100


# ---------------------------------------------------------------- keys


def test_keys_are_known_by_digest_and_change_without_a_restart(tmp_path: Path, caplog: Any) -> None:
    path = written(
        tmp_path / "keys.yaml",
        a={"sha256": digest("one"), "usd_total": 2.0, "usd_per_request": 1},
        b={"sha256": [digest("two")]},
    )
    keys = Keys(path)
    found = keys.find(b"one")
    assert found is not None and found.name == "a" and (other := keys.find(b"two")) is not None and other.name == "b"
    assert keys.find(b"three") is keys.find(b"") is keys.find(None) is None
    found.allow(0.5).settle(0.5)
    under_way = found.allow(0.25)
    with caplog.at_level(logging.WARNING):
        # the new key beside the old one, then the old one goes; b is gone
        written(path, a={"sha256": [digest("one"), digest("new key")], "usd_total": 2.0, "usd_per_request": 1})
        assert keys.find(b"one") is keys.find(b"new key") is found and keys.find(b"two") is None
        written(
            path, a={"sha256": digest("new key"), "usd_total": 1.0, "usd_per_request": 1, "requests_per_minute": 5}
        )
        assert keys.find(b"one") is None and keys.find(b"new key") is found
        assert (found.total.spent, found.limits.requests_per_minute) == (0.5, 5)  # it has spent what it has
        under_way.settle(0.125)  # what was under way goes on
        assert found.total.spent == 0.625
        path.write_text("keys: {a: {sha256: [")
        assert keys.find(b"new key") is found and keys.find(b"new key") is found
        path.unlink()
        assert keys.find(b"new key") is found
    assert keys.reloads == {"read": 2, "refused": 2}
    assert [r.levelname for r in caplog.records].count("ERROR") == 2
    assert "new key" not in caplog.text and digest("new key") not in caplog.text


def test_a_limit_below_what_is_spent_leaves_nothing_and_a_higher_one_no_more_than_itself(tmp_path: Path) -> None:
    key = Key("k", KeyLimits(usd_total=10, usd_per_request=3))
    key.allow().settle(3)
    open_ = [key.allow(), key.allow()]  # 3 spent, 6 set aside
    key.relimit(KeyLimits(usd_total=4, usd_per_request=3))
    with pytest.raises(Refused, match="set aside for its requests under way"):
        key.allow()
    open_[0].settle(0.5)
    open_[1].cancel()  # 3.5 spent: 0.5 of the 4 are left
    assert key.allow().usd == pytest.approx(0.5)
    key.relimit(KeyLimits(usd_total=2, usd_per_request=3))
    with pytest.raises(Refused, match="the budget of key 'k', 2 USD, is spent") as refused:
        key.allow()
    assert refused.value.retry_after is None
    key.relimit(KeyLimits(usd_total=5, usd_per_request=3))
    assert key.allow().usd == pytest.approx(5 - 3.5 - 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold `keys:`"),
        ("keys: []", "must hold `keys:`"),
        ("keys: {}", "holds no key"),
        (f"keys: {{'{SECRET} ': {{}}}}", "the name of entry 1 must be"),
        (f"keys: {{a: {SECRET}}}", "a: must be a mapping"),
        (f"keys: {{a: {{key: {SECRET}}}}}", "write no key here, but `sha256:` of it"),
        (f"keys: {{a: {{sha256: {SECRET}}}}}", "a: sha256 must be 64 hexadecimal digits"),
        ("keys: {a: {usd_total: 1}}", "a: sha256 must be 64"),
        (f"keys: {{a: {{sha256: {digest('x')}, {SECRET}: 1}}}}", "a: there is no such field; there are sha256"),
        (f"keys: {{a: {{sha256: {digest('x')}, usd: 1}}}}", "a: there is no 'usd'"),
        (f"keys: {{a: {{sha256: {digest('x')}, usd_total: -1}}}}", "usd_total=-1: must be at least 0"),
        (f"keys: {{a: {{sha256: {digest('x')}, usd_per_day: .nan}}}}", "usd_per_day=nan"),
        (f"keys: {{a: {{sha256: {digest('x')}, requests_per_minute: 1.5}}}}", "must be a whole number"),
        (f"keys: {{a: {{sha256: {digest('x')}, admin: 1}}}}", "admin must be true or false"),
        (f"keys: {{a: {{sha256: {digest('x')}}}, b: {{sha256: [{digest('x')}]}}}}", "b and a have the same key"),
        (f"keys: {{a: {{sha256: {digest('x')}}}, a: {{}}}}", "the key 'a' was already written"),
    ],
)
def test_a_bad_file_of_keys_is_named_and_shows_no_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"keys\.yaml") as error:
        read_keys(path)
    assert said in str(error.value) and SECRET not in str(error.value) and digest("x") not in str(error.value)


def test_a_rate_holds_in_any_sixty_seconds() -> None:
    clock = Clock()
    key = Key("k", KeyLimits(requests_per_minute=3), clock)
    for second in (0, 10, 20):
        clock.now = 1000.0 + second
        key.count()
    clock.now = 1050.0
    with pytest.raises(Refused, match="may ask 3 times a minute") as refused:
        key.count()
    assert refused.value.retry_after == pytest.approx(10)
    clock.now = 1060.0
    key.count()
    with pytest.raises(Refused):
        key.count()
    draw, taken = random.Random(0), [1010.0, 1020.0, 1060.0]
    for _ in range(500):
        clock.now += draw.expovariate(0.1)
        try:
            key.count()
        except Refused:
            continue
        taken.append(clock.now)
    assert len(taken) > 100
    assert all(sum(t - 60 < s <= t for s in taken) <= 3 for t in taken)


def test_days_begin_anew_and_spendings_outlive_the_server(tmp_path: Path) -> None:
    clock = Clock(86_400 * 100 + 86_000.0)  # 400 seconds before midnight, UTC
    path = written(tmp_path / "keys.yaml", a={"sha256": digest("one"), "usd_per_day": 1.0, "usd_total": 1.75})
    spending = tmp_path / "spending.json"
    keys = Keys(path, spending, clock)
    key = keys.find(b"one")
    assert key is not None and key.limits.request_usd == 0.01  # a hundredth of the smaller budget
    key.relimit(KeyLimits(usd_per_day=1.0, usd_total=1.75, usd_per_request=1.0))
    key.allow(0.75).settle(0.75)
    held = key.allow()  # what is left of today
    assert held.usd == 0.25
    keys.save()
    saved = json.loads(spending.read_text())["spending"]["a"]
    assert saved == {"day": "1970-04-11", "day_usd": 1.0, "total_usd": 1.0}  # set aside counts, until it is settled
    held.settle(0.125)
    held.settle(5.0)
    keys.save()
    open_call = key.allow(0.0625)  # nothing was set aside when the file was written last
    keys.save()
    assert json.loads(spending.read_text())["spending"]["a"]["day_usd"] == 0.9375
    open_call.cancel()
    keys.save()
    again = Keys(path, spending, clock).find(b"one")
    assert again is not None and (again.today.spent, again.total.spent) == (0.875, 0.875)
    with pytest.raises(Refused, match=r"of today of key .a., 0\.5 USD, is spent") as refused:
        again.relimit(KeyLimits(usd_per_day=0.5))
        again.allow()
    assert refused.value.retry_after == pytest.approx(400)
    clock.now += 401
    assert key.allow().usd == pytest.approx(1.75 - 0.875)  # a new day, the same total
    tomorrow = Keys(path, spending, clock).find(b"one")
    assert tomorrow is not None and (tomorrow.today.spent, tomorrow.total.spent) == (0.0, 0.875)
    spending.write_text('{"spending": {"a": {"day": 3}}}')
    with pytest.raises(ValueError, match="is no file of spendings; move it away"):
        Keys(path, spending, clock)


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a":NaN}', "holds NaN"),
        (b'{"a":[-Infinity]}', "holds -Infinity"),
        (b'{"a":1e999}', "too large"),
        (b'{"a":' + b"9" * 400 + b"}", "more than 64 bits"),
        (b'{"a":18446744073709551616}', "more than 64 bits"),
        (b'{"a":-' + b"9" * 5000 + b"}", "more than 64 bits"),
        (b'{"a":"\xed\xa0\x80"}', "not UTF-8: byte 6"),
        ('{"a":1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a":{"b":1,"c":2,"b":3}}', "'b' twice"),
        (b'{"\\ud800":1,"\\ud800":3}', "twice"),
        (b"[" * 65 + b"]" * 65, "more than 64 brackets"),
        (b'{"a":' * 500_000, "more than 64 brackets"),
        (b'{"a":1} x', "not JSON"),
    ],
)
def test_a_body_that_others_choke_on_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(ValueError, match="the body") as error:
        read_json(body)
    assert said in str(error.value)
    str(error.value).encode("utf-8")  # can be sent


def test_a_body_is_read_as_it_is() -> None:
    document = {"a": [1.5, -3, 2**64 - 1, None, True], "text": '\\" [[[{{{ 😀 \x00 \\ud800', "ü": {"ü": ""}}
    assert read_json(json.dumps(document).encode()) == read_json(json.dumps(document, ensure_ascii=False).encode())
    assert read_json(json.dumps(document).encode()) == document
    assert read_json(b'{"a":"\\ud83d"}') == {"a": "\ud83d"}  # half of a pair: a truncated text of somebody's
    deep: Any = 1
    for _ in range(64):
        deep = [deep]
    assert read_json(json.dumps([deep[0], "[" * 1000]).encode()) == [deep[0], "[" * 1000]


# ---------------------------------------------------------------- the gate, in process


def run(gated: Gated, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
    async def inside() -> Any:
        transport = httpx.ASGITransport(gated.app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            try:
                return await work(http)
            finally:
                await gated.decisions.aclose()

    return asyncio.run(inside())


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.001)


async def ask(http: httpx.AsyncClient, text: str, key: str | None = None, **more: Any) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = {"messages": [{"role": "user", "content": text}], **more}
    return await http.post("/v1/chat/completions", json=body, headers=headers)


def test_long_questions_meet_neither_tokenizer_nor_policy() -> None:
    counted: list[int] = []

    def count(text: str) -> int:
        counted.append(len(text))
        return len(text.split())

    gated = Gated(Gate(limits=GateLimits(question_tokens=1000, working=None), count_tokens=count))

    async def work(http: httpx.AsyncClient) -> list[httpx.Response]:
        return [await ask(http, text) for text in ("a " * 30_000, "a " * 1000, "a " * 1001, "a" * 8001, "a" * 8000)]

    replies = run(gated, work)
    assert [r.status_code for r in replies] == [413, 200, 413, 413, 200]
    assert "60,000 characters; at most 1,000 tokens" in replies[0].json()["error"]["message"]
    assert "1,001 tokens; at most 1,000" in replies[2].json()["error"]["message"]
    assert replies[0].json()["error"]["code"] == "context_length_exceeded"
    assert max(counted) <= 1000 * CHARACTERS and len(counted) == 3
    assert [len(text) for text in gated.router.done] == [2000, 8000]


def test_a_full_queue_of_one_key_refuses_that_key_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "keys.yaml", a={"sha256": digest("a")}, b={"sha256": digest("b")})
    gated = Gated(Gate(Keys(path), GateLimits(queue_tokens=30, queue_requests=5, working=None)))
    text = "sleep 0.05 and so on and on more"  # 32 characters: 8 tokens

    async def work(http: httpx.AsyncClient) -> Any:
        first = asyncio.create_task(ask(http, "sleep 0.5", "a"))
        await until(lambda: len(gated.router.batches) == 1)  # it is being decided: what comes now waits
        others = [asyncio.create_task(ask(http, text, "a")) for _ in range(6)]
        await until(lambda: sum(task.done() for task in others) == 3)
        waiting = gated.gate.metrics.text()[0].decode()
        other = await ask(http, text, "b")
        return await first, await asyncio.gather(*others), other, waiting

    first, others, other, waiting = run(gated, work)
    # the first, being decided, still counts with its 3 tokens: 3 + 3 x 8 = 27 of 30
    assert first.status_code == other.status_code == 200
    assert sorted(r.status_code for r in others) == [200] * 3 + [429] * 3
    refused = next(r for r in others if r.status_code == 429)
    assert refused.headers["retry-after"] == "1" and refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 'router_waiting{key="a"} 4' in waiting and 'router_waiting_tokens{key="a"} 27' in waiting
    numbers = gated.gate.metrics.text()[0].decode()
    assert 'router_refused_total{reason="queue"} 3' in numbers and 'router_waiting{key="a"}' not in numbers


@pytest.mark.parametrize(("working", "batches"), [(None, [4, 4, 2]), (1, [1] * 10)])
def test_places_and_batches_go_round_the_keys(tmp_path: Path, working: int | None, batches: list[int]) -> None:
    path = written(tmp_path / "keys.yaml", a={"sha256": digest("a")}, b={"sha256": digest("b")})
    gated = Gated(Gate(Keys(path), GateLimits(working=working)))

    async def work(http: httpx.AsyncClient) -> None:
        tasks = [asyncio.create_task(ask(http, "sleep .5", "a"))]
        await until(lambda: len(gated.router.batches) == 1)
        tasks += [asyncio.create_task(ask(http, f"a{i:07}", "a")) for i in range(8)]
        await until(lambda: gated.gate.states().total() == 9)
        await asyncio.gather(*tasks, *(ask(http, f"b{i:07}", "b") for i in range(2)))

    run(gated, work)
    # a was served once before; of equals it is first again, for it began to wait before b
    assert "".join(text[0] for text in gated.router.done[1:]) == "babaaaaaaa"
    assert [len(batch) for batch in gated.router.batches[1:]] == batches


def test_one_query_spoils_no_other_of_its_batch() -> None:
    async def work() -> Any:
        decisions = Decisions(SlowRouter())
        first = asyncio.create_task(decisions.decide("sleep 0.1"))
        await until(lambda: len(decisions._router.batches) == 1)
        found = await asyncio.gather(*map(decisions.decide, ["good", "bad", "fine"]), return_exceptions=True)
        batches = len(decisions._router.batches)
        gone = asyncio.create_task(decisions.decide("sleep 0.1 again"))
        await until(lambda: len(decisions._router.batches) > batches)
        left = asyncio.create_task(decisions.decide("never"))
        closed = asyncio.create_task(decisions.decide("closed"))
        await asyncio.sleep(0.01)
        left.cancel()
        await asyncio.sleep(0)
        await decisions.aclose()
        end = await asyncio.gather(first, gone, left, closed, return_exceptions=True)
        with pytest.raises(RuntimeError, match="no more is decided"):
            await decisions.decide("late")
        return found, end, decisions._router.done

    found, end, done = asyncio.run(work())
    assert [getattr(one, "member", None) for one in found] == ["member", None, "member"]
    assert isinstance(found[1], ValueError)
    assert [type(one).__name__ for one in end] == ["Decision", "Decision", "CancelledError", "RuntimeError"]
    assert "never" not in done and "closed" not in done and done[0] == "sleep 0.1"


def test_rates_and_budgets_answer_429_and_say_when_to_come_back(tmp_path: Path) -> None:
    path = written(
        tmp_path / "keys.yaml",
        rate={"sha256": digest("rate"), "requests_per_minute": 2},
        day={"sha256": digest("day"), "usd_per_day": 1.0, "usd_per_request": 0.5},
        total={"sha256": digest("total"), "usd_total": 0.5, "usd_per_request": 0.5},
        nothing={"sha256": digest("nothing"), "usd_per_day": 0},
    )
    gated = Gated(Gate(Keys(path), GateLimits(working=None)))

    async def work(http: httpx.AsyncClient) -> Any:
        rate = [await ask(http, "hello", "rate") for _ in range(3)]
        day = [await ask(http, "cost 9", "day") for _ in range(3)]
        free = [await ask(http, "cost 9", "total", max_cost_usd=0.125) for _ in range(4)]
        none = await ask(http, "cost 9", "total")
        assert (await ask(http, "hello", "nothing")).json()["error"]["code"] == "insufficient_quota"
        return rate, day, free, none

    rate, day, free, none = run(gated, work)
    assert [r.status_code for r in rate] == [200, 200, 429] and 1 <= int(rate[2].headers["retry-after"]) <= 60
    assert [r.status_code for r in day] == [200, 200, 429] and int(day[2].headers["retry-after"]) <= 86_400
    assert day[0].json()["usd"] == 0.5 and day[2].json()["error"]["code"] == "insufficient_quota"
    assert [r.json()["usd"] for r in free] == [0.125] * 4  # the client's own cap is what is set aside
    assert none.status_code == 429 and "retry-after" not in none.headers
    assert gated.spent == {"rate": 0.0, "day": 1.0, "total": 0.5}


def test_what_ends_without_a_bill_has_cost_what_was_set_aside() -> None:
    async def work() -> list[float]:
        key = Key("k", KeyLimits(usd_total=10, usd_per_request=1))
        gate, spent = Gate(limits=GateLimits(working=1)), []
        for error in (RequestError(400, "no"), ConnectionError("who knows"), None):
            try:
                async with gate.admitted(key, "q") as ticket:
                    assert current_ticket() is ticket and ticket.max_usd == 1
                    if error is not None:
                        raise error
            except (RequestError, ConnectionError):
                pass
            spent.append(key.total.spent)
        async with gate.admitted(key, "q", at_most=0.25) as ticket:
            assert ticket.max_usd == 0.25
            waits = asyncio.create_task(gate.admitted(key, "q").__aenter__())
            await asyncio.sleep(0.01)
            assert gate.states() == {"working": 1, "waiting": 1} and key.total.reserved == 1.25
            waits.cancel()  # never had its turn: it has cost nothing
            await asyncio.gather(waits, return_exceptions=True)
            ticket.settle(0.125)
            ticket.settle(7.0)
        assert key.total.reserved == 0 and not gate.states() and current_ticket() is None
        return [*spent, key.total.spent]

    assert asyncio.run(work()) == [0, 1, 2, 2.125]


def test_ten_thousand_random_requests_overspend_nothing(tmp_path: Path) -> None:
    """They come, wait, are refused, cost something, fail or are cancelled; at every moment the budgets hold."""
    names = ("a", "b", "c")
    limits = {
        "a": {"usd_per_day": 12.0, "usd_total": 15.0, "usd_per_request": 0.02},
        "b": {"usd_total": 2.7},
        "c": {"usd_per_day": 0.013, "usd_per_request": 0.01},
    }
    path = written(tmp_path / "keys.yaml", **{n: {"sha256": digest(n), **limits[n]} for n in names})
    draw, keys = random.Random(5), Keys(path)
    spent, ended = dict.fromkeys(names, 0.0), dict.fromkeys(("done", "refused", "cancelled"), 0)

    async def one(gate: Gate, name: str) -> None:
        key = keys.find(name.encode())
        assert key is not None
        try:
            cap = draw.choice([None, draw.uniform(0, 0.03)])
            async with gate.admitted(key, "q" * draw.randrange(1, 400), at_most=cap) as ticket:
                if cap is not None:
                    assert ticket.max_usd <= cap
                for _ in range(draw.randrange(3)):
                    await asyncio.sleep(0)
                if draw.random() < 0.1:
                    spent[name] += ticket.max_usd  # the worst that it can have done
                    raise ConnectionError
                usd = draw.uniform(0, ticket.max_usd)
                ticket.settle(usd)
                spent[name] += usd
                ended["done"] += 1
        except RequestError as error:
            assert error.status == 429
            ended["refused"] += 1
        except ConnectionError:
            pass
        for account, cap in ((key.today, key.limits.usd_per_day), (key.total, key.limits.usd_total)):
            assert cap is None or (account.spent + account.reserved <= cap and account.overrun == 0)

    async def work() -> None:
        gate, tasks = Gate(keys, GateLimits(working=8)), []
        for number in range(10_000):
            tasks.append(asyncio.create_task(one(gate, names[number % 3])))
            while draw.random() < 0.3 or len(gate._tickets) > 60:
                await asyncio.sleep(0)
            if draw.random() < 0.05:
                ended["cancelled"] += draw.choice(tasks[-30:]).cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert not gate.states() and gate._working == 0
        assert {type(one) for one in found} == {type(None), asyncio.CancelledError}, found

    asyncio.run(work())
    assert spent["a"] <= 12.0 and spent["b"] <= 2.7 and spent["c"] <= 0.013
    assert spent["a"] > 11.5 and spent["b"] > 2.6 and min(ended.values()) > 20, (spent, ended)


def test_clients_that_leave_end_their_work() -> None:
    gated = Gated(Gate(limits=GateLimits(working=None)))

    async def work(http: httpx.AsyncClient) -> None:
        deciding = asyncio.create_task(ask(http, "sleep 0.2"))
        await until(lambda: len(gated.router.batches) == 1)
        tasks = [asyncio.create_task(ask(http, f"wait {i}")) for i in (0, 600, 601)]
        await until(lambda: gated.gate.states().total() == 4)
        tasks[1].cancel()  # in the queue
        await deciding
        await until(lambda: "wait 601" in gated.router.done)
        tasks[2].cancel()  # at its member
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not gated.gate.states()

    run(gated, work)
    assert "wait 600" not in gated.router.done and gated.ended == ["sleep 0.2", "wait 0"]


# ---------------------------------------------------------------- metrics


def test_metrics_are_prometheus_text() -> None:
    metrics = ServerMetrics()
    metrics.watch("router_waiting", "Two.", lambda: {('a"b\\c\nd',): 2.5}, "key")
    metrics.began("/v1/chat/completions")
    metrics.finished("/v1/chat/completions", 200, 0.003)
    metrics.decided(None, 0.2)
    metrics.decided("m", 1000.0)
    text, kind = metrics.text()
    assert kind.startswith("text/plain; version=0.0.4")
    lines = text.decode().splitlines()
    assert 'router_waiting{key="a\\"b\\\\c\\nd"} 2.5' in lines and "router_in_flight 0.0" in lines
    assert 'router_requests_total{kind="/v1/chat/completions",status="200"} 1.0' in lines
    assert 'router_decisions_total{member=""} 1.0' in lines and 'router_decisions_total{member="m"} 1.0' in lines
    assert 'router_decision_seconds_bucket{le="0.25"} 1.0' in lines
    assert "router_decision_seconds_sum 1000.2" in lines and "router_decision_seconds_count 2.0" in lines
    newer, kind = metrics.text("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text") and newer.endswith(b"# EOF\n")
    documented = str(ServerMetrics.__module__ and __import__(ServerMetrics.__module__, fromlist=["x"]).__doc__)
    names = {line.split()[2] for line in lines if line.startswith("# TYPE router_")}
    assert all(name in documented for name in names), names
