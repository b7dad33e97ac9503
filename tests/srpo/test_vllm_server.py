"""vLLM's own OpenAI-compatible server as a pool member: a real process, on the CPU, with a tiny model."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from routers.data.catalogue import Member
from routers.pool import Ledger, live_pool
from srpo.scratch_lm import tiny_causal_lm, train_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
QUERIES = [f"say {word}" for word in ("red", "green", "blue", "one", "two", "cat", "dog", "sun")]
PATIENCE = 800.0
"""Seconds for a start, which is minutes of nothing but imports where many processes share two cores. A server that
ended is seen at once."""


def network_and_tokenizer():
    """Peaked, so that other kernels choose the same tokens; with this seed one reply ends before its limit."""
    tokenizer = train_tokenizer(QUERIES, vocab_size=290)
    network = tiny_causal_lm(tokenizer, hidden=64, layers=2, heads=2, intermediate=128, seed=3).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return network, tokenizer


def healthy(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its address."""
    folder = tmp_path_factory.mktemp("served")
    for part in network_and_tokenizer():
        part.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command += ["--max-num-seqs", "16", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("log") / "server.log"
    # The engine's worker in the engine's process: one process fewer that imports vLLM, which is most of what a start
    # takes. And no core of its own, which others may be using.
    quick = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    environment = {**os.environ, **quick, "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        until = time.monotonic() + PATIENCE
        while not healthy(port):
            state = "ended" if process.poll() is not None else "is not up"
            if state == "ended" or time.monotonic() > until:
                pytest.fail(f"the server {state}; the end of what it said:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):  # its engine is a process of its own
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def test_a_vllm_server_is_a_member_whose_usage_is_exact(server):
    """Every reply is billed by its real tokens: those of the chat template around the query, and those written."""
    network, tokenizer = network_and_tokenizer()
    member = Member("tiny", "small", 10.0, 20.0, base_url=server, max_tokens=12, concurrency=8)
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
