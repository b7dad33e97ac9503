"""What a call costs: the one place in the project that multiplies tokens by a price.

Prices are USD per million tokens, as vendors quote them; ``price_request`` alone is USD per request. A catalogue
states them per member (``routers.data.catalogue.Member``):

    price_in, price_out   prompt and completion tokens
    price_cached          prompt tokens that the provider read from its cache; default: price_in
    price_cache_write     prompt tokens that it wrote there; default: price_in
    price_cache_write_1h  of those, the ones to be kept for an hour or longer; default: price_cache_write
    price_cache_hour      per hour that a token is kept (Gemini's explicit caches); default: 0
    price_reasoning       completion tokens that were reasoning; default: price_out
    price_request         of every request that used tokens; default: 0
    price_tiers           [{above: 200000, price_in: 2.5, price_out: 15, price_cached: 0.25}, ...]: the prices of a
                          whole call whose prompt has more tokens than that. A tier says its price_in and price_out;
                          what else it leaves out costs as much as those, and is not taken from below

A reply is billed by what it reports, within what was possible and never below what was seen (``routers.pool.usage``).
What a call will find in a provider's cache is foretold by ``routers.data.prompt_cache``. What is set aside before a
call is ``highest``: no discount, every token written for the dearest time, the dearest tier that the prompt can reach,
the fee. A reply out of our own cache costs nothing; its price (``price``), which rewards use, stays that of the call
that was made. A recorded reply whose table has a ``cost`` column costs what that says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from srpo.types import Usage

if TYPE_CHECKING:
    from routers.data.catalogue import Member

TOKENS_PER_PRICE = 1_000_000
HIGHEST_PRICE = 10_000.0
"""USD per million tokens; the dearest model sold takes 600. Above it a catalogue means another unit."""
LOWEST_PRICE = 1e-4
"""The same from below: a price per token, where one per million belongs. 0 is a price."""
HIGHEST_REQUEST = 100.0
"""USD per request."""
HOUR = 3600.0
"""Seconds. What is kept as long, or longer, was written for long."""


@dataclass(frozen=True)
class PriceTier:
    """Prices of calls whose prompt has more than ``above`` tokens."""

    above: int
    price_in: float
    price_out: float
    price_cached: float | None = None
    price_cache_write: float | None = None
    price_reasoning: float | None = None
    price_cache_write_1h: float | None = None


def token_usd(prompt_tokens: Any, completion_tokens: Any, price_in: float, price_out: float) -> Any:
    """USD of tokens, or of arrays of them, at two plain prices."""
    return (prompt_tokens * price_in + completion_tokens * price_out) / TOKENS_PER_PRICE


def cost(
    member: Member,
    prompt_tokens: float,
    completion_tokens: float,
    *,
    cached_tokens: int = 0,
    cache_write_tokens: int = 0,
    reasoning_tokens: int = 0,
    cache_write_1h_tokens: int = 0,
    cache_token_hours: float = 0.0,
) -> float:
    """Price of one request in USD, by the member's prices; see the module's docstring.

    Args:
        member: with prices.
        prompt_tokens: all of them; a mean of several requests may be a fraction.
        completion_tokens: all of them.
        cached_tokens, cache_write_tokens: of the prompt tokens.
        reasoning_tokens: of the completion tokens.
        cache_write_1h_tokens: of the tokens written, those to be kept for an hour or longer.
        cache_token_hours: tokens kept, times hours.

    Raises:
        ValueError: the member has no prices, a count is negative, or a part is more than its whole.
    """
    fresh = prompt_tokens - cached_tokens - cache_write_tokens
    written = completion_tokens - reasoning_tokens
    kept_short = cache_write_tokens - cache_write_1h_tokens
    counts = (prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens)
    if min(*counts, cache_write_1h_tokens, cache_token_hours) < 0:
        raise ValueError(f"{member.name}: token counts are negative ({prompt_tokens}, {completion_tokens})")
    if min(fresh, written, kept_short) < 0:
        raise ValueError(f"{member.name}: more cached or reasoning tokens than prompt or completion tokens")
    prices = _tier(member, prompt_tokens)
    usd = token_usd(fresh, written, prices.price_in, prices.price_out)
    if cached_tokens or cache_write_tokens:
        write = _or(prices.price_cache_write, prices.price_in)
        usd += token_usd(cached_tokens, kept_short, _or(prices.price_cached, prices.price_in), write)
        usd += token_usd(0, cache_write_1h_tokens, 0.0, _or(prices.price_cache_write_1h, write))
    if reasoning_tokens:
        usd += token_usd(0, reasoning_tokens, 0.0, _or(prices.price_reasoning, prices.price_out))
    if cache_token_hours:
        usd += token_usd(0, cache_token_hours, 0.0, member.price_cache_hour)
    return float(usd + member.price_request)


def shown_usd(usd: float) -> float:
    """What is told of USD: 12 digits, so that a sum of them has no tail (1.2e-05, not 1.2000000000000002e-05). What
    is booked, reserved or compared is never rounded."""
    return float(f"{usd:.12g}")


def costs(member: Member, prompt_tokens: np.ndarray, completion_tokens: np.ndarray) -> np.ndarray:
    """`cost` of many plain requests: USD, float64 ``[requests]``.

    Raises:
        ValueError: the member has no prices.
    """
    usd = np.empty(len(prompt_tokens))
    for tier in (_base(member), *sorted(member.price_tiers, key=lambda tier: tier.above)):
        reached = slice(None) if tier.above == 0 else prompt_tokens > tier.above
        usd[reached] = token_usd(prompt_tokens[reached], completion_tokens[reached], tier.price_in, tier.price_out)
    return usd + member.price_request


def price(member: Member, usage: Usage) -> float:
    """USD of a call's usage: what its source states, else by tokens, request by request. Nothing used costs nothing.

    Raises:
        ValueError: as `cost`.
    """
    return sum(_of_one(member, request) for request in usage.calls or (usage,))


def _of_one(member: Member, usage: Usage) -> float:
    if usage.usd is not None:
        return usage.usd
    if not (usage.prompt_tokens or usage.completion_tokens):
        return 0.0
    return cost(
        member,
        usage.prompt_tokens,
        usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
        cache_token_hours=usage.cache_token_hours,
    )


def saved(member: Member, usage: Usage) -> float:
    """USD that the provider's cache made a call cheaper: what the same tokens cost without one, less their `price`.
    Negative where more was written than read again, and 0 where the source states what a call cost.

    Raises:
        ValueError: as `cost`.
    """
    requests = [r for r in usage.calls or (usage,) if r.usd is None and _cache_used(r)]
    without = [Usage(r.prompt_tokens, r.completion_tokens, reasoning_tokens=r.reasoning_tokens) for r in requests]
    return sum((_of_one(member, a) - _of_one(member, b) for a, b in zip(without, requests, strict=True)), 0.0)


def _cache_used(usage: Usage) -> bool:
    return bool(usage.cached_tokens or usage.cache_write_tokens or usage.cache_token_hours)


def highest(member: Member, prompt_tokens: int, completion_tokens: int) -> float:
    """USD that one request costs at most, if it has at most so many tokens; what its prompt costs to keep for
    ``cache_seconds`` is in it.

    Raises:
        ValueError: the member has no prices.
    """
    tiers = [_base(member), *(tier for tier in member.price_tiers if tier.above < prompt_tokens)]
    hours = prompt_tokens * (member.cache_seconds or 0.0) / HOUR
    dearest = max(token_usd(prompt_tokens, completion_tokens, *_dearest(tier)) for tier in tiers)
    return float(member.price_request + token_usd(0, hours, 0.0, member.price_cache_hour) + dearest)


def total(usages: Iterable[Usage]) -> Usage:
    """The sum of requests, which remembers them: a tier and a fee belong to a request, and not to a sum of tokens."""
    requests = tuple(usages)
    return Usage(
        sum(u.prompt_tokens for u in requests),
        sum(u.completion_tokens for u in requests),
        sum(u.cached_tokens for u in requests),
        sum(u.cache_write_tokens for u in requests),
        sum(u.reasoning_tokens for u in requests),
        cache_write_1h_tokens=sum(u.cache_write_1h_tokens for u in requests),
        cache_token_hours=sum(u.cache_token_hours for u in requests),
        calls=requests,
    )


def _dearest(prices: PriceTier) -> tuple[float, float]:
    """Prices of a prompt token and of a completion token, whatever becomes of them."""
    read = (prices.price_cached, prices.price_cache_write, prices.price_cache_write_1h)
    return max(prices.price_in, *(price or 0.0 for price in read)), max(
        prices.price_out, prices.price_reasoning or 0.0
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _base(member: Member) -> PriceTier:
    if member.price_in is None or member.price_out is None:
        raise ValueError(
            f"member {member.name!r} has no prices; write price_in and price_out (or price_from) in the catalogue. "
            "Only recorded replies of a table whose every row has a cost can do without"
        )
    found = (member.price_cached, member.price_cache_write, member.price_reasoning, member.price_cache_write_1h)
    return PriceTier(0, member.price_in, member.price_out, *found)


def _tier(member: Member, prompt_tokens: float) -> PriceTier:
    reached = [tier for tier in member.price_tiers if tier.above < prompt_tokens]
    return max(reached, key=lambda tier: tier.above) if reached else _base(member)
