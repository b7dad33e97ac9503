"""A trained router behind an OpenAI-compatible endpoint (FastAPI): completions, streaming, models, health, metrics.

The question is the one user message of a request; a trained router answers questions, it does not chat. An agent
answers by itself, a query router has the member answer that it chooses, or names it where there is no pool
(`routers.serving.forward`). Beyond OpenAI's fields, a request may carry ``max_cost_usd`` (a hard cap) and
``cost_weight``, for a policy that was trained with several price sensitivities; and a reply has in ``usage``

    cost_usd    USD of every member's tokens at catalogue prices, and of the policy's own where they have a price
    members     who was asked, in order
    scores      of a query router: the probability of each member

``prompt_tokens`` and ``completion_tokens`` are the policy's own. A stream sends each turn of the policy as
``reasoning_content`` when it is written, then the answer as ``content``. How an answer is sampled is the server's
business: ``temperature``, ``top_p``, ``seed`` and length limits of a request have no effect.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from routers.language.prompts import stated_cost_weight
from routers.router import Answer
from routers.serving.errors import RequestError
from routers.serving.metrics import ServerMetrics

MAX_BODY_BYTES = 1_000_000
_UNSUPPORTED = ("tools", "functions", "logprobs", "audio")


@dataclass(frozen=True)
class Asked:
    """A request that can be answered."""

    question: str
    max_cost_usd: float | None
    cost_weight: float | None
    stream: bool
    include_usage: bool


def create_app(agent: Any, *, name: str = "router", api_key: str | None = None, max_waiting: int = 256) -> FastAPI:
    """The application; closes the agent when it shuts down.

    Args:
        agent: who answers: a `RouterAgent` or a `Forwarder`.
        name: of the model, as clients say it.
        api_key: what clients must send as bearer token; None: nothing.
        max_waiting: requests in work or in the queue; more are refused with status 429.
    """
    metrics = ServerMetrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await agent.aclose()

    app = FastAPI(title="srpo router", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        metrics.finished(error.status)
        return JSONResponse(error.document(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)  # no such path, wrong method
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        return await refused(request, RequestError(error.status_code, str(error.detail), headers=error.headers))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def numbers() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _authorise(request, api_key)
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "srpo"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        _authorise(request, api_key)
        asked = read_request(await _body(request), name, agent.cost_weights)
        if metrics.in_flight >= max_waiting:
            raise RequestError(429, "too many requests are waiting; try again later", code="rate_limit_exceeded")
        if asked.stream:
            return StreamingResponse(_stream(agent, asked, name, metrics), media_type="text/event-stream")
        with metrics.working():
            found = await agent.aanswer(asked.question, asked.max_cost_usd, cost_weight=asked.cost_weight)
        metrics.answered(found)
        if found.stop == "lost":
            raise RequestError(502, f"the pool failed: {found.error}", code="pool_error")
        metrics.finished(200)
        message = {"role": "assistant", "content": found.answer or "", "reasoning_content": _transcript(found)}
        choice = {"index": 0, "message": message, "finish_reason": _reason(found)}
        head = {"id": _id(), "object": "chat.completion", "created": int(time.time()), "model": name}
        return JSONResponse({**head, "choices": [choice], "usage": _usage(found)})

    return app


def read_request(document: Any, name: str, cost_weights: Sequence[float] = ()) -> Asked:
    """Check a request's body.

    Args:
        document: the body, as JSON.
        name: of the model.
        cost_weights: price sensitivities that the policy was trained with.

    Raises:
        RequestError: 400 or 404, with the field that is wrong.
    """
    if not isinstance(document, dict):
        raise RequestError(400, "the body must be a JSON object")
    if document.get("model") != name:
        asked = document.get("model")
        raise RequestError(404, f"there is no model {asked!r}; use {name!r}", "model", "model_not_found")
    for field in _UNSUPPORTED:
        if document.get(field):
            raise RequestError(400, f"{field!r} is not supported by this server", field)
    if document.get("n") not in (None, 1):
        raise RequestError(400, "'n' must be 1", "n")
    stream, options = document.get("stream") or False, document.get("stream_options") or {}
    if not isinstance(stream, bool) or not isinstance(options, dict):
        raise RequestError(400, "'stream' must be true or false, and 'stream_options' an object", "stream")
    cap, weight = document.get("max_cost_usd"), document.get("cost_weight")
    if cap is not None and not (_is_number(cap) and cap >= 0):
        raise RequestError(400, "'max_cost_usd' must be a number of US dollars >= 0", "max_cost_usd")
    try:
        if weight is not None and not _is_number(weight):
            raise ValueError(f"'cost_weight' must be a number; trained with: {', '.join(map(str, cost_weights))}")
        stated_cost_weight(cost_weights, weight)
    except ValueError as error:
        raise RequestError(400, str(error), "cost_weight") from None
    return Asked(_question(document.get("messages")), cap, weight, stream, bool(options.get("include_usage")))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _question(messages: Any) -> str:
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise RequestError(400, "'messages' must hold exactly one message: the question of the user", "messages")
    if messages[0].get("role") != "user":
        raise RequestError(400, "the role of the message must be 'user'; there is no system prompt here", "messages")
    content = messages[0].get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise RequestError(400, "only text can be asked", "messages")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not content.strip():
        raise RequestError(400, "the content of the message must be a text that is not empty", "messages")
    return content


async def _body(request: Request) -> Any:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(400, "the body is not JSON") from None


def _authorise(request: Request, api_key: str | None) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
        raise RequestError(401, "the API key is missing or wrong", code="invalid_api_key")


async def _stream(agent: Any, asked: Asked, name: str, metrics: ServerMetrics) -> AsyncIterator[str]:
    head = {"id": _id(), "object": "chat.completion.chunk", "created": int(time.time()), "model": name}
    loop, turns, gone = asyncio.get_running_loop(), asyncio.Queue[str | None](), False

    def told(text: str) -> None:
        if gone:
            raise ConnectionAbortedError("the client went away")  # nobody asks further members on its behalf
        loop.call_soon_threadsafe(turns.put_nowait, text)

    def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
        return _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    status = 499
    try:
        with metrics.working():
            answering = asyncio.ensure_future(
                agent.aanswer(asked.question, asked.max_cost_usd, cost_weight=asked.cost_weight, on_turn=told)
            )
            answering.add_done_callback(lambda _: turns.put_nowait(None))
            yield chunk({"role": "assistant", "content": ""})
            while (text := await turns.get()) is not None:
                yield chunk({"reasoning_content": text})
            found = await answering
        metrics.answered(found)
        if found.stop == "lost":
            status = 502
            yield _event(RequestError(502, f"the pool failed: {found.error}", code="pool_error").document())
            return
        if found.answer:
            yield chunk({"content": found.answer})
        yield chunk({}, _reason(found))
        if asked.include_usage:
            yield _event({**head, "choices": [], "usage": _usage(found)})
        yield "data: [DONE]\n\n"
        status = 200
    finally:
        gone = True
        metrics.finished(status)


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"


def _id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _reason(found: Answer) -> str:
    """OpenAI's word: "length" where a limit (turns, tokens, deadline, budget) came before an answer."""
    return "stop" if found.stop == "done" else "length"


def _transcript(found: Answer) -> str:
    return "".join(text for owner, text in found.turns if owner == "policy")


def _usage(found: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "total_tokens": found.prompt_tokens + found.completion_tokens,
        "cost_usd": found.cost_usd,
        "members": list(found.members),
        **({"scores": dict(found.scores)} if found.scores else {}),
    }
