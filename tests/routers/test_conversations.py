"""A step router behind a server: the decisions of training, whose conversation it is, and budgets that hold."""

import asyncio
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import step_helpers as steps

from routers import StepRouter
from routers.data.catalogue import Member
from routers.environments.protocol import Act, View
from routers.language.digest import digest
from routers.router import CannotDo
from routers.tasks.step_routing.conversations import Call, Conversations
from routers.tasks.step_routing.environment import StepRoutingEnvironment
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.loop import Limits, play
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.special_tokens import end_ids
from srpo.rollout.turns import Sample
from srpo.types import Reply

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("read", "edit")]
BOUNDS = {"small": 0.01, "large": 0.1}


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    """(model, tokenizer): its choices are close to a coin's."""
    texts = [digest(agent(seed, ()), TOOLS).text for seed in range(5)]
    return steps.policy([*texts, "An agent acted [steps left 3]"])


def settings(observation: str = "signs", **changes: Any) -> Any:
    return steps.settings(observation, ("small", "large"), **{"environment": "messages", "unit": "usd", **changes})


@pytest.fixture(scope="module")
def router(policy: Any) -> Any:
    with StepRouter(*policy, settings()) as router:
        yield router


def agent(seed: int, members: Sequence[str]) -> list[dict[str, Any]]:
    """The messages of a deterministic agent's next call, after these members answered its calls."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"Do job {seed}."}]
    for number, member in enumerate(members):
        function = {"name": "read" if number % 2 else "edit", "arguments": f'{{"by": "{member}"}}'}
        call = {"id": f"c{number}", "type": "function", "function": function}
        good = member == "large" or (seed + number) % 3
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{number}", "content": "fine" * number if good else "Error: no"},
        ]
    return messages


class Job:
    """`agent` as an environment of the training: an observation is the digest of the next call."""

    task_type, how, admissible, waits, score, won = "", "", (), False, 0.0, False

    def __init__(self, seed: int, limit: int) -> None:
        self.number, self.seed, self.limit = seed, f"job {seed}", limit
        self.acted: list[str] = []

    steps = property(lambda self: len(self.acted))
    done = property(lambda self: self.steps >= self.limit)
    task = property(lambda self: digest(agent(self.number, ())).task)

    def reset(self) -> str:
        return digest(agent(self.number, ()), TOOLS).text

    def step(self, action: str) -> tuple[str, bool]:
        self.acted.append(action)
        return digest(agent(self.number, self.acted), TOOLS).text, self.done


class Acting:
    def __init__(self, name: str) -> None:
        self.name = name

    def bound(self, view: View) -> float:
        return BOUNDS[self.name]

    async def act(self, view: View, deadline: float) -> Act:
        return Act(self.name, BOUNDS[self.name] / 2, Reply(self.name))


@pytest.mark.parametrize("observation", ["signs", "digest", "progress"])
@pytest.mark.parametrize("cap", [None, 0.3])
def test_the_same_decisions_in_training_in_play_and_behind_a_server(
    policy: Any, observation: str, cap: float | None
) -> None:
    """Token for token, for the same states: a rollout of the trainer's loop, `play`, and conversations by messages."""
    how = settings(observation)
    members = [Acting("small"), Acting("large")]
    environment = StepRoutingEnvironment(
        lambda row: Job(row["task"], how.step_limit), members, how.style.describe, how.budget(cap), how.labels
    )
    tokenizer = policy[1]
    rows = [{"task": seed} for seed in range(4)]
    prompts = [how.start_ids(environment.starts(row, [cap])[0], tokenizer, lambda text: text) for row in rows]
    generator = TransformersGenerator(*policy, Sampling(1.0), eos_ids=end_ids(*policy))
    limits = Limits(how.step_limit, 100_000, how.observation_tokens, step_seconds=60.0)
    rolled = play(environment, rows, prompts, [f"job {n}" for n in range(4)], generator, tokenizer, limits)

    async def served(router: StepRouter, seed: int) -> tuple[list[str], tuple[int, ...]]:
        conversations, acted, ids = Conversations(router, cap=cap), list[str](), tuple[int, ...]()
        for _ in range(how.step_limit):
            call = await conversations.decide(agent(seed, acted), TOOLS, conversation=f"job {seed}", bounds=BOUNDS)
            if call.member is None:
                break
            conversations.settle(call, BOUNDS[call.member] / 2)
            acted.append(call.member)
            ids = call._session.ids  # type: ignore[union-attr]
        return acted, ids

    with StepRouter(*policy, how) as router:
        for seed, trajectory in enumerate(rolled):
            played = router.play(Job(seed, how.step_limit), members, cap, seed=f"job {seed}")
            names, ids = asyncio.run(served(router, seed))
            assert names == trajectory.columns["members"] == [step.executor for step in played.steps]
            assert ids == steps.ids_of(trajectory)[: len(ids)] == played.ids[: len(ids)] and len(ids) > 60
            assert ids[-1] in router._labels.ids(how.labels)  # type: ignore[attr-defined]
    assert {name for t in rolled for name in t.columns["members"]} == {"small", "large"}


