"""vLLM behind the generator protocol: TRL's own engine and client, against a real server that speaks vLLM's protocol.

TRL's server mode sends weights over NCCL, which needs GPUs. The server decodes with the tiny model; everything between
it and the rollout (`VLLMGenerator`, TRL's `VLLMGeneration.generate` in server mode, its `VLLMClient`) is real.
The colocated mode runs on a live engine in tests/srpo/test_vllm_live.py.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from accelerate import Accelerator
from core_helpers import model, tokenizer
from episode_worlds import ScriptedEnvironment
from trl.generation import vllm_client
from trl.generation.vllm_generation import VLLMGeneration

from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.loop import Limits, play
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.turns import Request
from srpo.rollout.vllm import VLLMGenerator
from srpo.types import Observation

EOS = tokenizer().eos_token_id


class Server(ThreadingHTTPServer):
    """/health, /v1/models and /v1/completions of `vllm serve`, greedy, for prompts of token ids."""

    def __init__(self, network):
        super().__init__(("127.0.0.1", 0), Handler)
        self.network, self.requests = network, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def complete(self, body):
        self.requests.append(body)
        stop = tuple(body.get("stop", ()))
        allowed = body.get("allowed_token_ids")
        made = TransformersGenerator(
            self.network, tokenizer(), Sampling(temperature=body["temperature"], stop=stop), eos_ids=[EOS]
        )
        requests = [
            Request(i, tuple(ids), f"{i}", body["max_tokens"], None if allowed is None else tuple(allowed))
            for i, ids in enumerate(body["prompt"])
        ]
        choices = []
        for ids, sample in zip(body["prompt"], made.generate(requests), strict=True):
            names = [f"token_id:{i}" for i in sample.ids]
            logprobs = {
                "tokens": names,
                "token_logprobs": list(sample.logprobs),
                "top_logprobs": [{n: p} for n, p in zip(names, sample.logprobs, strict=True)],
            }
            choices.append({"prompt_token_ids": ids, "token_ids": list(sample.ids), "logprobs": logprobs})
        return {"choices": choices}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({"data": [{"id": "tiny"}]} if self.path == "/v1/models" else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(self.server.complete(body))

    def reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def policy():
    return model(layers=2).eval()


@pytest.fixture
def server(policy):
    running = Server(policy)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def engine(server, monkeypatch):
    # The two classes refuse to be made without vLLM, though the server mode needs none of it in this process.
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *_, **__: True)
    made = object.__new__(VLLMGeneration)
    made.mode, made.accelerator, made.vllm_client = "server", Accelerator(cpu=True), vllm_client.VLLMClient(server.url)
    made.temperature, made.top_p, made.top_k, made.min_p, made.repetition_penalty = 0.0, 1.0, 0, None, 1.0
    made.max_completion_length, made.logprobs, made.structured_outputs_regex = 99, 0, None
    made.generation_kwargs = {"spaces_between_special_tokens": False}
    return made


def generator(engine, stop=()):
    return VLLMGenerator(engine, tokenizer(), Sampling(temperature=0, stop=stop), eos_ids=[EOS])


def test_turns_are_those_of_the_engine(engine, server, policy):
    """Free text with two limits, and two sets of choices: three calls, each row cut to its own limit."""
    requests = [
        Request(0, (5, 6, 7), "a", 6),
        Request(1, (5, 6, 7, 8), "b", 3),
        Request(2, (9, 10), "c", 5, choices=(30, 31)),
        Request(3, (9, 10, 11), "d", 5, choices=(40, 41, 42)),
    ]
    ours = TransformersGenerator(policy, tokenizer(), Sampling(temperature=0), eos_ids=[EOS]).generate(requests)
    found = generator(engine).generate(requests)
    for a, b in zip(found, ours, strict=True):
        assert a.ids == b.ids and a.ended == b.ended and a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    sent = [(r["max_tokens"], r.get("allowed_token_ids"), len(r["prompt"])) for r in server.requests]
    assert sent == [(6, None, 2), (1, [30, 31], 1), (1, [40, 41, 42], 1)]
    free, *choices = server.requests
    assert free["spaces_between_special_tokens"] is False and free["n"] == 1, "the user's own settings are kept"
    assert free["stop_token_ids"] == [EOS] and free["ignore_eos"] is True, "the trainer's end tokens, no others"
    for body in choices:  # at the temperature alone
        assert [body[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty")] == [1.0, 0, 0.0, 1.0]
        assert "spaces_between_special_tokens" not in body and "structured_outputs" not in body
    assert engine.max_completion_length == 99 and engine.structured_outputs_regex is None, "left as it was"
    assert engine.generation_kwargs == {"spaces_between_special_tokens": False}


def test_stop_strings_are_sent_and_kept_in_the_turn(engine, server, policy):
    request = Request(0, (5, 6, 7), "a", 30)
    plain = TransformersGenerator(policy, tokenizer(), Sampling(temperature=0), eos_ids=[]).generate([request])[0].ids
    text = [tokenizer().decode([i], skip_special_tokens=True) for i in plain]
    n = next(i for i, t in enumerate(text) if i > 2 and t.isascii() and t.strip() and t not in "".join(text[:i]))
    sample = generator(engine, (text[n],)).generate([request])[0]
    assert sample.ids == plain[: n + 1] and sample.ended
    assert server.requests[0]["stop"] == [text[n]] and server.requests[0]["include_stop_str_in_output"] is True


def test_a_rollout_over_vllm_is_the_rollout_over_transformers(engine, policy):
    """Greedy, several turns: the same trajectories, token for token."""

    def script(row, t, text):
        return Observation(end="done") if t == row["i"] % 3 else Observation(f"{len(text)} more", before="<|im_end|>")

    rows, prompts, seeds = (
        [{"i": i} for i in range(6)],
        [(5, 6, 7 + i % 2) for i in range(6)],
        [str(i) for i in range(6)],
    )
    limits = Limits(turns=4, tokens=60, observation_tokens=8, step_seconds=5, turn_tokens=7)
    plain = TransformersGenerator(policy, tokenizer(), Sampling(temperature=0), eos_ids=[EOS])
    found = []
    for made in (generator(engine), plain):
        environment = ScriptedEnvironment(script, lambda t: ["a", "b"] if t == 1 else None)
        found.append(play(environment, rows, prompts, seeds, made, tokenizer(), limits))
    for a, b in zip(*found, strict=True):
        assert [(t.owner, t.ids, t.choices) for t in a.turns] == [(t.owner, t.ids, t.choices) for t in b.turns]
        assert a.columns == b.columns
    assert torch.is_grad_enabled()
