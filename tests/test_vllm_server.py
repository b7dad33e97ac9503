"""vLLM's own OpenAI-compatible server as a pool member: a real process, on the CPU, with a tiny model."""

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.request

import core_helpers as core
import pytest

from routers.catalogue import Member
from routers.pool import Ledger, live_pool

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
QUERIES = [f"say {word}" for word in core.WORDS]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address with /v1, folder of the model)."""
    folder = tmp_path_factory.mktemp("served")
    core.model(layers=2, hidden=64).save_pretrained(folder)
    core.tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command += ["--max-num-seqs", "16", "--host", "127.0.0.1", "--port", str(port)]
    words = tmp_path_factory.mktemp("log") / "server.log"
    with words.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
        )
    try:
        for _ in range(600):
            assert process.poll() is None, words.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the server did not start: {words.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def test_a_vllm_server_is_a_member_whose_usage_is_exact(server):
    """Every reply is billed by its real tokens: those of the chat template around the query, and those written."""
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
        prompt = core.tokenizer().apply_chat_template(
            [{"role": "user", "content": query}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert reply.usage.prompt_tokens == len(prompt) and 1 <= reply.usage.completion_tokens <= 12
        expected = (len(prompt) * 10 + reply.usage.completion_tokens * 20) / 1e6
        assert reply.cost == pytest.approx(expected, rel=1e-12)
        paid += expected
    assert ledger.spent_usd == pytest.approx(paid)
    assert [r.text for r in replies[: len(QUERIES)]] == [r.text for r in replies[len(QUERIES) :]], "greedy"
