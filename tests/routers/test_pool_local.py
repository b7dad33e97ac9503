"""A real, tiny transformers model as a pool member: same text as generating alone, counted tokens, deadlines."""

import asyncio
import threading
import time

import pytest
import torch

from routers.data.catalogue import Member, cost
from routers.pool import Pool, kind
from routers.pool.local import LocalModel


def pool_of(member: Member, model, tokenizer) -> Pool:
    return Pool({member.name: member}, {member.name: LocalModel(member, model, tokenizer)})


def test_a_batch_gives_each_query_what_it_gets_alone_and_counts_its_tokens(tiny_model, tiny_tokenizer):
    member = Member("tiny", "a tiny model", 1.0, 2.0, max_tokens=8)
    pool = pool_of(member, tiny_model, tiny_tokenizer)
    queries = ["What is 12 plus 30?", "stone", "Which country has the capital Lima? Answer:"]

    async def main():
        return await asyncio.gather(*(pool.ask("tiny", query, 60.0) for query in queries))

    state = torch.random.get_rng_state()
    replies = asyncio.run(main())
    assert torch.equal(state, torch.random.get_rng_state())
    for query, reply in zip(queries, replies, strict=True):
        messages = [{"role": "user", "content": query}]
        ids = tiny_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        alone = tiny_model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        new = alone[0, ids["input_ids"].shape[1] :]
        assert reply.text == tiny_tokenizer.decode(new, skip_special_tokens=True).strip()
        assert reply.usage.prompt_tokens == ids["input_ids"].shape[1]
        assert reply.usage.completion_tokens == len(new)
        assert reply.cost == cost(member, reply.usage.prompt_tokens, reply.usage.completion_tokens)


def test_the_deadline_stops_the_generation_and_leaves_no_task(tiny_model, tiny_tokenizer):
    started = []
    forward = tiny_model.forward

    def slow(*args, **kwargs):
        started.append(time.monotonic())
        time.sleep(0.05)
        return forward(*args, **kwargs)

    tiny_model.forward = slow
    pool = pool_of(Member("tiny", "x", 1.0, 1.0, max_tokens=400), tiny_model, tiny_tokenizer)
    threads = set(threading.enumerate())

    async def main():
        reply = await pool.ask("tiny", "stone", 0.5)
        await pool.aclose()
        return reply, asyncio.all_tasks()

    begin = time.monotonic()
    reply, tasks = asyncio.run(main())
    assert kind(reply) == "timeout" and reply.seconds < 1.5
    assert time.monotonic() - begin < 5 and len(started) < 100  # 400 tokens would be 20 s
    assert len(tasks) == 1 and set(threading.enumerate()) <= threads


def test_a_failing_model_is_an_error_in_words_and_its_place_is_logged_once(tiny_model, tiny_tokenizer, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    tiny_model.forward = broken
    pool = pool_of(Member("tiny", "x", 1.0, 1.0, max_tokens=4), tiny_model, tiny_tokenizer)
    for _ in range(2):
        reply = asyncio.run(pool.ask("tiny", "stone", 5.0))
        assert kind(reply) == "malformed reply" and "out of memory" in reply.error
    (record,) = [r for r in caplog.records if r.name == "routers.pool.caller"]
    assert "'tiny'" in record.getMessage() and record.exc_info is not None
    assert isinstance(record.exc_info[1], RuntimeError)


def test_a_prompt_without_room_is_refused(tiny_model, tiny_tokenizer):
    member = Member("tiny", "x", 1.0, 1.0, max_tokens=4, context_length=12)
    reply = asyncio.run(pool_of(member, tiny_model, tiny_tokenizer).ask("tiny", "word " * 40, 5.0))
    assert kind(reply) == "bad request" and "12" in reply.error


def test_sampling_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"'tiny'.*greedy"):
        LocalModel(Member("tiny", "x", 1.0, 1.0, temperature=0.7), tiny_model, tiny_tokenizer)
