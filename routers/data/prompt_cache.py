"""What each member's prompt cache still holds of a conversation: a part of what the next call costs, and of a switch.

A provider keeps the beginning of a prompt for ``cache_seconds`` after it was last sent, and bills what it finds again
at ``price_cached``. A conversation that goes on with one member therefore pays for its history once; one that switches
pays for all of it again, at the new member's prices. The prefix at the old one stays warm until it expires: who comes
back in time finds it.

    shared     tokens of the messages that this prompt and the member's last one begin with alike; 0 where that one was
               sent ``cache_seconds`` ago or longer, or never
    whole(n)   n rounded down to a multiple of ``cache_step_tokens``; 0 where that is less than ``cache_min_tokens``
    cached     = whole(shared)              read, at price_cached; reading keeps the prefix warm as long again
    written    = whole(prompt) - cached     at price_cache_write, or price_cache_write_1h where ``cache_seconds`` is an
               hour or longer
    fresh      = prompt - cached - written  at price_in

A call that failed counts as not sent: nobody knows what the provider read of it, and its answer may come from another
machine. What a member had before, it still has.

A member without ``cache_seconds`` has no cache that anybody counts on: all is fresh. What providers publish, for
catalogues (USD stand in ``routers.data.billing``):

    OpenAI      cache_min_tokens 1024, cache_step_tokens 128, cache_seconds 300 (5 to 10 minutes without use)
    Anthropic   cache_min_tokens 512 to 4096 by model, cache_seconds 300, or 3600 where requests ask for an hour
    DeepSeek    cache_min_tokens 64, cache_step_tokens 64; kept for hours to days
    Gemini      cache_min_tokens 1024 to 4096 by model; explicit caches: cache_seconds and price_cache_hour

Sources: https://developers.openai.com/api/docs/guides/prompt-caching,
https://platform.claude.com/docs/en/build-with-claude/prompt-caching, https://api-docs.deepseek.com/guides/kv_cache,
https://ai.google.dev/gemini-api/docs/caching. A model of these rules, and no promise: providers throw prefixes away
early, and send a request to another machine. A live reply's own report is what it is billed for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from routers.data.billing import HOUR, cost, price
from routers.data.catalogue import Member
from srpo.types import Usage

BYTES_PER_TOKEN = 4
"""For estimates: English text in common vocabularies."""

Message = int | tuple[Hashable, int]
"""Its tokens; or what tells it from another, and its tokens. Two equal ones at the same place are the same text."""


@dataclass(frozen=True)
class Sent:
    """A member's last prompt."""

    messages: tuple[Message, ...]
    at: float
    """Seconds, of any clock that all calls share."""


@dataclass(frozen=True)
class Conversation:
    """A conversation as it stands before its next call. Immutable: `then` and `asked` return another one."""

    messages: tuple[Message, ...] = ()
    """What the next call sends: the whole history, and what is new."""
    now: float = 0.0
    """When it is made, in seconds."""
    sent: Mapping[str, Sent] = field(default_factory=dict)
    """Member -> its last prompt."""
    last: str | None = None
    """The member that was asked last."""

    def then(self, messages: Sequence[Message], now: float) -> Conversation:
        """The next prompt, and when it is sent.

        Raises:
            ValueError: tokens that are negative or no whole number, or a time that is none or before the last call.
        """
        messages = tuple(messages)
        if bad := [message for message in messages if not _is_count(tokens_of(message))]:
            raise ValueError(f"a message has {tokens_of(bad[0])!r} tokens; it must be a whole number >= 0")
        if not (math.isfinite(now) and now >= self.now):
            raise ValueError(f"the next call is at {now!r} s, the conversation is at {self.now:g} s; time goes on")
        return replace(self, messages=messages, now=now)

    def asked(self, member: str) -> Conversation:
        """The member got the prompt, and answered: that is what it keeps from now on."""
        return replace(self, sent={**self.sent, member: Sent(self.messages, self.now)}, last=member)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(tokens_of, self.messages))

    def expected(self, member: Member, completion_tokens: int = 0) -> Usage:
        """What the next call uses if this member gets it, with an answer of so many tokens."""
        return self._used(member, self._warm_at(member, member.name), completion_tokens)

    def _warm_at(self, member: Member, name: str) -> int:
        """Tokens of the prompt that a member with this one's rules would find, had it been sent what `name` was."""
        sent = self.sent.get(name)
        if sent is None or member.cache_seconds is None or self.now - sent.at >= member.cache_seconds:
            return 0
        shared = 0
        for one, other in zip(self.messages, sent.messages, strict=False):
            if one != other:
                break
            shared += tokens_of(one)
        return _whole(member, shared)

    def _used(self, member: Member, cached: int, completion_tokens: int) -> Usage:
        prompt, seconds = self.prompt_tokens, member.cache_seconds
        if seconds is None:
            return Usage(prompt, completion_tokens)
        written = _whole(member, prompt) - cached
        # What was warm is paid for until then; reading keeps it for longer, and that is paid for now.
        since = self.now - self.sent[member.name].at if member.name in self.sent else 0.0
        hours = (cached * since + written * seconds) / HOUR
        return Usage(
            prompt,
            completion_tokens,
            cached,
            written,
            cache_write_1h_tokens=written if seconds >= HOUR else 0,
            cache_token_hours=hours if member.price_cache_hour else 0.0,
        )


def expected_usd(member: Member, conversation: Conversation, completion_tokens: int = 0) -> float:
    """USD of the next call if this member gets it. Compare members by this: what a switch costs is in it.

    Raises:
        ValueError: the member has no prices.
    """
    return price(member, conversation.expected(member, completion_tokens))


def switch_cost(member_from: Member, member_to: Member, conversation: Conversation) -> float:
    """USD that the next prompt costs more at `member_to` because it does not hold what `member_from` holds: its price
    there, less its price there if all that is warm at `member_from` were warm there. 0 where nothing is warm at
    `member_from`, where `member_to` still holds as much, and for the member itself.

    Raises:
        ValueError: `member_to` has no prices.
    """
    if member_to.cache_seconds is None or member_from.name == member_to.name:
        return 0.0
    own = conversation._warm_at(member_to, member_to.name)
    held = conversation._warm_at(member_from, member_from.name)
    there = _whole(member_to, held)
    if there <= own:
        return 0.0
    now, warm = (conversation._used(member_to, tokens, 0) for tokens in (own, there))
    return _prompt_usd(member_to, now) - _prompt_usd(member_to, warm)


def estimated_tokens(text: str) -> int:
    """By its bytes, where there is no tokenizer."""
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)


def estimated_messages(messages: Sequence[Any]) -> tuple[Message, ...]:
    """Messages of a request (any JSON) as a `Conversation` takes them, with estimated tokens."""
    texts = (json.dumps(message, sort_keys=True, ensure_ascii=False, default=str) for message in messages)
    return tuple((_hash(text), estimated_tokens(text)) for text in texts)


def tokens_of(message: Message) -> int:
    return message[1] if isinstance(message, tuple) else message


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _whole(member: Member, tokens: int) -> int:
    found = tokens - tokens % member.cache_step_tokens
    return found if found >= member.cache_min_tokens else 0


def _prompt_usd(member: Member, usage: Usage) -> float:
    """Without what keeping it costs: that is paid for by whoever keeps it, switched or not."""
    return cost(
        member,
        usage.prompt_tokens,
        0,
        cached_tokens=usage.cached_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
