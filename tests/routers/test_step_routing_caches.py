"""Prompt caches in episodes: what a step costs, saves and loses, worked by hand; and in the table of an evaluation."""

import asyncio
import dataclasses
import json
import math
from typing import Any

import pandas as pd
import pytest
from step_helpers import drive

from routers.data.billing import highest
from routers.data.catalogue import Member
from routers.environments.messages.agent import Talk as Messages
from routers.environments.messages.environment import MessagesEnvironment
from routers.environments.messages.members import ScriptedMember
from routers.environments.priced import COMPLETION_TOKENS, PricedExecutor, conversation
from routers.environments.protocol import Act
from routers.evaluation.episodes import CACHES, Episodes
from routers.evaluation.tables import render
from routers.pool.ledger import Spending
from routers.tasks.step_routing.arguments import StepRoutingArguments
from routers.tasks.step_routing.conversations import Conversations
from routers.tasks.step_routing.environment import Situation, StepRoutingEnvironment
from routers.tasks.step_routing.rule_router import RuleRouter, RuleSettings
from routers.tasks.step_routing.rules import time_boxed
from routers.tasks.step_routing.settings import StepSettings
from routers.tasks.step_routing.spending import report
from routers.tasks.step_routing.world import StepWorld
from srpo.types import COST, Observation, Reply

CACHED = {"cache_seconds": 300.0}
SMALL = Member("small", "x", 1.0, 5.0, price_cached=0.1, price_cache_write=1.25, latency=10.0, **CACHED)
LARGE = Member("large", "x", 3.0, 15.0, price_cached=0.3, price_cache_write=3.75, latency=20.0, **CACHED)


class Talk:
    """Begins with 1,000 tokens, and says 100 more at every step."""

    seed, task, task_type, limit, won, score, how, waits = "talk", "talk", "talk", 4, False, 0.0, "", False
    admissible = ("go",)

    def __init__(self) -> None:
        self.steps = 0

    done = property(lambda self: self.steps >= self.limit)

    def reset(self) -> str:
        return "x" * 4000

    def step(self, action: str) -> tuple[str, bool]:
        self.steps += 1
        return "x" * 400, self.done


class Goer:
    def __init__(self, name: str) -> None:
        self.name = name

    def bound(self, view: Any) -> float:
        return 1.0

    async def act(self, view: Any, deadline: float) -> Act:
        return Act("go", 1.0, Reply("go"))


def world(small: Member = SMALL, large: Member = LARGE) -> StepRoutingEnvironment:
    executors = [PricedExecutor(Goer(member.name), member) for member in (small, large)]
    return StepRoutingEnvironment(lambda row: Talk(), executors, lambda now: Observation())


def played(order: str, environment: StepRoutingEnvironment) -> tuple[Any, list[Situation]]:
    seen: list[Situation] = []

    def rule(situation: Situation, affordable: Any) -> str:
        seen.append(situation)
        return {"s": "small", "l": "large"}[order[len(situation.calls)]]

    return drive(environment, {}, "x", rule).columns, seen


def test_an_episode_by_hand() -> None:
    environment = world()
    columns, seen = played("ssls", environment)
    # prompts of 1,000, 1,101, 1,202 and 1,303 tokens (a step is 1 + 100), answers of 50
    first = 1000 * 1.25 + 50 * 5
    second = 1000 * 0.1 + 101 * 1.25 + 50 * 5
    cold = 1202 * 3.75 + 50 * 15
    back = 1101 * 0.1 + 202 * 1.25 + 50 * 5  # 40 seconds on, its own prefix is still warm
    assert columns[COST] == pytest.approx((first + second + cold + back) / 1e6, rel=1e-12)
    plain = 3 * 50 * 5 + 1000 + 1101 + 1303
    read, hit, saved, lost = ([columns[what + name] for name in ("small", "large")] for what in CACHES)
    assert read == [1000 + 1101 + 1303, 1202] and hit == [1000 + 1101, 0]
    assert saved == pytest.approx([(plain - first - second - back) / 1e6, (1202 * 3 + 50 * 15 - cold) / 1e6])
    assert lost == pytest.approx([101 * (1.25 - 0.1) / 1e6, 1101 * (3.75 - 0.3) / 1e6])
    assert [step.by for step in seen[3].view.steps] == ["small", "small", "large"]
    assert [step.at for step in seen[3].view.steps] == [0, 10, 20] and seen[3].view.now == 40
    assert seen[3].bounds == pytest.approx(
        {m.name: highest(m, 1303, COMPLETION_TOKENS) for m in (SMALL, LARGE)}
    )  # as if nothing were cached
    metrics = environment.metrics()
    assert metrics["cache/share"] == pytest.approx(2101 / 4606) and metrics["cache/switch_usd"] == pytest.approx(
        sum(lost)
    )