def test_one_call_is_a_decision_with_probabilities(router: StepRouter) -> None:
    decision = router.route("Do job 1.")
    assert decision.member in ("small", "large") and sum(decision.scores.values()) == pytest.approx(1)
    assert decision == router.route("ignored", context=agent(1, ())) and decision.completion_tokens == 1
    assert router.route("Do job 1.", members=["large"]).scores == {"large": pytest.approx(1)}
    with pytest.raises(CannotDo, match="cost_weight"):
        router.route("x", cost_weight=1.0)
    with pytest.raises(ValueError, match="trained with small, large"):
        router.route("x", members=["huge"])


def scripted(router: StepRouter, probabilities: Sequence[float]) -> Any:
    """A router whose policy says `large` with these probabilities, and chooses the likelier."""
    wanted = iter(probabilities)

    class Scripted:
        settings = router.settings

        def session(self, *args: Any, **options: Any) -> Any:
            session = router.session(*args, **options)

            def submit(request: Any) -> Any:
                large = next(wanted)
                chances = [large] if len(request.choices) == 1 else [1 - large, large]
                best = max(range(len(chances)), key=chances.__getitem__)
                future: Any = asyncio.Future()
                logs = tuple(math.log(p) for p in chances)
                future.set_result(Sample((request.choices[best],), (logs[best],), True, logs))
                return future

            session._submit = submit
            return session

    return Scripted()


@pytest.fixture
def awaitable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("routers.tasks.step_routing.session.asyncio.wrap_future", lambda future: future)


async def turn(conversations: Conversations, acted: list[str], seed: int = 1, **how: Any) -> Call:
    """One call of an agent, paid at half its bound; the member is appended."""
    call = await conversations.decide(agent(seed, acted), TOOLS, **{"bounds": BOUNDS, **how})
    if call.member is not None:
        conversations.settle(call, BOUNDS[call.member] / 2)
        acted.append(call.member)
    return call


def test_whose_conversation_it_is(router: StepRouter) -> None:
    """By prefix; owners apart; retries alike and paid twice; branches, ids, histories that were changed."""

    async def main() -> None:
        conversations = Conversations(router, cap=5.0)
        ann, bob = list[str](), list[str]()
        one = await turn(conversations, ann, owner="ann")
        other = await turn(conversations, bob, owner="bob")
        assert one.conversation != other.conversation and conversations.counts()["begun"] == 2
        second = await turn(conversations, ann, owner="ann")
        assert second.conversation == one.conversation and second.number == 2
        assert second.spent_usd == pytest.approx(BOUNDS[ann[0]] / 2)
        history = agent(1, ann[:1])
        marked = [{**m, "cache_control": {"type": "ephemeral"}} for m in history]
        marked[0]["content"] = [{"type": "text", "text": history[0]["content"], "cache_control": {}}]
        again = await conversations.decide(marked, TOOLS, owner="ann", bounds=BOUNDS)
        assert (again.conversation, again.member, again.scores) == (one.conversation, second.member, second.scores)
        assert again._session.ids == second._session.ids  # type: ignore[union-attr]
        assert again.spent_usd == pytest.approx(sum(BOUNDS[name] / 2 for name in ann))
        conversations.settle(again)  # nothing is known: the whole bound
        third = await turn(conversations, ann, owner="ann")
        assert third.conversation == one.conversation
        assert third.spent_usd == pytest.approx(again.spent_usd + BOUNDS[str(again.member)])
        branch = await turn(conversations, ["huge", "huge"], owner="ann")  # another answer to the first call
        assert branch.conversation == one.conversation and len(branch._session.steps) == 2  # type: ignore[union-attr]
        anew = await turn(conversations, [], owner="ann")
        assert anew.conversation != one.conversation
        named = await conversations.decide(
            [{"role": "user", "content": "(summary)"}], owner="ann", conversation=one.conversation, bounds=BOUNDS
        )
        assert named.conversation == one.conversation and len(named._session.steps) > 2  # type: ignore[union-attr]
        conversations.settle(named, 0.0)
        stolen = await turn(conversations, [], owner="bob", conversation=one.conversation)
        assert stolen.number == 1 and stolen.spent_usd == 0
        counts = conversations.counts()
        assert (counts["retried"], counts["branched"], counts["rewritten"]) == (1, 1, 1)

    asyncio.run(main())


