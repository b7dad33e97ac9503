"""Episodes of a router over executors: who acts, what it costs, what is masked, and what a fault may cost."""

import asyncio
import json
from typing import Any

import pytest
from step_helpers import drive

from routers.environments.protocol import Act
from routers.tasks.step_routing.budget import Budget
from routers.tasks.step_routing.environment import Situation, StepRoutingEnvironment
from routers.tasks.step_routing.rules import always_large, always_small, cascade, first_large, random_mix
from srpo.types import CORRECT, COST, FEEDBACK, Observation, Reply


class Corridor:
    """Won after `length` steps forward; "large" goes two, "small" one."""

    def __init__(self, length: int, limit: int = 10, fault: str = "") -> None:
        self.seed, self.task, self.task_type, self.limit = f"corridor/{length}", "walk", "walk", limit
        self.length, self.fault, self.steps, self.at = length, fault, 0, 0

    won = property(lambda self: self.at >= self.length)
    score = property(lambda self: float(self.won))
    done = property(lambda self: self.won or self.steps >= self.limit)
    admissible, how, waits = ("one", "two"), "", False

    def reset(self) -> str:
        if self.fault == "reset":
            raise OSError("no such corridor")
        return "a corridor"

    def step(self, action: str) -> tuple[str, bool]:
        if self.fault == "step":
            raise OSError("the floor is gone")
        self.steps += 1
        self.at += {"one": 1, "two": 2}.get(action, 0)
        return f"at {self.at}", self.done


class Walker:
    def __init__(self, name: str, price: float, action: str, error: str | None = None) -> None:
        self.name, self.price, self.action, self.error = name, price, action, error

    def bound(self, view: Any) -> float:
        return self.price

    async def act(self, view: Any, deadline: float) -> Act:
        if self.error == "raise":
            raise ConnectionError("gone")
        return Act("" if self.error else self.action, self.price, Reply(self.action, error=self.error))


SMALL, LARGE = Walker("small", 0.01, "one"), Walker("large", 0.1, "two")


def describe(situation: Situation) -> Observation:
    return Observation(before=f"<{len(situation.view.steps)}>")


def world(budget: Budget | None = None, small: Walker = SMALL, large: Walker = LARGE, **corridor: Any) -> Any:
    return StepRoutingEnvironment(
        lambda row: Corridor(row["length"], **corridor), [small, large], describe, budget, ["<s>", "<l>"]
    )


def test_an_episode_by_hand() -> None:
    environment = world()
    driven = drive(environment, {"length": 5}, "x", first_large(2))
    # two, two, one: 0.1 + 0.1 + 0.01
    assert [name for name, _ in driven.decisions] == ["large", "large", "small"] and driven.stop == "done"
    assert environment.starts({"length": 5}, [None])[0].view.steps == () and [
        o.before for _, o in driven.decisions
    ] == ["<1>", "<2>", ""]
    assert driven.columns[COST] == pytest.approx(0.21) and driven.columns[CORRECT] == 1.0
    assert driven.columns["large_calls"] == 2 and driven.columns["calls"] == 3 and driven.columns[FEEDBACK] == ""
    assert environment.spent_usd() == pytest.approx(0.21)
    metrics = environment.metrics()
    assert metrics["budget/large_calls"] == 2 and metrics["budget/violations"] == 0 and environment.metrics() == {}


def test_the_limit_ends_it_without_success() -> None:
    driven = drive(world(limit=3), {"length": 9}, "x", always_small)
    assert driven.stop == "turns" and driven.columns[CORRECT] == 0.0
    assert driven.columns[FEEDBACK] == "The task was not finished: all 3 steps were used."


def test_expensive_calls_are_masked_at_the_cap() -> None:
    driven = drive(world(Budget(2)), {"length": 9}, "x", always_large)
    assert [name for name, _ in driven.decisions] == ["large"] * 2 + ["small"] * 5
    assert driven.columns["budget_used"] == 1.0 and not driven.columns["budget_violated"]
    # a row's own cap wins; None: no cap
    assert drive(world(Budget(2)), {"length": 9, "cap": 1}, "x", always_large).columns["large_calls"] == 1
    assert drive(world(Budget(2)), {"length": 9, "cap": None}, "x", always_large).columns["large_calls"] == 5


def test_dollars_end_the_episode_or_are_kept_for_its_rest() -> None:
    stopped = drive(world(Budget(0.256, "usd")), {"length": 99}, "x", always_large)
    assert [n for n, _ in stopped.decisions] == ["large"] * 2 + ["small"] * 5 and stopped.stop == "budget"
    assert stopped.columns[COST] <= 0.256 and "budget" in stopped.columns[FEEDBACK]
    forced = drive(world(Budget(0.25, "usd", on_empty="force_small")), {"length": 99}, "x", always_large)
    # ten steps must remain possible: .1 + 9 x .01 <= .25, then .1 + 8 x .01 > .15
    assert [n for n, _ in forced.decisions] == ["large"] + ["small"] * 9 and forced.stop == "turns"


