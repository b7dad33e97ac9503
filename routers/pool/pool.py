"""The pool: members by name, with the reply cache and the ledger around them."""

from __future__ import annotations

import asyncio
import math
import time
import warnings
from collections.abc import Mapping

from routers.data.billing import price
from routers.data.catalogue import Member
from routers.pool.cache import ReplyCache, cache_key, hit
from routers.pool.caller import Caller
from routers.pool.ledger import Ledger, Spending
from routers.pool.limits import Retry
from routers.pool.protocol import OVER_BUDGET, TIMEOUT, Backend, StatesCost, kind
from srpo.types import Reply, Usage


class _Flight:
    """One call that several ask for at once."""

    def __init__(self, task: asyncio.Task[Reply]) -> None:
        self.task = task
        self.waiting = 0


class Pool:
    """Members by name. Every failure of a member is a reply with an error; cancelling goes through.

    Args:
        members: prices and limits by name; the order is kept.
        backends: by the same names, how each member answers.
        ledger: None: a fresh one without a cap.
        cache: None: every call goes to its member. With a cache, equal calls that run at once are one call.
        retry: attempts and pauses of every member; None: the default.

    Raises:
        ValueError: members and backends have different names, or there are none, or a member has no prices.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        backends: Mapping[str, Backend],
        *,
        ledger: Ledger | None = None,
        cache: ReplyCache | None = None,
        retry: Retry | None = None,
    ) -> None:
        if not members or set(members) != set(backends):
            raise ValueError(f"members {sorted(members)} and backends {sorted(backends)} must have the same names")
        for name, member in members.items():
            if not member.priced and not isinstance(backends[name], StatesCost):
                raise ValueError(f"member {name!r} has no prices; write price_in and price_out, or price_from")
        self.members = dict(members)
        self.ledger = ledger or Ledger()
        self._cache = cache
        self._callers = {n: Caller(m, backends[n], self.ledger, retry) for n, m in self.members.items()}
        self._flights: dict[str, _Flight] = {}

    async def ask(
        self,
        member: str,
        query: str,
        deadline: float,
        *,
        query_id: str = "",
        max_cost: float = math.inf,
        sample: str = "",
    ) -> Reply:
        """Ask one member.

        Args:
            member: its name.
            query: any text.
            deadline: seconds from now, over queueing, limits and all attempts.
            query_id: the dataset row that the question belongs to: the key of recorded replies, and of the ledger.
            max_cost: USD that all attempts of this call together may cost. An attempt whose upper bound does not fit
                is not made; the error is then "over budget".
            sample: names an independent draw. A member that samples (a temperature above 0, and no seed of its own)
                has a place in the cache for each; any other member's reply serves them all.

        Returns:
            A reply whose ``error`` is None or ``KIND: words`` (``routers.pool.protocol.KINDS``). A reply out of the
            cache, or shared with an equal call in flight, has ``cached=True`` and cost 0, and keeps the usage and the
            seconds of the call that was made.

        Raises:
            KeyError: no such member.
        """
        caller = self._caller(member)
        identity = caller.backend.identity
        if self._cache is None or identity is None:
            return await caller.ask(query, deadline, query_id, max_cost)
        samples = caller.member.temperature > 0 and caller.member.seed is None
        key = cache_key(identity, query, sample if samples else "")
        end = time.monotonic() + deadline
        while True:
            reply = self._cache.get(key)
            if reply is None:
                flight = self._flights.get(key)
                if flight is None or flight.task.get_loop() is not asyncio.get_running_loop():
                    return await self._lead(key, caller, query, end - time.monotonic(), query_id, max_cost)
                reply = await self._follow(key, flight, end - time.monotonic())
                if kind(reply) in (TIMEOUT, OVER_BUDGET) and end > time.monotonic():
                    continue  # the other one had less time, or less money
            booked = Spending(cached=1) if reply.error is None else Spending(calls=1, failed=1)
            self.ledger.book(query_id, booked, member)
            return reply

    def kept(self, member: str, query: str) -> Reply | None:
        """The reply in the cache, for whoever wants to know before asking; samples are told apart by `ask` only."""
        identity = self._caller(member).backend.identity
        return None if self._cache is None or identity is None else self._cache.get(cache_key(identity, query))

    def _caller(self, member: str) -> Caller:
        try:
            return self._callers[member]
        except KeyError:
            raise KeyError(f"no member {member!r} in the pool; there are {', '.join(self.members)}") from None

    async def _lead(
        self, key: str, caller: Caller, query: str, deadline: float, query_id: str, max_cost: float
    ) -> Reply:
        async def call() -> Reply:
            reply = await caller.ask(query, deadline, query_id, max_cost)
            if self._cache is not None and reply.error is None:
                try:
                    self._cache.put(key, reply)
                except OSError as error:  # a full disk; the reply is paid for and good
                    warnings.warn(f"a reply could not be kept in {self._cache.folder}: {error}", stacklevel=2)
            return reply

        flight = self._flights[key] = _Flight(asyncio.create_task(call()))
        return await self._joined(key, flight)

    async def _follow(self, key: str, flight: _Flight, deadline: float) -> Reply:
        try:
            async with asyncio.timeout(deadline):
                return hit(await self._joined(key, flight))
        except TimeoutError:
            words = f"{TIMEOUT}: an equal call in flight did not end within {deadline:.3g} s"
            return Reply("", error=words, seconds=deadline)

    async def _joined(self, key: str, flight: _Flight) -> Reply:
        """The flight's reply. It goes on while anybody waits, and ends with the last one."""
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting:
                if self._flights.get(key) is flight:  # before anything is awaited: nobody may join what ends here
                    del self._flights[key]
                if not flight.task.done():
                    flight.task.cancel()
                    await asyncio.wait({flight.task})

    def price(self, member: str, usage: Usage) -> float:
        """USD of this usage at catalogue prices, whether or not it came out of our cache. The cost that rewards use:
        unlike ``Reply.cost`` it does not depend on what we asked before. (What the provider found in its own cache
        and billed at its price is a part of the usage.)"""
        return price(self._caller(member).member, usage)

    def bound(self, member: str, query: str) -> float:
        """USD that one attempt at this call costs at most."""
        return self._caller(member).bound(query)

    async def aclose(self) -> None:
        """Close the connections of the running event loop. The pool can be used again, also in another loop."""
        for caller in self._callers.values():
            await caller.backend.aclose()

    async def __aenter__(self) -> Pool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