@pytest.mark.usefixtures("awaitable")
def test_a_budget_failover_and_stickiness_by_hand(router: StepRouter) -> None:
    async def main() -> None:
        budget = Conversations(scripted(router, [0.9, 0.9, 0.9, 0.9]), cap=0.25)
        call = await budget.decide(agent(1, ()), bounds=BOUNDS)
        assert (call.member, call.reason, call.remaining) == ("large", "policy", pytest.approx(0.15))
        assert call.scores == {"small": pytest.approx(0.1), "large": pytest.approx(0.9)}
        call = budget.instead(call, "503", usd=0.02)
        assert (call.member, call.reason, call.failed) == ("small", "failover", ("large",))
        assert call.remaining == pytest.approx(0.25 - 0.02 - 0.01) and call.spent_usd == pytest.approx(0.02)
        ids = call._session.ids  # type: ignore[union-attr]
        assert ids[-1] == router._labels.ids(("<small>",))[0]  # type: ignore[attr-defined]
        budget.settle(call, 0.005)
        with pytest.raises(RuntimeError, match="no call is open"):
            budget.settle(call, 0.005)
        call = await budget.decide(agent(1, ["small"]), bounds=BOUNDS)
        assert call.member == "large" and call.spent_usd == pytest.approx(0.025)
        call = budget.instead(call, "timeout")  # nothing is known: .1; and .125 is left
        call = budget.instead(call, "timeout")
        assert (call.member, call.reason) == (None, "failed") and call.spent_usd == pytest.approx(0.135)
        call = await budget.decide(agent(1, ["small", "x"]), bounds={**BOUNDS, "large": 0.2}, among=["large"])
        assert (call.member, call.reason, call.scores) == (None, "budget", {})
        assert budget.counts()["refused"] == 1 and budget.counts()["failover"] == 2

    asyncio.run(main())


