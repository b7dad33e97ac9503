"""Members that think aloud: the answer comes first, whole, and a cut takes the head of the reasoning."""

import asyncio
import json
import time
from typing import Any

import numpy as np
import pytest
from openai_server import Fault, OpenAIServer
from test_untrusted import byte_level
from think_route_cases import RIGHT, ROUTE, episode

from routers.data.catalogue import Member
from routers.data.table import ReplyTable
from routers.language.actions import Tags
from routers.language.grammar import REASONING, ROUTER_R1, reply_observation
from routers.pool import Ledger, Pool, ReplyCache, Retry, kind, live_pool, recorded_pool
from routers.pool.reasoning import split_reasoning
from routers.tasks.think_route.environment import ThinkRoute
from routers.tasks.think_route.sft_rows import demonstrations
from srpo.rollout.loop import observation_ids
from srpo.types import CORRECT, LOST, Observation, Reply


@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        ("Herbert", "Herbert", ""),
        ("  as it is \n", "  as it is \n", ""),
        ("<think>\nhm\n</think>\n\nHerbert", "Herbert", "hm"),
        ("hm\n</think>\n\nHerbert", "Herbert", "hm"),  # the prompt has opened it
        ("<think></think>Herbert", "Herbert", ""),
        ("<think>a</think>one<think>b</think>two", "one\ntwo", "a\nb"),
        ("<think>a</think>\n<think>b</think>two", "two", "a\nb"),
        ("<think>cut by max_tok", "", "cut by max_tok"),
        ("<think>a</think>\n<think>cut", "", "a\ncut"),
        ("Herbert\n<think>was it", "Herbert", "was it"),
        ("<think>hm</think>", "", "hm"),
        ("hm</think>", "", "hm"),
        ("<think>a</think>Close it by `</think>`.", "Close it by `</think>`.", "a"),
        ("Models open with <think> and then go on", "Models open with <think> and then go on", ""),
        ("< Think >a</ THINK >Herbert", "Herbert", "a"),
        ("<thinking>a</thinking>Herbert", "Herbert", "a"),
        ("<thinking>a</think>b</thinking>Herbert", "Herbert", "a</think>b"),
        ("[THINK]a[/THINK]Herbert", "Herbert", "a"),
        ("◁think▷a◁/think▷Herbert", "Herbert", "a"),
        ("<think>a <think> b</think>Herbert", "Herbert", "a <think> b"),
    ],
)
def test_splitting(text, answer, reasoning):
    assert split_reasoning(text) == (answer, reasoning)


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<think></think>", "<", "< ", "[THINK]a\n"])
def test_splitting_takes_linear_time(piece):
    start = time.perf_counter()
    split_reasoning(piece * (1_000_000 // len(piece)))
    assert time.perf_counter() - start < 5


@pytest.fixture
def server():
    with OpenAIServer() as running:
        yield running


def pool_of(server: OpenAIServer, **options: Any) -> Pool:
    return live_pool({"a": Member("a", "x", 1.0, 2.0, base_url=server.url)}, retry=Retry(base=0.01), **options)


def ask(pool: Pool) -> Reply:
    async def main() -> Reply:
        async with pool:
            return await pool.ask("a", "Who wrote Dune?", 10.0)

    return asyncio.run(main())


def saying(content: Any, finish: str = "stop", **message: Any) -> Fault:
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    return Fault(raw=json.dumps({"choices": [choice], "usage": usage}).encode())


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<think>hm</think>Herbert", {}),
        ("hm\n</think>\nHerbert", {}),
        ("Herbert", {"reasoning_content": "hm"}),
        ("Herbert", {"reasoning": "hm"}),
        ("Herbert", {"reasoning": "hm", "reasoning_content": "hm"}),
        ("Herbert", {"reasoning": "hm", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]}),
        ("Herbert", {"reasoning_details": [{"type": "reasoning.summary", "summary": "hm"}]}),
        ("Herbert", {"reasoning": {"content": "hm"}}),
        ("<think>hm</think>Herbert", {"reasoning_content": "hm"}),
        ([THOUGHT, {"type": "text", "text": "Herbert"}], {}),
        ([{"type": "text", "text": "<think>hm</think>"}, {"type": "text", "text": "Herbert"}], {}),
        ([{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "Herbert"}], {}),
    ],
)
def test_answer_and_reasoning_in_every_shape(server, tmp_path, content, message):
    server.always = saying(content, **message)
    pool = pool_of(server, cache=ReplyCache(tmp_path))
    for cached in (False, True):
        reply = ask(pool)
        assert (reply.text, reply.reasoning, reply.error, reply.cached) == ("Herbert", "hm", None, cached)


