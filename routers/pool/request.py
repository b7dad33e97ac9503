"""A client's request as one member gets it: its own names and defaults, and how many tokens it can come to.

A catalogue's ``request:`` says more than what is sent: a null there says that the member does not take the field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from routers.data.catalogue import Member
from routers.data.catalogue_fields import LENGTH_FIELDS
from routers.pool.endpoint import TEMPLATE_TOKENS

LENGTHS = ("max_completion_tokens", "max_tokens")
"""OpenAI's two names for the longest reply; the first counts where both are given."""
_NOT_READ = ("metadata", "logit_bias", "stop", "stop_token_ids", "stream_options")
"""Fields with many values that no model reads."""


@dataclass(frozen=True)
class Request:
    """What is sent, and its bounds."""

    body: Mapping[str, Any]
    prompt_bound: int
    """Tokens of the prompt, at most."""
    completion_bound: int
    """Tokens of all replies (``n``), at most, reasoning outside the limit too as far as the catalogue states it."""
    limit: int
    """Tokens of all replies that the member is told to write at most."""
    reasoning_bound: int | None
    """Of all replies, beside the limit; None: not stated."""


class Refusal(NamedTuple):
    """Why a member cannot take a request."""

    field: str
    words: str


def refusal(member: Member, fields: Mapping[str, Any]) -> Refusal | None:
    """Why a member cannot take a request with these fields; None: it can."""
    for name in fields:
        if name not in LENGTHS and member.request.get(name, ...) is None:
            return Refusal(name, f"{member.name} does not take {name!r}")
    for name in LENGTHS:
        if (longest := fields.get(name)) is not None and longest > member.max_tokens:
            words = f"{member.name} writes at most {member.max_tokens} tokens (max_tokens of the catalogue)"
            return Refusal(name, f"{words}, and {name!r} asks for {longest}")
    return None


def longest_of(fields: Mapping[str, Any]) -> int | None:
    """Tokens of a reply, as far as the client limits them."""
    return next((fields[name] for name in LENGTHS if fields.get(name) is not None), None)


def request_of(member: Member, fields: Mapping[str, Any], *, stream: bool) -> Request:
    """What the member is sent. The client's fields come before those of the catalogue; the catalogue's system prompt
    is used where the conversation has none of its own.

    Args:
        fields: messages, tools, sampling, as the client sent them; the member takes them (`refusal`).
        stream: events as they come, with the usage in the last one.
    """
    own = {"temperature": member.temperature, "top_p": member.top_p, "seed": member.seed, **member.request}
    body = {**own, **{name: value for name, value in fields.items() if name not in LENGTHS}}
    length_name = next((name for name in LENGTH_FIELDS if member.request.get(name) is not None), "max_tokens")
    limit = longest_of(fields) or member.max_tokens
    body |= {"model": member.model or member.name, length_name: limit}
    if stream:
        usage = {"stream_options": {"include_usage": True}} if member.request.get("stream_options", ...) else {}
        body |= {"stream": True, **usage}
    if member.system and not any(m.get("role") in ("system", "developer") for m in body["messages"]):
        body["messages"] = [{"role": "system", "content": member.system}, *body["messages"]]
    body = {name: value for name, value in body.items() if value is not None}
    replies = body.get("n", 1)
    read = [value for name, value in body.items() if isinstance(value, (dict, list)) and name not in _NOT_READ]
    thoughts = member.max_reasoning_tokens
    return Request(
        body,
        prompt_bound=TEMPLATE_TOKENS + member.extra_prompt_tokens + sum(map(_bytes, read)),
        completion_bound=replies * (limit + (thoughts or 0)),
        limit=replies * limit,
        reasoning_bound=None if thoughts is None else replies * thoughts,
    )


def _bytes(value: Any) -> int:
    """At most one token per byte; a message's braces and names pay for its part of the chat template."""
    return len(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