def test_a_budget_that_pays_for_nothing_is_refused_for_its_row() -> None:
    with pytest.raises(ValueError, match=r"corridor/5: a budget of 0\.005 usd cannot pay for one call of small"):
        world(Budget(0.005, "usd")).episode({"length": 5}, "x")


def test_a_failed_call_costs_its_step_and_its_money() -> None:
    environment = world(large=Walker("large", 0.1, "two", error="timeout: slow"))
    driven = drive(environment, {"length": 2}, "x", first_large(1))
    assert [n for n, _ in driven.decisions] == ["large", "small", "small"]
    assert driven.columns[COST] == pytest.approx(0.12) and driven.columns[CORRECT] == 1.0


def test_an_executor_that_raises_is_paid_for() -> None:
    environment = world(large=Walker("large", 0.1, "two", error="raise"))
    episode = environment.episode({"length": 5}, "x")
    with pytest.raises(ConnectionError):
        asyncio.run(episode.step("<l>"))
    columns = episode.columns("lost")
    assert columns[COST] == pytest.approx(0.1) and columns[CORRECT] is None
    assert environment.spent_usd() == pytest.approx(0.1)


def test_a_fault_of_the_world_costs_one_episode_and_not_the_run() -> None:
    """Through the real rollout, with a real policy: one row's world raises, one row's world hangs."""
    import time

    import core_helpers as core

    from srpo.rollout.generator import TransformersGenerator
    from srpo.rollout.loop import Limits, play
    from srpo.rollout.sampling_rules import Sampling
    from srpo.types import LOST, STOP

    class Hanging(Corridor):
        waits = True

        def step(self, action: str) -> tuple[str, bool]:
            time.sleep(3)
            return super().step(action)

    def make(row: Any) -> Any:
        return Hanging(4) if row["fault"] == "hang" else Corridor(4, fault=row["fault"])

    tokenizer = core.tokenizer()
    environment = StepRoutingEnvironment(make, [SMALL, LARGE], describe, Budget(1), ["a", "b"])
    rows = [{"fault": fault} for fault in ("", "step", "hang", "reset", "")]
    prompts = [tokenizer("say red", add_special_tokens=False)["input_ids"]] * 5
    generator = TransformersGenerator(core.model().eval(), tokenizer, Sampling(), eos_ids=[tokenizer.eos_token_id])
    limits = Limits(turns=12, tokens=200, observation_tokens=20, step_seconds=0.3)
    played = play(environment, rows, prompts, [f"s{i}" for i in range(5)], generator, tokenizer, limits)
    stops = [t.columns[STOP] for t in played]
    assert stops == ["done", "lost", "lost", "lost", "done"]
    assert "the floor is gone" in played[1].columns[LOST] and "no such corridor" in played[3].columns[LOST]
    for trajectory in (played[0], played[4]):
        allowed = [turn.choices for turn in trajectory.turns if turn.owner == "policy"]
        large = tokenizer("b", add_special_tokens=False)["input_ids"][0]
        calls = [turn.ids[0] == large for turn in trajectory.turns if turn.owner == "policy"]
        assert sum(calls) <= 1  # the cap
        for n, choices in enumerate(allowed):
            assert (large in choices) == (sum(calls[:n]) < 1)


def test_rules() -> None:
    def share(rule: Any, seeds: int = 300) -> float:
        driven = [drive(world(), {"length": 99}, f"{i}", rule).columns for i in range(seeds)]
        return sum(c["large_calls"] for c in driven) / sum(c["calls"] for c in driven)

    assert share(random_mix(0.3)) == pytest.approx(0.3, abs=0.03)
    assert share(first_large(1.5)) == pytest.approx(0.15, abs=0.015)
    mixed = [name for name, _ in drive(world(limit=60), {"length": 999}, "x", random_mix(0.5)).decisions]
    assert 15 < mixed.count("large") < 45, "every step has dice of its own"
    escalated = drive(world(), {"length": 99}, "x", cascade(4))
    assert [n for n, _ in escalated.decisions] == ["small"] * 4 + ["large"] * 6


def test_state_is_the_money_and_what_was_solved() -> None:
    environment, other = world(), world()
    for length, rule in ((5, always_small), (5, always_small), (12, always_small), (12, always_large)):
        drive(environment, {"length": length, "task": f"t{length}"}, "x", rule)
    drive(environment, {"length": 5}, "x", always_small)  # a row without a task's name
    lost = environment.episode({"length": 5, "task": "t5"}, "x")
    assert lost.columns("lost")[CORRECT] is None
    assert environment.outcomes() == {"t5": (2, 2), "t12": (2, 1)}  # one of 12 by ten single steps; the lost is none
    other.load_state_dict(json.loads(json.dumps(environment.state_dict())))
    assert other.spent_usd() == pytest.approx(3 * 0.05 + 10 * 0.01 + 6 * 0.1)
    assert other.outcomes() == environment.outcomes()
    drive(other, {"length": 5, "task": "t5"}, "x", always_small)
    assert other.outcomes()["t5"] == (3, 3) and environment.outcomes()["t5"] == (2, 2)