def test_a_mark_in_an_answer_whose_reasoning_came_apart_is_a_word(server):
    server.always = saying("It closes by </think> always.", reasoning_content="hm")
    assert ask(pool_of(server)).text == "It closes by </think> always."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<think>long thou", {}),
        (None, {"reasoning_content": "long thou"}),
        ([{**THOUGHT, "thinking": "long thou"}], {}),
    ],
)
def test_reasoning_without_an_answer_is_an_empty_reply_that_is_paid_and_not_cached(server, tmp_path, content, message):
    server.always = saying(content, "length", **message)
    pool = pool_of(server, cache=ReplyCache(tmp_path))
    reply = ask(pool)
    assert reply.error == "empty reply: no text, only reasoning (finish_reason length)"
    assert (kind(reply), reply.text, reply.reasoning) == ("empty reply", "", "long thou")
    assert reply.usage.completion_tokens == 5 and len(server.requests) == 1 and not list(tmp_path.rglob("*.json"))


# ----------------------------------------------------------------------------------------------- what the policy reads


def shown(observation: Observation, limit: int) -> str:
    tokenizer = byte_level()
    ids = list(observation_ids(observation, tokenizer, limit))
    assert len(ids) <= limit + len(tokenizer(observation.before + observation.after)["input_ids"])
    return tokenizer.decode(ids)


def test_a_cut_takes_the_head_of_the_reasoning_and_not_the_answer():
    reasoning = " ".join(str(n) for n in range(3000))
    whole = reply_observation("Frank Herbert", ROUTER_R1, reasoning)
    text = shown(whole, 100)
    assert text.startswith("\n\n<information>Frank Herbert" + REASONING) and text.endswith(" 2999</information>\n\n")
    assert " 7 " not in text
    # Without room for some of it there is no word of it; the answer is the last to be cut.
    assert shown(whole, 14) == "\n\n<information>Frank Herbert</information>\n\n"
    assert shown(whole, 5) == "\n\n<information>Frank </information>\n\n"


def test_an_observation_without_reasoning_is_what_it_was():
    assert (
        shown(reply_observation("Frank Herbert", ROUTER_R1), 100) == "\n\n<information>Frank Herbert</information>\n\n"
    )


def test_tags_in_reasoning_are_harmless():
    observation = reply_observation("a", ROUTER_R1, "b </information> <answer>c</answer>")
    assert observation.aside == "b (/information) (answer)c(/answer)"


def live_world(server: OpenAIServer, **settings: Any) -> ThinkRoute:
    small = Member("small", "well-known facts", 1.0, 2.0, base_url=server.url)
    return ThinkRoute(live_pool({"small": small}, retry=Retry(base=0.01)), **settings)


def test_the_policy_reads_the_answer_of_a_member_that_thinks_for_long(server):
    server.always = saying("<think>\n" + "hmm, or Lyon? " * 700 + "so Paris</think>\n\nIt is Paris.")
    _, (seen, _) = episode(live_world(server), [ROUTE, RIGHT])
    text = shown(seen, 600)
    assert text.startswith("\n\n<information>It is Paris." + REASONING) and "Lyon? so Paris</inf" in text


def test_the_policy_is_told_of_reasoning_without_an_answer_and_reads_its_end(server):
    server.always = saying("<think>" + "hmm, or Lyon? " * 700 + "so Par", "length")
    columns, (seen, _) = episode(live_world(server, failed_call="lost"), [ROUTE, RIGHT])
    assert seen.body == "small came to no answer." and seen.aside.endswith("so Par")
    assert columns[LOST] is None and columns[CORRECT] == 1.0


def test_what_the_policy_reads_is_what_it_pays_for(server):
    server.always = saying("<think>" + "hm " * 50 + "</think>It is Paris.")
    read = []
    for limit in (None, 20):
        ledger = Ledger(policy_price=(1.0, 1.0))
        words = live_world(server, count_tokens=lambda text: len(text.split()), observation_tokens=limit)
        words.pool.ledger = ledger
        episode(words, [ROUTE])
        read.append(ledger.total().policy_prompt_tokens)
    # "It is Paris." 3, "Its reasoning, to the end:" 5, 50 times "hm"; with the limit 20 of these 58
    assert read[0] - read[1] == 58 - 20


def test_recorded_replies_are_split_for_the_policy_and_in_demonstrations():
    row = {"query_id": "q1", "query": "Capital of France?", "family": "x", "split": "train", "member": "m"}
    row |= {"reply": "<think>hm</think>Paris", "prompt_tokens": 1, "completion_tokens": 1, "correct": 1.0}
    table = ReplyTable([row], {"m": Member("m", "x", 1.0, 1.0)})
    reply = asyncio.run(recorded_pool(table).ask("m", "any", 5.0, query_id="q1"))
    assert (reply.text, reply.reasoning) == ("Paris", "hm")
    (made,) = demonstrations(table.queries("train"), table, lambda q: [], Tags([]), np.random.default_rng(0))
    _, seen, answer = made.turns
    assert (seen.body, seen.aside) == ("Paris", "hm") and "Paris" in answer and "hm" not in answer
