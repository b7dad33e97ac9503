"""What the body of a chat completion says: an answer, or why there is none. Any JSON comes in; nothing raises."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from routers.pool.protocol import EMPTY, FILTERED, MALFORMED, SERVER_ERROR
from routers.pool.reasoning import split_reasoning
from routers.pool.refusals import NoAnswer, error_of, refusal


@dataclass(frozen=True)
class Answer:
    """A member's words."""

    text: str
    reasoning: str = ""
    left_out: tuple[str, ...] = ()
    """Types of parts that hold no text, such as images."""


def read_json(body: bytes) -> Any:
    """A body as JSON, read as leniently as clients do: bytes that are no UTF-8 become U+FFFD, of a key written twice
    the last counts, and a number too long for a machine is infinite.

    Raises:
        ValueError: it is no JSON, or nested without end.
    """
    try:
        try:
            return json.loads(body, parse_int=_whole)
        except UnicodeDecodeError:
            return json.loads(body.decode("utf-8", "replace"), parse_int=_whole)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _whole(digits: str) -> float:
    return int(digits) if len(digits) <= 300 else math.copysign(math.inf, -1 if digits[0] == "-" else 1)


def not_json(body: bytes, content_type: str) -> NoAnswer:
    """A body with status 200 that ``read_json`` does not take."""
    text = body[:2000].decode("utf-8", "replace").lstrip("\ufeff \r\n\t")
    if content_type.startswith("text/event-stream") or re.match(r"(?:data|event|id|retry)\s*:|:", text):
        return NoAnswer(MALFORMED, f"a stream of events, which was not asked for: {text}")
    if not text:
        return NoAnswer(MALFORMED, "the body is empty", retry=True)
    told = f"the body ({content_type or 'no content type'}) is not JSON: {text}"
    return NoAnswer(MALFORMED, told, retry=text[0] in "{[")  # JSON that broke off; a page will be the same again


def read_completion(document: Any, asked: str = "") -> Answer | NoAnswer:
    """The body of a status 200.

    The first choice with an answer counts. An error in such a body is not retried, nor is a body of another kind: the
    provider has taken the request and may bill every attempt. Only a rate limit says that it has not; and where a
    completion is there and broken, or its place is empty, another attempt may bring a whole one.

    Args:
        asked: the question, which an error may repeat; its words are not the provider's.
    """
    choices = document.get("choices") if isinstance(document, dict) else None
    choices = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    if (error := error_of(document, bool(choices))) is not None:
        return refusal(200, error, asked)
    if not choices:
        empty = document is None
        empty |= isinstance(document, dict) and "choices" in document and document["choices"] in (None, [])
        there = f"; its fields: {', '.join(map(str, list(document)[:8]))}" if isinstance(document, dict) else ""
        return NoAnswer(MALFORMED, "no choices in the reply" + ("" if empty else there), retry=empty)
    read = [_read_choice(choice, asked) for choice in choices]
    return next((found for found in read if isinstance(found, Answer)), read[0])


_FAILED = re.compile(
    r"(?:\w+[_ ])?error|abort(?:ed)?|interrupt(?:ed)?|terminated|cancel+ed|insufficient_system_resource|time_?out"
    r"|(?:\w+_)?overloaded|failed",
    re.I,
)
_FILTERED = re.compile(
    r"content_?filter(?:ed)?|safety|sensitive|recitation|blocklist|prohibited_content|spii|guardrail\w*", re.I
)


