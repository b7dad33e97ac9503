"""One test per defect that was found in Router-R1 (ulab-uiuc/Router-R1 at 801a240), each failing on its behaviour.

Where it takes a line or two, the line is here (`theirs`), so that one sees what the test would catch.
"""

import asyncio
import math
import random
import re
import time
from pathlib import Path

import pytest
from scripted import Fault, Scripted
from think_route_cases import (
    CATALOGUE,
    LARGE_USD,
    RIGHT,
    ROUTE,
    ROUTE_LARGE,
    ROW,
    SMALL_USD,
    WRONG,
    Script,
    asked,
    episode,
    reward,
    world,
)

from rewards import additive_rewards, router_r1_rewards
from routers.data.catalogue import load_catalogue
from routers.language.grammar import Grammar, parse_turn
from routers.language.prompts import think_route_prompt
from routers.pool import Ledger, Pool, ReplyCache, Retry
from routers.tasks.think_route.environment import ThinkRoute, cost_scale
from srpo.rollout.loop import Limits, play
from srpo.types import Usage

LIMITS = Limits(turns=4, tokens=2_000, observation_tokens=600, step_seconds=30.0)
T = "<think>x</think>"


# 1. Queries with a colon: everything after the second one is dropped, and the format check refuses them.


def test_1_a_query_keeps_everything_after_its_first_colon() -> None:
    body = "small: what is 1:2 in: Python?"
    theirs = body.split(":")[1].strip()
    environment = world()
    episode(environment, [f"{T}<search>{body}</search>", RIGHT])
    assert asked(environment, "small") == ["what is 1:2 in: Python?"] != [theirs]


def test_1_a_query_with_two_colons_is_no_format_error() -> None:
    columns, _ = episode(world(), [f"{T}<search>small: is 1:2 a ratio?</search>", RIGHT])
    assert columns["format_error"] == "" and reward(router_r1_rewards(1.0), columns) == 1.0


def test_1_a_query_may_name_a_model() -> None:
    columns, _ = episode(world(), [f"{T}<search>small: is small better than large?</search>", RIGHT])
    assert columns["format_error"] == "" and columns["calls"] == 1


# 2. Names match as substrings; three names that can be resolved have no price, and the KeyError ends the run.


@pytest.mark.parametrize("name", ["sma", "smaller", "the small one", "SMALL", "small large", "xsmallx"])
def test_2_only_an_exact_name_is_a_member(name: str) -> None:
    columns, _ = episode(world(), [f"{T}<search>{name}: q</search>", RIGHT])
    assert (columns["calls"], columns["cost"], columns["invalid_actions"]) == (0, 0.0, 1)


def test_2_a_member_without_a_price_is_an_error_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("members:\n  - {name: granite, descriptor: x, price_in: 0.1}\n")
    with pytest.raises(ValueError, match=r"'granite'.*'price_out'"):
        load_catalogue(path)


def test_2_every_name_that_can_be_routed_to_has_a_price() -> None:
    environment = world()
    assert all(math.isfinite(environment.pool.price(name, Usage(1, 1))) for name in environment.names)
    with pytest.raises(ValueError, match="no member of the pool"):
        world(members=["small", "granite"])


# 3. The cost ignores input tokens, the router's own tokens, failed calls and latency.


def test_3_the_cost_counts_input_own_and_failed_tokens() -> None:
    fault = Fault("server error: x", retry=False, usage=Usage(10, 0))
    environment = world(
        "Paris", faults=[fault], failed_call="observe", ledger=Ledger(policy_price=(0.0, 5.0)), count_tokens=len
    )
    turns = [ROUTE, ROUTE_LARGE, RIGHT]
    columns, _ = episode(environment, turns)
    own = sum(map(len, turns)) * 5e-6
    theirs = 5 * 20e-6  # completion tokens of the call that worked
    assert columns["cost"] == pytest.approx(10 * 1e-6 + LARGE_USD + own) and columns["cost"] > theirs


def test_3_the_time_spent_waiting_is_reported() -> None:
    columns, _ = episode(world(seconds=0.05), [ROUTE, ROUTE_LARGE, RIGHT])
    assert columns["seconds"] >= 0.1


# 4. The cost is normalised by a global window over the last 1000 trajectories, shared by training and validation.


def test_4_the_reward_keeps_no_history() -> None:
    def columns(cost: float) -> dict:
        return episode(world(), [ROUTE, RIGHT])[0] | {"cost": cost}

    scheme = router_r1_rewards(1e-3, 0.6)
    before = reward(scheme, columns(0.25e-3))
    rng = random.Random(0)
    for _ in range(1200):  # longer than their window
        reward(scheme, {**_ANY, "cost": rng.random() * 1e-6})
    assert reward(scheme, columns(0.25e-3)) == before == pytest.approx(0.85)
    # A resumed run, or another process, makes its functions anew.
    assert reward(router_r1_rewards(1e-3, 0.6), columns(0.25e-3)) == before


