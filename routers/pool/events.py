"""Server-sent events of chat completions: read from bytes as they come, and made of a whole completion."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from routers.pool.completion import choices_of
from routers.pool.transport import LONGEST_BODY, Refused

DONE = b"[DONE]"
_BESIDE_TEXT = ("role", "id", "type", "index")


async def data_of(pieces: AsyncIterator[bytes], longest: int) -> AsyncGenerator[bytes | None, None]:
    """What each event carries; None: a comment, which some servers send so that the connection stays open.

    Lines are cut at bytes, so that a character whose bytes come in two pieces is whole again.

    Args:
        longest: bytes of all events together.

    Raises:
        Refused: more than that, or one line of more than ``LONGEST_BODY`` bytes.
    """
    rest, size = bytearray(), 0
    data: list[bytes] = []
    async for piece in pieces:
        size += len(piece)
        rest += piece
        if size > longest or len(rest) > LONGEST_BODY:
            raise Refused(f"a stream of more than {longest // 2**20} MiB, or an event of {LONGEST_BODY // 2**20} MiB")
        *lines, left = rest.split(b"\n")
        rest = bytearray(left)
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if data:
                    yield b"\n".join(data)
                    data = []
            elif line.startswith(b"data:"):
                data.append(bytes(line[5:]).removeprefix(b" "))
            elif line.startswith(b":"):
                yield None
    if rest.split() == [b"data:", DONE]:
        data.append(DONE)
    if data:  # it ended without the empty line; half a line is none
        yield b"\n".join(data)


def texts_in(message: Any) -> Iterator[str]:
    """All that a model wrote in a message or delta: content, reasoning, names and arguments of calls."""
    if isinstance(message, str):
        yield message
    elif isinstance(message, list):
        for part in message:
            yield from texts_in(part)
    elif isinstance(message, dict):
        for name, value in message.items():
            if name not in _BESIDE_TEXT:
                yield from texts_in(value)


def chunks_of(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A whole completion as the events of a stream: one with each choice, one with its end, and the usage."""
    head = {name: value for name, value in document.items() if name not in ("choices", "usage", "object")}
    head["object"] = "chat.completion.chunk"
    for choice in choices_of(document):
        index, said = choice.get("index", 0), choice.get("message")
        message: dict[str, Any] = dict(said) if isinstance(said, dict) else {}
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            message["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls) if isinstance(call, dict)]
        more = {"logprobs": choice["logprobs"]} if choice.get("logprobs") is not None else {}
        yield {**head, "choices": [{"index": index, "delta": message, **more, "finish_reason": None}]}
        yield {**head, "choices": [{"index": index, "delta": {}, "finish_reason": choice.get("finish_reason")}]}
    if document.get("usage") is not None:
        yield {**head, "choices": [], "usage": document["usage"]}
