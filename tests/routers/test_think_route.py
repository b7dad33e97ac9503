"""Episodes of think/route agents: columns by hand, failures, budgets, and that tricks of the policy do not pay."""

import asyncio
import random
from typing import Any

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
    asked,
    episode,
    pool,
    reward,
    world,
)

from rewards import additive_rewards, router_r1_rewards, xrouter_rewards
from routers.data.catalogue import Member
from routers.data.table import ReplyTable
from routers.language.grammar import Grammar
from routers.language.prompts import drawn_cost_weight, measured, short_think_route_prompt, think_route_prompt
from routers.pool import Ledger, Pool, Retry
from routers.tasks.think_route.environment import ThinkRoute, cost_scale
from srpo.types import Usage

KEYS = {
    "route",
    "members",
    "calls",
    "cost",
    "seconds",
    "answer",
    "em",
    "f1",
    "correct",
    "format_error",
    "invalid_actions",
    "feedback",
    "lost",
}


def test_a_whole_episode_by_hand() -> None:
    environment = world("I think Paris.")
    columns, seen = episode(environment, [ROUTE, ROUTE_LARGE, RIGHT])
    assert [o.body for o in seen] == ["I think Paris.", "I think Paris.", ""]
    assert (seen[0].before, seen[0].after, seen[0].end) == ("\n\n<information>", "</information>\n\n", None)
    assert seen[2].end == "done"
    seconds = columns.pop("seconds")
    assert seconds >= 0
    assert columns == {
        "route": "small",
        "members": ["small", "large"],
        "calls": 2,
        "cost": pytest.approx(SMALL_USD + LARGE_USD),
        "answer": "Paris",
        "em": 1.0,
        "f1": 1.0,
        "correct": 1.0,
        "format_error": "",
        "invalid_actions": 0,
        "feedback": "",
        "lost": None,
    }
    assert environment.spent_usd() == pytest.approx(SMALL_USD + LARGE_USD)
    assert environment.metrics()["pool/calls"] == 2.0
    assert environment.metrics()["pool/calls"] == 0.0  # since the last call
    other = world("x")
    other.load_state_dict(environment.state_dict())
    assert other.spent_usd() == environment.spent_usd()


def test_the_query_arrives_whole() -> None:
    environment = world("ok")
    turn = "<think>x</think><search> small : is it: 1:1, or\n2: 1? </search>"
    episode(environment, [turn])
    assert asked(environment, "small") == ["is it: 1:1, or\n2: 1?"]


def test_wrong_answers() -> None:
    columns, _ = episode(world(), [ROUTE, WRONG])
    assert (columns["correct"], columns["em"], columns["f1"], columns["answer"]) == (0.0, 0.0, 0.0, "Rome")
    assert columns["feedback"] == "The answer, given after asking small, was wrong."
    columns, _ = episode(world(), [WRONG])
    assert (columns["route"], columns["members"], columns["calls"], columns["cost"]) == (None, [], 0, 0.0)
    assert columns["feedback"] == "The answer, given after asking nobody, was wrong."


def test_metrics_and_rows_without_gold() -> None:
    half = "<think>x</think><answer>big Paris France</answer>"
    columns, _ = episode(world(metric="f1"), [half])  # 1 of 3 words: plain F1 2*1/(3+1), no score as one answer
    assert (columns["em"], columns["f1"], columns["correct"]) == (0.0, 0.5, 0.0)
    numeric = {"query": "6 times 7?", "gold": ["42"], "metric": "numeric"}
    columns, _ = episode(world(), ["<think>x</think><answer>It is 42.0</answer>"], numeric)
    assert (columns["em"], columns["correct"]) == (0.0, 1.0)
    columns, _ = episode(world(), [ROUTE, RIGHT], {"query": "?"})
    assert (columns["em"], columns["f1"], columns["correct"], columns["answer"]) == (None, None, None, "Paris")
    assert columns["feedback"] == ""


def test_invalid_turns_are_told_once_and_counted() -> None:
    turns = ["Paris?", "<search>oracle:q</search>", ROUTE, RIGHT]
    columns, seen = episode(world("Paris"), turns)
    assert seen[0].body == "That turn was not valid. The text did not start with (think)."
    assert "'oracle', which is not one member. The members are: small, large." in seen[1].body
    assert all(o.before == "\n\n<information>" for o in seen[:3])
    assert (columns["invalid_actions"], columns["calls"], columns["correct"]) == (2, 1, 1.0)
    assert columns["format_error"] == columns["feedback"] == "The text did not start with <think>."


