"""Routed experts of vLLM and SGLang: recorded shapes, faults, and a whole loop over HTTP with a real tiny model."""

from __future__ import annotations

import base64
import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import httpx
import numpy
import pytest
import torch
from engine_server import EngineServer
from moe_families import build
from torch import Tensor

from srpo.replay.engines import align, sglang_generate, sglang_routes, vllm_complete, vllm_routes
from srpo.replay.expert_table import RouterSpec, flip_statistics
from srpo.replay.replay import RoutingReplay

SPEC = RouterSpec(layers=(1, 2), num_layers=3, top_k=2, num_experts=8)  # one dense layer before two MoE layers
PROMPT = [5, 6, 7, 8, 9]


def engine_table(rows: int, layers: int = 3, columns: int = 2) -> Tensor:
    """As an engine's buffer: zeros in the dense layer, elsewhere different rows; the columns behind k are shared."""
    first = (torch.arange(rows)[:, None] + 2 * torch.arange(layers)) % 7
    table = torch.stack([first, first + 1, *[torch.full_like(first, 8 + i) for i in range(columns - 2)]], dim=-1)
    if layers == 3:
        table[:, 0] = 0
    return table


def expected(rows: int) -> Tensor:
    """Our rows of `engine_table`: its MoE layers, then one native row."""
    return torch.cat([engine_table(rows)[:, 1:], torch.full((1, 2, 2), -1)]).to(torch.int16)


def base64_int32(table: Tensor) -> str:
    return base64.b64encode(table.numpy().astype("<i4").tobytes()).decode()


@pytest.mark.parametrize("columns", [2, 3], ids=["plain", "fused-shared-expert"])
def test_all_layers_are_picked_by_their_number_and_moe_layers_by_their_order(columns: int) -> None:
    whole = engine_table(6, columns=columns)
    assert torch.equal(align(whole, 7, SPEC), expected(6))
    assert torch.equal(align(whole[:, 1:], 7, SPEC), expected(6))
    assert align(whole, 7, SPEC).dtype == torch.int16


def test_vllm_shapes_of_all_versions_give_the_same_rows() -> None:
    whole = engine_table(6).numpy().astype("int16")  # prompt of 4, sample of 3
    early = vllm_routes(whole, 7, SPEC)
    last = numpy.full_like(whole[:1], 3)  # 0.21 may have a row for the token that was never fed
    split = vllm_routes(numpy.concatenate([whole[4:], last]), 7, SPEC, whole[:4], 4)
    shorter = vllm_routes(whole[4:].tolist(), 7, SPEC, whole[:4].tolist(), 4)
    for found in (early, split, shorter):
        assert torch.equal(found, expected(6))
    one_token = vllm_routes([], 5, SPEC, whole[:4].tolist(), 4)  # a sample of one token: nothing of it was fed
    assert torch.equal(one_token, expected(4))
    with pytest.raises(ValueError, match="prompt_routed_experts of 4 tokens for a prompt of 5"):
        vllm_routes(whole[4:], 7, SPEC, whole[:4], 5)


@pytest.mark.parametrize("columns", [2, 3])
def test_sglang_buffers(columns: int) -> None:
    whole = engine_table(6, columns=columns)
    assert torch.equal(sglang_routes({"routed_experts": base64_int32(whole)}, 7, SPEC), expected(6))
    assert torch.equal(sglang_routes({"routed_experts": base64_int32(whole[:, 1:])}, 7, SPEC), expected(6))
    later = {"routed_experts": base64_int32(whole[4:]), "routed_experts_start_len": 4}
    held = expected(6)[:4]
    assert torch.equal(sglang_routes(later, 7, SPEC, held), expected(6))
    with pytest.raises(ValueError, match="start at token 4, but 3 rows are held"):
        sglang_routes(later, 7, SPEC, held[:3])


def test_engines_that_return_nothing_name_the_flag() -> None:
    with pytest.raises(ValueError, match=r"--enable-return-routed-experts .*enable_return_routed_experts=True"):
        vllm_routes(None, 7, SPEC)
    with pytest.raises(ValueError, match="SGLang with --enable-return-routed-experts and ask for return_routed_exp"):
        sglang_routes({}, 7, SPEC)


