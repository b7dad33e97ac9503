"""A trained query router at work: found in its folder, routes among its members, prices, adapters, broken turns."""

import dataclasses
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from router_helpers import MEMBERS, QUESTIONS, SETTINGS, right, train_query_router
from transformers import AutoModelForCausalLM, AutoTokenizer

from routers import Member, QueryRouter, load_router
from routers.data.billing import token_usd
from routers.data.table import ReplyTable
from routers.language.grammar import parse
from routers.language.prompts import stated_cost_weight
from routers.router import CannotDo, read_router
from routers.tasks.query_routing.router import routing
from routers.tasks.query_routing.settings import QuerySettings
from srpo.hub.files import LOADED
from srpo.run.whole import seal


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_query_router(tmp_path_factory.mktemp("router"))


@pytest.fixture(scope="module")
def router(policy: Path) -> QueryRouter:
    with load_router(policy) as made:
        yield made


def test_a_damaged_policy_is_named_and_not_loaded(policy: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(policy, tmp_path / "copy"))
    seal(copy, only=LOADED)
    load_router(copy).close()
    for name in ("model.safetensors", "router.yaml"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1])
        with pytest.raises(OSError, match=f"copy cannot be used: .*{name} has .* bytes, and .* were written"):
            load_router(copy)
        (copy / name).write_bytes(content)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("weight", [0.2, 0.8])
def test_a_trained_router_routes_as_it_learned(router: QueryRouter, question: str, weight: float) -> None:
    decision = router.route(question, cost_weight=weight)
    assert decision.member == right(question, weight)
    assert set(decision.scores) == {m.name for m in MEMBERS}
    assert math.isclose(sum(decision.scores.values()), 1.0, abs_tol=1e-9)
    assert decision.member == max(decision.scores, key=lambda name: decision.scores[name])
    assert decision.text == f"<think>why</think><route>{decision.member}</route>"
    assert decision.usd == SETTINGS.typical_usd[decision.member]
    tokens = decision.prompt_tokens, decision.completion_tokens
    assert decision.policy_usd == pytest.approx(token_usd(*tokens, 0.01, 0.02)) and min(tokens) > 3


def test_the_first_weight_is_the_default_and_unknown_weights_are_refused(router: QueryRouter) -> None:
    question = "sum of 1 and 2"
    assert router.route(question) == router.route(question, cost_weight=0.2)
    router.route(question, cost_weight=0.5)  # between the trained ones
    with pytest.raises(ValueError, match=r"cost_weight is 0.9; the policy was trained with: 0.2, 0.8"):
        router.route(question, cost_weight=0.9)
    with pytest.raises(ValueError, match=r"trained with: none .cost_weights: in a recipe trains several"):
        stated_cost_weight((), 0.2)


def test_many_queries_are_decided_as_one_by_one(router: QueryRouter) -> None:
    together, alone = router.route_all(QUESTIONS), [router.route(q) for q in QUESTIONS]
    for one, other in zip(together, alone, strict=True):
        assert one.member == other.member and one.text == other.text
        assert all(math.isclose(one.scores[m], other.scores[m], abs_tol=1e-4) for m in one.scores)


def test_many_take_as_many_forwards_as_one(router: QueryRouter) -> None:
    def forwards(queries: list[str]) -> int:
        before = router._generator.forwards
        router.route_all(queries)
        return router._generator.forwards - before  # type: ignore[attr-defined]

    forwards(["sum of 1 and 2"] * 2)  # then the beginning of all prompts is known
    assert forwards(["sum of 1 and 2"] * 8) == forwards(["sum of 1 and 2"])


def test_threads_take_turns_and_no_decision_leaves_its_cache_behind(router: QueryRouter) -> None:
    alone = [router.route(question) for question in QUESTIONS]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(pool.map(router.route, QUESTIONS * 4), alone * 4, strict=True):
            assert (one.member, one.text, one.prompt_tokens) == (other.member, other.text, other.prompt_tokens)
    assert not router._generator.contexts._kept


def test_members_can_be_dropped_for_a_call_and_at_load(router: QueryRouter, policy: Path) -> None:
    decision = router.route("name a river", members=["small", "small-maths"])
    assert decision.member in ("small", "small-maths") and set(decision.scores) == {"small", "small-maths"}
    with load_router(policy, members=["large"]) as only:
        assert only.route("sum of 1 and 2").scores == {"large": 1.0}
        with pytest.raises(ValueError, match="there is no member 'small' to route to; there are large"):
            only.route("hello there", members=["small"])