def test_think_is_needed_in_the_first_turn_only() -> None:
    columns, _ = episode(world("Paris"), [ROUTE, "<answer>Paris</answer>"])
    assert (columns["correct"], columns["format_error"]) == (1.0, "")
    columns, _ = episode(world("Paris"), ["<answer>Paris</answer>"])
    assert (columns["correct"], columns["answer"]) == (0.0, None)


@pytest.mark.parametrize("stop, words", [("turns", "turns"), ("tokens", "length"), ("budget", "budget")])
def test_no_answer_in_time_is_a_format_error(stop: Any, words: str) -> None:
    environment = world()
    columns = environment.episode(ROW, "s").columns(stop)
    assert columns["format_error"] == f"There was no answer within the allowed {words}.".replace(
        "allowed budget", "budget"
    )
    assert (columns["correct"], columns["answer"], columns["lost"]) == (0.0, None, None)


def test_a_deadline_is_nobodys_fault() -> None:
    columns = world().episode(ROW, "s").columns("deadline")
    assert "deadline" in columns["lost"] and columns["format_error"] == columns["feedback"] == ""

    async def late() -> Any:
        played = world().episode(ROW, "s")
        await played.step("junk")
        return played.columns("deadline")

    assert "deadline" in asyncio.run(late())["lost"]  # also after a bad turn: slower machines do not change rewards


def test_every_episode_has_the_same_columns() -> None:
    for turns in ([], [RIGHT], [ROUTE, WRONG], ["junk"] * 4):
        assert set(episode(world(), turns)[0]) == KEYS
    assert set(episode(world(faults=[Fault("timeout: x")]), [ROUTE])[0]) == KEYS
    assert set(episode(world(), [RIGHT], {"query": "?"})[0]) == KEYS


# ------------------------------------------------------------------------------------------- failures, money


def test_a_failed_call_loses_the_episode_or_is_told() -> None:
    failing = {"faults": [Fault("server error: 500 canary", retry=False)]}
    columns, seen = episode(world(**failing), [ROUTE, RIGHT])
    assert (seen[0].end, columns["lost"]) == ("lost", "small: server error: 500 canary")
    assert (columns["members"], columns["calls"], columns["feedback"]) == (["small"], 1, "")

    columns, seen = episode(world("Paris", **failing, failed_call="observe"), [ROUTE, ROUTE_LARGE, RIGHT])
    assert [o.body for o in seen] == ["small could not be reached (server error).", "Paris", ""]
    assert (columns["lost"], columns["correct"], columns["calls"]) == (None, 1.0, 2)
    assert columns["cost"] == pytest.approx(LARGE_USD)  # the failed call reported no usage


def test_failed_calls_that_used_tokens_cost() -> None:
    from srpo.types import Usage

    fault = Fault("malformed reply: x", retry=False, usage=Usage(7, 3))
    columns, _ = episode(world("x", faults=[fault], failed_call="observe"), [ROUTE])
    assert columns["cost"] == pytest.approx((7 * 1.0 + 3 * 2.0) / 1e6)


def test_a_hanging_member_costs_its_deadline_only() -> None:
    environment = world(faults=[Fault(hang=True)], call_seconds=0.2)
    columns, seen = episode(environment, [ROUTE, RIGHT])
    assert seen[0].end == "lost" and columns["lost"].startswith("small: timeout")
    assert columns["seconds"] < 1.0


def test_a_call_that_does_not_fit_is_refused_in_words_and_twice_ends() -> None:
    # small costs at most 20e-6, large at most 200e-6.
    columns, seen = episode(world("Paris", max_cost_usd=100e-6), [ROUTE_LARGE, ROUTE, RIGHT])
    assert "large was not asked" in seen[0].body and "Answer now" in seen[0].body
    assert (columns["members"], columns["cost"], columns["correct"]) == (["small"], pytest.approx(SMALL_USD), 1.0)

    columns, seen = episode(world("Paris", max_cost_usd=100e-6), [ROUTE_LARGE, ROUTE_LARGE, RIGHT])
    assert seen[1].end == "budget" and len(seen) == 2
    assert (columns["calls"], columns["cost"], columns["correct"]) == (0, 0.0, 0.0)
    assert columns["format_error"] == "There was no answer within the budget."


def test_the_cap_of_a_row_goes_first_and_holds() -> None:
    environment = world("no", max_cost_usd=1.0)
    columns, _ = episode(environment, [ROUTE] * 9, ROW | {"max_cost_usd": 50e-6})  # two calls of 20e-6 fit
    assert columns["calls"] == 2 and columns["cost"] <= 50e-6
    assert episode(environment, [ROUTE, RIGHT], ROW | {"max_cost_usd": 0.0})[0]["calls"] == 0


