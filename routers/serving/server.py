"""A router behind an OpenAI-compatible endpoint (FastAPI): chat completions, responses, models, health, metrics, docs.

Who answers is a `Worker` (`routers.serving.served`): `routers.serving.proxy` for routers in front of members,
`routers.serving.agent` for agents. Here a request is let in, read, answered in the shape that it was asked in, and
settled: once, by what it cost, however it ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from routers.serving.chat import CONVERSATION_HEADER, ChatRequest, read_chat
from routers.serving.errors import RequestError
from routers.serving.gate import Gate, GateLimits
from routers.serving.keys import Key, Keys
from routers.serving.page import Recent, page
from routers.serving.response_shape import ResponseShape
from routers.serving.responses import chat_of
from routers.serving.schema import docs_page, openapi, start_page
from routers.serving.served import Spent, Worker
from routers.serving.shapes import ChatShape, Shape, json_bytes
from routers.serving.watch import LEFT, Watch

if TYPE_CHECKING:
    from routers.serving.tracing import Tracing

Tell = Callable[[str, Spent, float, int], None]
"""See `Recent.add`."""
_EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}


def create_app(
    worker: Worker,
    *,
    name: str = "router",
    gate: Gate | None = None,
    public_metrics: bool = False,
    ui: bool = False,
    tracing: Tracing | None = None,
) -> Watch:
    """The application; closes the worker, and what traces it, when it shuts down.

    Args:
        worker: who answers.
        name: of the model, as clients say it.
        gate: who may ask, and how much (see `make_gate`); None: anybody, within its limits.
        public_metrics: `/metrics`, and what `/ui` shows, need no key.
        ui: there is a page to watch it by, `/ui`.
        tracing: makes spans of its requests; None: nobody does.
    """
    recent = Recent() if ui else None
    tell: list[Tell] = [one.add for one in (recent, tracing) if one is not None]
    door = gate or make_gate(worker)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await worker.aclose()
        if tracing is not None:
            await tracing.aclose()

    app = FastAPI(title="srpo router", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return _json(error.document(), error.status, error.headers)

    @app.exception_handler(HTTPException)  # no such path, wrong method
    async def unknown(request: Request, error: HTTPException) -> Response:
        return await refused(
            request, RequestError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        )

    @app.get("/")
    async def where() -> dict[str, Any]:
        return start_page(name)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def numbers(request: Request) -> Response:
        if not public_metrics:
            door.authorise(request.headers, admin=True)
        text, kind = door.metrics.text(request.headers.get("accept", ""))
        return Response(text, media_type=kind)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        door.authorise(request.headers)
        return {"object": "list", "data": [_model(name)]}

    @app.get("/v1/models/{asked:path}")
    async def model(request: Request, asked: str) -> dict[str, Any]:
        door.authorise(request.headers)
        if asked != name:
            raise RequestError(404, f"there is no model {asked!r}; use {name!r}", "model", "model_not_found")
        return _model(name)

    if recent is not None:
        html, heads = page()

        @app.get("/ui")
        async def watched() -> HTMLResponse:
            return HTMLResponse(html, headers=heads)

        @app.get("/ui/decisions")
        async def decided(request: Request) -> Response:
            if not public_metrics:
                door.authorise(request.headers, admin=True)
            return Response(json_bytes(recent.listed()), media_type="application/json")

    @app.get("/openapi.json")
    async def described() -> Response:
        return _json(openapi(name))

    @app.get("/docs")
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(name))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        key = door.authorise(request.headers)
        asked = read_chat(await door.body(request), name, request.headers.get(CONVERSATION_HEADER))
        return _Reply(worker, door, key, asked, ChatShape(), tell)

    @app.post("/v1/responses", response_model=None)
    async def respond(request: Request) -> Response:
        key = door.authorise(request.headers)
        document = await door.body(request)
        asked = read_chat(chat_of(document), name, request.headers.get(CONVERSATION_HEADER))
        return _Reply(worker, door, key, asked, ResponseShape(document, name), tell)

    return Watch(app, door, tracing)


def make_gate(worker: Worker, keys: Keys | None = None, limits: GateLimits | None = None) -> Gate:
    """What stands before a worker, and counts with it.

    Args:
        worker: who will answer. One that decides once per request has a queue for its decisions, and is let work on
            all that are let in.
        keys: who may ask; None: anybody.
        limits: what is let in; None: the defaults.
    """
    limits = limits or GateLimits()
    if worker.queues:
        limits = replace(limits, working=None)
    return Gate(keys, limits, count_tokens=worker.count_tokens, metrics=worker.metrics)


class _Reply(Response):
    """Does its work while it is sent, so that what admits a request spans all of it, a stream too."""

    def __init__(
        self, worker: Worker, gate: Gate, key: Key, asked: ChatRequest, shape: Shape, tell: Sequence[Tell]
    ) -> None:
        super().__init__()
        self._worker, self._gate, self._key, self._asked, self._shape = worker, gate, key, asked, shape
        self._tell, self._status = tell, LEFT

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        spent, started = Spent(), time.monotonic()
        try:
            await self._answer(spent, scope, receive, send)
        except RequestError as error:
            self._status = error.status
            raise
        finally:
            for tell in self._tell:
                tell(self._key.name, spent, time.monotonic() - started, self._status)

    async def _answer(self, spent: Spent, scope: Scope, receive: Receive, send: Send) -> None:
        read = self._worker.reads(self._asked)
        async with self._gate.admitted(self._key, read.text, at_most=self._asked.max_cost_usd) as ticket:
            asked = self._asked if math.isinf(ticket.max_usd) else replace(self._asked, max_cost_usd=ticket.max_usd)
            try:
                async with self._worker.serve(asked, read, spent) as served:
                    headers, document = served.headers, served.document
                    if served.chunks is not None:
                        await send(_start(200, {**headers, **_EVENTS}))
                        async with aclosing(served.chunks) as chunks:
                            self._status = await self._stream(chunks, send)
            except RequestError as error:
                if error.code == "over_budget" and ticket.max_usd < (self._asked.max_cost_usd or math.inf):
                    error.param = None  # the client has set no such limit
                    error.message += f"; a request of key {self._key.name!r} may cost {ticket.max_usd:.6g} USD"
                raise
            finally:
                if spent.known:
                    ticket.settle(spent.usd)
        if document is None:  # the end comes when all is settled
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await _json(self._shape.whole(document), headers=headers)(scope, receive, send)
            self._status = 200

    async def _stream(self, chunks: AsyncGenerator[dict[str, Any] | None, None], send: Send) -> int:
        """The status that it would have had as a whole."""
        try:
            for event in self._shape.begin():
                await send(_part(event))
            async for chunk in chunks:
                for event in [b": \n\n"] if chunk is None else self._shape.chunk(chunk):
                    await send(_part(event))
            for event in self._shape.end():
                await send(_part(event))
        except RequestError as error:  # the client has its status already: an event says what went wrong
            self._gate.metrics.broke_off(error.status)
            for event in self._shape.failed(error):
                await send(_part(event))
            return error.status
        return 200


def _json(document: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_bytes(document), status, headers, media_type="application/json")


def _start(status: int, headers: dict[str, str]) -> dict[str, Any]:
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": pairs}


def _part(event: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": event, "more_body": True}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "srpo"}
