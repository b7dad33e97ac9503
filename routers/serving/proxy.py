"""A router of queries in front of its members: a request goes to the member that it picks, and the reply comes back.

What the client gets is the member's own reply, but for

    model               the router's name
    usage.cost_usd      USD of the call at the catalogue's prices, and of the router's own tokens
    srpo                {member, scores, decision, tried, cost_usd, policy_usd}: what was decided, and who else tried;
                        `abstained`, why, where the router chose nobody and the safe member got the request

A stream has ``srpo`` in its first chunk, without costs, and in that of the usage, where the client asked for it.
A member that does not answer (429, 5xx, no reply in time, before the first byte) is followed by the next in the
router's own order: its choice, then by probability. So is one that the request's ``max_cost_usd`` has no room for, or
that does not take one of its fields. Any other error is the member's answer: status and words are kept.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import quote

from routers.pool import Ledger
from routers.pool.call import Declined, Failed
from routers.pool.protocol import OVER_BUDGET
from routers.pool.request import Refusal
from routers.router import Decision
from routers.serving.chat import ChatRequest
from routers.serving.decisions import Decisions
from routers.serving.errors import RequestError
from routers.serving.metrics import ServerMetrics
from routers.serving.served import Served, Spent, counted
from srpo.types import Usage
from srpo.well_formed import well_formed


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

    def call(
        self, fields: Mapping[str, Any], *, stream: bool, max_cost: float
    ) -> AbstractAsyncContextManager[Reply]: ...

    async def aclose(self) -> None: ...


class Proxy:
    """Serves a router of queries. Closes router and lines.

    Args:
        router: decides by `route`.
        lines: the way to each of its members, by name.
        ledger: where the policy's own tokens are booked.
        name: of the router, as clients say it.
        metrics: None: new ones.
        safe: who gets what the router abstains from; None: that is an error, for a person to see.

    Raises:
        ValueError: `safe` is no member.
    """

    queues = True

    def __init__(
        self,
        router: Any,
        lines: Mapping[str, Line],
        ledger: Ledger,
        name: str = "router",
        metrics: ServerMetrics | None = None,
        safe: str | None = None,
    ) -> None:
        if safe is not None and safe not in lines:
            raise ValueError(
                f"there is no member {safe!r} for what the router abstains from; there are {', '.join(lines)}"
            )
        self.router, self.lines, self.name, self.safe = router, lines, name, safe
        self.metrics = metrics or ServerMetrics()
        self.metrics.follow(ledger)
        self.count_tokens = router.count_tokens
        self._ledger = ledger
        self._decisions = Decisions(router, metrics=self.metrics)

    def reads(self, asked: ChatRequest) -> str:
        return well_formed(asked.query)

    @asynccontextmanager
    async def serve(self, asked: ChatRequest, spent: Spent) -> AsyncIterator[Served]:
        decision = await self._route(asked)
        spent.policy_usd = self._ledger.policy(decision.prompt_tokens, decision.completion_tokens)
        told: dict[str, Any] = {"member": None, "scores": dict(decision.scores), "decision": decision.text}
        told["tried"] = []
        spent.told = told
        if decision.member is None and self.safe is not None:
            decision = replace(decision, members=(self.safe,))
            told["abstained"] = decision.error
        if decision.member is None:
            words = f"the router chose no member: {decision.error}"
            raise RequestError(422, words, code="no_member", srpo=self._costs(told, spent))
        async with AsyncExitStack() as stack:
            spent.call = reply = await self._answering(stack, asked, decision, spent, told)
            headers = self._headers(told, spent)
            if reply.document is None:
                yield Served(headers, chunks=self._chunks(reply, asked, told, spent))
            else:
                document = {**reply.document, "model": self.name, "srpo": self._costs(told, spent)}
                document["usage"] = self._usage(reply.document.get("usage"), reply, spent)
                headers["x-srpo-cost-usd"] = f"{spent.usd:.10g}"
                yield Served(headers, document=document)

    async def _route(self, asked: ChatRequest, members: Sequence[str] | None = None) -> Decision:
        try:
            return await self._decisions.decide(self.reads(asked), cost_weight=asked.cost_weight, members=members)
        except ValueError as error:
            param = None if asked.cost_weight is None else "cost_weight"
            raise RequestError(400, str(error), param, "invalid_value") from None

    async def _answering(
        self, stack: AsyncExitStack, asked: ChatRequest, decision: Decision, spent: Spent, told: dict[str, Any]
    ) -> Reply:
        """The reply of the first member in the router's order that answers; `told` learns who was tried."""
        cap = math.inf if asked.max_cost_usd is None else asked.max_cost_usd
        failed: Failed | None = None
        declined: Declined | None = None
        refused: Refusal | None = None
        async for name in self._order(asked, decision):
            line = self.lines[name]
            if (refusal := line.refusal(asked.body)) is not None:
                refused = refused or refusal
                told["tried"].append({"member": name, "error": refusal.words})
                continue
            try:
                call = line.call(asked.body, stream=asked.stream, max_cost=cap - spent.usd)
                reply = await stack.enter_async_context(call)
            except Declined as error:
                declined = declined or error
                told["tried"].append({"member": name, "error": str(error)})
            except Failed as error:
                spent.failed_usd += error.usd
                failed = error if failed is None or not error.elsewhere else failed
                told["tried"].append({"member": name, "error": error.words, "status": error.status})
                if not error.elsewhere:
                    break
            else:
                told["member"] = name
                return reply
        raise self._without_reply(failed or declined or refused, told, spent)

    async def _order(self, asked: ChatRequest, decision: Decision) -> AsyncIterator[str]:
        """The router's choice, then by its probabilities; a router that states none is asked again without those."""
        left = [name for name in self.lines if name not in decision.members]
        for name in decision.members:
            yield name
        while left:
            if all(name in decision.scores for name in left):
                best: str | None = max(left, key=lambda name: decision.scores[name])
            else:
                best = (await self._route(asked, left)).member
            if best is None:
                return
            left.remove(best)
            yield best

    def _without_reply(self, why: Any, told: dict[str, Any], spent: Spent) -> RequestError:
        srpo, tried = self._costs(told, spent), [one["member"] for one in told["tried"]]
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

    async def _chunks(
        self, reply: Reply, asked: ChatRequest, told: dict[str, Any], spent: Spent
    ) -> AsyncGenerator[dict[str, Any] | None, None]:
        """The member's chunks. The usage, which it is always asked for, comes last, if the client wants it."""
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
            raise self._without_reply(error, told, spent) from None
        if asked.include_usage:
            costs = {"usage": self._usage(usage, reply, spent), "srpo": self._costs(told, spent)}
            yield {**head, "model": self.name, "choices": [], **costs}

    def _costs(self, told: Mapping[str, Any], spent: Spent) -> dict[str, Any]:
        return {**told, "cost_usd": spent.usd, "policy_usd": spent.policy_usd}

    def _usage(self, reported: Any, reply: Reply, spent: Spent) -> dict[str, Any]:
        """As the member said it; where it said nothing, what it is counted as, which is an upper bound."""
        usage = reported if isinstance(reported, dict) else {**counted(reply.usage), "estimated": True}
        return {**usage, "cost_usd": spent.usd}

    def _headers(self, told: Mapping[str, Any], spent: Spent) -> dict[str, str]:
        headers = {"x-srpo-member": _safe(told["member"]), "x-srpo-policy-usd": f"{spent.policy_usd:.10g}"}
        if told["member"] in told["scores"]:
            headers["x-srpo-probability"] = f"{told['scores'][told['member']]:.6g}"
        if told["tried"]:
            headers["x-srpo-tried"] = ", ".join(_safe(one["member"]) for one in told["tried"])
        return headers

    async def aclose(self) -> None:
        await self._decisions.aclose()
        await self.router.aclose()
        for line in self.lines.values():
            await line.aclose()


def _safe(name: str) -> str:
    """As a header can hold it."""
    return quote(name, safe="/:@+ ")
