"""Rules to beat, worked by hand: in episodes, behind conversations of messages, within caps, from a file."""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import step_helpers as steps

from routers import load_router
from routers.environments.protocol import Step, View
from routers.evaluation.tables import render
from routers.language.digest import digest
from routers.tasks.step_routing import evaluate
from routers.tasks.step_routing.advantages import FIRST, Advantages, estimate, state_of, steps_of
from routers.tasks.step_routing.budget import Budget, BudgetGate
from routers.tasks.step_routing.conversations import Conversations
from routers.tasks.step_routing.environment import Situation
from routers.tasks.step_routing.evaluate import ADVANTAGES, choose_rules, estimate_advantages, play_rules
from routers.tasks.step_routing.rule_router import RuleRouter, RuleSettings
from routers.tasks.step_routing.rules import (
    LARGE,
    SMALL,
    always_large,
    always_small,
    escalate,
    explore,
    rules_of,
    sticky,
    time_boxed,
    went_wrong,
)
from routers.tasks.step_routing.settings import Told
from srpo.task import Share
from srpo.types import Observation

BOTH = ("small", "large")


def chosen(rule: Any, fine: str, seed: str = "s", affordable: Sequence[str] = BOTH) -> str:
    """Who acts at every step, as letters, where the step before went as `fine` says: + or -."""
    acted, taken = list[str](), list[Step]()
    for mark in ["", *fine]:
        if mark:
            taken.append(Step("go", "fine" if mark == "+" else "Nothing happens."))
        view = View("a room", tuple(taken), (), Told("walk"), seed)  # type: ignore[arg-type]
        now = Situation(view, 9, BudgetGate(Budget(None)), tuple(acted), math.inf)
        acted.append(rule(now, affordable))
    return "".join(name[0] for name in acted)


def test_by_hand() -> None:
    assert chosen(escalate(math.inf), "++-++") == "ssslll"
    assert chosen(escalate(1), "+-+-+") == "sslsls"
    assert chosen(escalate(2), "-+++-") == "sllssl"
    assert chosen(explore(2), "+++-") == "sssss" and chosen(explore(2), "+-+++") == "ssllll"
    assert chosen(explore(2), "++---") == "ssssss", "one decision, after two turns"
    assert chosen(time_boxed(2), "+" * 6) == "ssllssl"
    for rule in (escalate(1), explore(1), time_boxed(1)):
        assert set(chosen(rule, "-----", affordable=["small"])) == {"s"}, "what fits only"
    coins = [chosen(sticky(0.3), "+-+", seed=f"{n}") for n in range(400)]
    assert set(coins) == {"ssss", "llll"} and coins.count("llll") == pytest.approx(120, abs=25)


def test_what_went_wrong() -> None:
    assert went_wrong("Nothing happens.") and went_wrong("ValueError: no") and not went_wrong("You open the drawer.")
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    history = [{"role": "user", "content": "Error: x"}, {"role": "assistant", "tool_calls": [call]}]
    assert went_wrong(digest([*history, {"role": "tool", "tool_call_id": "1", "content": "Error: x"}]).text)
    assert not went_wrong(digest([*history, {"role": "tool", "tool_call_id": "1", "content": "fine"}]).text)


def test_advantages_by_hand() -> None:
    """State a: the expensive one wins 2 of 2, the cheapest 1 of 2; in b it is the other way round; c is seen once. A
    step costs 1, one of the expensive executor 3 more; an episode of it alone 12."""
    episodes = [
        ([("a", True), ("b", False)], 1.0, 5.0),
        ([("a", True), ("b", False)], 1.0, 5.0),
        ([("a", False), ("b", True)], 1.0, 5.0),
        ([("a", False), ("b", True), ("c", True)], 0.0, 9.0),
    ]
    found = estimate(episodes, 12.0, fewest=2)
    assert found.gains == {"a": 0.5, "b": -0.5} and found.gain("c") == 0.0 and found.price == pytest.approx(0.25)
    said = [("large", Observation(before="<error><f2><e1><t3>")), ("small", Observation())]
    assert steps_of(said, "small") == [(FIRST, True), ("<error><f2>", False)]
    assert state_of(Observation(body="> go\nError: no")) == "<error>"
    head = digest([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]).text
    assert state_of(Observation(body=head, before="\nsmall acted.\n[steps left 3]\n")) == "<assistant><f0>"


