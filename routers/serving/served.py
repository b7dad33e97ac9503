"""What a server hands out, whoever answers: one protocol for proxies and agents, and what a request cost so far."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from routers.serving.chat import ChatRequest
from routers.serving.metrics import ServerMetrics
from srpo.types import Usage


class Priced(Protocol):
    """A call under way."""

    @property
    def usd(self) -> float: ...


class Spent:
    """USD of one request, at any moment: also where it fails, or the client leaves in the middle of a stream."""

    def __init__(self) -> None:
        self.policy_usd = 0.0
        self.failed_usd = 0.0
        self.call: Priced | None = None
        self.known = True
        """False: it may have cost more than `usd` says, as of an agent that was stopped in the middle."""
        self.told: Mapping[str, Any] = {}
        """What was decided, as far as it is: member, scores, tried."""

    @property
    def usd(self) -> float:
        return self.policy_usd + self.failed_usd + (0.0 if self.call is None else self.call.usd)


@dataclass
class Served:
    """A reply under way."""

    headers: dict[str, str] = field(default_factory=dict)
    """Known before the first byte."""
    document: dict[str, Any] | None = None
    """The whole reply, a ``chat.completion``; None: it is a stream."""
    chunks: AsyncGenerator[dict[str, Any] | None, None] | None = None
    """Of a stream, ``chat.completion.chunk``; None among them: nothing new, but all is well."""


class Reading(Protocol):
    """What a policy reads of a request."""

    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class Text:
    """A `Reading` that is no more than its text."""

    text: str


class Worker(Protocol):
    """Answers chat requests: a router with its members, or an agent."""

    metrics: ServerMetrics
    queues: bool
    """Whether its requests wait for the policy in a queue of their own (`routers.serving.decisions`)."""

    def count_tokens(self, text: str) -> int:
        """Of what the policy reads; from any thread."""

    def reads(self, asked: ChatRequest) -> Reading:
        """What the policy will read of a request; RequestError if the request cannot be answered."""

    def serve(self, asked: ChatRequest, read: Any, spent: Spent) -> AbstractAsyncContextManager[Served]:
        """Answer a request, of which this is `read`. RequestError before the reply begins, and out of its chunks where
        it breaks off."""

    async def aclose(self) -> None:
        """Finish, and give back threads and connections."""


def new_head(kind: str, name: str) -> dict[str, Any]:
    """What every ``chat.completion`` and each of its chunks begins with."""
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}


def counted(usage: Usage) -> dict[str, Any]:
    """Tokens in OpenAI's shape."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
