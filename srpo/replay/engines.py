"""Routed experts that vLLM and SGLang return with a sample, checked and brought into our layout.

Engines differ, and between versions, in what a row and a layer of their table is. What is accepted:

========== ==================================== ============================ ==========================================
engine     field                                rows                         form
========== ==================================== ============================ ==========================================
vLLM       ``choice.routed_experts``            prompt and sample, less the  array (offline), base64 of ``numpy.save``
                                                last token: S - 1            (HTTP, from 0.22)
vLLM 0.21  ``response.prompt_routed_experts``,  P; then G or G - 1           array (offline), nested lists (HTTP)
           ``choice.routed_experts``
SGLang     ``meta_info.routed_experts``         S - 1 - start                base64 of int32
========== ==================================== ============================ ==========================================

Layers: all decoder layers (ours are picked by their number) or the MoE layers only (taken in their order). Columns
behind the k-th are the slots of fused shared experts, whose ids lie behind those of the routed experts; they are
dropped. Ids must be logical ones, as the checkpoint counts (with expert-parallel load balancing: before placement).

Sources: docs.vllm.ai (v0.21.0 training/routed_experts_replay; latest training/routed_experts), vllm pull requests
28284, 38939 and 51906, sglang pull requests 12162 and 17434. Seen in vLLM 0.30 on a CPU, offline
(tests/srpo/test_vllm_live.py): the first line of the table, and that row t belongs to token t as it was fed. Inferred
for the others, because the sources do not say it: the same; and a G-th row of vLLM 0.21 is the sample's last token,
which was not fed. No other engine has run here; the tests' server answers in these formats.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy
import torch
from torch import Tensor

from srpo.replay.expert_table import RouterSpec, append_routes, check_routes, fit_rows

VLLM_FLAG = "start vLLM with --enable-return-routed-experts (offline: LLM(..., enable_return_routed_experts=True))"
SGLANG_FLAG = "start SGLang with --enable-return-routed-experts and ask for return_routed_experts"


@dataclass(frozen=True)
class EngineSample:
    """One completion: ids, their log-probabilities (nats), and the routes [P + G, L, k] of prompt and completion."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    routes: Tensor


def align(table: Tensor, tokens: int, spec: RouterSpec, start: int = 0) -> Tensor:
    """An engine's table -> our rows for the tokens from `start` on.

    Args:
        table: ``[R, layers, columns]`` integers; R = tokens - start - 1 (the last token is never fed) or one more.
        tokens: of the whole sequence.
        start: first token that the table covers.

    Returns:
        ``[tokens - start, L, k]`` int16; the last row is -1.

    Raises:
        ValueError: another number of rows, layers or columns than the model's; routes that `check_routes` refuses.
    """
    if table.dim() != 3:
        raise ValueError(
            f"routed experts have shape {tuple(table.shape)}, expected (tokens, layers, experts per token)"
        )
    rows, layers, columns = table.shape
    fed = tokens - start - 1
    if rows not in (fed, fed + 1):
        raise ValueError(
            f"routed experts of {rows} tokens for a sequence of {tokens} tokens from token {start} on, expected {fed} "
            f"(all but the last): rows are missing in the middle, or prompt and sample were not those of this request"
        )
    if layers == spec.num_layers:
        table = table[:, list(spec.layers)]
    elif layers != len(spec.layers):
        raise ValueError(
            f"routed experts of {layers} layers, but the model has {spec.num_layers} layers, {len(spec.layers)} of "
            "them with experts (draft or multi-token-prediction layers?)"
        )
    if columns < spec.top_k:
        raise ValueError(f"{columns} experts per token, but the model chooses {spec.top_k}")
    shared = table[:fed, :, spec.top_k :]
    if bool(((shared >= 0) & (shared < spec.num_experts)).any()):
        raise ValueError(
            f"{columns} experts per token, but the model chooses {spec.top_k}, and the rest is no fused shared expert "
            f"(ids from {spec.num_experts} on)"
        )
    routes = table[:fed, :, : spec.top_k]
    check_routes(routes, spec)
    return fit_rows(routes.to(torch.int16), tokens - start)


def vllm_routes(
    routes: Any,
    tokens: int,
    spec: RouterSpec,
    prompt_routes: Any = None,
    prompt_tokens: int | None = None,
    held: Tensor | None = None,
) -> Tensor:
    """What vLLM returned for one completion.

    Args:
        routes: ``routed_experts`` of the choice (HTTP) or `CompletionOutput` (offline).
        tokens: of prompt and completion.
        prompt_routes: ``prompt_routed_experts`` of the response or `RequestOutput` (0.21); None in other versions.
        prompt_tokens: of the prompt; needed with `prompt_routes`.
        held: routes ``[T0, L, k]`` of the tokens that earlier turns have fed. vLLM reports them again; the rows that
            the earlier log-probabilities came from are kept.

    Returns:
        ``[tokens, L, k]`` int16.

    Raises:
        ValueError: nothing was returned, or what `align` refuses.
    """
    if routes is None:
        raise ValueError(f"vLLM returned no routed experts: {VLLM_FLAG}")
    table = _table(routes)
    if prompt_routes is not None:
        prompt = _table(prompt_routes)
        if len(prompt) != prompt_tokens:
            raise ValueError(f"prompt_routed_experts of {len(prompt)} tokens for a prompt of {prompt_tokens}")
        table = torch.cat([prompt, table]) if table.numel() else prompt
    aligned = align(table, tokens, spec)
    return aligned if held is None else append_routes(held, aligned[len(held) :], len(held))