class Graded(Corridor):
    """A score of its own, and an end that is neither the goal nor the limit."""

    score = property(lambda self: min(self.at, 3) / 4)
    won = property(lambda self: self.score >= 1)
    done = property(lambda self: self.at >= 3 or self.steps >= self.limit)


def test_steps_left_are_those_of_the_episode() -> None:
    environment = world()
    environment.describe = lambda situation: Observation(before=f"<{situation.steps_left}>")
    driven = drive(environment, {"length": 3}, "x", always_small)
    assert [o.before for _, o in driven.decisions] == ["<9>", "<8>", ""]
    # In the last step no tail is kept back: .01 is left for nine small steps and .1 for a large one.
    tail = world(Budget(0.19, "usd", tail_calls=1), limit=10)
    last = drive(tail, {"length": 99}, "x", lambda situation, names: names[-1 if situation.steps_left == 1 else 0])
    assert [name for name, _ in last.decisions] == ["small"] * 9 + ["large"]


class Overcharging(Walker):
    def bound(self, view: Any) -> float:
        return self.price / 10


def test_a_call_beyond_its_bound_is_a_violation() -> None:
    environment = world(Budget(0.05, "usd"), large=Overcharging("large", 0.1, "two"))
    driven = drive(environment, {"length": 9}, "x", always_large)
    assert driven.columns["budget_violated"] and driven.columns["budget_used"] == pytest.approx(2.0)
    assert driven.stop == "budget" and environment.metrics()["budget/violations"] == 1.0


def test_every_executor_but_the_cheapest_counts_as_expensive() -> None:
    environment = StepRoutingEnvironment(
        lambda row: Corridor(5), [SMALL, Walker("medium", 0.05, "two"), LARGE], describe, Budget(2)
    )
    order = iter(["medium", "large", "small"])
    driven = drive(environment, {}, "x", lambda situation, names: next(order))
    assert driven.columns["large_calls"] == 2 and driven.columns["members"] == ["medium", "large", "small"]
    metrics = environment.metrics()
    assert metrics["budget/large_calls"] == 2 and metrics["budget/large_share"] == pytest.approx(2 / 3)
    assert metrics["budget/used"] == 1.0


def test_partial_scores_are_neither_lost_nor_solved() -> None:
    environment = StepRoutingEnvironment(lambda row: Graded(9), [SMALL, LARGE], describe)
    driven = drive(environment, {"task": "t"}, "x", always_small)
    assert driven.columns[CORRECT] == 0.75 and environment.outcomes() == {"t": (1, 0)}
    # The world ended it after three of ten steps: no limit was reached.
    assert driven.stop == "done" and driven.columns[FEEDBACK] == "The task was not finished: the episode ended."


def test_executors_and_labels_must_differ() -> None:
    with pytest.raises(ValueError, match="all different"):
        StepRoutingEnvironment(lambda row: Corridor(1), [SMALL, LARGE], describe, labels=["x", "x"])
    with pytest.raises(ValueError, match="two or more"):
        StepRoutingEnvironment(lambda row: Corridor(1), [SMALL], describe)


def test_retries_of_a_live_executor_stay_within_what_was_reserved() -> None:
    """The first attempt fails and is billed: a second one would pass the reservation, so it is not made."""
    from scripted import Fault, Scripted

    from routers.data.catalogue import Member
    from routers.environments.alfworld.environment import AlfWorld
    from routers.environments.alfworld.generate import generated
    from routers.environments.react import ReActExecutor
    from routers.environments.scripted import Explorer
    from routers.pool import Pool, Retry
    from srpo.types import Usage

    billed, free = (Fault(error="server error: 500", usage=usage) for usage in (Usage(10, 5), Usage()))
    for faults, attempts in (([billed, billed, billed], 1), ([free, None, free, None], 2)):
        backend = Scripted("Action: look", faults=faults)
        pool = Pool({"m": Member("m", "x", 1e4, 1e4)}, {"m": backend}, retry=Retry(attempts=3, base=0.0))
        executors = [Explorer(0.001), ReActExecutor(pool, "m")]  # 15 tokens at 1e4 per million: 0.15 a call
        environment = StepRoutingEnvironment(
            lambda row: AlfWorld(generated("generated/train/0")), executors, describe, Budget(0.16, "usd")
        )
        driven = drive(environment, {}, "s", first_large(1))
        assert len(backend.queries) == attempts and driven.columns[COST] <= 0.16
        assert not driven.columns["budget_violated"] and [n for n, _ in driven.decisions][:2] == ["m", "explorer"]
