"""What stands between clients and the policy: keys, sizes, queues and budgets.

    key = gate.authorise(request.headers)
    document = await gate.body(request)
    async with gate.admitted(key, question) as ticket:     # waits for its turn
        ... at most ticket.max_usd ...
        ticket.settle(usd)

What is wrong with a request is a `RequestError` before anything works for it:

    401  no key, or a wrong one; 403: no admin's         413  more bytes, characters or tokens than are taken
    400  no UTF-8, no JSON, or JSON that others choke on 415  a body that is packed
    408  a body that does not arrive                     429  rate, budget or queue of the key, with Retry-After

A text of more than `CHARACTERS` per token that is allowed is never given to the tokenizer: counting it would be work
that anybody could order.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

from starlette.requests import Request

from routers.router import Router
from routers.serving.errors import RequestError
from routers.serving.fair_queue import FairQueue, Waiting
from routers.serving.keys import Allowance, Key, Keys, Refused
from routers.serving.metrics import ServerMetrics
from srpo.ranges import Ranges, above, at_least, check_numbers

CHARACTERS = 8
"""Per token: prose has 4 or 5, source code up to 8 with its indentation; what has more is a text of repetitions."""
OWN_TOKENS = 256
"""That a question costs the policy beside its own text: the description of the pool, and the turn that it writes."""
DEEPEST = 64
"""Brackets within brackets of a body: what a request holds is passed on to programs that count them too."""
LARGEST = 2**64
"""Whole numbers of a body are below it: seeds have 64 bits."""
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"')
_AT_ONCE = 65_536
"""Bytes that are read as JSON between two beats of the event loop; more are read in a thread."""
_COUNTED_AT_ONCE = 1000
"""Characters whose tokens are counted between two beats of the event loop."""
_SWALLOW_SECONDS = 2.0
"""So long the rest of a body that is refused is read and thrown away: a client that is still sending hears nothing."""


@dataclass(frozen=True)
class GateLimits:
    """What is let in.

    Raises:
        ValueError: a number out of its range.
    """

    RANGES: ClassVar[Ranges] = {
        "body_bytes": at_least(1),
        "body_seconds": above(0),
        "question_tokens": at_least(1),
        "queue_tokens": at_least(1),
        "queue_requests": at_least(1),
        "working": at_least(1),
    }

    body_bytes: int = 1_000_000
    body_seconds: float = 20.0
    """Until the last byte of a body has arrived."""
    question_tokens: int = 4096
    """Of the text that the policy reads."""
    queue_tokens: int = 65_536
    """Of all questions of one key that wait."""
    queue_requests: int = 256
    """Of one key that wait."""
    working: int | None = 64
    """Requests that are worked on at once, further ones wait; None: all, where each waits for the policy by itself
    (`routers.serving.decisions`)."""

    def __post_init__(self) -> None:
        check_numbers(self)


class Ticket:
    """A request that was let in. Made by `Gate.admitted`."""

    def __init__(self, key: Key, tokens: int, allowance: Allowance) -> None:
        self.key = key
        self.tokens = tokens
        """Of its question, for queues: at least 1."""
        self.state = "working"
        """Or "waiting", in one of the queues."""
        self.allowance = allowance

    @property
    def max_usd(self) -> float:
        """The most that this request may cost, in USD, which whoever works for it must keep to; inf: no limit."""
        return self.allowance.usd

    @property
    def work(self) -> float:
        """For `FairQueue`."""
        return float(self.tokens + OWN_TOKENS)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While it stands in a queue; what is cancelled meanwhile has cost nothing."""
        self.state = "waiting"
        yield
        self.state = "working"  # not where it was cancelled: it never had its turn

    def settle(self, usd: float) -> None:
        """What it cost. Later calls do nothing."""
        self.allowance.settle(usd)


_current: ContextVar[Ticket | None] = ContextVar("ticket", default=None)


def current_ticket() -> Ticket | None:
    """Of the request that this task works for."""
    return _current.get()


