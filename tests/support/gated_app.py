"""A small application behind the real gate, watch, decisions and life cycle, whose policy takes as long as it is told.

As a process: `python tests/support/gated_app.py '{"drain": 2}'` with settings of `ConnectionLimits`, `GateLimits`, and
"keys", "spending", "port". What the user message says is what is done:

    sleep S      decided in S seconds (a policy that computes: it cannot be interrupted)
    wait S       decided at once, then waits for S seconds, as for a member
    stream N     N chunks of 64 KiB, as fast as they are taken
    cost USD     costs so much (of what is set aside, if that is less)

`done` holds what was decided, `ended` what came to its end, in order; GET /done shows both.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from routers.router import Decision, Router
from routers.serving.decisions import Decisions
from routers.serving.errors import RequestError
from routers.serving.gate import Gate, GateLimits
from routers.serving.keys import Keys
from routers.serving.lifecycle import ConnectionLimits, serve
from routers.serving.watch import Watch


class SlowRouter(Router):
    """Decides as its queries say."""

    kind = "slow"

    def __init__(self) -> None:
        self.done: list[str] = []
        self.batches: list[list[str]] = []

    def route(self, query: str, **_: Any) -> Decision:
        return self.route_all([query])[0]

    def route_all(self, queries: list[str], **_: Any) -> list[Decision]:
        self.batches.append(queries)
        for query in queries:
            words = query.split()
            if words[0] == "sleep":
                time.sleep(float(words[1]))
            if words[0] == "bad":
                raise ValueError(f"a query that cannot be decided: {query}")
        self.done += queries
        return [Decision(("member",), {}) for _ in queries]


class Gated:
    """The application (`app`) with its parts at hand."""

    def __init__(self, gate: Gate, router: SlowRouter | None = None) -> None:
        self.gate, self.router = gate, router or SlowRouter()
        self.decisions = Decisions(self.router, max_batch=4, metrics=gate.metrics)
        self.ended: list[str] = []
        self.spent: dict[str, float] = {}

        @asynccontextmanager
        async def lifespan(_: Any) -> AsyncIterator[None]:
            yield
            await self.decisions.aclose()

        async def refused(_: Request, error: Any) -> JSONResponse:
            return JSONResponse(error.document(), error.status, error.headers)

        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/metrics", lambda _: Response(gate.metrics.text()[0])),
            Route("/done", lambda _: JSONResponse([self.router.done, self.ended])),
        ]
        inner = Starlette(routes=routes, lifespan=lifespan, exception_handlers={RequestError: refused})
        self.app = Watch(inner, gate)

    async def _chat(self, request: Request) -> Response:
        key = self.gate.authorise(request.headers)
        document = await self.gate.body(request)
        try:
            text, cap = document["messages"][-1]["content"], document.get("max_cost_usd")
            return _Working(self, key, text + "", cap)
        except (LookupError, TypeError, AttributeError):
            raise RequestError(400, "no question") from None


class _Working(Response):
    def __init__(self, own: Gated, key: Any, text: str, cap: float | None) -> None:
        self.own, self.key, self.text, self.cap, self.background = own, key, text, cap, None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        own, words = self.own, self.text.split()
        async with own.gate.admitted(self.key, self.text, at_most=self.cap) as ticket:
            decision = await own.decisions.decide(self.text)
            if words[0] == "wait":
                await asyncio.sleep(float(words[1]))
            usd = min(float(words[1]), ticket.max_usd) if words[0] == "cost" else 0.0
            ticket.settle(usd)
            own.spent[self.key.name] = own.spent.get(self.key.name, 0.0) + usd
            own.ended.append(self.text)
            if words[0] == "stream":
                chunks = (b"x" * 65536 for _ in range(int(words[1])))
                await StreamingResponse(_slowly(chunks))(scope, receive, send)
            else:
                await JSONResponse({"member": decision.member, "usd": usd})(scope, receive, send)


async def _slowly(chunks: Any) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def main(settings: dict[str, Any]) -> None:
    def of(kind: Any) -> Any:
        return kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings})

    keys = Keys(settings.get("keys"), settings.get("spending"))
    gated = Gated(Gate(keys, of(GateLimits)))
    serve(gated.app, keys, port=settings.get("port", 0), limits=of(ConnectionLimits))


if __name__ == "__main__":
    main({"working": None, **json.loads(sys.argv[1])})
