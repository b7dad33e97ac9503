"""What all routers in front of members share: the way to a member, its reply as the client gets it, and errors.

What the client gets is the member's own reply, but for

    model               the router's name
    usage               of the member, with
        cost_usd        USD of the call at the catalogue's prices, and of the router's own tokens
        member          who answered
        decision        what the policy wrote, where it writes; of a step router policy, sticky or failover
        probabilities   of every member that could be chosen, by the router; empty where a kind has none
    srpo                {member, scores, tried, cost_usd, policy_usd, ...}: the same, and who was tried before

Headers say the same (`routers.serving.schema.HEADERS`). A stream's have no cost, which nobody knows yet: it is in the
last chunk, that of the usage, if the client asked for it (`stream_options: {include_usage: true}`). The first has
``srpo``, without costs.
Errors of a member keep its status and words.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from typing import Any, Protocol
from urllib.parse import quote

from routers.data.billing import shown_usd
from routers.pool import Ledger
from routers.pool.call import Failed
from routers.pool.protocol import OVER_BUDGET
from routers.pool.request import Refusal
from routers.serving.chat import ChatRequest
from routers.serving.errors import RequestError
from routers.serving.metrics import ServerMetrics
from routers.serving.served import Served, Spent, counted
from srpo.types import Usage

_SHOWN, _LIKELIEST = 256, 16
"""Characters of a decision, and members, that headers hold: proxies on the way take a few thousand bytes of them."""


class Reply(Protocol):
    """Of a member: a whole completion, or its chunks."""

    document: dict[str, Any] | None
    events: AsyncGenerator[dict[str, Any] | None, None]

    @property
    def usage(self) -> Usage: ...

    @property
    def usd(self) -> float: ...


class Line(Protocol):
    """The way to a member (`routers.pool.passthrough.Passthrough`, or a stand-in)."""

    def refusal(self, fields: Mapping[str, Any]) -> Refusal | None: ...

    def bound(self, fields: Mapping[str, Any]) -> float: ...

    def call(
        self, fields: Mapping[str, Any], *, stream: bool, max_cost: float
    ) -> AbstractAsyncContextManager[Reply]: ...

    async def aclose(self) -> None: ...


class Front:
    """Members behind a router. Closes the lines.

    Args:
        lines: the way to each member, by name.
        ledger: where the router's own tokens are booked.
        name: of the router, as clients say it.
    """

    def __init__(self, lines: Mapping[str, Line], ledger: Ledger, name: str = "router") -> None:
        self.lines, self.ledger, self.name = lines, ledger, name
        self.metrics = ServerMetrics()
        self.metrics.follow(ledger)

    async def reply_of(self, line: Line, asked: ChatRequest, spent: Spent, stack: AsyncExitStack) -> Reply:
        """The reply of a member, open until the stack is closed. Declined or Failed: there is none.

        Where the client leaves before anything has come, the request counts as what was set aside for the call: the
        member was at work, and whoever leaves early would else use up no budget.
        """
        left = asked.cap - spent.usd
        try:
            return await stack.enter_async_context(line.call(asked.body, stream=asked.stream, max_cost=left))
        except asyncio.CancelledError:
            spent.failed_usd += min(left, line.bound(asked.body))
            raise

    def served(
        self,
        reply: Reply,
        asked: ChatRequest,
        told: dict[str, Any],
        spent: Spent,
        over: Callable[[str | None], None] = lambda error: None,
        more: Mapping[str, str] | None = None,
    ) -> Served:
        """A member's reply as the client gets it.

        Args:
            reply: as the pool gave it.
            asked: the request.
            told: what the router says of its decision.
            spent: where its cost is booked.
            over: called when the member has said all, before the client knows, with None; or with why it broke off.
            more: headers.
        """
        headers = {**self.headers(told, spent), **(more or {})}
        if reply.document is None:
            return Served(headers, chunks=self._chunks(reply, asked, told, spent, over))
        over(None)
        headers["x-srpo-cost-usd"] = f"{shown_usd(spent.usd)}"
        return Served(headers, document=self._document(reply, told, spent))

    def _document(self, reply: Reply, told: dict[str, Any], spent: Spent) -> dict[str, Any]:
        theirs = reply.document or {}
        usage = self._usage(theirs.get("usage"), reply, told, spent)
        return {**theirs, "model": self.name, "usage": usage, "srpo": self.costs(told, spent)}

    async def _chunks(
        self,
        reply: Reply,
        asked: ChatRequest,
        told: dict[str, Any],
        spent: Spent,
        over: Callable[[str | None], None],
    ) -> AsyncGenerator[dict[str, Any] | None, None]:
        """The usage, which the member is always asked for, comes last, if the client wants it."""
        first, usage = True, None
        head: dict[str, Any] = {}
        try:
            async with aclosing(reply.events) as events:
                async for chunk in events:
                    if chunk is None:
                        yield None
                        continue
                    usage = chunk.pop("usage", None) or usage
                    head = {name: chunk.get(name) for name in ("id", "object", "created")}
                    if usage is not None and not chunk["choices"]:
                        continue
                    more: dict[str, Any] = {"srpo": told} if first else {}
                    more |= {"usage": None} if asked.include_usage else {}
                    first = False
                    yield {**chunk, "model": self.name, **more}
        except Failed as error:
            over(error.words)
            raise self.without_reply(error, told, spent) from None
        over(None)
        if asked.include_usage:
            costs = {"usage": self._usage(usage, reply, told, spent), "srpo": self.costs(told, spent)}
            yield {**head, "model": self.name, "choices": [], **costs}

    def costs(self, told: Mapping[str, Any], spent: Spent) -> dict[str, Any]:
        return {**told, "cost_usd": shown_usd(spent.usd), "policy_usd": shown_usd(spent.policy_usd)}

    def _usage(self, reported: Any, reply: Reply, told: Mapping[str, Any], spent: Spent) -> dict[str, Any]:
        """As the member said it; where it said nothing, what it is counted as, which is an upper bound."""
        usage = reported if isinstance(reported, dict) else {**counted(reply.usage), "estimated": True}
        decided = {"member": told["member"], "decision": _decision(told), "probabilities": told["scores"]}
        return {**usage, "cost_usd": shown_usd(spent.usd), **decided}

    def headers(self, told: Mapping[str, Any], spent: Spent) -> dict[str, str]:
        headers = {"x-srpo-member": _safe(told["member"]), "x-srpo-policy-usd": f"{shown_usd(spent.policy_usd)}"}
        if decision := _decision(told):
            headers["x-srpo-decision"] = _safe(decision[:_SHOWN])
        if likely := sorted(told["scores"].items(), key=lambda one: -one[1])[:_LIKELIEST]:
            headers["x-srpo-probabilities"] = ", ".join(f"{_safe(name)}={p:.6g}" for name, p in likely)
        if told["tried"]:
            headers["x-srpo-tried"] = ", ".join(_safe(one["member"]) for one in told["tried"])
        return headers

    def without_reply(self, why: Any, told: dict[str, Any], spent: Spent) -> RequestError:
        srpo, tried = self.costs(told, spent), [one["member"] for one in told["tried"]]
        headers = {"x-srpo-tried": ", ".join(map(_safe, tried))} if tried else {}
        if isinstance(why, Failed):  # the member's own words
            if why.retry_after is not None:
                headers["retry-after"] = f"{math.ceil(why.retry_after)}"
            param, code = why.error.get("param"), why.error.get("code")
            return RequestError(why.status, why.words, param, code, headers, kind=why.error.get("type"), srpo=srpo)
        if isinstance(why, Refusal):
            return RequestError(400, f"no member takes this request: {why.words}", why.field, "unsupported_parameter",
                                headers, srpo=srpo)  # fmt: skip
        if why.kind == OVER_BUDGET:
            return RequestError(402, str(why), "max_cost_usd", "over_budget", headers, srpo=srpo)
        return RequestError(503, str(why), code="members_busy", headers=headers, srpo=srpo)

    async def aclose(self) -> None:
        for line in self.lines.values():
            await line.aclose()


def _decision(told: Mapping[str, Any]) -> str | None:
    return told.get("decision") or told.get("reason")


def _safe(text: str) -> str:
    """As a header can hold it."""
    return quote(text, safe="/:@+ ", errors="replace")
