"""What a reply is billed for: the tokens that it reports, within what was possible, and never below what was seen.

Providers report one thing in many ways. Cached prompt tokens stand inside the prompt tokens (OpenAI, DeepSeek, Gemini)
or beside them (Anthropic, which also says how much of what it wrote is kept for an hour); reasoning stands inside the
completion tokens (OpenAI) or beside them (xAI, Gemini), which the total, or a part that is larger than its whole,
gives away. Reports are text of others as well: a count may be missing, nonsense, zero beside a text, or a billion.

    possible   a prompt of at most its bytes and ``extra_prompt_tokens`` of the catalogue; an answer of at most
               ``max_tokens``. Reasoning that is reported by name and that the provider evidently does not count in
               ``max_tokens``: at most ``max_reasoning_tokens`` of the catalogue; where that is not stated,
               ``UNSTATED_REASONING``
    seen       a text is not made of nothing: at least one token per ``LONGEST_TOKEN`` bytes
    missing    a count that is not reported, or is zero where there must be some, counts as what was possible
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from srpo.types import Usage

LONGEST_TOKEN = 128
"""Bytes; the longest tokens of common vocabularies are runs of 128 spaces."""
UNSTATED_REASONING = 32_768
"""Tokens of reasoning outside ``max_tokens`` that are believed of a member whose catalogue does not say."""

_PROMPT = ("prompt_tokens", "input_tokens", "promptTokenCount")
_COMPLETION = ("completion_tokens", "output_tokens", "candidatesTokenCount")
_PROMPT_DETAILS = ("prompt_tokens_details", "input_tokens_details", "input_token_details")
_COMPLETION_DETAILS = ("completion_tokens_details", "output_tokens_details", "output_token_details")
_CACHED = (
    *("cached_tokens", "num_cached_tokens", "prompt_cache_hit_tokens", "cache_read_input_tokens"),
    "cachedContentTokenCount",
)
_WRITTEN = ("cache_creation_input_tokens", "cache_write_tokens", "cache_creation_tokens")
_TIMES = ("cache_creation", "cache_creation_token_details")
"""Where the tokens written stand by the time that they are kept."""
_SHORT, _LONG = "ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens"
_THOUGHTS, _TOOL_USE = "thoughtsTokenCount", "toolUsePromptTokenCount"
"""Gemini's, always beside its other counts."""
_REASONING = ("reasoning_tokens", "thinking_tokens", _THOUGHTS)


@dataclass(frozen=True)
class Bill:
    """What one request is billed for."""

    usage: Usage
    estimated: bool = False
    """Something was not reported, and counts as what was possible."""
    bounded: bool = False
    """More was reported than was possible, or less than was seen."""


@dataclass(frozen=True)
class _Report:
    prompt: int | None
    completion: int | None
    cached: int = 0
    written: int = 0
    reasoning: int = 0
    named: bool = False
    """Reasoning was reported by name, and not only as the difference to a total."""
    long: int | None = None
    """Of the tokens written, those that are kept for an hour or longer; None: it does not say."""


def bill(
    document: Any,
    *,
    prompt_bound: int,
    max_tokens: int,
    seen: str | None = None,
    reasoning_bound: int | None = None,
    long_writes: bool = False,
) -> Bill | None:
    """What a reply (or an error that reports usage) is billed for; None: an error that reports none.

    Args:
        document: the body.
        prompt_bound: tokens that the prompt had at most.
        max_tokens: tokens that the answer had at most.
        seen: everything that the member wrote, reasoning too; None: there is no completion, so that nothing is added
            to what is reported.
        reasoning_bound: tokens of reasoning that may come on top of ``max_tokens``; None: not stated.
        long_writes: tokens that were written to the provider's cache are kept for an hour or longer, where the body
            does not say it.
    """
    found = _read(document)
    answered = seen is not None
    size = len((seen or "").encode("utf-8", "replace"))
    if not answered and not (found.prompt or found.completion):
        return None
    least = math.ceil(size / LONGEST_TOKEN)
    beyond = UNSTATED_REASONING if reasoning_bound is None else reasoning_bound
    most_unreported = max(least, min(max_tokens + (reasoning_bound or 0), size))
    prompt, completion = found.prompt or 0, found.completion or 0
    no_prompt, no_completion = answered and not prompt, answered and not completion and (size > 0 or not found.prompt)
    if no_prompt:
        prompt = prompt_bound
    if no_completion:
        completion = most_unreported + found.reasoning
    reasoning = min(found.reasoning, completion)
    visible = min(completion - reasoning, max_tokens)
    thought = min(reasoning, max(beyond if found.named else 0, max_tokens - visible))
    billed = max(visible + thought, least)
    kept = min(prompt, prompt_bound)
    cached, written = _cached_of(kept, prompt, found.cached, found.written)
    long = (written if long_writes else 0) if found.long is None else min(found.long, written)
    usage = Usage(kept, billed, cached, written, min(thought, billed), cache_write_1h_tokens=long)
    estimated = no_prompt or (no_completion and size > 0)
    return Bill(usage, estimated, bounded=(kept, billed) != (prompt, completion))