def sglang_routes(meta_info: Mapping[str, Any], tokens: int, spec: RouterSpec, held: Tensor | None = None) -> Tensor:
    """What SGLang returned for one completion.

    Args:
        meta_info: of the response.
        tokens: of prompt and completion.
        held: routes ``[T0, L, k]`` of the tokens that earlier turns have fed, where the request asked for rows from
            there on (``routed_experts_start_len``).

    Returns:
        ``[tokens, L, k]`` int16.

    Raises:
        ValueError: nothing was returned, the rows do not continue `held`, or what `align` refuses.
    """
    encoded = meta_info.get("routed_experts")
    if encoded is None:
        raise ValueError(f"SGLang returned no routed experts: {SGLANG_FLAG}")
    start = int(meta_info.get("routed_experts_start_len") or 0)
    numbers = torch.from_numpy(numpy.frombuffer(base64.b64decode(encoded), dtype="<i4").copy())
    rows = tokens - start - 1
    # A flat buffer: its layers are either axis that `align` accepts.
    found: list[Tensor] = []
    refused: list[ValueError] = []
    for layers in dict.fromkeys((spec.num_layers, len(spec.layers))):
        if rows > 0 and len(numbers) and len(numbers) % (rows * layers) == 0:
            try:
                found.append(align(numbers.view(rows, layers, -1), tokens, spec, start))
            except ValueError as error:
                refused.append(error)
    if len(found) != 1:
        raise ValueError(
            f"SGLang returned {len(numbers)} expert ids for {rows} tokens (all but the last of {tokens}, from {start} "
            f"on), which fit {len(found)} layouts of {spec.num_layers} or {len(spec.layers)} layers with {spec.top_k} "
            f"experts or more: {'; '.join(map(str, refused)) or 'wrong size'}"
        )
    return append_routes(found[0][:0] if held is None else held, found[0], start)


def vllm_complete(
    url: str,
    model: str,
    prompt: Sequence[int],
    spec: RouterSpec,
    held: Tensor | None = None,
    timeout: float = 600.0,
    **sampling: Any,
) -> list[EngineSample]:
    """``POST /v1/completions`` of a vLLM server; one sample per choice.

    Args:
        url: of the server, without a path.
        prompt: token ids, all turns so far.
        held: routes of the tokens of `prompt` that earlier turns have fed (without their last, unfed one).
        sampling: fields of the request (``n``, ``temperature``, ``max_tokens``, ...).

    Raises:
        httpx.HTTPStatusError: the server refused.
        ValueError: token ids, log-probabilities or routes are missing or do not fit together.
    """
    body = {"model": model, "prompt": list(prompt), "logprobs": 1, "return_token_ids": True} | sampling
    response = _post(f"{url.rstrip('/')}/v1/completions", body, timeout, "choices")
    samples = []
    for choice in response["choices"]:
        ids = choice.get("token_ids")
        if ids is None:
            raise ValueError("vLLM returned no token_ids: it does not know return_token_ids, use 0.11 or newer")
        logprobs = choice["logprobs"]["token_logprobs"]
        routes = vllm_routes(
            choice.get("routed_experts"),
            len(prompt) + len(ids),
            spec,
            response.get("prompt_routed_experts"),
            len(prompt),
            held,
        )
        samples.append(_sample(ids, logprobs, routes))
    return samples


def sglang_generate(
    url: str,
    prompt: Sequence[int],
    spec: RouterSpec,
    held: Tensor | None = None,
    timeout: float = 600.0,
    **sampling: Any,
) -> EngineSample:
    """``POST /generate`` of an SGLang server.

    Args:
        url: of the server, without a path.
        prompt: token ids, all turns so far.
        held: routes of the tokens of `prompt` that earlier turns have fed; only later rows are asked for.
        sampling: ``sampling_params`` of the request (``temperature``, ``max_new_tokens``, ...).

    Raises:
        httpx.HTTPStatusError: the server refused.
        ValueError: routes are missing or do not fit.
    """
    body = {
        "input_ids": list(prompt),
        "sampling_params": sampling,
        "return_logprob": True,
        "return_routed_experts": True,
        "routed_experts_start_len": 0 if held is None else len(held),
    }
    response = _post(f"{url.rstrip('/')}/generate", body, timeout, "meta_info")
    meta = response["meta_info"]
    logprobs, ids = zip(*[(entry[0], entry[1]) for entry in meta["output_token_logprobs"]], strict=True)
    asked = {"routed_experts_start_len": body["routed_experts_start_len"]}  # not every version answers with it
    return _sample(ids, logprobs, sglang_routes(asked | meta, len(prompt) + len(ids), spec, held))


def _post(url: str, body: Mapping[str, Any], timeout: float, field: str) -> dict[str, Any]:
    """The answer, which has ``field``; engines also send errors with status 200."""
    response = httpx.post(url, json=body, timeout=timeout)
    if response.is_error:
        raise httpx.HTTPStatusError(
            f"{url} answered {response.status_code}: {response.text[:300]}",
            request=response.request,
            response=response,
        )
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or not answer.get(field):
        raise ValueError(f"{url} answered without {field!r}: {response.text[:300]}")
    return answer


def _sample(ids: Sequence[int], logprobs: Sequence[float], routes: Tensor) -> EngineSample:
    if len(ids) != len(logprobs):
        raise ValueError(f"the engine returned {len(ids)} token ids, but {len(logprobs)} log-probabilities")
    return EngineSample(tuple(ids), tuple(logprobs), routes)


def _table(field: Any) -> Tensor:
    """[rows, layers, columns] of an array, of nested lists, or of base64 text of numpy's file format."""
    if isinstance(field, str):
        field = numpy.load(io.BytesIO(base64.b64decode(field)), allow_pickle=False)
    return torch.as_tensor(numpy.asarray(field).astype(numpy.int64))
