"""What the router is told: words by hand, from texts only, every word in the vocabulary."""

from dataclasses import replace

import pytest
from step_helpers import drive

from routers.environments.alfworld.environment import AlfWorld
from routers.environments.alfworld.explorer import Memory
from routers.environments.alfworld.facts import Goal
from routers.environments.alfworld.generate import generated
from routers.environments.protocol import Step, View
from routers.environments.scripted import Explorer, Planner
from routers.tasks.step_routing.budget import Budget, BudgetGate
from routers.tasks.step_routing.environment import TASK, Situation, StepRoutingEnvironment
from routers.tasks.step_routing.prompts import (
    OBSERVATIONS,
    compact,
    compact_prompt,
    phase,
    progress,
    progress_prompt,
    verbose,
    verbose_prompt,
)
from routers.tasks.step_routing.rules import always_small, random_mix

CLEAN = Goal("pick_clean_then_place_in_recep", "mug", "shelf", None)
TWO = Goal("pick_two_obj_and_place", "mug", "shelf", None)
LAMP = Goal("look_at_obj_in_light", "book", None, "desklamp")


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (Memory(None, []), "lost"),
        (Memory(CLEAN, ["shelf 1", "drawer 1"]), "search"),
        (Memory(CLEAN, ["shelf 1", "drawer 1"], here="drawer 1", closed={"drawer 1"}), "closed"),
        (Memory(CLEAN, ["shelf 1"], seen={"shelf 1": {"mug 1"}}), "seen"),  # there, but not clean
        (Memory(CLEAN, ["shelf 1"], held="mug 1"), "held"),
        (Memory(CLEAN, ["shelf 1"], held="mug 1", treated={("clean", "mug 1")}), "ready"),
        (Memory(CLEAN, ["shelf 1"], held="mug 1", treated={("heat", "mug 1")}), "held"),
        (Memory(TWO, ["shelf 1", "desk 1"], seen={"shelf 1": {"mug 1"}}), "search"),  # where is the other?
        (Memory(TWO, ["shelf 1", "desk 1"], seen={"shelf 1": {"mug 1"}, "desk 1": {"mug 2"}}), "seen"),
        (Memory(TWO, ["shelf 1"], held="mug 2"), "ready"),
        (Memory(TWO, ["shelf 1"], held="pan 1"), "search"),  # somebody took the wrong thing
        (Memory(LAMP, ["desk 1"], held="book 1"), "search"),
        (Memory(LAMP, ["desk 1"], held="book 1", seen={"desk 1": {"desklamp 1"}}), "held"),
    ],
)
def test_phases_by_hand(memory: Memory, expected: str) -> None:
    assert phase(memory) == expected


def environment(budget: Budget | None = None, describe=compact) -> StepRoutingEnvironment:
    return StepRoutingEnvironment(
        lambda row: AlfWorld(generated(row[TASK]), limit=20), [Explorer(), Planner()], describe, budget
    )


def test_words_stay_in_the_vocabulary_and_count_down() -> None:
    words = set(OBSERVATIONS["compact"].words)
    for number in range(12):
        row = {TASK: f"generated/test/{number}"}
        driven = drive(environment(Budget(3)), row, "s", random_mix(0.3))
        told = [
            compact(environment(Budget(3)).starts(row, [3])[0]),
            *(o for _, o in driven.decisions if o.end is None),
        ]
        spent = 0
        for step, observation in enumerate(told):
            found = [f"<{word}" for word in observation.before.split("<")[1:]]
            assert len(found) == 4 and set(found) <= words and found[1] == f"<t{step}>"
            assert found[3] == f"<b{3 - spent}>" and observation.body == observation.after == ""
            if step < len(driven.decisions):
                spent += driven.decisions[step][0] == "planner"


def test_money_is_shown_in_thirtieths() -> None:
    gate = environment(Budget(0.3, "usd")).episode({TASK: "generated/train/0"}, "s")
    gate.gate.account.charge(0.21)  # .09 of .3 left: 9 thirtieths, floored against rounding
    now = replace(gate.situation, left=gate.gate.remaining)
    assert compact(now).before.endswith(("<b8>", "<b9>"))
    assert compact(environment().episode({TASK: "generated/train/0"}, "s").situation).before.endswith("<b*>")


def test_it_reads_texts_and_never_the_hidden_state() -> None:
    """The same texts with another world behind them give the same words."""
    episode = environment().episode({TASK: "generated/train/4"}, "s")
    situation = episode.situation
    other = AlfWorld(generated("generated/train/5"), limit=20)
    view = type(situation.view)(situation.view.first, situation.view.steps, (), other, "x")
    assert compact(Situation(view, 20, situation.gate, (), situation.left)) == compact(situation)


def test_prompts_and_texts_for_language_models() -> None:
    made = environment(Budget(3), verbose)
    episode = made.episode({TASK: "generated/train/0"}, "s")
    labels = {"explorer": "small", "planner": "large"}
    text = verbose_prompt(episode.situation, labels)
    assert "small: explorer\nlarge: planner\nThe budget is 3 large_calls. There are 20 steps." in text
    assert text.endswith(episode.situation.view.first)
    driven = drive(made, {TASK: "generated/train/0"}, "s", always_small)
    told = driven.decisions[0][1]
    assert told.before == "\nexplorer acted.\n[steps left 19, budget left 3]\n" and told.body.startswith("> ")
    start = environment().episode({TASK: "generated/train/0"}, "s").situation
    assert compact_prompt(start, {}) == f"{start.view.environment.task}\n{compact(start).before}"
    kind = start.view.environment.task_type
    assert progress_prompt(start, {}) == f"{kind}: {start.view.environment.task}\n<new><t0><s0><b*>"


def test_progress_tells_what_is_new_and_the_score_by_hand() -> None:
    class Scored:
        score = 0.37

    said = [Step("a", "One."), Step("b", "Two."), Step("c", "One.")]
    gate = BudgetGate(Budget(2))
    words = []
    for count in range(4):
        view = View("First.", tuple(said[:count]), (), Scored(), "s")
        words.append(progress(Situation(view, 20 - count, gate, (), 2)).before)
    assert words == ["<new><t0><s3><b2>", "<new><t1><s3><b2>", "<new><t2><s3><b2>", "<again><t3><s3><b2>"]
    known = set(OBSERVATIONS["progress"].words)
    assert all(f"<{word}" in known for line in words for word in line.split("<")[1:])
