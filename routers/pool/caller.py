"""One member with everything around a request: deadline, limits, breaker, the one retry layer, and its money."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field, replace

from routers.data.billing import highest, price, saved
from routers.data.billing import total as sum_of
from routers.data.catalogue import Member
from routers.pool.ledger import Ledger, OverBudget, Spending
from routers.pool.limits import Breaker, CircuitOpen, Entry, Retry, Spacing, TokenBucket
from routers.pool.protocol import (
    CIRCUIT_OPEN,
    CONNECTION,
    MALFORMED,
    NO_QUOTA,
    OVER_BUDGET,
    SERVER_ERROR,
    TIMEOUT,
    Attempt,
    Backend,
    StatesCost,
)
from routers.pool.usage import within
from srpo.types import Reply, Usage

_log = logging.getLogger(__name__)

LONGEST_PAUSE = 60.0
"""Seconds that one Retry-After may hold back other calls of the member; a server could ask for a year."""
_MEMBER_IS_DOWN = (TIMEOUT, SERVER_ERROR, MALFORMED, CONNECTION)  # what the breaker counts


@dataclass
class _Sum:
    """All attempts of one call."""

    spending: Spending = field(default_factory=Spending)
    usages: list[Usage] = field(default_factory=list)
    """Of the attempts that used anything."""
    error: str = ""
    reasoning: str = ""
    attempts: int = 0
    entry: Entry | None = None
    """Of the attempt under way, once it has left our queue."""

    def reply(self, answer: Attempt | None, seconds: float) -> Reply:
        return Reply(
            text="" if answer is None else answer.text,
            usage=sum_of(self.usages),
            cost=self.spending.cost,
            error=self.error if answer is None else None,
            seconds=seconds if answer is None or answer.seconds is None else answer.seconds,
            reasoning=self.reasoning if answer is None else answer.reasoning,
        )


class Caller:
    """Asks one member.

    Args:
        member: prices and limits.
        backend: how it answers.
        ledger: where every attempt is reserved before, and settled after.
        retry, breaker: None: the defaults of ``routers.pool.limits``.
    """

    def __init__(
        self,
        member: Member,
        backend: Backend,
        ledger: Ledger,
        retry: Retry | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        self.member = member
        self.backend = backend
        self._ledger = ledger
        self._retry = retry or Retry()
        self._breaker = breaker or Breaker()
        self._spacing = Spacing(member.requests_per_second)
        self._tokens = TokenBucket(member.tokens_per_minute)
        self._places: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None
        self._raised: set[type[Exception]] = set()
        self._states_cost = backend if isinstance(backend, StatesCost) else None  # asking takes as long as the rest

    def bound(self, query: str) -> float:
        """USD that one attempt costs at most."""
        return self._bound(query, self.backend.prompt_bound(query))

    def _bound(self, query: str, prompt_bound: int) -> float:
        if self._states_cost is not None:
            return self._states_cost.highest_usd(query)
        return highest(self.member, prompt_bound, self.backend.max_tokens)

    async def ask(self, query: str, deadline: float, query_id: str, max_cost: float) -> Reply:
        """The member's answer, or why there is none. Never raises for a failure; cancelling it frees its place.

        Args:
            deadline: seconds from now, over queueing, limits and all attempts.
            max_cost: USD; no attempt is made that could bring the call above it.
        """
        start = time.monotonic()
        total = _Sum()
        answer = None
        try:
            async with asyncio.timeout(deadline):
                answer = await self._attempts(query, start + deadline, query_id, max_cost, total)
        except TimeoutError:
            if total.entry is not None:
                self._breaker.ended(replace(total.entry, probe=False), worked=False)
            waited = (
                "no reply"
                if total.entry is not None
                else f"waiting for one of {self.member.concurrency} places, or a limit"
            )
            before = f"; before that: {total.error}" if total.error else ""
            total.error = f"{TIMEOUT}: {waited} within the deadline of {deadline:g} s{before}"
        finally:  # also of a call that was cancelled
            seconds = time.monotonic() - start
            total.spending += Spending(
                calls=1,
                failed=int(answer is None),
                unmetered=int(total.entry is not None),
                seconds=0.0 if answer is None else seconds,
            )
            self._ledger.book(query_id, total.spending, self.member.name)
        return total.reply(answer, seconds)

    async def _attempts(self, query: str, end: float, query_id: str, max_cost: float, total: _Sum) -> Attempt | None:
        while True:
            try:
                attempt = await self._attempt(query, end, query_id, max_cost, total)
            except OverBudget as error:
                before = f"; before that: {total.error}" if total.error else ""
                total.error = f"{OVER_BUDGET}: {error} USD{before}"
                return None
            except CircuitOpen as error:
                total.error = total.error or f"{CIRCUIT_OPEN}: {error}"
                return None
            if attempt.error is None:
                return attempt
            total.error, total.reasoning = attempt.error, attempt.reasoning
            if not attempt.retry or total.attempts >= self._retry.attempts:
                return None
            pause = max(self._retry.pause(total.attempts), attempt.retry_after or 0.0)
            if time.monotonic() + pause >= end:
                total.error += f" (no time left for another attempt after {total.attempts})"
                return None
            await asyncio.sleep(pause)

    async def _attempt(self, query: str, end: float, query_id: str, max_cost: float, total: _Sum) -> Attempt:
        prompt_bound = self.backend.prompt_bound(query)
        bound = self._bound(query, prompt_bound)
        left = max_cost - total.spending.cost
        if bound > left:
            raise OverBudget(f"up to {bound:.6g} USD do not fit into {left:.6g}, which are left for this call")
        async with self._semaphore():
            taken = await self._tokens.take(prompt_bound + self.backend.max_tokens)
            attempt = Attempt()
            try:
                await self._spacing.wait()
                reservation = self._ledger.reserve(bound)
                try:
                    attempt = await self._guarded(query, end, query_id, total)
                    # A backend may have learned from this very reply how long one can be.
                    usage, other = within(attempt.usage, prompt_bound, self.backend.max_tokens, bound)
                    attempt = replace(attempt, usage=usage, bounded=attempt.bounded or other)
                    spent = price(self.member, usage)
                    reservation.settle(spent)
                finally:
                    reservation.cancel()  # of a call that was cancelled or refused; after settling it does nothing
            finally:
                self._tokens.give_back(taken, attempt.usage.prompt_tokens + attempt.usage.completion_tokens)
        total.entry = None
        total.spending += Spending(
            prompt_tokens=attempt.usage.prompt_tokens,
            completion_tokens=attempt.usage.completion_tokens,
            cost=spent,
            cached_tokens=attempt.usage.cached_tokens,
            reasoning_tokens=attempt.usage.reasoning_tokens,
            cache_write_tokens=attempt.usage.cache_write_tokens,
            saved=saved(self.member, attempt.usage),
            estimated=int(attempt.estimated),
            bounded=int(attempt.bounded),
            unmetered=int(attempt.unmetered),
        )
        if attempt.usage != Usage():
            total.usages.append(attempt.usage)
        if attempt.retry_after is not None:
            self._spacing.pause(min(attempt.retry_after, LONGEST_PAUSE))
        return attempt

    async def _guarded(self, query: str, end: float, query_id: str, total: _Sum) -> Attempt:
        """One attempt through the breaker; whatever goes wrong with the member is an error in words."""
        entry = self._breaker.enter()
        worked = None
        total.attempts += 1
        total.entry = entry
        try:
            async with asyncio.timeout(self.member.timeout):
                attempt = await self.backend.send(query, min(self.member.timeout, end - time.monotonic()), query_id)
            if attempt.error is None:
                worked = True
            elif attempt.error.partition(":")[0] in _MEMBER_IS_DOWN:
                worked = False
            elif attempt.error.startswith(f"{NO_QUOTA}:"):
                self._breaker.trip(attempt.error)
        except TimeoutError:
            worked = False
            words = f"{TIMEOUT}: no reply within the timeout of {self.member.timeout:g} s"
            attempt = Attempt(error=words, retry=True, unmetered=True)
        except Exception as error:  # a member's failure is data, whatever it is
            worked = False
            if type(error) not in self._raised:  # but it may be a fault of ours, and then the place is wanted
                self._raised.add(type(error))
                _log.error("member %r raised (said once per kind of error)", self.member.name, exc_info=error)
            attempt = Attempt(error=f"{MALFORMED}: {type(error).__name__}: {error}", unmetered=True)
        finally:
            self._breaker.ended(entry, worked)
        return attempt

    def _semaphore(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if self._places is None or self._places[0] is not loop:  # a semaphore belongs to one event loop
            self._places = (loop, asyncio.Semaphore(self.member.concurrency))
        return self._places[1]
