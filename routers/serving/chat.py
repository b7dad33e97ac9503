"""A chat request, read and checked; what a router reads of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from routers.serving.errors import RequestError
from routers.serving.fields import OURS, PASSED, REFUSED

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MOST_MESSAGES = 10_000
CONVERSATION_ID = "conversation_id"
CONVERSATION_HEADER = "x-srpo-conversation"
LONGEST_ID = 256


@dataclass(frozen=True)
class ChatRequest:
    """What is to be answered."""

    body: Mapping[str, Any]
    """Fields for whoever answers, as they came: messages, tools, sampling."""
    stream: bool = False
    include_usage: bool = False
    max_cost_usd: float | None = None
    cost_weight: float | None = None
    conversation: str | None = None
    """Its id, where the client names it: routers of steps keep a budget by it."""

    def without_conversation(self) -> ChatRequest:
        """As a member gets it: the id is ours, and metadata that hold nothing else are left out."""
        metadata = {name: value for name, value in self.body.get("metadata", {}).items() if name != CONVERSATION_ID}
        body = {name: value for name, value in self.body.items() if name != "metadata"}
        return replace(self, body={**body, "metadata": metadata} if metadata else body)

    @property
    def cap(self) -> float:
        """USD that the request may cost."""
        return math.inf if self.max_cost_usd is None else self.max_cost_usd

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.body["messages"]

    @property
    def query(self) -> str:
        """What a query router reads: the text of the last message of the user, as in its training, where it reads one
        question. So an agent that calls tools stays with its member until the user speaks again.

        Raises:
            RequestError: there is none.
        """
        for message in reversed(self.messages):
            if message["role"] == "user" and (text := text_of(message)).strip():
                return text
        raise RequestError(400, "'messages' holds no text of the user's, which is what the router reads", "messages")


def read_chat(document: Any, name: str, conversation: str | None = None) -> ChatRequest:
    """Check a request's body.

    Args:
        document: the body, as JSON.
        name: of the router.
        conversation: id of a header; None: `metadata.conversation_id`, if there is one.

    Raises:
        RequestError: 400 or 404, with the field that is wrong.
    """
    if not isinstance(document, dict):
        raise RequestError(400, "the body must be a JSON object")
    given = {field: value for field, value in document.items() if value is not None}
    for field, value in given.items():
        if field in REFUSED:
            raise RequestError(400, f"{field!r} is not served: {REFUSED[field]}", field, "unsupported_parameter")
        known = OURS.get(field) or PASSED.get(field)
        if known is None:
            raise RequestError(400, f"there is no field {shown(field)}", field[:80], "unknown_parameter")
        if not known.check(value):
            raise RequestError(400, f"{field!r} must be {known.must}", field, "invalid_value")
    if given.get("model") != name:
        asked = shown(given.get("model"))
        raise RequestError(404, f"there is no model {asked}; use {name!r}", "model", "model_not_found")
    options = given.get("stream_options", {})
    for option, value in options.items():
        if option != "include_usage" or not isinstance(value, bool):
            raise RequestError(
                400, "'stream_options' may hold include_usage: true or false", "stream_options", "invalid_value"
            )
    check_messages(given.get("messages"))
    return ChatRequest(
        body={field: value for field, value in given.items() if field in PASSED},
        stream=given.get("stream", False),
        include_usage=bool(options.get("include_usage")),
        max_cost_usd=given.get("max_cost_usd"),
        cost_weight=given.get("cost_weight"),
        conversation=_conversation(given.get("metadata", {}).get(CONVERSATION_ID), conversation),
    )


def _conversation(named: Any, header: str | None) -> str | None:
    if named is not None and not (isinstance(named, str) and 0 < len(named) <= LONGEST_ID):
        words = f"'metadata.{CONVERSATION_ID}' must be a text of 1 to {LONGEST_ID} characters"
        raise RequestError(400, words, "metadata", "invalid_value")
    if header is not None and not 0 < len(header) <= LONGEST_ID:
        raise RequestError(400, f"{CONVERSATION_HEADER} must have 1 to {LONGEST_ID} characters", code="invalid_value")
    if None not in (named, header) and named != header:
        words = f"the header {CONVERSATION_HEADER} and metadata.{CONVERSATION_ID} name two conversations"
        raise RequestError(400, words, "metadata", "invalid_value")
    return named if header is None else header


def check_messages(messages: Any) -> None:
    """RequestError for what is no conversation of texts and tool calls.

    What an image or a sound costs depends on the model and on what lies at an address, so that nothing could be set
    aside for it before the call.
    """
    if not isinstance(messages, list) or not 0 < len(messages) <= MOST_MESSAGES:
        raise RequestError(400, f"'messages' must hold 1 to {MOST_MESSAGES} messages", "messages", "invalid_value")
    for place, message in enumerate(messages):
        here = f"messages[{place}]"
        if not isinstance(message, dict):
            raise RequestError(400, f"{here} must be an object", here, "invalid_value")
        if message.get("role") not in ROLES:
            words = f"{here}: the role is {shown(message.get('role'))}; use one of {', '.join(ROLES)}"
            raise RequestError(400, words, f"{here}.role", "invalid_value")
        if message.get("audio") is not None:
            raise RequestError(400, f"{here}: only text is served", f"{here}.audio", "unsupported_content")
        content = message.get("content")
        if content is None and message["role"] == "assistant":  # it called tools
            continue
        if not isinstance(content, (str, list)):
            raise RequestError(
                400, f"{here}: the content must be a text or a list", f"{here}.content", "invalid_value"
            )
        for number, part in enumerate(content if isinstance(content, list) else ()):
            there = f"{here}.content[{number}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "refusal"):
                words = f"{there}: a part of type {shown(kind)}; only text is served, whose cost has a bound"
                raise RequestError(400, words, there, "unsupported_content")
            if not isinstance(part.get(kind), str):
                raise RequestError(400, f"{there}: {kind!r} must be a text", there, "invalid_value")


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a checked message."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or part.get("refusal") or "" for part in content)
    return content or ""


def refuse_others(request: ChatRequest, taken: Collection[str], who: str) -> None:
    """RequestError for a field that is not among those taken; `who` completes "... does not take 'field'"."""
    for field in request.body:
        if field not in taken:
            raise RequestError(400, f"{who} does not take {field!r}", field, "unsupported_parameter")


def shown(value: Any) -> str:
    """A value of the client's in a message, short and encodable."""
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return text.encode("utf-8", "replace").decode("utf-8")
