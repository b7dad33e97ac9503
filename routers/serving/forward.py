"""A router of queries, trained or fitted, whose decisions are carried out: the chosen member's reply is the answer."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from routers.data.catalogue import Member
from routers.pool import Ledger, Pool, ReplyCache, live_pool
from routers.pool.protocol import OVER_BUDGET, kind
from routers.router import Answer, OnTurn

AS_IT_IS = "{query}"
"""What a member of a query router is told: the query, unlike a sub-question of an agent."""


class Forwarder:
    """Routes queries and asks the chosen members. Safe in many tasks at once; closes its router and pool.

    Args:
        router: decides: `route` of one query, `members`.
        pool: who is asked; None: nobody, and the answer is the member's name.
        call_seconds: deadline of one call of a member, retries included.
        max_concurrent: decisions that wait for the policy at once; it makes them in batches.
    """

    def __init__(
        self, router: Any, pool: Pool | None = None, *, call_seconds: float = 60.0, max_concurrent: int = 64
    ) -> None:
        self.router = router
        self.pool = pool
        self.cost_weights = router.cost_weights
        self._seconds = call_seconds
        self._numbers = itertools.count()
        self._threads = ThreadPoolExecutor(max_concurrent, thread_name_prefix="query-router")

    async def aanswer(
        self,
        query: str,
        max_cost_usd: float | None = None,
        *,
        cost_weight: float | None = None,
        on_turn: OnTurn | None = None,
    ) -> Answer:
        """The reply of the member that the router chooses.

        Args:
            query: forwarded as it is.
            max_cost_usd: hard cap of the member's call: it is only made if the most that it could cost still fits.
            cost_weight: price sensitivity, for a router that was trained with several.
            on_turn: told what the policy wrote, before the member is asked.
        """
        route = partial(self.router.route, query, cost_weight=cost_weight)
        decision = await asyncio.get_running_loop().run_in_executor(self._threads, route)
        if on_turn is not None:
            on_turn(decision.text)
        found = Answer(
            answer=decision.member,
            stop="done",
            error=None,
            cost_usd=decision.policy_usd,
            members=decision.members,
            prompt_tokens=decision.prompt_tokens,
            completion_tokens=decision.completion_tokens,
            turns=(("policy", decision.text),),
            scores=decision.scores,
        )
        if decision.member is None:
            return replace(found, stop="lost", error=f"the router chose no member: {decision.error}")
        if self.pool is None:
            return found
        number = f"query {next(self._numbers)}"
        self.pool.ledger.policy(decision.prompt_tokens, decision.completion_tokens, number)
        cap = math.inf if max_cost_usd is None else max(0.0, max_cost_usd - decision.policy_usd)
        reply = await self.pool.ask(decision.member, query, self._seconds, query_id=number, max_cost=cap)
        if kind(reply) == OVER_BUDGET:
            return replace(found, answer=None, stop="budget", error=reply.error, members=())
        usd = decision.policy_usd + self.pool.price(decision.member, reply.usage)
        if reply.error is not None:
            return replace(found, answer=None, stop="lost", error=reply.error, cost_usd=usd)
        return replace(found, answer=reply.text, cost_usd=usd)

    def answer(self, query: str, max_cost_usd: float | None = None, **options: Any) -> Answer:
        """`aanswer`, for callers without an event loop."""

        async def once() -> Answer:
            try:
                return await self.aanswer(query, max_cost_usd, **options)
            finally:
                if self.pool is not None:
                    await self.pool.aclose()

        return asyncio.run(once())

    async def aclose(self) -> None:
        """Finish what was begun, then give back threads and connections."""
        await asyncio.to_thread(self.close)
        if self.pool is not None:
            await self.pool.aclose()

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.router.close()


def with_endpoints(members: Sequence[Member]) -> bool:
    """Whether all members live behind endpoints; False: none does.

    Raises:
        ValueError: some do and some do not.
    """
    here = [member.name for member in members if member.base_url]
    if here and (missing := [member.name for member in members if not member.base_url]):
        raise ValueError(f"member {missing[0]!r} has no base_url in the catalogue, and {here[0]!r} has one")
    return bool(here)


def forwarding_pool(members: Sequence[Member], ledger: Ledger, cache: ReplyCache | None = None) -> Pool | None:
    """The members behind their endpoints; None: they have none.

    Raises:
        ValueError: some have one and some have not.
    """
    if not with_endpoints(members):
        return None
    pool: Mapping[str, Member] = {member.name: member for member in members}
    return live_pool(pool, ledger=ledger, cache=cache, agent_prompt=AS_IT_IS)
