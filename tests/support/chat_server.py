"""A member on loopback that says exactly what a test wants it to, whole or in pieces of bytes, and logs what it told.

with ChatServer(said("hello")) as member:               # to every request
    member.replies = [Said(429, body=b"..."), ...]      # to the next ones
"""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from openai_server import OpenAIServer


@dataclass
class Said:
    """One HTTP answer: `body`, or `pieces` that are sent one by one, each in a packet of its own."""

    status: int = 200
    body: bytes = b""
    pieces: list[bytes] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    """Seconds before every piece but the first, and before the body."""
    hang: bool = False
    """After the pieces: the connection stays open, and nothing more comes."""


Respond = Callable[[dict[str, Any]], Said]


def usage(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def whole(message: dict[str, Any], used: dict[str, Any], finish: str = "stop", **more: Any) -> bytes:
    """The body of a completion, with the bytes of UTF-8."""
    head = {"id": "chatcmpl-7", "object": "chat.completion", "created": 1700000000, "model": "theirs"}
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish, **more}
    return json.dumps({**head, "choices": [choice], "usage": used, "x_theirs": [1]}, ensure_ascii=False).encode()


def events(deltas: list[dict[str, Any]], used: dict[str, Any] | None, finish: str = "stop") -> bytes:
    """The body of a stream."""
    head = {"id": "chatcmpl-8", "object": "chat.completion.chunk", "created": 1700000001, "model": "theirs"}
    chunks = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if used is not None:
        chunks.append({**head, "choices": [], "usage": used})
    lines = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode() for chunk in chunks]
    return b"".join([*lines, b"data: [DONE]\n\n"])


def cut(body: bytes, size: int) -> list[bytes]:
    """In pieces of so many bytes, characters or not."""
    return [body[i : i + size] for i in range(0, len(body), size)]


def said(
    text: str, used: dict[str, Any] | None = None, *, size: int = 50, deltas: list[dict[str, Any]] | None = None
) -> Respond:
    """Whole or streamed, as it is asked."""
    used = used or usage(20, 10)

    def respond(request: dict[str, Any]) -> Said:
        if not request.get("stream"):
            return Said(body=whole({"content": text}, used))
        told = deltas or [{"role": "assistant", "content": text}]
        wanted = used if (request.get("stream_options") or {}).get("include_usage") else None
        return Said(pieces=cut(events(told, wanted), size))

    return respond


class ChatServer(OpenAIServer):
    """`respond` makes the answer of a request; `replies` come first, each once."""

    def __init__(self, respond: Respond) -> None:
        super().__init__()
        self.respond = respond
        self.replies: list[Said] = []
        self.logged: list[dict[str, Any]] = []
        """Usage of every answer that told it, as it was told."""
        self.left = 0
        """Answers that were not sent to their end, because the other side left."""

    async def _answer(
        self,
        path: str,
        headers: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        request = json.loads(body)
        self.requests.append(request)
        self.headers.append({**headers, "path": path})
        answer = self.replies.pop(0) if self.replies else self.respond(request)
        data = answer.body or b"".join(answer.pieces)
        kind = "text/event-stream" if answer.pieces else "application/json"
        length = "Transfer-Encoding: chunked" if answer.pieces else f"Content-Length: {len(data)}"
        lines = [f"HTTP/1.1 {answer.status} OK", length, "Connection: close", f"Content-Type: {kind}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode()
        ended = asyncio.ensure_future(reader.read(1))
        try:
            if answer.pieces:
                writer.write(head)
            for number, piece in enumerate(answer.pieces or [head + data]):
                if answer.pause and (number or not answer.pieces):
                    await asyncio.wait({ended}, timeout=answer.pause)
                if ended.done():
                    self.left += 1
                    return False
                if answer.pieces:
                    writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    await writer.drain()
                elif not answer.hang:
                    self._log(data)  # before anybody can have read it
                    writer.write(piece)
            if answer.hang:
                await ended
                self.left += 1
                return False
        finally:
            ended.cancel()
        if answer.pieces:
            self._log(data)
            writer.write(b"0\r\n\r\n")
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()  # one connection each: the read that waits for its end takes what comes next
        return False

    def _log(self, data: bytes) -> None:
        for line in data.split(b"\n"):
            try:
                document = json.loads(line.removeprefix(b"data: "))
            except ValueError:
                continue
            if isinstance(document, dict) and document.get("usage"):
                self.logged.append(document["usage"])
