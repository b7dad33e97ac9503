"""What a pool member is to the pool: something that answers one attempt. Limits, retries and money are the pool's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from srpo.types import Reply, Usage

TIMEOUT = "timeout"
RATE_LIMIT = "rate limit"
SERVER_ERROR = "server error"
BAD_REQUEST = "bad request"
MALFORMED = "malformed reply"
EMPTY = "empty reply"
FILTERED = "filtered"
"""The provider's filter withheld the answer, or the rest of it."""
NO_QUOTA = "no quota"
"""Money or quota at the provider is used up: nothing that waiting for seconds helps."""
CONNECTION = "connection"
CIRCUIT_OPEN = "circuit open"
OVER_BUDGET = "over budget"
KINDS = (
    TIMEOUT,
    RATE_LIMIT,
    SERVER_ERROR,
    BAD_REQUEST,
    MALFORMED,
    EMPTY,
    FILTERED,
    NO_QUOTA,
    CONNECTION,
    CIRCUIT_OPEN,
    OVER_BUDGET,
)
"""Every error of a reply begins with one of these and a colon. ``OVER_BUDGET`` is ours, all others are the pool's."""


def kind(reply: Reply) -> str | None:
    """Which of ``KINDS`` the reply failed with; None where it did not."""
    return None if reply.error is None else reply.error.partition(":")[0]


@dataclass(frozen=True)
class Attempt:
    """What came of one request."""

    text: str = ""
    """The answer, without the reasoning before it."""
    usage: Usage = field(default_factory=Usage)
    error: str | None = None
    """None exactly when there is an answer, else ``KIND: words``. May hold the server's words: untrusted text."""
    retry: bool = False
    """Another attempt may help."""
    retry_after: float | None = None
    """Seconds the server asks to be left alone."""
    estimated: bool = False
    """The server did not report all usage; what is missing in ``usage`` is our upper bound."""
    bounded: bool = False
    """The server reported more than was possible, or less than was seen; ``usage`` is what can be."""
    unmetered: bool = False
    """It failed and reported no usage; whether it was billed is unknown, and nothing was counted."""
    seconds: float | None = None
    """Recorded wall time; None: measured by the caller."""
    reasoning: str = ""
    """What the member thought aloud, also where no answer came of it."""


@runtime_checkable
class StatesCost(Protocol):
    """A backend whose replies come with their cost in USD (`Usage.usd`): its member needs no prices."""

    def highest_usd(self, query: str) -> float:
        """USD that a reply costs at most."""


class Backend(Protocol):
    """One member's way of answering."""

    @property
    def identity(self) -> Mapping[str, Any] | None:
        """What besides the query decides the reply (JSON-able; never a key). None: replies are not cached."""

    @property
    def max_tokens(self) -> int:
        """The longest reply in tokens, enforced by the member."""

    def prompt_bound(self, query: str) -> int:
        """Tokens that a prompt with this query has at most."""

    async def send(self, query: str, timeout: float, query_id: str) -> Attempt:
        """One request, no retry. Runs under the caller's timeout (seconds), and may be cancelled at any await."""

    async def aclose(self) -> None:
        """Close what belongs to the running event loop. The member stays usable."""