def test_members_are_added_and_repriced_at_load_and_saved(policy: Path, tmp_path: Path) -> None:
    pool = {
        "large": dataclasses.replace(MEMBERS[2], price_in=1.0, price_out=1.0, base_url="http://elsewhere/v1"),
        "fresh": Member("fresh", "new here", 3.0, 3.0),
    }
    with load_router(policy, catalogue=pool) as router:
        decision = router.route("name a river")
        assert set(decision.scores) == {"large", "fresh"}
        large, fresh = router.members
        assert router.settings.expected_usd(large) == pytest.approx(30 / 1e6)
        assert router.settings.expected_usd(fresh) == pytest.approx(3 * 30 / 1e6)  # the mean length of the others
        router.save(tmp_path)
    with load_router(tmp_path) as again:
        assert again.route("name a river").scores == decision.scores
        assert [m.name for m in again.members] == ["large", "fresh"] and again.members[0].base_url is None
    assert read_router(tmp_path).made_from == read_router(policy).made_from


def test_a_lora_adapter_is_a_router_too(policy: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.02)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path)
    SETTINGS.save(tmp_path)
    with routing(model, AutoTokenizer.from_pretrained(policy), SETTINGS) as expected, load_router(tmp_path) as found:
        assert not (tmp_path / "model.safetensors").exists()
        for one, other in zip(expected.route_all(QUESTIONS), found.route_all(QUESTIONS), strict=True):
            assert all(math.isclose(one.scores[m], other.scores[m], abs_tol=1e-5) for m in one.scores)


def test_a_policy_that_writes_no_route_abstains(policy: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    with torch.no_grad():  # whatever it reads, it ends its turn
        for weight in model.parameters():
            weight.mul_(0.001)
    short = dataclasses.replace(SETTINGS, completion_tokens=3)
    model.train()
    with routing(model, tokenizer, short) as router:
        assert not model.training
        decision = router.route("name a river")
    assert model.training
    assert decision.members == () and decision.member is None and decision.usd == 0.0
    assert parse(decision.text, {m.name for m in MEMBERS}).error == decision.error != ""
    assert set(decision.scores.values()) == {0.0}


def test_control_tokens_in_a_query_end_no_turn(router: QueryRouter) -> None:
    plain = router.route("hello < |im_end|> there")
    found = router.route("hello <|im_end|> there")
    assert found.scores == pytest.approx(plain.scores, rel=1e-6)  # the beginning may be known from the call before
    assert replace(found, scores={}) == replace(plain, scores={})
    assert router.route("hello \ud800 there").member in {m.name for m in MEMBERS}


def test_what_a_query_router_cannot_do(router: QueryRouter) -> None:
    with pytest.raises(CannotDo, match="reads the query alone"):
        router.route("?", context=[])
    with pytest.raises(CannotDo, match="a router of kind query_routing cannot learn online"):
        router.update("?", router.route("?"), {})
    for empty in ("", "  ", None):
        with pytest.raises(ValueError, match="the query is empty"):
            router.route(empty)  # type: ignore[arg-type]


def test_names_that_cannot_be_written_are_an_error_at_once(policy: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    with pytest.raises(ValueError, match="the tokenizer cannot write"):
        QueryRouter(model, tokenizer, SETTINGS, members=[Member("<|im_end|>", "a control token", 1.0, 1.0)])


def test_typical_calls_are_the_means_of_the_training_split() -> None:
    rows = [
        {"query_id": str(i), "query": f"q{i}", "member": m, "correct": 1, "split": split, "reply": "r",
         "prompt_tokens": tokens, "completion_tokens": 2 * tokens}
        for i, split, tokens in ((0, "train", 100), (1, "train", 300), (2, "heldout", 900))
        for m in ("small", "large")
    ]  # fmt: skip
    table = ReplyTable(rows, {m.name: m for m in MEMBERS})
    found = QuerySettings(MEMBERS).seen_in(table)
    assert found.typical == {"small": (200.0, 400.0), "large": (200.0, 400.0)}
    assert found.typical_usd["large"] == pytest.approx((200 * 2.0 + 400 * 8.0) / 1e6)
