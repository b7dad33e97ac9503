"""A member's endpoint for whole requests of clients: limits, breaker and money as of `Caller`, words as they come.

`Caller` asks a question and reads an answer; this passes a conversation on, with tools and sampling, and gives back
the member's own document, or its events as they come. One attempt, no retry: whoever calls may ask somebody else, as
long as nothing has come. What is set aside is `billing.highest` for the longest prompt and reply that the request
allows; what is booked is what the member reports, within that, and an upper bound where it reports nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from routers.data.billing import highest, price, saved
from routers.data.catalogue import Member
from routers.pool.call import Call, Declined, Failed, chunks
from routers.pool.caller import LONGEST_PAUSE
from routers.pool.completion import choices_of, error_of, not_json, read_json
from routers.pool.endpoint import Endpoint, retry_after
from routers.pool.events import DONE, chunks_of, data_of
from routers.pool.ledger import Ledger, OverBudget, Reservation, Spending
from routers.pool.limits import Breaker, CircuitOpen, Entry, Spacing, TokenBucket
from routers.pool.protocol import CIRCUIT_OPEN, OVER_BUDGET, TIMEOUT
from routers.pool.request import Refusal, refusal, request_of
from routers.pool.transport import Broken, Redirected, Refused, Unreachable
from srpo.redact import redacted, scrubbed
from srpo.types import Usage

_log = logging.getLogger(__name__)

LONGEST_STREAM = 64 * 2**20
"""Bytes of all events of one reply: each token has an envelope of some hundred bytes."""
_ERROR_CHARS = 2000


class Passthrough:
    """One member, for whole requests. For one event loop.

    Args:
        member: with ``base_url`` and prices.
        ledger: where calls are set aside and booked.

    Raises:
        ValueError: as `Endpoint`, or the member has no prices.
    """

    def __init__(self, member: Member, ledger: Ledger) -> None:
        if not member.priced:
            raise ValueError(f"member {member.name!r} has no prices; write price_in and price_out, or price_from")
        self.member = member
        self._endpoint = Endpoint(member, "{query}")
        self._ledger = ledger
        self._breaker = Breaker()
        self._places = asyncio.Semaphore(member.concurrency)
        self._spacing = Spacing(member.requests_per_second)
        self._tokens = TokenBucket(member.tokens_per_minute)

    def refusal(self, fields: Mapping[str, Any]) -> Refusal | None:
        """Why this member cannot take a request with these fields; None: it can."""
        return refusal(self.member, fields)

    def bound(self, fields: Mapping[str, Any]) -> float:
        """USD that a call with these fields costs at most."""
        request = request_of(self.member, fields, stream=False)
        return highest(self.member, request.prompt_bound, request.completion_bound)

    @asynccontextmanager
    async def call(
        self, fields: Mapping[str, Any], *, stream: bool = False, max_cost: float = math.inf
    ) -> AsyncIterator[Call]:
        """One call; it is booked when the context is left, however it is left.

        Args:
            fields: of the request, as the client sent them: messages, tools, sampling.
            stream: events as they come (`Call.events`), from the first one on; else `Call.document`.
            max_cost: USD; a call that could cost more is not made.

        Raises:
            Declined: the member was not asked.
            Failed: it gave no reply; `Call.events` raises it too, where a stream breaks off.
        """
        request = request_of(self.member, fields, stream=stream)
        bound = highest(self.member, request.prompt_bound, request.completion_bound)
        if bound > max_cost:
            raise Declined(OVER_BUDGET, f"a call costs at most {bound:.6g} USD, and {max_cost:.6g} USD are left")
        call = Call(self.member, request)
        async with AsyncExitStack() as stack:
            await self._queue(stack, call, request.prompt_bound + request.completion_bound)
            try:
                reservation = self._ledger.reserve(bound)
            except OverBudget as error:
                raise Declined(OVER_BUDGET, f"{error} USD") from None
            stack.callback(self._book, call, reservation, time.monotonic())
            try:
                entry = self._breaker.enter()
            except CircuitOpen as error:
                raise Declined(CIRCUIT_OPEN, str(error)) from None
            await self._ask(stack, call, entry, request.body)
            yield call

    async def _queue(self, stack: AsyncExitStack, call: Call, tokens: int) -> None:
        """A place among the member's, its tokens per minute, and its turn; given back with the stack."""
        try:
            async with asyncio.timeout(self.member.timeout):
                await stack.enter_async_context(self._places)
                taken = await self._tokens.take(tokens)
                stack.callback(lambda: self._tokens.give_back(taken, _tokens_of(call)))
                await self._spacing.wait()
        except TimeoutError:
            waited = f"waiting for one of {self.member.concurrency} places, or a limit"
            raise Declined(TIMEOUT, f"{waited}, for {self.member.timeout:g} s") from None

    async def _ask(self, stack: AsyncExitStack, call: Call, entry: Entry, body: Mapping[str, Any]) -> None:
        """Send the request and wait for the reply, or the first event of it."""
        worked: bool | None = None
        try:
            async with asyncio.timeout(self.member.timeout):
                call.began = True
                await self._begin(stack, call, body)
            worked = True
        except TimeoutError:
            worked = False
            raise _unmetered(504, f"no reply within the timeout of {self.member.timeout:g} s") from None
        except (Refused, Broken, Unreachable) as error:
            worked = False
            raise _unmetered(502, self._lost(error)) from None
        except Failed as error:
            worked, error.usd = (False if error.status >= 500 else None), call.usd
            if error.retry_after is not None:
                self._spacing.pause(min(error.retry_after, LONGEST_PAUSE))
            raise
        finally:
            self._breaker.ended(entry, worked)

    async def _begin(self, stack: AsyncExitStack, call: Call, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()  # ASCII: also what no UTF-8 has, as the client sent it
        opened = self._endpoint.transport.opened(data, self._endpoint.key, None)
        answer = await stack.enter_async_context(opened)
        if not 200 <= answer.status < 300:
            raise self._failed(call, answer.status, await answer.whole(), answer.headers)
        if not body.get("stream") or answer.headers.get("content-type", "").startswith("application/json"):
            document = self._completion(call, await answer.whole(), answer.headers)
            if body.get("stream"):
                call.events = chunks(chunks_of(document))
            else:
                call.document = document
            return
        events = data_of(answer.pieces(), LONGEST_STREAM)
        stack.push_async_callback(events.aclose)
        first = await anext(events, b"")
        while first is None:
            first = await anext(events, b"")
        call.events = self._events(call, events, self._chunk(call, first))

    async def _events(
        self, call: Call, data: AsyncGenerator[bytes | None, None], first: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any] | None, None]:
        chunk: dict[str, Any] | None = first
        finished = False
        while True:
            finished |= chunk is not None and any(choice.get("finish_reason") for choice in choices_of(chunk))
            yield chunk
            try:
                async with asyncio.timeout(self.member.timeout):
                    event = await anext(data, DONE if finished else b"")
            except TimeoutError:
                raise Failed(504, f"the stream stood still for {self.member.timeout:g} s") from None
            except (Refused, Broken, Unreachable) as error:
                raise Failed(502, self._lost(error)) from None
            if event == DONE:
                with suppress(Exception):  # the end of the body, so that the connection can be used again
                    async with asyncio.timeout(0.1):
                        await anext(data, None)
                return
            chunk = None if event is None else self._chunk(call, event)

    def _chunk(self, call: Call, event: bytes) -> dict[str, Any]:
        if not event:
            raise Failed(502, "the stream broke off before its end")
        return self._completion(call, event, {})

    def _completion(self, call: Call, body: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
        """A completion or a chunk; Failed for anything else, an error in a body of status 200 too."""
        try:
            document = read_json(self._without_key(body))
        except ValueError:
            told = not_json(self._without_key(body), headers.get("content-type", ""))
            raise Failed(502, self._clean(told.words)) from None
        if not isinstance(document, dict) or not isinstance(document.get("choices"), list):
            told_error = error_of(document, holds_answer=False)
            codes = () if told_error is None else told_error.codes
            inner = next((int(code) for code in codes if re.fullmatch("[45][0-9][0-9]", code)), 502)
            raise self._failed(call, inner, body, headers)
        call.read(document)
        return document

    def _failed(self, call: Call, status: int, body: bytes, headers: Mapping[str, str]) -> Failed:
        """The member's error, in its own words."""
        body = self._without_key(body)
        try:
            document = read_json(body)
        except ValueError:
            document = None
        if isinstance(document, dict):
            call.note(document)
        told = error_of(document, holds_answer=False)
        words = told.words if told is not None else body.decode("utf-8", "replace")
        error = document.get("error") if isinstance(document, dict) else None
        shaped = error if isinstance(error, dict) else {}
        named = {name: value for name, value in shaped.items() if name in ("type", "param", "code")}
        if status < 400:
            status, words = 502, f"status {status}, which is no reply"
        return Failed(status, self._clean(words) or f"status {status}", redacted(named), retry_after(headers))

    def _book(self, call: Call, reservation: Reservation, started: float) -> None:
        billed = call.bill()
        usage = Usage() if billed is None else billed.usage
        usd = price(self.member, usage)
        reservation.settle(usd) if call.began else reservation.cancel()
        spent = Spending(
            calls=int(call.began),
            failed=int(call.began and billed is None),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cost=usd,
            cached_tokens=usage.cached_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            saved=saved(self.member, usage),
            estimated=int(billed is not None and billed.estimated),
            bounded=int(billed is not None and billed.bounded),
            unmetered=int(call.began and billed is None),
            seconds=0.0 if billed is None else time.monotonic() - started,
        )
        self._ledger.book("", spent, self.member.name)

    def _without_key(self, body: bytes) -> bytes:
        key = self._endpoint.key
        return body.replace(key.encode(), b"[key]") if key else body

    def _lost(self, error: Exception) -> str:
        """Why there is no reply; at which address a member lives, and what is wrong there, only the log says."""
        words = self._clean(str(error))
        _log.warning("member %r: %s", self.member.name, words)
        return "the connection to the member failed" if isinstance(error, (Unreachable, Redirected)) else words

    def _clean(self, words: str) -> str:
        """Words of others for a client: without anything that looks like a secret, and not without end."""
        return scrubbed(" ".join(self._endpoint.clean(words).split()))[:_ERROR_CHARS]

    async def aclose(self) -> None:
        await self._endpoint.aclose()


def _unmetered(status: int, words: str) -> Failed:
    failed = Failed(status, words)
    failed.unmetered = True
    return failed


def _tokens_of(call: Call) -> int:
    billed = call.bill()
    return 0 if billed is None else billed.usage.prompt_tokens + billed.usage.completion_tokens