def test_4_the_reward_does_not_depend_on_the_order_in_a_batch() -> None:
    costs = [i * 1e-4 for i in range(9)]
    functions, weights = router_r1_rewards(1e-3, 0.6)

    def together(costs: list[float]) -> list[float]:
        batch = {key: [value] * len(costs) for key, value in _ANY.items()} | {"cost": costs}
        parts = [f([""] * len(costs), **batch) for f in functions]
        return [sum(w * part[i] for w, part in zip(weights, parts, strict=True)) for i in range(len(costs))]

    assert together(costs[::-1]) == together(costs)[::-1]
    assert together([5e-4])[0] == together(costs)[5]  # alone: their range is degenerate there, and the reward 0.5


_ANY = {"correct": 1.0, "format_error": "", "cost": 0.0, "invalid_actions": 0, "answer": "Paris"}


def test_4_two_calls_cost_what_two_calls_cost() -> None:
    """Their square root makes the second of two equal calls 41 % as dear as the first."""
    scheme = additive_rewards(1e-3, 0.5)
    drops = [reward(scheme, {**_ANY, "cost": n * 1e-4}) for n in range(3)]
    assert drops[0] - drops[1] == pytest.approx(drops[1] - drops[2]) == pytest.approx(0.05)


def test_4_the_scale_is_a_constant_of_the_catalogue() -> None:
    assert cost_scale(list(CATALOGUE.values())) == cost_scale(list(reversed(CATALOGUE.values())))


# 5. Turns are decoded, cut and encoded again: the tokens that are trained are not those that were sampled.


def test_5_the_sampled_ids_are_the_trajectorys_ids(tiny_tokenizer) -> None:
    """Ids that no encoder would choose (one letter at a time) come back as they were."""
    turns = [
        [i for letter in text for i in tiny_tokenizer(letter, add_special_tokens=False)["input_ids"]]
        for text in (ROUTE, RIGHT)
    ]
    theirs = tiny_tokenizer(tiny_tokenizer.decode(turns[0]), add_special_tokens=False)["input_ids"]
    assert theirs != turns[0]
    [trajectory] = play(world(), [ROW], [[5]], ["s"], Script([turns]), tiny_tokenizer, LIMITS)
    assert [list(t.ids) for t in trajectory.turns if t.owner == "policy"] == turns
    assert trajectory.columns["correct"] == 1.0


# 6. The reward parses the whole transcript, pool text included.


def test_6_tags_in_a_reply_do_not_break_the_format() -> None:
    for reply in ("</information>", "<search>", "<think>", "<answer>", "</search> a : b"):
        columns, _ = episode(world(reply), [ROUTE, RIGHT])
        assert (columns["format_error"], columns["correct"]) == ("", 1.0)


def test_6_an_answer_in_a_reply_is_not_the_policys() -> None:
    reply = "<answer>Paris</answer>"
    theirs = re.findall(r"<answer>(.*?)</answer>", ROUTE + f"<information>{reply}</information>")[-1]
    columns, _ = episode(world(reply), [ROUTE] * 4)
    assert theirs == "Paris" and columns["answer"] is None and columns["correct"] == 0.0


def test_6_a_truncated_observation_keeps_its_closing_tag(tiny_tokenizer) -> None:
    turns = [tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in (ROUTE, RIGHT)]
    short = Limits(turns=4, tokens=2_000, observation_tokens=7, step_seconds=30.0)
    [trajectory] = play(world("word " * 500), [ROW], [[5]], ["s"], Script([turns]), tiny_tokenizer, short)
    shown = tiny_tokenizer.decode(trajectory.turns[1].ids)
    assert shown.startswith("\n\n<information>wo") and shown.endswith("</information>\n\n")
    assert trajectory.columns["format_error"] == ""


# 7. No cache, no replay, no budget, no async client; 500 attempts, 5 s apart, can hang a step for 40 minutes.


def test_7_a_member_that_fails_or_hangs_does_not_hold_up_the_step() -> None:
    def batch(faults: list[Fault]) -> float:
        backends = {"small": Scripted(faults=faults), "large": Scripted()}
        environment = ThinkRoute(Pool(CATALOGUE, backends, retry=Retry(base=0.01)), call_seconds=0.5)
        start = time.monotonic()
        columns, _ = episode(environment, [ROUTE, RIGHT])
        assert columns["lost"].startswith("small: ")  # lost, not scored 0
        return time.monotonic() - start

    assert batch([Fault(hang=True)]) < 2.5
    assert batch([Fault("server error: 500")] * 500) < 2.5


def test_7_eight_calls_run_at_once() -> None:
    environment = world(seconds=0.2)

    async def all_at_once() -> None:
        await asyncio.gather(*(environment.episode(ROW, str(i)).step(ROUTE) for i in range(8)))

    start = time.monotonic()
    asyncio.run(all_at_once())
    assert time.monotonic() - start < 1.0  # one after another: 1.6


def test_7_a_second_run_calls_nobody_and_earns_the_same(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path)
    first, second = (world("Paris", cache=cache) for _ in range(2))
    results = [episode(w, [ROUTE, ROUTE_LARGE, RIGHT])[0] for w in (first, second)]
    assert [len(asked(first, name)) for name in first.names] == [1, 1]
    assert [len(asked(second, name)) for name in second.names] == [0, 0]
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}  # the cost of the reward, too
    assert second.spent_usd() == 0.0