def test_a_slow_executor_lets_the_other_s_prefix_expire() -> None:
    columns, _ = played("ssls", world(large=dataclasses.replace(LARGE, latency=290.0)))
    assert columns["cached tokens: small"] == 1000  # 300 seconds after its last call nothing is left
    columns, _ = played("ssls", world(large=dataclasses.replace(LARGE, latency=289.0)))
    assert columns["cached tokens: small"] == 1000 + 1101


def test_who_stays_pays_less_than_who_switches_and_a_warm_dear_one_less_than_a_cold_cheap_one() -> None:
    usd = {order: played(order, world())[0][COST] for order in ("ssss", "slsl", "llll", "ssll", "llls")}
    assert usd["ssss"] < usd["ssll"] < usd["slsl"] < usd["llll"]
    close = dataclasses.replace(
        LARGE, name="small", price_in=2.0, price_cached=0.2, price_cache_write=2.5, price_out=10.0
    )
    stay, switch = (played(order, world(small=close))[0][COST] for order in ("llll", "llls"))
    assert stay < switch  # the last call goes to the cheaper one, which has to read everything


def test_what_every_prompt_begins_with_is_cached_too_and_helps_over_the_minimum() -> None:
    long = {"extra_prompt_tokens": 3000, "cache_min_tokens": 4096}
    without, _ = played("ssss", world(small=dataclasses.replace(SMALL, cache_min_tokens=4096)))
    columns, seen = played("ssss", world(small=dataclasses.replace(SMALL, **long)))
    assert without["cached tokens: small"] == 0  # 1,303 tokens are too few
    assert columns["prompt tokens: small"] == 4 * 3000 + 1000 + 1101 + 1202 + 1303
    assert columns["cached tokens: small"] == 4101 + 4202  # 4,000 were too few; then the prompts before
    assert seen[0].bounds["small"] == pytest.approx(highest(SMALL, 4000, COMPLETION_TOKENS))


def test_executors_without_a_member_tell_nothing_of_caches() -> None:
    environment = StepRoutingEnvironment(lambda row: Talk(), [Goer("small"), Goer("large")], lambda now: Observation())
    columns, seen = played("slsl", environment)
    assert columns[COST] == 4.0 and not [name for name in columns if name.startswith(CACHES)]
    assert "cache/share" not in environment.metrics()
    assert conversation(seen[2].view, SMALL).prompt_tokens == 1202


def test_an_executor_needs_a_member_of_its_name_with_prices() -> None:
    for member in (dataclasses.replace(SMALL, name="other"), Member("small", "no prices")):
        with pytest.raises(ValueError, match="executor 'small': needs a member of its name"):
            PricedExecutor(Goer("small"), member)


# ---- agents that speak messages: the whole request is the prompt, not the digest of it that the policy reads ----


def message(role: str, tokens: int) -> dict[str, str]:
    """Of so many tokens, four bytes each as JSON."""
    bare = {"role": role, "content": ""}
    return {**bare, "content": "x" * (4 * tokens - len(json.dumps(bare)))}


class Asking:
    """An agent whose prompts have 1,000, 1,300, 1,600 ... tokens."""

    waits = False

    def tasks(self, split: str, count: int = 0) -> dict[str, str]:
        return {"one": "ask"}

    def talk(self, task: str) -> Messages:
        messages: list[Any] = [message("user", 1000)]
        for _ in range(5):
            reply = yield {"messages": list(messages)}
            messages += [reply, message("user", 200)]
        return 1.0


class Answering(ScriptedMember):
    def say(self, request: Any, seed: str) -> dict[str, Any]:
        return message("assistant", 100)


def test_an_agent_s_switches_by_hand_in_the_simulator_and_behind_a_server() -> None:
    both = [Answering(dataclasses.replace(member, max_tokens=200)) for member in (SMALL, LARGE)]
    environment = StepRoutingEnvironment(
        lambda row: MessagesEnvironment(Asking(), "asking/one", "ask", 9), both, lambda now: Observation()
    )
    seen: list[Situation] = []

    def rule(situation: Situation, affordable: Any) -> str:  # small, small, large, large, small
        seen.append(situation)
        return time_boxed(2)(situation, affordable)

    columns = drive(environment, {}, "x", rule).columns
    prompts = [
        1000 * 1.25,
        1000 * 0.1 + 300 * 1.25,
        1600 * 3.75,
        1600 * 0.3 + 300 * 3.75,
        1300 * 0.1 + 900 * 1.25,  # what it was sent two calls ago is still warm
    ]
    assert columns[COST] == pytest.approx((sum(prompts) + 3 * 100 * 5 + 2 * 100 * 15) / 1e6, rel=1e-12)
    read, hit, _, lost = ([columns[what + name] for name in ("small", "large")] for what in CACHES)
    assert read == [1000 + 1300 + 2200, 1600 + 1900] and hit == [1000 + 1300, 1600]
    # at the first switch small holds 1,300 tokens that large has not; at the second large 1,900, small 1,300 of them
    assert lost == pytest.approx([600 * (1.25 - 0.1) / 1e6, 1300 * (3.75 - 0.3) / 1e6], rel=1e-12)
    assert environment.metrics()["cache/switch_usd"] == pytest.approx(sum(lost))

    how = RuleSettings("time-boxed", 2, StepSettings(("small", "large"), ("<s>", "<l>"), observation="signs"))
    clock = iter(range(0, 500, 5))
    conversations = Conversations(RuleRouter(how), members={"small": SMALL, "large": LARGE}, clock=lambda: next(clock))
    messages, expected = [message("user", 1000)], list[float]()
    for _ in range(5):
        call = asyncio.run(conversations.decide(messages, conversation="one"))
        expected.append(call.expected_usd[str(call.member)] * 1e6)
        conversations.settle(call, 0.0)
        messages += [message("assistant", 100), message("user", 200)]
    assert expected == pytest.approx(prompts, rel=1e-12), "what a server foretells is what training was paid for"