def test_arbitrage_is_estimated_on_training_tasks_and_kept(tmp_path: Path) -> None:
    world = steps.world(12, 2, heldout_tasks=["generated/test"], step_limit=12, profile_runs=1)
    profiles = world.profiles("train", "generated/train", world.train_tasks(), 12, tmp_path)
    estimate_advantages(world, profiles, tmp_path)
    found = Advantages.load(tmp_path / ADVANTAGES)
    cost = sum(p.cost_large for p in profiles.values()) / 12
    assert found.price == pytest.approx((0.0024 - 0.00006) / cost) and FIRST in found.gains
    before = (tmp_path / ADVANTAGES).stat().st_mtime_ns
    estimate_advantages(world, profiles, tmp_path)
    assert (tmp_path / ADVANTAGES).stat().st_mtime_ns == before
    rules, _ = rules_of(world.arguments, Advantages({"<search>": 0.5, "<ready>": -0.1}, 0.1))
    assert {"arbitrage 0", "arbitrage 1", "arbitrage 3"} <= set(rules)
    assert not any(name.startswith("arbitrage") for name in rules_of(world.arguments)[0])
    [driven] = steps.drive_all(
        world.environment(), [steps.Job("", {"task": steps.GAMES[0]}, "x", rules["arbitrage 1"][1])]
    )
    large = [name == "planner" for name, _ in driven.decisions]
    told = [None, *(o for _, o in driven.decisions)]
    assert large == [state_of(o) == "<search>" for o in told[:-1]] and any(large)


def test_a_rule_is_a_router_of_conversations(tmp_path: Path) -> None:
    """The same as a trained one: served, capped, with failover; loaded from a file."""
    told = steps.settings("signs", BOTH, unit="usd", environment="messages")
    RuleRouter(RuleSettings("escalate", math.inf, told)).save(tmp_path)
    router = load_router(tmp_path)
    assert isinstance(router, RuleRouter) and router.name == "escalate inf"
    assert router.route("Do it.").scores == {"small": 1.0, "large": 0.0}

    async def main() -> list[str]:
        conversations, said = Conversations(router, cap=0.35), list[str]()
        messages: list[Any] = [{"role": "user", "content": "Do it."}]
        for content in ("fine", "Error: no", "fine", "fine", "fine"):
            call = await conversations.decide(messages, bounds={"small": 0.01, "large": 0.1})
            said.append(str(call.member))
            conversations.settle(call)
            one = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
            messages += [{"role": "assistant", "tool_calls": [one]}, {"role": "tool", "content": content}]
        call = await conversations.decide(messages, bounds={"small": 0.01, "large": 0.1})
        return [*said, str(conversations.instead(call, "503").member)]

    # .02 for two small calls, .3 for three large ones; .03 is left, which is not enough for another
    assert asyncio.run(main()) == ["small", "small", "large", "large", "large", "None"]
    with pytest.raises(ValueError, match="rule 'escalade' 3: use one of"):
        RuleSettings("escalade", 3, told)
    with pytest.raises(ValueError, match="arbitrage with advantages"):
        RuleSettings("arbitrage", 1.0, told)
    known = RuleRouter(RuleSettings("arbitrage", 1.0, told, Advantages({FIRST: 0.5}, 0.1)))
    known.save(tmp_path)
    assert load_router(tmp_path).how == known.how and known.route("x").member == "large"


def test_rules_choose_their_settings_on_validation_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a family's frontier there, and its best; only they meet held-out tasks, and the table says so."""
    world = steps.world(
        None, 10, environment="messages", train_tasks="repairs/train", heldout_tasks=["repairs/test"],
        executors=["junior", "senior"], executor_usd=[0, 0], step_limit=14, profile_runs=1, observation="signs",
        validation_tasks="repairs/validation",
    )  # fmt: skip
    few = {
        name: rule for name, rule in rules_of(world.arguments)[0].items() if name[:-1] in ("cascade ", "time-boxed ")
    }
    both = {name: rules_of(world.arguments)[0][name] for name in (SMALL, LARGE)}
    # a setting that is dearer than the large one alone, and no better
    silly = {"time-boxed 9": ("time-boxed", always_large), "cascade 1": ("cascade", always_small)}
    monkeypatch.setattr(evaluate, "rules_of", lambda *_: ({**both, **few, **silly}, 2))
    chosen = choose_rules(world, tmp_path)
    assert chosen is not None and {SMALL, LARGE} <= set(chosen) < {*both, *few, *silly}
    assert {name.split()[0] for name in chosen} == {SMALL, LARGE, "cascade", "time-boxed"}
    assert "cascade 12" not in few and not list(tmp_path.glob("*test*")), "no held-out task was looked at"
    assert choose_rules(world, tmp_path) == chosen
    profiles = {"test": world.profiles("test", "repairs/test", world.heldout()["test"], 10, tmp_path)}
    played = play_rules(world, profiles, Share(0, 1), tmp_path, chosen)
    assert list(played.routers) == list(chosen) and set(played.frame["set"]) == {"test"}
    text = render(played)
    assert "Of each family of rules, its best setting: chosen on validation tasks." in text
    rows = [line.split("  ")[0] for line in text.split("Prompt caches")[0].splitlines()]
    families = {name: rule[0] for name, rule in {**few, **silly}.items()}
    for family in ("cascade", "time-boxed"):
        best = max((name for name in chosen if families.get(name) == family), key=chosen.__getitem__)
        assert [row for row in rows if families.get(row) == family] == [best]
    with pytest.raises(ValueError, match="'repairs/validation' would be called 'validation', which another part is"):
        steps.world(heldout_tasks=["repairs/validation"], validation_tasks="repairs/validation")
