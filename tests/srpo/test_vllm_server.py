"""vLLM's own OpenAI-compatible server as a pool member: a real process, on the CPU, with a tiny model."""

import asyncio

import pytest
import torch
from vllm_server import vllm_server

from routers.data.catalogue import Member
from routers.pool import Ledger, live_pool
from srpo.scratch_lm import tiny_causal_lm, train_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
QUERIES = [f"say {word}" for word in ("red", "green", "blue", "one", "two", "cat", "dog", "sun")]


def network_and_tokenizer():
    """Peaked, so that other kernels choose the same tokens; with this seed one reply ends before its limit."""
    tokenizer = train_tokenizer(QUERIES, vocab_size=290)
    network = tiny_causal_lm(tokenizer, hidden=64, layers=2, heads=2, intermediate=128, seed=3).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return network, tokenizer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its address."""
    folder = tmp_path_factory.mktemp("served")
    for part in network_and_tokenizer():
        part.save_pretrained(folder)
    with vllm_server(folder, folder / "server.log", "--max-model-len", "256") as address:
        yield f"{address}/v1"


def test_a_vllm_server_is_a_member_whose_usage_is_exact(server):
    """Every reply is billed by its real tokens: those of the chat template around the query, and those written."""
    network, tokenizer = network_and_tokenizer()
    member = Member("tiny", "small", 10.0, 20.0, base_url=server, model="smollm2", max_tokens=12, concurrency=8)
    ledger = Ledger()
    pool = live_pool({"tiny": member}, agent_prompt="{query}", ledger=ledger)

    async def main():
        async with pool:
            return await asyncio.gather(*(pool.ask("tiny", query, 120.0) for query in QUERIES * 2))

    replies = asyncio.run(main())
    paid = 0.0
    for query, reply in zip(QUERIES * 2, replies, strict=True):
        assert reply.error is None, reply
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": query}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        own = network.generate(**prompt, do_sample=False, max_new_tokens=12, eos_token_id=tokenizer.eos_token_id)
        read = prompt["input_ids"].shape[1]
        written = own.shape[1] - read
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (read, written)
        expected = (read * 10 + written * 20) / 1e6
        assert reply.cost == pytest.approx(expected, rel=1e-12)
        paid += expected
    assert ledger.spent_usd == pytest.approx(paid)
    assert len({reply.usage.completion_tokens for reply in replies}) > 1, "some ended by themselves"
    assert [r.text for r in replies[: len(QUERIES)]] == [r.text for r in replies[len(QUERIES) :]], "greedy"