def test_7_there_is_a_budget() -> None:
    columns, _ = episode(world(max_cost_usd=2.5 * SMALL_USD), [ROUTE] * 10)
    assert columns["calls"] == 2 and columns["cost"] == pytest.approx(2 * SMALL_USD)


# 8. The inference script: one prompt, one precision, one process per model, and text as its result.


def test_8_one_world_serves_many_questions_and_says_what_happened(tiny_tokenizer) -> None:
    turns = [
        [tiny_tokenizer(t, add_special_tokens=False)["input_ids"] for t in row] for row in ([RIGHT], [ROUTE, WRONG])
    ]
    rows = [ROW, {"query": "Another question?"}]  # no gold: use, not training
    found = play(world(), rows, [[5], [5]], ["a", "b"], Script(turns), tiny_tokenizer, LIMITS)
    assert [t.columns["answer"] for t in found] == ["Paris", "Rome"]
    assert [t.columns["members"] for t in found] == [[], ["small"]]
    assert [t.columns["cost"] for t in found] == [0.0, pytest.approx(SMALL_USD)]
    assert [t.stop for t in found] == ["done", "done"]


def test_8_neither_tags_nor_pool_are_fixed() -> None:
    grammar = Grammar(route="call", information="result")
    environment = world("Paris", grammar=grammar, members=["large"])
    content = think_route_prompt("x", environment.members, grammar)[0]["content"]
    assert "<call>" in content and "- large" in content and "small" not in content
    columns, seen = episode(environment, [f"{T}<call>large:q</call>", RIGHT])
    assert (columns["correct"], seen[0].before) == (1.0, "\n\n<result>")


# Section 1.2: the prompt carries no price, latency or example scores, although the abstract says so.


def test_the_prompt_carries_prices() -> None:
    content = think_route_prompt("x", list(CATALOGUE.values()))[0]["content"]
    assert "$1/2 per 1M tokens" in content and "$10/20 per 1M tokens" in content


# Section 1.4: an invalid action gets an empty observation, a failed call "None".


def test_an_invalid_action_is_told_what_was_wrong() -> None:
    _, seen = episode(world(), [f"{T}<search>oracle: q</search>"])
    assert "'oracle', which is not one member. The members are: small, large." in seen[0].body


def test_a_failed_call_is_not_an_answer() -> None:
    faults = [Fault("connection: reset", retry=False)]
    _, seen = episode(world(faults=faults, failed_call="observe"), [ROUTE])
    assert seen[0].body == "small could not be reached (connection)."
    assert episode(world(faults=faults), [ROUTE])[0]["lost"] == "small: connection: reset"


# Section 1.5 and 1.8: alpha is no dial: between 0.6 and 0.7 the policy falls off a cliff.


def test_the_weight_of_the_cost_moves_the_best_choice_step_by_step() -> None:
    """Eight members, each 0.08 more often right and each dearer than the one before: eight weights, eight choices.

    Cost c of member i is i^2/49 and p is 0.3 + 0.08 i: member i is best where w lies around 0.08 * 49 / (2 i).
    """
    members = [(0.3 + 0.08 * i, i * i / 49) for i in range(8)]

    def best(weight: float) -> int:
        scheme = additive_rewards(1e-3, weight / 10, format_weight=1.0)  # a tenth: weights stay below 1

        def value(p: float, c: float) -> float:
            right, wrong = ({**_ANY, "correct": s, "cost": c * 1e-3} for s in (1.0, 0.0))
            return p / 10 * reward(scheme, right) + (1 - p / 10) * reward(scheme, wrong)

        return max(range(8), key=lambda i: value(*members[i]))

    chosen = [best(w) for w in (0.29, 0.33, 0.39, 0.49, 0.65, 0.98, 1.96, 9.0)]
    assert chosen == [7, 6, 5, 4, 3, 2, 1, 0]


# Issue 3 ("queries becomes an empty list in the first step") and issue 10 (calls drop to zero).


def test_a_step_in_which_nobody_routes_works_and_is_seen(tiny_tokenizer) -> None:
    turns = [[tiny_tokenizer(WRONG, add_special_tokens=False)["input_ids"]]] * 4
    found = play(world(), [ROW] * 4, [[5]] * 4, list("abcd"), Script(turns), tiny_tokenizer, LIMITS)
    assert [t.columns["calls"] for t in found] == [0] * 4
    assert [t.columns["route"] for t in found] == [None] * 4
    assert [t.columns["members"] for t in found] == [[]] * 4


# "Tags inside think" and look-alikes: the first tag of a turn is taken there, wherever it stands.


def test_an_action_inside_the_reasoning_is_no_action() -> None:
    text = "<think>I could write <search>large:q</search> here.</think><search>small:q</search>"
    theirs = re.search(r"<(search|answer)>(.*?)</\1>", text)
    assert theirs is not None and theirs.group(2) == "large:q"
    assert parse_turn(text, ["small", "large"]).kind == "invalid"
