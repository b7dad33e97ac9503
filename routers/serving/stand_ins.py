"""Members of a query router that are no endpoints: recorded replies, and nobody at all.

Both answer one question of text: neither a conversation nor tools or sampling can be honoured, so they are refused.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from routers.pool import Pool
from routers.pool.call import Declined, Failed, chunks
from routers.pool.events import chunks_of
from routers.pool.protocol import OVER_BUDGET, kind
from routers.pool.request import Refusal
from routers.serving.chat import text_of
from routers.serving.served import counted, new_head
from srpo.types import Usage

_TAKEN = ("messages", "user", "metadata")


@dataclass
class Made:
    """A reply that is there."""

    document: dict[str, Any] | None
    events: AsyncGenerator[dict[str, Any] | None, None]
    usage: Usage
    usd: float


def _made(name: str, text: str, usage: Usage, usd: float, stream: bool) -> Made:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    document = {**new_head("chat.completion", name), "choices": [choice], "usage": counted(usage)}
    return Made(None if stream else document, chunks(chunks_of(document) if stream else ()), usage, usd)


def _refusal(fields: Mapping[str, Any], what: str) -> Refusal | None:
    for name in fields:
        if name not in _TAKEN:
            return Refusal(name, f"{what} cannot honour {name!r}")
    if len(fields["messages"]) != 1:
        return Refusal("messages", f"{what} can only answer one message of the user")
    return None


class RecordedReplies:
    """One member's column of a table, by the text of the question."""

    def __init__(self, pool: Pool, name: str) -> None:
        self._pool, self._name = pool, name

    def refusal(self, fields: Mapping[str, Any]) -> Refusal | None:
        return _refusal(fields, "a recorded reply")

    def bound(self, fields: Mapping[str, Any]) -> float:
        return self._pool.bound(self._name, text_of(fields["messages"][0]))

    @asynccontextmanager
    async def call(self, fields: Mapping[str, Any], *, stream: bool, max_cost: float) -> AsyncIterator[Made]:
        reply = await self._pool.ask(self._name, text_of(fields["messages"][0]), 60.0, max_cost=max_cost)
        if reply.error is not None and kind(reply) == OVER_BUDGET:
            raise Declined(OVER_BUDGET, reply.error.partition(": ")[2])
        if reply.error is not None:
            raise Failed(404, reply.error)
        yield _made(self._name, reply.text, reply.usage, self._pool.price(self._name, reply.usage), stream)

    async def aclose(self) -> None:
        await self._pool.aclose()


class NameOnly:
    """A member that lives nowhere: its reply is its name, and costs nothing."""

    def __init__(self, name: str) -> None:
        self._name = name

    def refusal(self, fields: Mapping[str, Any]) -> Refusal | None:
        return _refusal(fields, "without a catalogue there is nobody to pass a request on to: a decision alone")

    def bound(self, fields: Mapping[str, Any]) -> float:
        return 0.0

    @asynccontextmanager
    async def call(self, fields: Mapping[str, Any], *, stream: bool, max_cost: float) -> AsyncIterator[Made]:
        yield _made(self._name, self._name, Usage(), 0.0, stream)

    async def aclose(self) -> None:
        pass