def test_billed_retries_stay_within_the_cap_of_the_row() -> None:
    # The first attempt fails and is billed 20e-6; a second one would bring the question to 40e-6.
    faults = [Fault("server error: 500", usage=Usage(10, 5))]
    for cap, attempts, lost in ((30e-6, 1, True), (50e-6, 2, False)):
        backends = {"small": Scripted("Paris", faults=faults), "large": Scripted("Paris")}
        members = Pool(CATALOGUE, backends, retry=Retry(attempts=2, base=0.0))
        columns, _ = episode(ThinkRoute(members, max_cost_usd=cap), [ROUTE, RIGHT])
        assert (columns["lost"] is not None) is lost
        assert columns["cost"] == pytest.approx(attempts * SMALL_USD) and columns["cost"] <= cap


def test_the_cap_of_the_run_loses_episodes_instead_of_scoring_them() -> None:
    environment = world(ledger=Ledger(max_cost_usd=30e-6))
    assert episode(environment, [ROUTE, RIGHT])[0]["lost"] is None
    columns, seen = episode(environment, [ROUTE, RIGHT])
    assert seen[0].end == "lost" and columns["lost"].startswith("small: over budget")


def test_the_policys_own_tokens_by_hand() -> None:
    """Words as tokens, $1 and $2 per million: prompt 3 in; turn 1 out; observation in; turn 2 out."""
    environment = world("It is Paris", ledger=Ledger(policy_price=(1.0, 2.0)), count_tokens=lambda t: len(t.split()))
    row = ROW | {"prompt": [{"role": "user", "content": "one two three"}]}
    turns = ["<think>a b</think> <search>small:c</search>", "<answer> Paris </answer>"]
    columns, _ = episode(environment, turns, row)
    # out: "<think>a", "b</think>", "<search>small:c</search>" = 3, and "<answer>", "Paris", "</answer>" = 3;
    # in: 3 of the prompt, "<information>", "It", "is", "Paris", "</information>" = 5.
    own = (8 * 1.0 + 6 * 2.0) / 1e6
    assert columns["cost"] == pytest.approx(SMALL_USD + own)
    assert environment.pool.ledger.total().policy_cost == pytest.approx(own)
    assert environment.spent_usd() == pytest.approx(SMALL_USD + own)
    # What the rollout cuts off is not read: 2 of the reply's 3 words.
    environment = world(
        "It is Paris",
        ledger=Ledger(policy_price=(1.0, 2.0)),
        count_tokens=lambda t: len(t.split()),
        observation_tokens=2,
    )
    assert episode(environment, turns, row)[0]["cost"] == pytest.approx(SMALL_USD + own - 1e-6)


def test_an_empty_query_sends_the_question() -> None:
    environment = world("Paris", forward_empty=True)
    columns, _ = episode(environment, ["<think>x</think><search>small</search>", RIGHT])
    assert asked(environment, "small") == [ROW["query"]]
    assert columns["correct"] == 1.0
    assert "no colon" in episode(world(), ["<think>x</think><search>small</search>"])[0]["format_error"]


def test_members_may_be_a_part_of_the_pool() -> None:
    environment = world("Paris", members=["large"])
    assert [m.name for m in environment.members] == ["large"]
    assert episode(environment, [ROUTE])[0]["calls"] == 0
    assert episode(environment, [ROUTE_LARGE])[0]["calls"] == 1


