"""What the body of a chat completion says: an answer, or why there is none. Any JSON comes in; nothing raises.

Errors come in the shapes that OpenAI, Anthropic, Google, gateways and the servers of open models use.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from routers.pool.protocol import (
    BAD_REQUEST,
    EMPTY,
    FILTERED,
    MALFORMED,
    NO_QUOTA,
    RATE_LIMIT,
    SERVER_ERROR,
    TIMEOUT,
)
from routers.pool.reasoning import split_reasoning


@dataclass(frozen=True)
class Answer:
    """A member's words."""

    text: str
    reasoning: str = ""
    left_out: tuple[str, ...] = ()
    """Types of parts that hold no text, such as images."""


@dataclass(frozen=True)
class NoAnswer:
    """Why there is none."""

    kind: str
    words: str
    """May hold the server's words: untrusted."""
    retry: bool = False
    reasoning: str = ""
    """What was thought before no answer came."""


@dataclass(frozen=True)
class Told:
    """An error as it is told."""

    words: str
    codes: tuple[str, ...]
    """Every code, type and status in it, as text."""


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


def choices_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a completion or a chunk; whatever else stands there is left out."""
    choices = document.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def read_completion(document: Any, asked: str = "") -> Answer | NoAnswer:
    """The body of a status 200.

    The first choice with an answer counts. An error in such a body is not retried, nor is a body of another kind: the
    provider has taken the request and may bill every attempt. Only a rate limit says that it has not; and where a
    completion is there and broken, or its place is empty, another attempt may bring a whole one.

    Args:
        asked: the question, which an error may repeat; its words are not the provider's.
    """
    choices = choices_of(document) if isinstance(document, dict) else []
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


def read_error(status: int, document: Any, body: bytes, asked: str = "", hinted: bool = False) -> NoAnswer:
    """The body of any other status; ``document`` is None where it is no JSON, ``hinted``: with a Retry-After."""
    error = error_of(document, holds_answer=False)
    if error is None:
        error = Told(body[:2000].decode("utf-8", "replace"), ())
    return refusal(status, error, asked, hinted)


_NO_QUOTA = re.compile(
    r"insufficient[\s_-]*(?:\w+[\s_-]+){0,2}(?:quota|balance|credits?|funds)|exceeded[\s_-]+(?:your[\s_-]+)?current"
    r"[\s_-]+quota|credit balance is too low|billing[\s_-]*(?:hard[\s_-]*limit|not[\s_-]*active)|out of credits"
    r"|payment[\s_-]*required|arrearage|balance is not enough|not enough (?:credits|balance)"
    r"|budget[\s_-]*exceeded|exceeded[\s_-]*(?:\w+[\s_-]+){0,2}budget|(?:key|credit) limit exceeded"
    "|\u6b20\u8d39|\u4f59\u989d\u4e0d\u8db3",  # "in arrears", "the balance is not enough"
    re.IGNORECASE,
)
_RATE = re.compile(r"rate[\s_-]*limit|too[\s_-]*many[\s_-]*requests|throttl|resource[\s_-]*exhausted", re.IGNORECASE)
_SOON = re.compile(r"(?:retry|try again) (?:in|after) ", re.IGNORECASE)
_WRONG = re.compile(r"invalid|bad_request|not_found|authentication|permission|unsupported|unauthorized", re.IGNORECASE)


def refusal(status: int, error: Told, asked: str, hinted: bool = False) -> NoAnswer:
    """Which kind of failure it is, and whether to ask again.

    No money at the provider is told by a code anywhere, or by its words where such an error is sent. Words alone lose
    to a time after which to come back: some say "you exceeded your current quota" of the quota of a minute.
    """
    codes = " ".join(error.codes)
    words = " ".join(error.words.split())
    theirs = words.replace(" ".join(asked.split()), " ") if asked.strip() else words
    inner = next((int(code) for code in error.codes if re.fullmatch(r"[45]\d\d", code)), status)
    told = status in (200, 400, 402, 403, 429) and _NO_QUOTA.search(theirs) is not None
    coded = _NO_QUOTA.search(codes) or "insufficient_quota" in theirs.lower()
    soon = hinted or _SOON.search(theirs) is not None
    shown = f"status {status}: {words}" if not error.codes else f"status {status} ({', '.join(error.codes)}): {words}"
    if 402 in (status, inner) or coded or (told and not soon):
        return NoAnswer(NO_QUOTA, shown)
    if 429 in (status, inner) or (status == 200 and _RATE.search(codes)):
        return NoAnswer(RATE_LIMIT, shown, retry=True)
    if status == 200:
        wrong = 400 <= inner < 500 or _WRONG.search(codes)
        return NoAnswer(BAD_REQUEST if wrong else SERVER_ERROR, shown)
    return NoAnswer(_kind_of_status(status), shown, retry=status in (408, 409) or status >= 500)


def _kind_of_status(status: int) -> str:
    if status == 408:
        return TIMEOUT
    if status == 409 or status >= 500:
        return SERVER_ERROR
    return BAD_REQUEST if status >= 400 else MALFORMED


_TOLD = ("message", "msg", "detail", "error_msg", "status_msg", "error_description", "description", "error", "raw")
_CODES = ("code", "type", "status", "error_code", "status_code", "error_type", "reason")
_NESTED = ("error", "errors", "base_resp", "metadata", "details", "inner_error", "innererror")


def error_of(document: Any, holds_answer: bool) -> Told | None:
    """The error that a body tells of, in any of the shapes in use; None: none. Beside an answer only ``error`` is
    one: a status, a type or a message of such a body speak of other things."""
    if isinstance(document, list):  # Google's
        document = next((one for one in document if isinstance(one, dict)), None)
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    if isinstance(error, bool | int | float):  # {"error": true, "message": ...}
        error = document if error and not holds_answer else None
    if not error:
        if holds_answer or isinstance(document.get("message"), dict):
            return None
        named = [document[name] for name in ("errors", "base_resp") if document.get(name)]
        told = [document.get(name) for name in ("message", "msg", "detail", "error_msg")]
        error = named[0] if named else (document if any(isinstance(one, str | list) and one for one in told) else None)
        if error is None:
            return None
    words = _told(error)
    if isinstance(error, str) and isinstance(document.get("message"), str):
        words = f"{error}: {document['message']}"
    codes = tuple(dict.fromkeys(_codes(error if holds_answer else document)))[:6]
    if not words and not codes:
        if holds_answer:
            return None
        words = json.dumps(error)[:500]
    return Told(words, codes)


def _told(value: Any, depth: int = 0) -> str:
    if isinstance(value, str):
        return value
    if depth > 4:
        return ""
    if isinstance(value, list):
        return "; ".join(t for one in value[:3] if (t := _told(one, depth + 1)))
    if isinstance(value, dict):
        told = next((t for name in _TOLD if (t := _told(value.get(name), depth + 1))), "")
        behind = _told(value.get("metadata"), depth + 1) if depth == 0 else ""  # the words of who is behind a gateway
        return f"{told} ({behind})" if behind and behind != told else told
    return ""


def _codes(value: Any, depth: int = 0) -> Iterator[str]:
    if depth > 4:
        return
    if isinstance(value, list):
        for one in value[:5]:
            yield from _codes(one, depth + 1)
    elif isinstance(value, dict):
        for name in _CODES:
            code = value.get(name)
            told = str(code).strip() if isinstance(code, str | int) and not isinstance(code, bool) else ""
            if told.lower() not in ("", "0", "none", "error", "failed"):
                yield told[:60]
        for name in _NESTED:
            yield from _codes(value.get(name), depth + 1)
