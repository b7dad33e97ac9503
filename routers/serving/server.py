"""A router behind an OpenAI-compatible endpoint (FastAPI): chat completions, responses, models, health, metrics, docs.

Who answers is a `Worker` (`routers.serving.served`): `routers.serving.proxy` for routers in front of members,
`routers.serving.agent` for agents. Here a request is let in, read, answered in the shape that it was asked in, and
settled: once, by what it cost, however it ends.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from routers.serving.chat import ChatRequest, read_chat
from routers.serving.errors import RequestError
from routers.serving.response_shape import ResponseShape
from routers.serving.responses import chat_of
from routers.serving.schema import docs_page, openapi
from routers.serving.served import Spent, Worker
from routers.serving.shapes import ChatShape, Shape, json_bytes

MAX_BODY_BYTES = 1_000_000
_EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}


def create_app(
    worker: Worker,
    *,
    name: str = "router",
    api_key: str | None = None,
    max_waiting: int = 256,
    public_metrics: bool = False,
) -> FastAPI:
    """The application; closes the worker when it shuts down.

    Args:
        worker: who answers.
        name: of the model, as clients say it.
        api_key: what clients must send as bearer token; None: nothing.
        max_waiting: requests in work or in the queue; more are refused with status 429.
        public_metrics: `/metrics` needs no key.
    """
    metrics = worker.metrics

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await worker.aclose()

    app = FastAPI(title="srpo router", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        metrics.finished(error.status)
        return _json(error.document(), error.status, error.headers)

    @app.exception_handler(HTTPException)  # no such path, wrong method
    async def unknown(request: Request, error: HTTPException) -> Response:
        return await refused(
            request, RequestError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        )

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def numbers(request: Request) -> PlainTextResponse:
        if not public_metrics:
            _authorise(request, api_key)
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _authorise(request, api_key)
        return {"object": "list", "data": [_model(name)]}

    @app.get("/v1/models/{asked:path}")
    async def model(request: Request, asked: str) -> dict[str, Any]:
        _authorise(request, api_key)
        if asked != name:
            raise RequestError(404, f"there is no model {asked!r}; use {name!r}", "model", "model_not_found")
        return _model(name)

    @app.get("/openapi.json")
    async def described() -> Response:
        return _json(openapi(name))

    @app.get("/docs")
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(name))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        _authorise(request, api_key)
        asked = read_chat(await _body(request), name)
        return _Reply(worker, asked, ChatShape(), max_waiting)

    @app.post("/v1/responses", response_model=None)
    async def respond(request: Request) -> Response:
        _authorise(request, api_key)
        document = await _body(request)
        return _Reply(worker, read_chat(chat_of(document), name), ResponseShape(document, name), max_waiting)

    return app


class _Reply(Response):
    """Does its work while it is sent, so that what admits a request spans all of it, a stream too."""

    def __init__(self, worker: Worker, asked: ChatRequest, shape: Shape, max_waiting: int) -> None:
        super().__init__()
        self._worker, self._asked, self._shape = worker, asked, shape
        self._metrics, self._max_waiting = worker.metrics, max_waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._work(scope, receive, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.wait({work, gone})

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        spent = Spent()
        self._worker.reads(self._asked)
        if self._metrics.in_flight >= self._max_waiting:
            raise RequestError(429, "too many requests are waiting; try again later", code="rate_limit_exceeded")
        with self._metrics.working():
            async with self._worker.serve(self._asked, spent) as served:
                headers, document = served.headers, served.document
                if served.chunks is not None:
                    await send(_start(200, {**headers, **_EVENTS}))
                    async with aclosing(served.chunks) as chunks:
                        await self._stream(chunks, send)
        if document is None:  # the end comes when all is settled
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await _json(self._shape.whole(document), headers=headers)(scope, receive, send)
            self._metrics.finished(200)

    async def _stream(self, chunks: AsyncGenerator[dict[str, Any] | None, None], send: Send) -> None:
        status = 499
        try:
            for event in self._shape.begin():
                await send(_part(event))
            async for chunk in chunks:
                for event in [b": \n\n"] if chunk is None else self._shape.chunk(chunk):
                    await send(_part(event))
            for event in self._shape.end():
                await send(_part(event))
            status = 200
        except RequestError as error:  # the client has its status already: an event says what went wrong
            status = error.status
            for event in self._shape.failed(error):
                await send(_part(event))
        finally:
            self._metrics.finished(status)


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(document: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_bytes(document), status, headers, media_type="application/json")


def _start(status: int, headers: dict[str, str]) -> dict[str, Any]:
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": pairs}


def _part(event: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": event, "more_body": True}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "srpo"}


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