def spoiled(**changes: Any) -> Tensor:
    table = engine_table(6)
    for place, value in changes.values():
        table[place] = value
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (engine_table(5), "routed experts of 5 tokens for a sequence of 7 tokens .* expected 6"),  # a lost prefill row
        (engine_table(8), "routed experts of 8 tokens"),
        (engine_table(6, layers=4), "4 layers, but the model has 3 layers, 2 of them with experts"),  # a draft layer
        (engine_table(6)[..., :1], "1 experts per token, but the model chooses 2"),
        (torch.cat([engine_table(6), engine_table(6)[..., :1]], -1), "the rest is no fused shared expert"),
        (torch.zeros(6, 3, 2, dtype=torch.long), "names an expert twice"),  # prefix cache hits that nobody filled
        (spoiled(a=((3, 1), torch.tensor([8, 1]))), r"row \[3, 0\] .* outside 0..7"),  # a physical id, after EPLB
        (spoiled(a=((3, 1), torch.tensor([4, 4]))), r"row \[3, 0\] .* names an expert twice"),
        (engine_table(6)[0], "expected .tokens, layers, experts per token."),
    ],
)
def test_tables_that_cannot_be_right_are_refused(table: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vllm_routes(table, 7, SPEC)


def test_a_buffer_of_another_size_is_refused() -> None:
    for table, why in ((engine_table(5), "wrong size"), (engine_table(6, layers=5), "no fused shared expert")):
        with pytest.raises(ValueError, match=rf"SGLang returned .* expert ids for 6 tokens .* 0 layouts .*{why}"):
            sglang_routes({"routed_experts": base64_int32(table)}, 7, SPEC)


def trained(replay: RoutingReplay, model: Any, ids: list[int], routes: Tensor) -> tuple[float, Tensor]:
    """(flip rate of a replayed training forward, log-probabilities of all tokens but the first)."""
    tokens = torch.tensor([ids])
    with torch.no_grad(), replay.replay(routes[None], measure=True):
        scores = model(input_ids=tokens).logits.log_softmax(-1)
    flips = flip_statistics(replay.divergence(), replay.spec.top_k)["flip_rate"].item()
    return flips, scores[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]


@pytest.mark.parametrize("form", ["npy", "lists"])
@pytest.mark.parametrize("layout", [{}, {"all_layers": False}, {"shared": 1}], ids=["all", "moe", "shared"])
def test_vllm_over_http(form: str, layout: dict[str, Any]) -> None:
    """Sampled there, trained here: same weights in float32, so no route flips and log-probabilities agree."""
    model = build("deepseek_v3")
    replay = RoutingReplay(model)
    with EngineServer(build("deepseek_v3"), form, **layout) as server:
        samples = vllm_complete(server.url, "tiny", PROMPT, replay.spec, n=3, max_tokens=4)
    assert len({sample.ids for sample in samples}) == 3
    assert server.bodies[0]["prompt"] == PROMPT and server.bodies[0]["return_token_ids"] is True
    for sample in samples:
        flips, logprobs = trained(replay, model, [*PROMPT, *sample.ids], sample.routes)
        assert flips == 0 and (sample.routes[-1] == -1).all() and (sample.routes[:-1] >= 0).all()
        torch.testing.assert_close(logprobs[len(PROMPT) - 1 :], torch.tensor(sample.logprobs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", [{}, {"all_layers": False}, {"shared": 1}], ids=["all", "moe", "shared"])
def test_sglang_over_http_in_two_turns(layout: dict[str, Any]) -> None:
    model = build("deepseek_v3")
    replay = RoutingReplay(model)
    with EngineServer(build("deepseek_v3"), **layout) as server:
        first = sglang_generate(server.url, PROMPT, replay.spec, max_new_tokens=4)
        context = [*PROMPT, *first.ids, 20, 21]  # an observation follows
        second = sglang_generate(server.url, context, replay.spec, held=first.routes[:-1], max_new_tokens=3)
    assert [body["routed_experts_start_len"] for body in server.bodies] == [0, len(PROMPT) + 3]
    assert torch.equal(second.routes[: len(first.routes) - 1], first.routes[:-1])
    flips, logprobs = trained(replay, model, [*context, *second.ids], second.routes)
    assert flips == 0 and len(second.routes) == len(context) + 3 and (second.routes[:-1] >= 0).all()
    torch.testing.assert_close(logprobs[-3:], torch.tensor(second.logprobs), atol=1e-5, rtol=0)


def test_vllm_in_two_turns_keeps_the_first_turns_rows() -> None:
    with EngineServer(build("deepseek_v3")) as server:
        spec = server.replay.spec
        (first,) = vllm_complete(server.url, "tiny", PROMPT, spec, max_tokens=4)
        held = first.routes[:-1].flip(-1)  # the same experts in another order, to be told apart
        (second,) = vllm_complete(server.url, "tiny", [*PROMPT, *first.ids, 20], spec, held, max_tokens=2)
    assert torch.equal(second.routes[: len(held)], held)
    assert (second.routes[len(held) : -1] >= 0).all() and len(second.routes) == len(PROMPT) + 4 + 1 + 2


def test_a_server_without_the_flag_and_a_server_error() -> None:
    with EngineServer(build("deepseek_v3")) as server:
        spec = server.replay.spec
        server.enabled = False
        with pytest.raises(ValueError, match="vLLM returned no routed experts: start vLLM with --enable"):
            vllm_complete(server.url, "tiny", PROMPT, spec, max_tokens=2)
        with pytest.raises(ValueError, match="SGLang returned no routed experts"):
            sglang_generate(server.url, PROMPT, spec, max_new_tokens=2)
        server.enabled, server.spoil = True, torch.zeros_like  # what an unfilled buffer looks like
        with pytest.raises(ValueError, match="names an expert twice"):
            sglang_generate(server.url, PROMPT, spec, max_new_tokens=2)
        with pytest.raises(httpx.HTTPStatusError, match=r"answered 404: .*no route /nowhere/generate"):
            sglang_generate(server.url + "/nowhere", PROMPT, spec, max_new_tokens=2)


@pytest.mark.parametrize("body", [b'{"error": "out of memory"}', b"<html>", b'{"choices": []}', b"[]"])
def test_an_error_with_status_200_is_told_in_the_servers_words(body: bytes) -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ValueError, match=f"without 'choices': {re.escape(body.decode())}"):
            vllm_complete(url, "m", [1], SPEC)
        with pytest.raises(ValueError, match=f"without 'meta_info': {re.escape(body.decode())}"):
            sglang_generate(url, [1], SPEC)
        server.shutdown()