def _read_choice(choice: dict[str, Any], asked: str) -> Answer | NoAnswer:
    finish = choice.get("finish_reason")
    finish = str(finish.get("type") if isinstance(finish, dict) else finish)  # SGLang's own
    message = choice.get("message")
    if (error := error_of(choice, holds_answer=False)) is not None:
        return refusal(200, error, asked)
    if _FAILED.fullmatch(finish):
        return NoAnswer(SERVER_ERROR, f"the reply broke off (finish_reason {finish})")
    if not isinstance(message, dict):
        told = "no choices in the reply: the first one has no message"
        return NoAnswer(MALFORMED, told, retry="message" in choice and message is None)
    parts = _Parts()
    try:
        parts.add(message.get("content"))
    except TypeError as error:
        return NoAnswer(MALFORMED, f"the content is not text: {error}", retry=True)
    apart = next((t for name in _APART if (t := _words_of(message.get(name)))), "")
    thoughts = [*parts.reasoning, *([apart] if apart else [])]
    text = "".join(parts.text)
    if not thoughts or text.lstrip()[:1] in ("<", "[", "◁"):  # else the server has split it, and tags are words
        text, inside = split_reasoning(text) if text.strip() else (text, "")
        thoughts += [inside] if inside else []
    reasoning = "\n".join(dict.fromkeys(thought.strip() for thought in thoughts if thought.strip()))
    if _FILTERED.fullmatch(finish):  # half an answer is not the member's answer
        return NoAnswer(FILTERED, f"the provider withheld the answer (finish_reason {finish})", reasoning=reasoning)
    if not text.strip() and isinstance(message.get("refusal"), str):
        text = message["refusal"]  # the member's answer: it says that, and why, it does not
    if text.strip():
        return Answer(text, reasoning, tuple(dict.fromkeys(parts.other)))
    there = [f"parts of type {', '.join(dict.fromkeys(parts.other))}"] if parts.other else []
    there += [f"calls of the tools {names}"] if (names := _tools(message)) else []
    there += ["only reasoning"] if reasoning else []
    found = f", {' and '.join(there)}" if there else ""
    return NoAnswer(EMPTY, f"no text{found} (finish_reason {finish})", reasoning=reasoning)


_APART = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
"""Where servers put reasoning beside the content. Several hold the same words."""
_TEXT_PARTS = ("text", "output_text", "input_text")
_THOUGHT_PARTS = ("thinking", "reasoning", "reasoning_content", "redacted_thinking", "reasoning.text")


class _Parts:
    """Content, as one text or as a list of parts."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.other: list[str] = []

    def add(self, content: Any) -> None:
        """Raises TypeError, in words, for what is no content."""
        if content is None:
            return
        if isinstance(content, str):
            self.text.append(content)
        elif isinstance(content, list):
            for part in content:
                if isinstance(part, str):
                    self.text.append(part)
                elif isinstance(part, dict):
                    self._part(part)
                elif part is not None:
                    raise TypeError(f"a part is a {_json_type(part)}")
        elif isinstance(content, dict):
            self._part(content)
        else:
            raise TypeError(f"it is a {_json_type(content)}")

    def _part(self, part: dict[str, Any]) -> None:
        of_type = part.get("type", "text" if "text" in part else None)
        if of_type in _THOUGHT_PARTS:
            self.reasoning.append(_words_of(part))
        elif of_type in (*_TEXT_PARTS, "refusal"):
            words = part.get("refusal" if of_type == "refusal" else "text")
            words = words.get("value") if isinstance(words, dict) else words
            if words is None:  # as content itself may be
                return
            if not isinstance(words, str):
                raise TypeError(f"a part of type {of_type} holds a {_json_type(words)}")
            self.text.append(words)
        else:
            self.other.append(str(of_type)[:40])


def _words_of(value: Any, depth: int = 0) -> str:
    """The text of reasoning: a text, a part, or a list of them."""
    if isinstance(value, str):
        return value
    if depth > 4:
        return ""
    if isinstance(value, list):
        return "".join(_words_of(one, depth + 1) for one in value)
    if isinstance(value, dict):
        names = ("text", "thinking", "content", "reasoning_content", "reasoning", "summary")
        return next((t for name in names if (t := _words_of(value.get(name), depth + 1))), "")
    return ""


def _tools(message: dict[str, Any]) -> str:
    calls = message.get("tool_calls")
    called = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    called.append(message.get("function_call"))
    return ", ".join(str(one.get("name"))[:40] for one in called if isinstance(one, dict))


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = ((bool, "boolean"), ((int, float), "number"), (str, "text"), (list, "list"))
    return next((name for of, name in names if isinstance(value, of)), "mapping")  # type: ignore[arg-type]