# ---- scripted executors at the prices of a catalogue ----

POOL = """members:
  - {name: explorer, descriptor: x, price_in: 1, price_out: 5, price_cached: 0.1, price_cache_write: 1.25,
     cache_seconds: 300, latency: 1}
  - {name: planner, descriptor: x, price_in: 3, price_out: 15, price_cached: 0.3, price_cache_write: 3.75,
     cache_seconds: 300, latency: 2}
"""


def test_scripted_executors_cost_what_a_catalogue_says(tmp_path) -> None:
    pool = tmp_path / "pool.yaml"
    pool.write_text(POOL)
    task = StepRoutingArguments(train_tasks="generated/train", step_limit=6, catalogue=str(pool))
    made = StepWorld(task, train_limit=1)
    name = next(iter(made.train_tasks()))
    order = iter("eepe" * 2)

    def rule(situation: Situation, affordable: Any) -> str:
        return {"e": "explorer", "p": "planner"}[next(order)]

    environment = made.environment()
    columns = drive(environment, {"task": name}, "x", rule).columns
    assert 0 < columns["cached tokens: explorer"] < columns["prompt tokens: explorer"]
    assert columns["USD lost by switches: planner"] > 0 and columns[COST] > 0
    order = iter("eepe" * 2)
    assert drive(made.environment(), {"task": name}, "x", rule).columns == columns  # nothing is kept between episodes
    assert "catalogue_content" in made.profile_settings()
    pool.write_text(POOL.replace("explorer", "somebody").replace("planner", "else"))
    other = tmp_path / "other.yaml"
    pool.rename(other)
    with pytest.raises(ValueError, match=r"other\.yaml: lists none of the executors explorer, planner"):
        StepWorld(dataclasses.replace(task, catalogue=str(other))).executors()


# ---- in reports ----


def test_the_table_of_an_evaluation_says_what_caches_did() -> None:
    def row(router: str, kind: str, item: str, *caches: float) -> dict[str, Any]:
        base = {"router": router, "kind": kind, "item": item, "score": 1.0, "usd": 0.5, "reward": 0.5}
        return {**base, **dict(zip((f"{what}large" for what in CACHES), caches, strict=False))}

    frame = pd.DataFrame(
        [
            row("policy", "policy", "a", 100.0, 80.0, 0.002, 0.0),
            row("policy", "policy", "b", 300.0, 20.0, -0.001, 0.004),
            row("always-large", "member", "a", 50.0, 0.0, 0.0, 0.0),
            row("always-large", "member", "b"),  # could not even begin
            row("always-small", "member", "a"),
            row("always-small", "member", "b"),
        ]
    )
    text = render(Episodes(frame, {"item": "episode"}))
    top, _, *rows = text[text.index("Prompt caches") :].split("\n\n")[1].splitlines()
    assert "prompt tokens / 1k episodes" in top and "$ lost by switches / 1k" in top
    assert {row.split()[0]: row.split()[-5:] for row in rows} == {
        "policy": ["large", "200,000", "25.0%", "0.5000", "2.0000"],
        "always-large": ["large", "25,000", "0.0%", "0.0000", "0.0000"],
    }
    assert "Saved: against" in text
    plain = render(Episodes(frame[[c for c in frame if not c.startswith(CACHES)]], {"item": "episode"}))
    assert "Prompt caches" not in plain


def test_the_line_of_a_phase_says_what_providers_caches_saved() -> None:
    used = {"m": Spending(calls=3, prompt_tokens=1000, cached_tokens=630, saved=0.004, cost=0.0123)}
    line = report("training", used, 0.0123, None)
    assert "m 3 calls, 63% of its prompts in the provider's cache, $0.0040 saved, $0.0123" in line
    assert "provider" not in report("training", {"m": Spending(calls=3, prompt_tokens=1000)}, 0.0, None)
    assert math.isclose((used["m"] + used["m"]).saved, 0.008)
