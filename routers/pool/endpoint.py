"""An OpenAI-compatible endpoint as a pool member: one request by the openai client, its answer or fault in words.

The client's own retries are off; the one retry layer is ``routers.pool.caller``. A key lives in the environment and in
the request's header; it is in no attribute of ours, and cut out of every text that comes back.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from routers.catalogue import Member
from routers.pool.protocol import (
    BAD_REQUEST,
    CONNECTION,
    EMPTY,
    MALFORMED,
    RATE_LIMIT,
    SERVER_ERROR,
    TIMEOUT,
    Attempt,
)
from srpo.types import Usage

if TYPE_CHECKING:
    from openai import AsyncOpenAI

AGENT_PROMPT = (
    "You help another assistant with a part of its task. Answer the question below briefly, in less than 400 words, "
    "with the facts that matter. If you cannot answer it, say so, and say what you do know about it.\n\n"
    "Question: {query}"
)
"""What members are told, in the manner of Router-R1's agent prompt (help or answer, below 512 tokens, say if not)."""

TEMPLATE_TOKENS = 128
"""INFERRED: what a chat template adds to the bytes of the messages at most, default system prompts included."""
_ERROR_CHARS = 200
_RETRIED = {408, 409, 429}  # and every 5xx


class Endpoint:
    """One member behind an OpenAI-compatible chat-completions endpoint (vLLM, SGLang, llama.cpp and vendors alike).

    ``max_tokens`` is sent with every request, so that the reservation is an upper bound. Byte-level tokenizers make at
    most one token per byte, which bounds the prompt. A server that reports no usage is counted by those bounds, and
    the attempt is marked ``estimated``.

    Args:
        member: ``base_url`` is needed; ``api_key_env`` must be set in the environment where the member names one.
        agent_prompt: text around the question, with ``{query}`` in it once.

    Raises:
        ValueError: names the member, what is missing and what to do.
        ImportError: the openai package is not installed.
    """

    def __init__(self, member: Member, agent_prompt: str = AGENT_PROMPT) -> None:
        if member.base_url is None:
            raise ValueError(f"member {member.name!r}: field 'base_url' is missing; a live member needs its endpoint")
        if member.api_key_env is not None and not os.environ.get(member.api_key_env):
            raise ValueError(
                f"member {member.name!r}: environment variable {member.api_key_env} is not set; export it"
            )
        if agent_prompt.count("{query}") != 1:
            raise ValueError("the agent prompt must hold {query} once; it is where the question goes")
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ImportError("members behind endpoints need the openai client: pip install 'srpo[serve]'") from error
        self._member = member
        self._agent_prompt = agent_prompt
        self._client: tuple[asyncio.AbstractEventLoop, AsyncOpenAI] | None = None

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
        return self._member.max_tokens

    def prompt_bound(self, query: str) -> int:
        return TEMPLATE_TOKENS + sum(len(m["content"].encode("utf-8")) for m in self._messages(query))

    def _messages(self, query: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self._member.system}] if self._member.system else []
        return [*system, {"role": "user", "content": _encodable(self._agent_prompt.replace("{query}", query))}]

    async def send(self, query: str, timeout: float, query_id: str) -> Attempt:
        import openai

        member = self._member
        request: dict[str, Any] = {
            "model": member.model or member.name,
            "messages": self._messages(query),
            "max_tokens": member.max_tokens,
            "temperature": member.temperature,
        }
        request |= {"top_p": member.top_p, "seed": member.seed, **member.request}
        request = {name: value for name, value in request.items() if value is not None}
        try:
            # The client's `post` and not `chat.completions.create`: that walks through every message by its type hints
            # and builds objects that nobody validated, for a third of the time of a call.
            content = await self._openai().post(
                "/chat/completions", cast_to=bytes, body=request, options={"timeout": timeout}
            )
            return self._read(content, query)
        except openai.APIStatusError as error:
            return self._refused(error.status_code, error.response.headers, error.response.content)
        except openai.APITimeoutError:
            return Attempt(error=f"{TIMEOUT}: no reply within {timeout:.3g} s", retry=True, unmetered=True)
        except openai.APIError as error:  # refused, reset, cut off, not HTTP
            words = self._clean(f"{CONNECTION}: {error.__cause__ or error}")
            return Attempt(error=words, retry=True, unmetered=True)

    def _read(self, content: bytes, query: str) -> Attempt:
        """A reply with status 200."""
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            return Attempt(error=f"{MALFORMED}: the body is not JSON", retry=True, unmetered=True)
        usage = read_usage(document)
        failed = Attempt(usage=usage or Usage(), unmetered=usage is None)
        try:
            choice = document["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            return replace(failed, error=f"{MALFORMED}: no choices in the reply", retry=True)
        if text is not None and not isinstance(text, str):
            return replace(failed, error=f"{MALFORMED}: the content is not text", retry=True)
        if text is None or not text.strip():  # asking again would cost the same, and say the same
            reason = self._clean(str(choice.get("finish_reason")))
            return replace(failed, error=f"{EMPTY}: no text (finish_reason {reason})"[:_ERROR_CHARS])
        if usage is None:
            longest = min(self._member.max_tokens, len(text.encode("utf-8", "replace")))
            return Attempt(self._clean(text), Usage(self.prompt_bound(query), longest), estimated=True)
        return Attempt(self._clean(text), usage)

    def _refused(self, status: int, headers: Mapping[str, str], content: bytes) -> Attempt:
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            document = None
        usage = read_usage(document)
        told = document.get("error") if isinstance(document, dict) else None
        told = told.get("message") if isinstance(told, dict) else told
        words = told if isinstance(told, str) else content[:_ERROR_CHARS].decode("utf-8", "replace")
        return Attempt(
            usage=usage or Usage(),
            error=self._clean(f"{_kind_of_status(status)}: status {status}: {' '.join(words.split())}")[:_ERROR_CHARS],
            retry=status in _RETRIED or status >= 500,
            retry_after=retry_after(headers),
            unmetered=usage is None and status >= 500,
        )

    def _clean(self, text: str) -> str:
        """Without the key, which a server may send back, and as text that tokenizers take."""
        key = os.environ.get(self._member.api_key_env or "")
        return _encodable(text.replace(key, "[key]") if key else text)

    def _openai(self) -> AsyncOpenAI:
        """The running event loop's client; connections of another loop cannot be used in this one."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        loop = asyncio.get_running_loop()
        if self._client is None or self._client[0] is not loop:
            variable = self._member.api_key_env

            async def key() -> str:
                return os.environ.get(variable or "") or "none"  # "none": never OPENAI_API_KEY for somebody else

            # Without a client of ours openai's own closes itself when it is forgotten, in whatever loop runs then.
            http = DefaultAsyncHttpxClient()
            client = AsyncOpenAI(base_url=self._member.base_url, api_key=key, max_retries=0, http_client=http)
            self._client = (loop, client)
        return self._client[1]

    async def aclose(self) -> None:
        if self._client is not None and self._client[0] is asyncio.get_running_loop():
            await self._client[1].close()
        self._client = None


def _encodable(text: str) -> str:
    """Lone surrogates, which no UTF-8 has, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _kind_of_status(status: int) -> str:
    if status == 429:
        return RATE_LIMIT
    if status == 408:
        return TIMEOUT
    if status == 409 or status >= 500:
        return SERVER_ERROR
    return BAD_REQUEST if status >= 400 else MALFORMED


def read_usage(document: Any) -> Usage | None:
    """Tokens that a reply or an error reports; None where it reports none, or nonsense."""
    try:
        reported = document["usage"]
        counts = reported["prompt_tokens"], reported["completion_tokens"]
    except (KeyError, TypeError):
        return None
    if any(not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < 2**53 for count in counts):
        return None
    return Usage(*counts)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as an HTTP date; None without a usable one."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds < float("inf") else None
