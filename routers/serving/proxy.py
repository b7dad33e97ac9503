"""A router of queries in front of its members: a request goes to the member that it picks, and the reply comes back.

``srpo.decision`` is what the policy wrote; ``srpo.abstained`` says why the router chose nobody, where the safe member
got the request. A member that does not answer (429, 5xx, no reply in time, before the first
byte) is followed by the next in the router's own order: its choice, then by probability. So is one that the request's
``max_cost_usd`` has no room for, or that does not take one of its fields. Any other error is the member's answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

from routers.pool import Ledger
from routers.pool.call import Declined, Failed
from routers.pool.request import Refusal
from routers.router import Decision
from routers.serving.chat import ChatRequest
from routers.serving.decisions import Decisions
from routers.serving.errors import RequestError
from routers.serving.front import Front, Line, Reply
from routers.serving.served import Served, Spent, Text
from srpo.texts import well_formed


class Proxy(Front):
    """Serves a router of queries. Closes router and lines.

    Args:
        router: decides by `route`.
        lines: the way to each of its members, by name.
        ledger, name: as of `Front`.
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
        safe: str | None = None,
    ) -> None:
        if safe is not None and safe not in lines:
            known = ", ".join(lines)
            raise ValueError(f"there is no member {safe!r} for what the router abstains from; there are {known}")
        super().__init__(lines, ledger, name)
        self.router, self.safe = router, safe
        self.count_tokens = router.count_tokens
        self._decisions = Decisions(router, metrics=self.metrics)

    def reads(self, asked: ChatRequest) -> Text:
        return Text(well_formed(asked.query))

    @asynccontextmanager
    async def serve(self, asked: ChatRequest, read: Text, spent: Spent) -> AsyncIterator[Served]:
        decision = await self._route(asked, read.text)
        spent.policy_usd = self.ledger.policy(decision.prompt_tokens, decision.completion_tokens)
        told: dict[str, Any] = {"member": None, "scores": dict(decision.scores), "decision": decision.text}
        told["tried"] = []
        spent.told = told
        if decision.member is None and self.safe is not None:
            decision = replace(decision, members=(self.safe,))
            told["abstained"] = decision.error
        if decision.member is None:
            words = f"the router chose no member: {decision.error}"
            raise RequestError(422, words, code="no_member", srpo=self.costs(told, spent))
        async with AsyncExitStack() as stack:
            spent.call = reply = await self._answering(stack, asked, read.text, decision, spent, told)
            yield self.served(reply, asked, told, spent)

    async def _route(self, asked: ChatRequest, query: str, members: Sequence[str] | None = None) -> Decision:
        try:
            return await self._decisions.decide(query, cost_weight=asked.cost_weight, members=members)
        except ValueError as error:
            param = None if asked.cost_weight is None else "cost_weight"
            raise RequestError(400, str(error), param, "invalid_value") from None

    async def _answering(
        self,
        stack: AsyncExitStack,
        asked: ChatRequest,
        query: str,
        decision: Decision,
        spent: Spent,
        told: dict[str, Any],
    ) -> Reply:
        """The reply of the first member in the router's order that answers; `told` learns who was tried."""
        failed: Failed | None = None
        declined: Declined | None = None
        refused: Refusal | None = None
        async for name in self._order(asked, query, decision):
            line = self.lines[name]
            if (refusal := line.refusal(asked.body)) is not None:
                refused = refused or refusal
                told["tried"].append({"member": name, "error": refusal.words})
                continue
            try:
                reply = await self.reply_of(line, asked, spent, stack)
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
        raise self.without_reply(failed or declined or refused, told, spent)

    async def _order(self, asked: ChatRequest, query: str, decision: Decision) -> AsyncIterator[str]:
        """The router's choice, then by its probabilities; a router that states none is asked again without those."""
        left = [name for name in self.lines if name not in decision.members]
        for name in decision.members:
            yield name
        while left:
            if all(name in decision.scores for name in left):
                best: str | None = max(left, key=lambda name: decision.scores[name])
            else:
                best = (await self._route(asked, query, left)).member
            if best is None:
                return
            left.remove(best)
            yield best

    async def aclose(self) -> None:
        await self._decisions.aclose()
        await self.router.aclose()
        await super().aclose()
