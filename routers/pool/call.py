"""A call of a member on a client's behalf: what came of it so far, what that costs, and how it fails."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any

from routers.data.billing import HOUR, price
from routers.data.catalogue import Member
from routers.pool.completion import choices_of
from routers.pool.events import texts_in
from routers.pool.request import Request
from routers.pool.usage import Bill, bill
from srpo.types import Usage

_ELSEWHERE = (408, 425, 429)


class Declined(Exception):
    """The member is not asked. `kind`: of `routers.pool.protocol.KINDS`."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(f"{kind}: {words}")
        self.kind = kind


class Failed(Exception):
    """The member gave no reply, or broke it off.

    Attributes:
        status: the member's own; 502 where there was no HTTP or no completion behind it, 504 where it took too long.
        words: the member's own, without keys.
        error: the member's error object, where it sent one in OpenAI's shape.
        retry_after: seconds that the member asks to be left alone.
        usd: what the failure is billed for, where the member says so.
        unmetered: it may have been billed all the same: the member was at work, and nobody knows.
    """

    def __init__(
        self, status: int, words: str, error: Mapping[str, Any] | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(words)
        self.status, self.words, self.error, self.retry_after = status, words, error or {}, retry_after
        self.usd, self.unmetered = 0.0, False

    @property
    def elsewhere(self) -> bool:
        """Whether another member may do better with the same request."""
        return self.status >= 500 or self.status in _ELSEWHERE


class Call:
    """A reply under way: made by `Passthrough.call`.

    Attributes:
        document: the whole completion; None: it is a stream, see `events`.
        events: its chunks as they come; None among them: the member says that it is still there.
        began: whether the member was asked.
    """

    def __init__(self, member: Member, request: Request) -> None:
        self.document: dict[str, Any] | None = None
        self.events: AsyncGenerator[dict[str, Any] | None, None] = chunks([])
        self._member = member
        self._request = request
        self._reported: dict[str, Any] = {}
        self._seen: list[str] | None = None  # what the member wrote; None: nothing came
        self._billed: Bill | None = None  # of all that came; None: not known
        self.began = False

    def note(self, document: dict[str, Any]) -> None:
        """Note what a body says of usage, an error too."""
        self._billed = None
        if isinstance(document.get("usage"), dict):
            self._reported = {"usage": document["usage"]}

    def read(self, document: dict[str, Any]) -> None:
        """Note what a completion or a chunk says of usage, and what it holds."""
        self.note(document)
        self._seen = [] if self._seen is None else self._seen
        for choice in choices_of(document):
            self._seen += texts_in(choice.get("delta") or choice.get("message"))

    def bill(self) -> Bill | None:
        """Of what came so far; None: nothing did, and no usage was reported."""
        if self._billed is None:
            request = self._request
            self._billed = bill(
                self._reported,
                prompt_bound=request.prompt_bound,
                max_tokens=request.limit,
                seen=None if self._seen is None else "".join(self._seen),
                reasoning_bound=request.reasoning_bound,
                long_writes=(self._member.cache_seconds or 0.0) >= HOUR,
            )
        return self._billed

    @property
    def usage(self) -> Usage:
        """What it is billed for so far."""
        billed = self.bill()
        return Usage() if billed is None else billed.usage

    @property
    def usd(self) -> float:
        """What it has cost so far."""
        return price(self._member, self.usage)


async def chunks(made: Iterable[dict[str, Any]]) -> AsyncGenerator[dict[str, Any] | None, None]:
    """Chunks that are there already, as a stream."""
    for chunk in made:
        yield chunk
