"""A router of queries, trained or fitted, whose decisions are carried out: the chosen member's reply is the answer."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from routers.data.catalogue import Member
from routers.pool import Ledger, Pool, ReplyCache, live_pool
from routers.pool.protocol import OVER_BUDGET, kind
from routers.router import Answer, CannotDo
from srpo.types import Reply

AS_IT_IS = "{query}"
"""What a member of a query router is told: the query, unlike a sub-question of an agent."""


class Forwarder:
    """Routes queries and asks the chosen members, one after the other. Closes its router.

    Args:
        router: decides: `route` of one query, `members`.
        pool: who is asked; None: nobody can answer.
        call_seconds: deadline of one call of a member, retries included.
    """

    def __init__(self, router: Any, pool: Pool | None = None, *, call_seconds: float = 60.0) -> None:
        self.router = router
        self.pool = pool
        self._seconds = call_seconds
        self._numbers = itertools.count()

    def answer(self, query: str, max_cost_usd: float | None = None, *, cost_weight: float | None = None) -> Answer:
        """The reply of the member that the router chooses.

        Args:
            query: forwarded as it is.
            max_cost_usd: hard cap of the member's call: it is only made if the most that it could cost still fits.
            cost_weight: price sensitivity, for a router that was trained with several.

        Raises:
            CannotDo: there is no pool to ask.
        """
        if self.pool is None:
            raise CannotDo("there is nobody to ask: give a catalogue whose members have a base_url")
        pool, decision = self.pool, self.router.route(query, cost_weight=cost_weight)
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
        number = f"query {next(self._numbers)}"
        pool.ledger.policy(decision.prompt_tokens, decision.completion_tokens, number)
        cap = math.inf if max_cost_usd is None else max(0.0, max_cost_usd - decision.policy_usd)

        async def asked() -> Reply:
            try:
                return await pool.ask(decision.member, query, self._seconds, query_id=number, max_cost=cap)
            finally:
                await pool.aclose()

        reply = asyncio.run(asked())
        if kind(reply) == OVER_BUDGET:
            return replace(found, answer=None, stop="budget", error=reply.error, members=())
        usd = decision.policy_usd + pool.price(decision.member, reply.usage)
        if reply.error is not None:
            return replace(found, answer=None, stop="lost", error=reply.error, cost_usd=usd)
        return replace(found, answer=reply.text, cost_usd=usd)

    def close(self) -> None:
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