class Gate:
    """Decides who is let in, and when. Belongs to an event loop.

    Args:
        keys: who may ask; None: anybody, without limits.
        limits: what is let in.
        count_tokens: `Router.count_tokens` of the router; None: that of one without a tokenizer.
        metrics: None: nobody counts.
    """

    def __init__(
        self,
        keys: Keys | None = None,
        limits: GateLimits | None = None,
        *,
        count_tokens: Callable[[str], int] | None = None,
        metrics: ServerMetrics | None = None,
    ) -> None:
        self.keys = keys or Keys()
        self.limits = limits or GateLimits()
        self._count = count_tokens or Router().count_tokens
        self.metrics = metrics or ServerMetrics()
        self._tickets: set[Ticket] = set()
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()
        self._working = 0
        for name, weigh in (("router_waiting", lambda _: 1), ("router_waiting_tokens", lambda t: t.tokens)):
            self.metrics.watch(name, "Admitted, and not begun or decided yet.", self._waiting_by(weigh), "key")
        whose, keys = ("key", "period"), self.keys
        self.metrics.watch("router_budget_usd", "Budgets of keys.", lambda: keys.budgets(spent=False), *whose)
        spent = "Spent of them, and set aside."
        self.metrics.watch("router_budget_spent_usd", spent, lambda: keys.budgets(spent=True), *whose)

    def authorise(self, headers: Mapping[str, str], *, admin: bool = False) -> Key:
        """Whose request this is.

        Args:
            admin: it asks for what not every key may see.

        Raises:
            RequestError: 401, or 403.
        """
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        key = self.keys.find(given.encode("latin-1", "replace") or None)
        if key is None:
            raise self._refusal(
                "key", RequestError(401, "the API key is missing or wrong", code="invalid_api_key",
                                    headers={"WWW-Authenticate": "Bearer"}),
            )  # fmt: skip
        if admin and not key.limits.admin:
            words = f"key {key.name!r} may not see the numbers of the whole server; `admin: true` in the file of keys "
            raise self._refusal("key", RequestError(403, f"{words}lets it", code="insufficient_permissions"))
        return key

    async def body(self, request: Request) -> Any:
        """The JSON in a request's body.

        Raises:
            RequestError: 400, 408, 413 or 415.
            ClientDisconnect: the client left.
        """
        packed = request.headers.get("content-encoding", "identity")
        if packed != "identity":
            raise self._refusal("body", RequestError(415, "send the body as it is, without a content-encoding"))
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                data = await self._read(request)
        except TimeoutError:
            message = f"the body did not arrive within {self.limits.body_seconds:g} seconds"
            raise self._refusal("slow", RequestError(408, message, headers={"Connection": "close"})) from None
        try:
            return read_json(data) if len(data) <= _AT_ONCE else await asyncio.to_thread(read_json, data)
        except ValueError as error:
            raise self._refusal("body", RequestError(400, str(error))) from None

    @asynccontextmanager
    async def admitted(self, key: Key, text: str, *, at_most: float | None = None) -> AsyncIterator[Ticket]:
        """Let a question in when its turn comes: its key's rate, budget and queue hold it, and its length.

        Money is set aside until `Ticket.settle`. Where that is never called, a request that ends by a `RequestError`
        has cost nothing, and any other all that was set aside: nobody knows what it did.

        Args:
            key: whose it is.
            text: what the policy will read of it.
            at_most: USD that it cannot cost more than, as whoever works for it can promise; None: not known.

        Raises:
            RequestError: 413 or 429.
        """
        tokens = await self._tokens(text)
        ticket = self._ticket(key, tokens, math.inf if at_most is None else at_most)
        self._tickets.add(ticket)
        took_place = False
        try:
            if self.limits.working is not None:
                await self._place(ticket)
                took_place = True
            _current.set(ticket)
            yield ticket
        except RequestError:
            ticket.allowance.cancel()
            raise
        except BaseException:
            if ticket.state == "waiting":
                ticket.allowance.cancel()
            raise
        finally:
            _current.set(None)
            self._tickets.discard(ticket)
            ticket.settle(ticket.max_usd)
            if took_place:
                self._give_place()

    def states(self) -> Counter[str]:
        """How many of those let in are "waiting" and "working"."""
        return Counter(ticket.state for ticket in self._tickets)

    async def _read(self, request: Request) -> bytes:
        limit, body = self.limits.body_bytes, bytearray()
        stated = request.headers.get("content-length", "")
        too_large = stated.isdecimal() and (len(stated) > 18 or int(stated) > limit)
        if not too_large:
            async for part in request.stream():
                body += part
                if too_large := len(body) > limit:
                    break
        if not too_large:
            return bytes(body)
        try:  # a connection that is closed while its client sends is reset, and the client hears no reason
            async with asyncio.timeout(_SWALLOW_SECONDS):
                while (await request.receive()).get("more_body"):
                    pass
        except TimeoutError:
            pass
        message = f"the body is larger than {limit:,} bytes"
        raise self._refusal("size", RequestError(413, message, headers={"Connection": "close"}))

    async def _tokens(self, text: str) -> int:
        """Of a text that is not too long.

        Raises:
            RequestError: 413.
        """
        limit, size = self.limits.question_tokens, f"{len(text):,} characters"
        if len(text) <= limit * CHARACTERS:
            tokens = self._count(text) if len(text) <= _COUNTED_AT_ONCE else await asyncio.to_thread(self._count, text)
            if tokens <= limit:
                return max(1, tokens)
            size = f"{tokens:,} tokens"
        message = f"the question has {size}; at most {limit:,} tokens are taken"
        raise self._refusal("size", RequestError(413, message, "messages", "context_length_exceeded"))

    def _ticket(self, key: Key, tokens: int, at_most: float) -> Ticket:
        """Raises RequestError 429."""
        waiting = [ticket for ticket in self._tickets if ticket.key is key and ticket.state == "waiting"]
        tokens_waiting = sum(ticket.tokens for ticket in waiting)
        full = len(waiting) >= self.limits.queue_requests or tokens_waiting + tokens > self.limits.queue_tokens
        if full and waiting:
            message = f"{len(waiting)} requests with {tokens_waiting:,} tokens wait already; try again later"
            raise self._too_many("queue", message, 1.0)
        try:
            allowance = key.allow(at_most)
            try:
                key.count()
            except Refused:
                allowance.cancel()
                raise
        except Refused as refused:
            raise self._too_many(refused.reason, refused.message, refused.retry_after) from None
        return Ticket(key, tokens, allowance)

    def _too_many(self, reason: str, message: str, retry_after: float | None) -> RequestError:
        code = "insufficient_quota" if reason == "budget" else "rate_limit_exceeded"
        headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        return self._refusal(reason, RequestError(429, message, code=code, headers=headers))

    def _refusal(self, reason: str, error: RequestError) -> RequestError:
        self.metrics.refused(reason)
        return error

    async def _place(self, ticket: Ticket) -> None:
        """One of `working` places, in fair order."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting: Waiting[asyncio.Future[None]] = self._queue.push(ticket.key.name, ticket.work, turn)
        self._fill_places()
        try:
            with ticket.waiting():
                await turn
        except asyncio.CancelledError:
            self._queue.discard(waiting)
            if turn.done() and not turn.cancelled():  # its turn came at the same moment
                self._give_place()
            raise

    def _give_place(self) -> None:
        self._working -= 1
        self._fill_places()

    def _fill_places(self) -> None:
        while len(self._queue) and self._working < (self.limits.working or 0):
            turn = self._queue.pop()
            if not turn.done():  # its request was cancelled a moment ago
                turn.set_result(None)
                self._working += 1

    def _waiting_by(self, weigh: Callable[[Ticket], int]) -> Callable[[], dict[tuple[str, ...], float]]:
        def read() -> dict[tuple[str, ...], float]:
            found: Counter[tuple[str, ...]] = Counter()
            for ticket in list(self._tickets):
                found[(ticket.key.name,)] += weigh(ticket) if ticket.state == "waiting" else 0
            return dict(found)

        return read


def read_json(data: bytes) -> Any:
    """A body that other programs can read: JSON in UTF-8, each name once, no NaN, no number that is none elsewhere.

    Half of a surrogate pair, which JSON can write and UTF-8 cannot, is taken: truncated texts of others hold some.

    Raises:
        ValueError: says what is wrong.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the body is not UTF-8: byte {error.start}") from None
    if text.count("[") + text.count("{") > DEEPEST and _depth(text) > DEEPEST:
        raise ValueError(f"the body has more than {DEEPEST} brackets within brackets")
    try:
        return json.loads(
            text, parse_constant=_no_constant, parse_int=_whole, parse_float=_real, object_pairs_hook=_names_once
        )
    except _Bad as error:
        raise ValueError(str(error)) from None
    except (ValueError, RecursionError):
        raise ValueError("the body is not JSON") from None


class _Bad(Exception):
    """What is wrong with a body that is JSON. No ValueError: json takes those for its own."""


def _no_constant(word: str) -> Any:
    raise _Bad(f"the body holds {word}, which is not JSON")


def _whole(digits: str) -> int:
    if len(digits) > 21 or abs(number := int(digits)) >= LARGEST:
        raise _Bad("the body holds a whole number of more than 64 bits")
    return number


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _Bad("the body holds a number that is too large")
    return number


def _names_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(n for n, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise _Bad(f"the body holds {name[:80]!r} twice in one object")
    return found


def _depth(text: str) -> int:
    """Of its brackets; those in strings do not count."""
    brackets = re.findall(r"[\[\]{}]", _BRACKETS.sub("", text))
    return max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)
