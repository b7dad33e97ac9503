"""Members that do as they are told: for tests, and for work without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from routers.pool.protocol import Attempt
from srpo.types import Usage


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one attempt."""

    error: str | None = None
    """``KIND: words``; None: it answers after all (late, or with a wrong usage)."""
    retry: bool = True
    hang: bool = False
    """Never ends by itself."""
    usage: Usage | None = None
    """Reported instead of the true one."""
    raises: Exception | None = None


class Scripted:
    """A deterministic member.

    Args:
        reply: the answer, or a function of the query.
        prompt_tokens, completion_tokens: of every answer.
        seconds: it takes this long.
        faults: what happens to the first attempts, in the order in which they are made; None in between: nothing.
        cached_as: its name in the reply cache; None: not cached.
    """

    def __init__(
        self,
        reply: str | Callable[[str], str] = "ok",
        *,
        prompt_tokens: int = 10,
        completion_tokens: int = 5,
        seconds: float = 0.0,
        faults: Iterable[Fault | None] = (),
        cached_as: str | None = None,
    ) -> None:
        self._reply = reply
        self._usage = Usage(prompt_tokens, completion_tokens)
        self._seconds = seconds
        self._faults = iter(faults)
        self._cached_as = cached_as
        self.queries: list[str] = []
        """Every query that arrived, retries too."""

    @property
    def identity(self) -> Mapping[str, Any] | None:
        return None if self._cached_as is None else {"scripted": self._cached_as}

    @property
    def max_tokens(self) -> int:
        return self._usage.completion_tokens

    def prompt_bound(self, query: str) -> int:
        return self._usage.prompt_tokens

    async def send(self, query: str, timeout: float, query_id: str) -> Attempt:
        self.queries.append(query)
        fault = next(self._faults, None) or Fault()
        if fault.hang:
            await asyncio.Event().wait()
        if self._seconds:
            await asyncio.sleep(self._seconds)
        if fault.raises is not None:
            raise fault.raises
        if fault.error is not None:
            return Attempt(usage=fault.usage or Usage(), error=fault.error, retry=fault.retry)
        text = self._reply if isinstance(self._reply, str) else self._reply(query)
        return Attempt(text, fault.usage or self._usage)

    async def aclose(self) -> None:
        pass
