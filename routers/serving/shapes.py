"""In which shape a reply is sent: as it is (a chat completion), or as a response (`routers.serving.responses`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Protocol

from routers.serving.errors import RequestError


class Shape(Protocol):
    """Makes of a chat completion, or of its chunks, what the client asked for. One request each."""

    def whole(self, document: dict[str, Any]) -> dict[str, Any]:
        """Of a ``chat.completion``."""

    def begin(self) -> Iterator[bytes]:
        """Events before the first chunk."""

    def chunk(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        """Events of a ``chat.completion.chunk``."""

    def end(self) -> Iterator[bytes]:
        """Events after the last chunk."""

    def failed(self, error: RequestError) -> Iterator[bytes]:
        """Events of a stream that breaks off."""


class ChatShape:
    """Chat completions: everything as it came."""

    def whole(self, document: dict[str, Any]) -> dict[str, Any]:
        return document

    def begin(self) -> Iterator[bytes]:
        yield from ()

    def chunk(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        yield event(chunk)

    def end(self) -> Iterator[bytes]:
        yield b"data: [DONE]\n\n"

    def failed(self, error: RequestError) -> Iterator[bytes]:
        yield event(error.document())


def json_bytes(document: Any) -> bytes:
    """ASCII, so that what has no UTF-8, such as half of a pair of surrogates, comes through as it came."""
    return json.dumps(document, separators=(",", ":")).encode()


def event(document: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json_bytes(document) + b"\n\n"
