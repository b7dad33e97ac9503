"""An OpenAI-compatible endpoint as a pool member: one request, its answer or fault in words.

The request goes by ``routers.pool.transport`` and not by a vendor's client: those read bodies of any length, follow
redirects, and add headers out of variables of the environment that were meant for their own service. What the body
says is read in ``routers.pool.completion``, and the one retry layer is ``routers.pool.caller``. A key lives in the
environment and in the request's header; it is in no attribute of ours, and cut out of every text that comes back.
"""

from __future__ import annotations

import email.utils
import json
import logging
import os
import time
from collections.abc import Mapping
from datetime import UTC
from typing import Any

from yarl import URL

from routers.data.billing import HOUR
from routers.data.catalogue import Member
from routers.pool.completion import Answer, NoAnswer, not_json, read_completion, read_error, read_json
from routers.pool.protocol import BAD_REQUEST, CONNECTION, EMPTY, FILTERED, MALFORMED, TIMEOUT, Attempt
from routers.pool.transport import Broken, Redirected, Refused, Secret, Transport, Unreachable
from routers.pool.usage import Bill, bill
from srpo.types import Usage

_log = logging.getLogger(__name__)

AGENT_PROMPT = (
    "You help another assistant with a part of its task. Answer the question below briefly, in less than 400 words, "
    "with the facts that matter. If you cannot answer it, say so, and say what you do know about it.\n\n"
    "Question: {query}"
)
"""What members are told, in the manner of Router-R1's agent prompt (help or answer, below 512 tokens, say if not)."""

TEMPLATE_TOKENS = 128
"""INFERRED: what a chat template adds to the bytes of the messages at most, default system prompts included."""
_ERROR_CHARS = 200