@pytest.mark.usefixtures("awaitable")
def test_who_has_the_prompt_in_its_cache_stays(router: StepRouter) -> None:
    """Prompts of n x 1000 tokens and what is new, read at a tenth where they are cached; small is 1, large 2 $/M."""
    members = {
        name: Member(name, "x", price, price, price_cached=price / 10, cache_seconds=60.0)
        for name, price in (("small", 1.0), ("large", 2.0))
    }
    now = [0.0]

    def said(number: int) -> list[Any]:
        texts = [f"{n:04}" + "x" * (4000 - 4 - len('{"content": "", "role": "user"}')) for n in range(number)]
        return [{"role": "user", "content": text} for text in texts]

    async def main() -> None:
        chances, seconds = [0.9, 0.9, 0.9, 0.4, 0.1, 0.9, 0.9], [0, 1, 2, 3, 4, 5, 99]
        sticky = Conversations(scripted(router, chances), members=members, worth_usd=0.004, clock=lambda: now[0])
        found = []
        for number, at in enumerate(seconds):
            now[0] = float(at)
            call = await sticky.decide(said(number + 1), conversation="c", bounds=BOUNDS)
            sticky.settle(call, 0.0)
            found.append((call.member, call.reason, *(round(1e6 * usd) for usd in call.expected_usd.values())))
        assert found == [  # in millionths: what the prompt costs at small, and at large
            ("large", "policy", 1000, 2000),
            ("large", "policy", 2000, 2200),
            ("large", "policy", 3000, 2400),
            ("large", "sticky", 4000, 2600),  # 4000 x (.6 - .4) = 800 <= 1400
            ("small", "policy", 5000, 2800),  # 4000 x (.9 - .1) = 3200 > 2200
            ("small", "sticky", 1500, 4800),  # large still has 4000 of 6000 tokens; 3200 <= 3300
            ("small", "sticky", 7000, 14000),  # nobody has any after so long
        ]
        assert sticky.counts()["sticky"] == 3

        failing, found = Conversations(scripted(router, [0.9] * 3), members=members, clock=lambda: now[0]), []
        for number in range(3):
            call = await failing.decide(said(number + 1), conversation="f", bounds=BOUNDS)
            found.append([round(1e6 * usd) for usd in call.expected_usd.values()])
            if number == 0:
                failing.settle(failing.instead(call, "503", 0.0), 0.0)
            else:
                failing.settle(call, 0.0, error="the client left")
        # a call that failed is not counted as sent: large has nothing, small what it answered
        assert found == [[1000, 2000], [1100, 4000], [2100, 6000]]

    asyncio.run(main())


