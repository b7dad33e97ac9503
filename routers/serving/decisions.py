"""Decisions of a router of queries for many clients: those that wait at the same time are made together.

One thread decides. While it does, queries wait in a fair queue per key (`routers.serving.fair_queue`), and the next
batch is taken from there; a query that finds it idle is decided at once, alone. Whoever leaves while waiting is never
decided.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from routers.router import Decision
from routers.serving.fair_queue import FairQueue
from routers.serving.gate import OWN_TOKENS, current_ticket
from routers.serving.metrics import ServerMetrics


@dataclass(eq=False)
class _Query:
    text: str
    cost_weight: float | None
    members: tuple[str, ...] | None
    future: asyncio.Future[Decision]


class Decisions:
    """Decides queries of one event loop; close it, which leaves the router open.

    Args:
        router: `route` of one query, and `route_all` of several if it has that.
        max_batch: queries that are decided together.
        metrics: None: nobody counts.
    """

    def __init__(self, router: Any, *, max_batch: int = 32, metrics: ServerMetrics | None = None) -> None:
        self._router, self._max_batch = router, max_batch
        self.metrics = metrics or ServerMetrics()
        self._queue: FairQueue[_Query] = FairQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decisions")
        self._deciding: asyncio.Task[None] | None = None
        self._closed = False

    async def decide(
        self, query: str, *, cost_weight: float | None = None, members: Sequence[str] | None = None
    ) -> Decision:
        """`Router.route`, for the request whose ticket this task holds.

        Raises:
            ValueError: as `Router.route`.
            RuntimeError: closed.
        """
        if self._closed:
            raise RuntimeError("no more is decided: the server is stopping")
        ticket, started = current_ticket(), time.monotonic()
        future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        wanted = _Query(query, cost_weight, None if members is None else tuple(members), future)
        name, work = (ticket.key.name, ticket.work) if ticket else ("", float(OWN_TOKENS + len(query) // 4))
        waiting = self._queue.push(name, work, wanted)
        if self._deciding is None:
            self._deciding = asyncio.create_task(self._decide())
        with ticket.waiting() if ticket else nullcontext():
            try:
                decision = await future
            finally:
                self._queue.discard(waiting)
        self.metrics.decided(decision.member, time.monotonic() - started)
        return decision

    async def aclose(self) -> None:
        """Finish the batch under way; what still waits is not decided, and raises."""
        self._closed = True
        while len(self._queue):
            future = self._queue.pop().future
            if not future.done():
                future.set_exception(RuntimeError("no more is decided: the server is stopping"))
        if self._deciding is not None:
            await self._deciding
        self._thread.shutdown(wait=False)

    async def _decide(self) -> None:
        """Until nothing waits."""
        loop = asyncio.get_running_loop()
        try:
            while len(self._queue):
                batch = [self._queue.pop() for _ in range(min(self._max_batch, len(self._queue)))]
                self.metrics.batched(len(batch))
                found = await loop.run_in_executor(self._thread, self._route, batch)
                for query, one in zip(batch, found, strict=True):
                    if query.future.done():  # its client left
                        continue
                    if isinstance(one, BaseException):
                        query.future.set_exception(one)
                    else:
                        query.future.set_result(one)
        finally:
            self._deciding = None

    def _route(self, batch: Sequence[_Query]) -> list[Decision | BaseException]:
        """In the thread: together those that ask alike; where that fails, each alone, so that one spoils no other."""
        found: dict[_Query, Decision | BaseException] = {}
        for wanted in dict.fromkeys((query.cost_weight, query.members) for query in batch):
            alike = [query for query in batch if (query.cost_weight, query.members) == wanted]
            how: dict[str, Any] = {"cost_weight": wanted[0], "members": wanted[1]}
            if len(alike) > 1 and hasattr(self._router, "route_all"):
                try:
                    decided = self._router.route_all([query.text for query in alike], **how)
                    found.update(zip(alike, decided, strict=True))
                    continue
                except Exception:  # found again below, by the query that it belongs to
                    pass
            for query in alike:
                try:
                    found[query] = self._router.route(query.text, **how)
                except BaseException as error:
                    found[query] = error
        return [found[query] for query in batch]