def within(usage: Usage, prompt_bound: int, completion_bound: int, usd_bound: float) -> tuple[Usage, bool]:
    """The usage that a backend says, as far as it was possible, and whether that is less (or other) than it says."""

    def part(value: Any, most: int) -> int:
        count = _count(value)
        return most if count is None else min(count, most)

    prompt, completion = part(usage.prompt_tokens, prompt_bound), part(usage.completion_tokens, completion_bound)
    # What is not a count may not be a discount either.
    said, parts = _count(usage.prompt_tokens) or prompt, (usage.cached_tokens, usage.cache_write_tokens)
    cached, written = _cached_of(prompt, said, *(_count(value) or 0 for value in parts))
    usd = usage.usd
    if usd is not None:
        usd = min(usd, usd_bound) if math.isfinite(usd) and usd >= 0 else usd_bound
    reasoning, long = part(usage.reasoning_tokens, completion), part(usage.cache_write_1h_tokens, written)
    kept = Usage(prompt, completion, cached, written, reasoning, usd, long)
    return kept, kept != usage


def _cached_of(kept: int, prompt: int, cached: int, written: int) -> tuple[int, int]:
    """Tokens read from the provider's cache and written there, of a prompt of which ``kept`` tokens are believed: what
    is not believed is taken from the cheapest ones."""
    fresh = min(max(0, prompt - cached - written), kept)
    wrote = min(written, kept - fresh)
    return min(cached, kept - fresh - wrote), wrote


def _read(document: Any) -> _Report:
    places = (document.get("usage"), document.get("usageMetadata")) if isinstance(document, Mapping) else ()
    usage = next((place for place in places if isinstance(place, Mapping) and place), None)
    if usage is None:
        return _Report(None, None)
    prompt, completion = _largest(usage, _PROMPT), _largest(usage, _COMPLETION)
    if prompt is not None:
        prompt += _count(usage.get(_TOOL_USE)) or 0
    if completion is None and _count(usage.get(_THOUGHTS)) is not None:
        completion = 0  # it thought, and wrote nothing
    inside = _parts(usage, _PROMPT_DETAILS)
    cached = max((_largest(part, _CACHED) or 0 for part in (*inside, usage)), default=0)
    written = max((_largest(part, _WRITTEN) or 0 for part in (*inside, usage)), default=0)
    times = [time for part in (*inside, usage) for time in _parts(part, _TIMES)]
    long = max((count for part in times if (count := _count(part.get(_LONG))) is not None), default=None)
    written = max(written, *(sum(_count(part.get(name)) or 0 for name in (_SHORT, _LONG)) for part in times), 0)
    details = _parts(usage, _COMPLETION_DETAILS)
    reasoning = max((_largest(part, _REASONING) or 0 for part in (*details, usage)), default=0)
    total = _total(usage)
    if total is not None and (prompt is None) != (completion is None):
        rest = max(0, total - (prompt or 0) - (completion or 0))
        prompt, completion = (rest, completion) if prompt is None else (prompt, rest)
    if prompt is None and (missed := _count(usage.get("prompt_cache_miss_tokens"))) is not None:
        prompt = cached + missed
    if prompt is not None and cached + written and not _cached_inside(usage, prompt, completion, cached + written):
        prompt += cached + written
    outside = 0
    if completion is not None:
        rest = 0 if total is None or prompt is None else max(0, total - prompt - completion)
        beside = reasoning > completion or _count(usage.get(_THOUGHTS)) is not None
        outside = max(rest, reasoning if beside else 0)
        completion += outside
    return _Report(prompt, completion, cached, written, max(reasoning, outside), named=reasoning > 0, long=long)


def _cached_inside(usage: Mapping[str, Any], prompt: int, completion: int | None, cached: int) -> bool:
    """Whether the prompt tokens hold the cached ones."""
    if cached > prompt:
        return False
    total = _total(usage)
    if total is not None and completion is not None and total == prompt + cached + completion:
        return False
    # Anthropic's names: input_tokens are those behind the last place in the cache.
    named = ("cache_read_input_tokens", _WRITTEN[0], _TIMES[0])
    return "prompt_tokens" in usage or not any(name in usage for name in named)


def _total(usage: Mapping[str, Any]) -> int | None:
    return _largest(usage, ("total_tokens", "totalTokenCount"))


def _parts(usage: Mapping[str, Any], names: Iterable[str]) -> list[Mapping[str, Any]]:
    return [usage[name] for name in names if name in usage and isinstance(usage[name], Mapping)]


def _largest(part: Mapping[str, Any], names: Iterable[str]) -> int | None:
    counts = [count for name in names if name in part and (count := _count(part[name])) is not None]
    return max(counts, default=None)


def _count(value: Any) -> int | None:
    """A number of tokens, also where it is written as 20.0 or "20"; None for anything else."""
    if type(value) is int:  # nearly always, and several for every reply
        return value if value >= 0 else None
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdecimal() and len(value) < 20 else None
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value >= 0 and value.is_integer() else None
    return None