@pytest.mark.parametrize("number", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_conversations_never_pass_their_cap(router: StepRouter, number: int) -> None:
    """Many at once, with retries, failover, clients that leave, absurd reports, and settlements that are lost."""
    draw = random.Random(0)
    caps, kept = {"usd": 0.12, "large_calls": 2.0}, number // 3
    billed: dict[str, dict[str, float]] = {unit: {} for unit in caps}
    ends = dict.fromkeys(("budget", "failed", "done"), 0)

    class Coin:
        """A policy that costs nothing: ten thousand conversations would take long on a model."""

        settings = router.settings

        def session(self, *args: Any, **options: Any) -> Any:
            session = router.session(*args, **options)

            async def decided(request: Any) -> Sample:
                await asyncio.sleep(0)  # others come in between
                logs = tuple(math.log(1 / len(request.choices)) for _ in request.choices)
                return Sample((draw.choice(request.choices),), logs[:1], True, logs)

            session._submit = lambda request: decided(request)
            return session

    async def one(conversations: Conversations, unit: str, number: int) -> None:
        owner, name = f"key {number % 7}", draw.choice([None, f"id {number}"])
        acted: list[str] = []
        for _ in range(4):
            for _ in range(draw.choice([1, 1, 2])):  # a retry, or two at once
                small = draw.uniform(0, 0.03)
                bounds = {"small": small, "large": small + draw.uniform(0, 0.06)}
                call = await conversations.decide(agent(number, acted), owner=owner, conversation=name, bounds=bounds)
                while call.member is not None:
                    key = call.conversation
                    true = draw.uniform(0, bounds[call.member]) if unit == "usd" else float(call.member == "large")
                    billed[unit][key] = billed[unit].get(key, 0.0) + true
                    await asyncio.sleep(0)
                    kind = draw.random()
                    if kind < 0.2:
                        call = conversations.instead(call, "500", draw.choice([true, None, math.nan]))
                        continue
                    if kind > 0.97:
                        break  # never settled: what was reserved stays so
                    report = draw.choice([true] * 5 + [None, -1.0, math.inf])
                    conversations.settle(call, report, draw.choice([None, "the client left"]))
                    break
                if call.member is None:
                    ends[call.reason] += 1
                    break
            if call.member is None:
                break
            acted.append(call.member)
        else:
            ends["done"] += 1

    async def main() -> None:
        for unit, cap in caps.items():
            conversations = Conversations(Coin(), cap=cap, unit=unit, max_conversations=kept)  # type: ignore[arg-type]
            for start in range(0, number // 2, 100):
                await asyncio.gather(*(one(conversations, unit, n) for n in range(start, start + 100)))
            counts = conversations.counts()
            assert counts["begun"] >= number // 2 and counts["open"] == kept and counts["retried"] > number // 20
            assert counts["evicted"] == counts["begun"] - counts["open"] and min(ends.values()) > number // 100, (
                ends,
                counts,
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("routers.tasks.step_routing.session.asyncio.wrap_future", lambda future: future)
        asyncio.run(main())
    for unit, cap in caps.items():
        names, most = len(billed[unit]), max(billed[unit].values())
        assert most <= cap * (1 + 1e-9) and names > 0.4 * number, (unit, most, names)


def test_memory_is_bounded_and_fair(router: StepRouter) -> None:
    """The owner with the most loses; idle ones go; nothing of a forgotten conversation is left."""
    now = [0.0]
    conversations = Conversations(router, max_conversations=6, idle_seconds=10.0, clock=lambda: now[0])

    async def main() -> None:
        quiet: list[str] = []
        first = await turn(conversations, quiet, owner="quiet")
        for seed in range(9):
            acted: list[str] = []
            for _ in range(6):
                await turn(conversations, acted, seed=seed, owner="loud")
        assert (await turn(conversations, quiet, owner="quiet")).conversation == first.conversation
        assert conversations.counts()["evicted"] == 4 and conversations.counts()["open"] == 6
        assert len(conversations._requests) <= 6 * 5
        left = await conversations.decide(agent(99, ()), owner="loud", bounds=BOUNDS)  # stays open
        now[0] = 11.0
        await turn(conversations, [], seed=5, owner="new")
        conversations.settle(left, 0.0)  # its conversation is gone
        counts = conversations.counts()
        assert (counts["expired"], counts["abandoned"], counts["open"]) == (6, 1, 1)
        assert len(conversations._requests) == 1 and dict(conversations._owners) == {"new": 1}

    asyncio.run(main())


def test_a_long_conversation_is_read_anew_and_goes_on_paying(router: StepRouter) -> None:
    async def main() -> None:
        conversations, acted = Conversations(router, cap=5.0), list[str]()
        calls = [await turn(conversations, acted) for _ in range(2 * router.settings.step_limit + 1)]
        assert conversations.counts()["restarted"] == 2 and len({call.conversation for call in calls}) == 1
        lengths = [len(call._session.steps) for call in calls]  # type: ignore[union-attr]
        assert lengths == [*range(1, 13), *range(1, 13), 1]
        assert calls[-1].spent_usd == pytest.approx(sum(BOUNDS[name] / 2 for name in acted[:-1]))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"bounds": None}, "bounds are needed"),
        ({"bounds": {"small": 1.0}}, "bounds are needed"),
        ({"bounds": {"small": 1.0, "large": math.nan}}, "the bound of large"),
        ({"among": ["huge"]}, "none of the router's members"),
        ({"conversation": ""}, "1 to 256 characters"),
        ({"conversation": "x" * 257}, "1 to 256 characters"),
    ],
)
def test_what_is_refused(router: StepRouter, how: dict[str, Any], told: str) -> None:
    conversations = Conversations(router, cap=1.0)
    with pytest.raises(ValueError, match=told):
        asyncio.run(conversations.decide(agent(1, ()), TOOLS, **{"bounds": BOUNDS, **how}))
    assert not any(home.open for home in conversations._known.values())


def test_what_is_refused_at_once(policy: Any, router: StepRouter) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for messages, told in (([], "no messages"), ([{"role": "user", "content": deep}], "nested too deeply")):
        with pytest.raises(ValueError, match=told):
            asyncio.run(Conversations(router).decide(messages))
    while deep:
        deep = deep.pop()  # one by one: a destructor would recurse
    with StepRouter(*policy, settings("compact")) as compact, pytest.raises(CannotDo, match="signs or digest"):
        Conversations(compact)
    for number in (
        {"max_conversations": 0},
        {"idle_seconds": 0.0},
        {"worth_usd": -1.0},
        {"worth_usd": 1.0},
        {"members": {}},
        {"cap": -1.0},
    ):
        with pytest.raises(ValueError):
            Conversations(router, **number)