class Endpoint:
    """One member behind an OpenAI-compatible chat-completions endpoint (vLLM, SGLang, llama.cpp and vendors alike).

    ``max_tokens`` is sent with every request, so that the reservation is an upper bound. Byte-level tokenizers make at
    most one token per byte, which bounds the prompt. What a reply is billed for is decided by ``routers.pool.usage``:
    a server that reports no usage is counted by those bounds, and the attempt is marked ``estimated``.

    Args:
        member: ``base_url`` is needed; ``api_key_env`` must be set in the environment where the member names one.
        agent_prompt: text around the question, with ``{query}`` in it once.

    Raises:
        ValueError: names the member, what is missing and what to do.
    """

    def __init__(self, member: Member, agent_prompt: str = AGENT_PROMPT) -> None:
        if member.base_url is None:
            raise ValueError(f"member {member.name!r}: field 'base_url' is missing; a live member needs its endpoint")
        self._member = member
        if member.api_key_env is not None and self.key is None:
            raise ValueError(
                f"member {member.name!r}: environment variable {member.api_key_env} is not set; export it"
            )
        key = self.key
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(
                f"member {member.name!r}: environment variable {member.api_key_env} holds characters that no key has "
                "(white space inside, or no ASCII); export it again"
            )
        if agent_prompt.count("{query}") != 1:
            raise ValueError("the agent prompt must hold {query} once; it is where the question goes")
        self._agent_prompt = agent_prompt
        self.transport = Transport(_completions(member))
        self._system = [{"role": "system", "content": member.system}] if member.system else []
        request: dict[str, Any] = {
            "model": member.model or member.name,
            "messages": self._system,
            "max_tokens": member.max_tokens,
            "temperature": member.temperature,
        }
        request |= {"top_p": member.top_p, "seed": member.seed, **member.request}
        self._request = {name: value for name, value in request.items() if value is not None}
        # Tools and schemas in the request are a part of what the model reads.
        more = [json.dumps(value) for value in member.request.values() if isinstance(value, (dict, list))]
        texts = [member.system or "", agent_prompt.replace("{query}", ""), *more]
        self._prompt_bound = TEMPLATE_TOKENS + member.extra_prompt_tokens + sum(map(_size, texts))
        self._left_out: set[str] = set()
        self._longest = member.max_tokens + (member.max_reasoning_tokens or 0)
        self._told_of_bounds = False

    @property
    def identity(self) -> Mapping[str, Any]:
        member = self._member
        return {
            "model": member.model or member.name,
            "base_url": member.base_url,
            "agent_prompt": self._agent_prompt,
            "system": member.system,
            "temperature": member.temperature,
            "top_p": member.top_p,
            "seed": member.seed,
            "max_tokens": member.max_tokens,
            "request": dict(member.request),
        }

    @property
    def max_tokens(self) -> int:
        """Reasoning outside the limit too; more once a reply has shown that this server goes beyond it."""
        return self._longest

    def prompt_bound(self, query: str) -> int:
        return self._prompt_bound + _size(query)

    def _bill(self, document: Any, query: str, seen: str | None) -> Bill | None:
        """What a body is billed for; ``seen`` is all that the member wrote, None in an error."""
        member = self._member
        found = bill(
            document,
            prompt_bound=self.prompt_bound(query),
            max_tokens=member.max_tokens,
            seen=seen,
            reasoning_bound=member.max_reasoning_tokens,
            long_writes=(member.cache_seconds or 0.0) >= HOUR,
        )
        if found is not None and found.usage.completion_tokens > self._longest:
            _log.warning(
                "member %r: a reply of %d tokens, where at most %d were reserved. State the reasoning that the "
                "endpoint does not count in max_tokens as max_reasoning_tokens",
                member.name,
                found.usage.completion_tokens,
                self._longest,
            )
            self._longest = found.usage.completion_tokens
        elif found is not None and found.bounded and not self._told_of_bounds:
            self._told_of_bounds = True
            _log.warning(
                "member %r: the usage that it reports is not possible, and counted as %d prompt and %d completion "
                "tokens (said once; pool/bounded counts them). If it adds a prompt of its own, state "
                "extra_prompt_tokens",
                member.name,
                found.usage.prompt_tokens,
                found.usage.completion_tokens,
            )
        return found

    async def send(self, query: str, timeout: float, query_id: str) -> Attempt:
        question = {"role": "user", "content": _encodable(self._agent_prompt.replace("{query}", query))}
        request = {**self._request, "messages": [*self._system, question]}
        try:
            answer = await self.transport.post(request, self.key, timeout)
        except TimeoutError:
            return Attempt(error=f"{TIMEOUT}: no reply within {timeout:.3g} s", retry=True, unmetered=True)
        except Redirected as error:
            return self._failed(NoAnswer(BAD_REQUEST, str(error)), unmetered=False)
        except Refused as error:
            return self._failed(NoAnswer(MALFORMED, str(error)))
        except Broken as error:
            return self._failed(NoAnswer(MALFORMED, str(error), retry=True))
        except Unreachable as error:  # refused, reset, cut off, not HTTP
            return self._failed(NoAnswer(CONNECTION, str(error), retry=True))
        return self._read(answer.status, answer.headers, answer.body, query)

    def _read(self, status: int, headers: Mapping[str, str], body: bytes, query: str) -> Attempt:
        try:
            document = read_json(body)
        except ValueError:
            if 200 <= status < 300:
                return self._failed(not_json(body, headers.get("content-type", "")))
            document = None
        if not 200 <= status < 300:
            pause = retry_after(headers)
            told = read_error(status, document, body, query, hinted=pause is not None)
            told_usage = self._bill(document, query, None)
            return self._failed(told, told_usage, pause, unmetered=None if status >= 500 else False)
        found = read_completion(document, query)
        if isinstance(found, NoAnswer):
            written = found.reasoning if found.kind in (EMPTY, FILTERED) else None  # where a completion was made
            return self._failed(found, self._bill(document, query, written), retry_after(headers))
        self._name_left_out(found)
        text, reasoning = self.clean(found.text), self.clean(found.reasoning)
        billed = self._bill(document, query, found.text + found.reasoning) or Bill(Usage())
        return Attempt(text, billed.usage, estimated=billed.estimated, bounded=billed.bounded, reasoning=reasoning)

    def _failed(
        self, told: NoAnswer, billed: Bill | None = None, pause: float | None = None, unmetered: bool | None = None
    ) -> Attempt:
        """``unmetered``: whether it may have been billed all the same; None: if no usage is reported."""
        words = " ".join(self.clean(told.words).split())  # cleaned before it is cut: no part of a key is left
        return Attempt(
            usage=billed.usage if billed else Usage(),
            estimated=billed is not None and billed.estimated,
            bounded=billed is not None and billed.bounded,
            error=f"{told.kind}: {words}"[:_ERROR_CHARS],
            retry=told.retry,
            retry_after=pause,
            unmetered=billed is None if unmetered is None else unmetered,
            reasoning=self.clean(told.reasoning),
        )

    def _name_left_out(self, found: Answer) -> None:
        for of_type in set(found.left_out) - self._left_out:
            self._left_out.add(of_type)
            _log.warning(
                "member %r: a reply holds a part of type %r, which is no text and is left out (said once)",
                self._member.name,
                self.clean(of_type),
            )

    def clean(self, text: str) -> str:
        """Without the key, which a server may send back, and as text that tokenizers take."""
        key = self.key
        return _encodable(text.replace(key, "[key]") if key else text)

    @property
    def key(self) -> Secret | None:
        """Out of the environment, every time; white space around it is the shell's."""
        key = os.environ.get(self._member.api_key_env or "", "").strip()
        return Secret(key) if key else None

    async def aclose(self) -> None:
        await self.transport.aclose()


def _completions(member: Member) -> URL:
    path, mark, query = (member.base_url or "").partition("?")
    try:
        return URL(f"{path.rstrip('/')}/chat/completions{mark}{query}")
    except ValueError as error:
        raise ValueError(f"member {member.name!r}: field 'base_url' is no address; write https://host/v1") from error


def _size(text: str) -> int:
    """Bytes, with a lone surrogate as the question mark that is sent for it."""
    return len(text.encode("utf-8", "replace"))


def _encodable(text: str) -> str:
    """Lone surrogates, which no UTF-8 has, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks for, by ``retry-after-ms`` or ``Retry-After``, a number or an HTTP date; None without
    a usable one."""
    thousandths = _seconds(headers.get("retry-after-ms"))
    if thousandths is not None:
        return thousandths / 1000
    value = headers.get("retry-after")
    seconds = _seconds(value)
    if seconds is None and value is not None:
        try:
            date = email.utils.parsedate_to_datetime(value)
            seconds = max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time())
        except (ValueError, OverflowError):
            return None
    return seconds


def _seconds(value: str | None) -> float | None:
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return max(0.0, seconds) if seconds < float("inf") else None
