"""What an endpoint says when it refuses: the provider's words, which kind of failure it is, and whether to ask again.

Any JSON comes in, in the shapes that OpenAI, Anthropic, Google, gateways and the servers of open models use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from routers.pool.protocol import BAD_REQUEST, MALFORMED, NO_QUOTA, RATE_LIMIT, SERVER_ERROR, TIMEOUT


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