def test_many_at_once_are_as_each_alone() -> None:
    rng = random.Random(0)
    choice = [ROUTE, ROUTE_LARGE, RIGHT, WRONG, "junk"]
    scripts = [[rng.choice(choice) for _ in range(4)] for _ in range(40)]
    alone = [episode(world("Paris"), turns)[0] for turns in scripts]
    environment = world("Paris", seconds=0.001)

    async def one(turns: list[str]) -> dict[str, Any]:
        played, stop = environment.episode(ROW, "s"), "turns"
        for text in turns:
            if end := (await played.step(text)).end:
                stop = end
                break
        return dict(played.columns(stop))  # type: ignore[arg-type]

    async def together() -> list[dict[str, Any]]:
        return await asyncio.gather(*map(one, scripts))

    for a, b in zip(alone, asyncio.run(together()), strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_the_cost_scale() -> None:
    # large: 256 * 10 + 512 * 20 = 12,800 millionths
    assert cost_scale(list(CATALOGUE.values())) == pytest.approx(12_800e-6)
    with pytest.raises(ValueError, match="every member of the pool is free"):
        cost_scale([Member("x", "y", 0.0, 0.0)])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"members": ["nobody"]}, "'nobody' is no member"),
        ({"members": []}, "at least one name"),
        ({"members": ["small", "small"]}, "each once"),
        ({"metric": "bleu"}, "metric 'bleu'"),
        ({"failed_call": "ignore"}, "failed_call 'ignore'"),
        ({"call_seconds": 0.0}, "call_seconds"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        world(**settings)


@pytest.mark.parametrize(
    "row, words",
    [
        ({}, "'query' is None"),
        ({"query": " "}, "'query' is ' '"),
        ({"query": "x", "gold": "Paris"}, "'gold' is 'Paris'"),
        ({"query": "x", "gold": []}, r"'gold' is \[\]"),
        ({"query": "x", "gold": [1]}, r"'gold' is \[1\]"),
        ({"query": "x", "gold": ["1"], "metric": "bleu"}, "'metric' is 'bleu'"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        world().episode(row, "s")


# ------------------------------------------------------------------------------------------- tricks of the policy

T = "<think>x</think>"
TRICKS: dict[str, list[str]] = {
    "two answers": [T + "<answer>Rome</answer><answer>Paris</answer>"],
    "two answers, right first": [T + "<answer>Paris</answer><answer>Rome</answer>"],
    "the same answer twice": [T + "<answer>Paris</answer><answer>Paris</answer>"],
    "a second try": [T + "<answer>Rome</answer><answer>Madrid</answer>", RIGHT],
    "answer nested in answer": [T + "<answer>Rome<answer>Paris</answer></answer>"],
    "stuffed answer": [T + "<answer>Rome, Paris, Madrid</answer>"],
    "stuffed answer, spaces": [T + "<answer>Rome Paris</answer>"],
    "stuffed answer, or": [T + "<answer>Paris or Rome</answer>"],
    "stuffed answer, long": [T + "<answer>Paris " + "word " * 200 + "</answer>"],
    "answer inside think": ["<think><answer>Paris</answer></think>"],
    "answer inside think, then a wrong one": ["<think><answer>Paris</answer></think><answer>Rome</answer>"],
    "route inside think": ["<think><search>large:q</search></think><answer>Paris</answer>"],
    "answer and route in one turn": [T + "<answer>Paris</answer><search>small:q</search>"],
    "route and answer in one turn": [T + "<search>small:q</search><answer>Paris</answer>"],
    "a made-up reply": [T + "<search>small:q</search><information>Paris</information><answer>Paris</answer>"],
    "a made-up reply inside think": ["<think><information>Paris</information></think><answer>Paris</answer>"],
    "answer without thinking": ["<answer>Paris</answer>"],
    "answer before thinking": ["<answer>Paris</answer>" + T],
    "text around the answer": ["Paris! " + T + "<answer>Rome</answer>"],
    "empty answer": [T + "<answer></answer>"],
    "gold in the query only": ["<think>Paris</think><search>small:Paris</search>"] * 4,
    "gold in the reasoning only": ["<think>Paris</think><answer>Rome</answer>"],
    "answer never closed": [T + "<answer>Paris"] * 4,
    "silence": [""] * 4,
}
SCHEMES = {
    "router_r1": router_r1_rewards(LARGE_USD),
    "router_r1_0.9": router_r1_rewards(LARGE_USD, 0.9),
    "xrouter": xrouter_rewards(LARGE_USD),
    "additive": additive_rewards(LARGE_USD),
    "additive_0.9": additive_rewards(LARGE_USD, 0.9),
}


@pytest.mark.parametrize("metric", ["em", "f1"])
@pytest.mark.parametrize("name", TRICKS)
def test_no_trick_beats_an_honest_wrong_answer(name: str, metric: Any) -> None:
    turns = TRICKS[name]
    tricked, _ = episode(world("Paris", metric=metric), turns)
    assert tricked["correct"] == 0.0 and (tricked["format_error"] or tricked["answer"] is not None)
    # Honest: the same number of calls, and the dearest way to be wrong where the trick has a broken form.
    honest, _ = episode(world("Paris", metric=metric), [ROUTE] * tricked["calls"] + [WRONG])
    dear, _ = episode(world("Paris", metric=metric), [ROUTE_LARGE] * 3 + [WRONG])
    for scheme in SCHEMES.values():
        assert reward(scheme, tricked) <= reward(scheme, honest)
        if tricked["answer"] is None:
            assert reward(scheme, tricked) <= reward(scheme, dear)
        assert reward(scheme, tricked) < reward(scheme, episode(world("Paris"), [ROUTE, RIGHT])[0])


@pytest.mark.parametrize("metric, answer, gold", [("numeric", "41 42 43", "42"), ("choice", "A B C D", "B")])
def test_lists_of_candidates_do_not_pay_in_other_metrics(metric: Any, answer: str, gold: str) -> None:
    row = {"query": "?", "gold": [gold], "metric": metric}
    assert episode(world(), [f"{T}<answer>{answer}</answer>"], row)[0]["correct"] == 0.0


# ------------------------------------------------------------------------------------------- prompts


def test_prompts_show_what_routing_needs() -> None:
    members = [
        Member("small", "well-known facts", 0.1, 0.4, latency=0.82, examples={"nq": 0.41, "gsm8k": 0.9}),
        Member("large", "hard questions", 10.0, 20.0),
    ]
    [message] = think_route_prompt("What is 2+2?", members, cost_weight=0.3)
    lines = message["content"].splitlines()
    assert "- small: well-known facts ($0.1/0.4 per 1M tokens; 0.82 s; gsm8k 0.90, nq 0.41)" in lines
    assert "- large: hard questions ($10/20 per 1M tokens)" in lines
    assert "Price sensitivity: 0.30 (0: only a right answer counts, 1: price counts as much)" in lines
    assert lines[-1] == "Question: What is 2+2?"
    assert not any("Price sensitivity" in m["content"] for m in think_route_prompt("x", members))
    [short] = short_think_route_prompt("What is 2+2?", members, cost_weight=0.3)
    assert short["content"].splitlines() == [
        "small $0.1/0.4: well-known facts",
        "large $10/20: hard questions",
        "Price sensitivity: 0.30 (0: only a right answer counts, 1: price counts as much)",
        "Write <think>why</think><search>name:query</search> or <answer>answer</answer>",
        "Question: What is 2+2?",
    ]
    for prompt in (think_route_prompt, short_think_route_prompt):
        with pytest.raises(ValueError, match="every name once"):
            prompt("x", [])
        with pytest.raises(ValueError, match="must lie in"):
            prompt("x", members, cost_weight=1.1)


def test_the_tags_of_the_prompt_are_the_grammars() -> None:
    grammar = Grammar(think="plan", route="call", answer="final", information="result")
    for prompt in (think_route_prompt, short_think_route_prompt):
        content = prompt("x", list(CATALOGUE.values()), grammar)[0]["content"]
        assert "<call>" in content and "<final>" in content
        assert not any(tag in content for tag in ("<search>", "<answer>", "<think>", "<information>"))


def test_the_placeholders_of_the_prompt_are_no_action() -> None:
    columns, _ = episode(world(), ["<think>x</think><search> LLM-Name:Your-Query </search>"])
    assert "'LLM-Name', which is not one member" in columns["format_error"]


def test_a_rows_price_sensitivity_is_drawn_from_its_id() -> None:
    weights = [0.0, 0.3, 0.6]
    drawn = [drawn_cost_weight(f"q{i}", weights) for i in range(3000)]
    assert drawn == [drawn_cost_weight(f"q{i}", weights) for i in range(3000)]
    # 1000 expected each, standard deviation 26.
    assert all(abs(drawn.count(weight) - 1000) < 130 for weight in weights)
    with pytest.raises(ValueError, match="at least one cost weight"):
        drawn_cost_weight("q", [])


def test_measured_members_by_hand() -> None:
    """Latency and scores come from training rows; what the catalogue says stays."""
    names = ("query_id", "family", "split", "member", "reply", "correct", "seconds")
    rows = [
        ("a", "sums", "train", "small", "x", 1.0, 1.0),
        ("b", "sums", "train", "small", "x", 0.0, 3.0),
        ("c", "facts", "train", "small", "x", 1.0, 5.0),
        ("d", "sums", "heldout", "small", "x", 1.0, 99.0),
    ]
    tokens = {"prompt_tokens": 1, "completion_tokens": 1}
    table = ReplyTable(
        [dict(zip(names, row, strict=True)) | tokens | {"query": f"the {row[0]}?"} for row in rows], CATALOGUE
    )
    stated = Member("small", "x", 1.0, 2.0, latency=0.5, examples={"nq": 0.4})
    small, large, kept = measured([CATALOGUE["small"], CATALOGUE["large"], stated], table)
    assert (small.latency, dict(small.examples)) == (3.0, {"sums": 0.5, "facts": 1.0})
    assert large == CATALOGUE["large"] and kept == stated


def test_names_that_could_not_be_copied_stop_at_the_start() -> None:
    bad = Pool({"a:b": Member("a:b", "x", 0.0, 0.0)}, {"a:b": Scripted("x")})
    with pytest.raises(ValueError, match="rename it in the catalogue"):
        ThinkRoute(bad)
    assert ThinkRoute(pool()).names == ["small", "large"]
