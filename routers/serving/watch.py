"""Around the whole application: who is being served, who has left, and what becomes of them when the server stops.

An ASGI middleware. A client that closes its connection before its answer is whole has the task that works for it
cancelled, at whatever it awaits; so handlers need not ask. When the server stops, what is left is cancelled too, and
told so (503) if its answer has not begun.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from routers.serving.errors import RequestError
from routers.serving.gate import Gate
from routers.serving.metrics import OTHER
from routers.serving.shapes import json_bytes

if TYPE_CHECKING:
    from routers.serving.tracing import Tracing

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

WORK = ("/v1/chat/completions", "/v1/responses")
LEFT = 499
"""Status of a request whose client left, as nginx counts it; nobody receives it."""


class Watch:
    """The application, watched.

    Args:
        app: any ASGI application.
        gate: knows which requests wait; its metrics count requests by their path, if it is one of `WORK`, and status.
        tracing: makes a span of each of these; None: nobody does.
    """

    def __init__(self, app: App, gate: Gate, tracing: Tracing | None = None) -> None:
        self._app, self.gate, self.metrics, self._tracing = app, gate, gate.metrics, tracing
        self._served: set[_Served] = set()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        kind = scope["path"] if scope["path"] in WORK else OTHER
        served = _Served(receive, send)
        started = time.monotonic()
        self._served.add(served)
        self.metrics.began(kind)
        tracing = None if kind == OTHER else self._tracing
        try:
            with nullcontext() if tracing is None else tracing.request(scope, served):
                await served.run(self._app, scope)
        finally:
            self._served.discard(served)
            if served.cut == "left":
                self.metrics.dropped("left")
            self.metrics.finished(kind, served.status, time.monotonic() - started)

    def states(self) -> Counter[str]:
        """How many requests are "reading" (their bodies have not arrived), "waiting", "working"."""
        found = +self.gate.states()
        unread = sum(not served.read for served in self._served)
        found["reading"] = unread
        found["working"] += max(0, len(self._served) - unread - found["waiting"] - found["working"])
        return +found

    def drop(self, everything: bool) -> Counter[str]:
        """Cancel requests because the server stops: everything, or those that are still being read. How many there
        were by state."""
        states = self.states()
        if not everything:
            states = Counter({"reading": states["reading"]})
        for state, number in states.items():
            self.metrics.dropped(state, number)
        for served in list(self._served):
            if everything or not served.read:
                served.cancel("stopped")
        return states


class _Served:
    """One request."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.read = False
        """Its body has arrived."""
        self.status = LEFT
        self.cut: str | None = None
        """Why it was cancelled by us: "left" or "stopped"."""
        self._begun = self._whole = False
        self._gone = asyncio.Event()
        self._task: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def run(self, app: App, scope: MutableMapping[str, Any]) -> None:
        self._task = asyncio.current_task()
        assert self._task is not None
        try:
            await app(scope, self._app_receive, self._app_send)
        except asyncio.CancelledError:
            if self.cut is None:
                raise
            self._task.uncancel()
            self.status = 503 if self.cut == "stopped" else LEFT
            if self.cut == "stopped" and not self._begun:
                await self._say_stopped()
        except Exception:
            if not self._begun:
                self.status = 500  # uvicorn says so
            raise
        finally:
            if self._watcher is not None:
                self._watcher.cancel()

    def cancel(self, why: str) -> None:
        if self.cut is None and not self._whole and self._task is not None:
            self.cut = why
            self._task.cancel()

    async def _app_receive(self) -> Message:
        if self.read:  # what comes now is the end of the connection, which the watcher waits for
            await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._left()
            await asyncio.sleep(0)  # ends here, and nobody takes a client that left for an error
        elif not message.get("more_body", False):
            self.read = True
            self._watcher = asyncio.create_task(self._watch())
        return message

    async def _app_send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun, self.status = True, message["status"]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._whole = True
        await self._send(message)
        if self._whole:
            self._gone.set()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left()

    def _left(self) -> None:
        self.cancel("left")
        self._gone.set()

    async def _say_stopped(self) -> None:
        error = RequestError(503, "the server is stopping; ask again", code="server_stopping")
        body = json_bytes(error.document())
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1"), (b"connection", b"close"),
                   (b"content-length", str(len(body)).encode())]  # fmt: skip
        await self._app_send({"type": "http.response.start", "status": 503, "headers": headers})
        await self._app_send({"type": "http.response.body", "body": body})
