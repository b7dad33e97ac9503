"""A chat reply in the shape of OpenAI's responses: items, whole or as events with their names and numbers.

    message           content (output_text) and refusal
    function_call     one for each call of a tool; call_id is the member's id of it
    reasoning         reasoning_content, as reasoning_text

``usage.cost_usd`` and ``srpo`` are those of chat.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from routers.pool.completion import choices_of
from routers.pool.events import chunks_of, texts_in
from routers.serving.errors import RequestError
from routers.serving.shapes import event

_ECHOED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "parallel_tool_calls": True,
    "temperature": None,
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "reasoning": {"effort": None, "summary": None},
    "text": {"format": {"type": "text"}},
    "metadata": {},
    "user": None,
}
"""What a response repeats of its request."""
_CUT = ("length", "content_filter")


class ResponseShape:
    """`routers.serving.shapes.Shape` of one request to ``/v1/responses``.

    Args:
        document: the request, whose settings the response repeats.
        name: of the router.
    """

    def __init__(self, document: Mapping[str, Any], name: str) -> None:
        echoed = {field: document.get(field) for field in _ECHOED if document.get(field) is not None}
        self._base: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": name,
            "background": False,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "service_tier": "default",
            **_ECHOED,
            **echoed,
        }
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the item that is being written
        self._calls: dict[int, dict[str, Any]] = {}  # of tools, by their index in the chunks
        self._number = 0
        self._finish: str | None = None
        self._usage: dict[str, Any] | None = None
        self._srpo: Any = None

    def whole(self, document: dict[str, Any]) -> dict[str, Any]:
        for chunk in chunks_of(document):  # the same items, by the same rules
            for _ in self._took(chunk):
                pass
        for _ in self._close():
            pass
        return self._response()

    def begin(self) -> Iterator[bytes]:
        return _sent(self._began())

    def chunk(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        return _sent(self._took(chunk))

    def end(self) -> Iterator[bytes]:
        return _sent(self._ended())

    def failed(self, error: RequestError) -> Iterator[bytes]:
        return _sent(self._broke(error))

    def _began(self) -> Iterator[dict[str, Any]]:
        started = {**self._base, "status": "in_progress", "error": None, "incomplete_details": None, "output": []}
        yield self._event("response.created", response={**started, "usage": None})
        yield self._event("response.in_progress", response={**started, "usage": None})

    def _took(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._usage = chunk.get("usage") or self._usage
        self._srpo = chunk.get("srpo") or self._srpo
        for choice in choices_of(chunk):
            if choice.get("index", 0) != 0:
                continue
            delta = choice["delta"] if isinstance(choice.get("delta"), dict) else {}
            thought = delta.get("reasoning_content") or delta.get("reasoning")
            if isinstance(thought, str) and thought:
                yield from self._write("reasoning", "reasoning_text", thought)
            content = "".join(texts_in(delta.get("content")))
            if content:
                yield from self._write("message", "output_text", content)
            if isinstance(delta.get("refusal"), str) and delta["refusal"]:
                yield from self._write("message", "refusal", delta["refusal"])
            calls = delta.get("tool_calls")
            for call in calls if isinstance(calls, list) else ():
                if isinstance(call, dict):
                    yield from self._call(call)
            if isinstance(choice.get("finish_reason"), str):
                self._finish = choice["finish_reason"]

    def _ended(self) -> Iterator[dict[str, Any]]:
        yield from self._close()
        response = self._response()
        yield self._event(f"response.{response['status']}", response=response)

    def _broke(self, error: RequestError) -> Iterator[dict[str, Any]]:
        yield from self._close("incomplete")
        told = {"code": error.code or "server_error", "message": error.message}
        response = {**self._response(), "status": "failed", "error": told, "incomplete_details": None}
        yield self._event("response.failed", response=response)

    def _response(self) -> dict[str, Any]:
        cut = {"length": "max_output_tokens"}.get(self._finish or "", self._finish) if self._finish in _CUT else None
        return {
            **self._base,
            "status": "completed" if cut is None else "incomplete",
            "error": None,
            "incomplete_details": None if cut is None else {"reason": cut},
            "output": self._items,
            "usage": None if self._usage is None else _usage(self._usage),
            "srpo": self._srpo,
        }

    def _event(self, kind: str, /, **more: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **more}

    def _begin(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self._open = item
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(item))

    def _where(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": self._items.index(item)}  # type: ignore[arg-type]

    def _write(self, kind: str, part_kind: str, text: str) -> Iterator[dict[str, Any]]:
        """Text of a message or of reasoning; the part of another kind before it ends."""
        if self._open is None or self._open["type"] != kind:
            more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            name = f"{'msg' if kind == 'message' else 'rs'}_{uuid.uuid4().hex}"
            yield from self._begin({"id": name, "type": kind, "status": "in_progress", **more, "content": []})
        assert self._open is not None
        parts, field = self._open["content"], "refusal" if part_kind == "refusal" else "text"
        if not parts or parts[-1]["type"] != part_kind:
            yield from self._end_part()
            empty: dict[str, Any] = {"type": part_kind, field: ""}
            parts.append({**empty, "annotations": [], "logprobs": []} if part_kind == "output_text" else empty)
            where = {**self._where(self._open), "content_index": len(parts) - 1}
            yield self._event("response.content_part.added", **where, part=dict(parts[-1]))
        parts[-1][field] += text
        where = {**self._where(self._open), "content_index": len(parts) - 1}
        yield self._event(f"response.{part_kind}.delta", **where, delta=text, **_logprobs(part_kind))

    def _call(self, delta: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A piece of a call of a tool."""
        function = delta["function"] if isinstance(delta.get("function"), dict) else {}
        index = delta["index"] if isinstance(delta.get("index"), int) else 0
        item = self._calls.get(index)
        if item is None:
            name, given = function.get("name") or "", delta.get("id") or f"call_{uuid.uuid4().hex}"
            item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress"}
            item |= {"call_id": given, "name": name, "arguments": ""}
            self._calls[index] = item
            yield from self._begin(item)
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments:
            item["arguments"] += arguments
            where = self._where(item)
            yield self._event("response.function_call_arguments.delta", **where, delta=arguments)

    def _end_part(self) -> Iterator[dict[str, Any]]:
        item = self._open
        if item is None or not item.get("content"):
            return
        part, where = item["content"][-1], {**self._where(item), "content_index": len(item["content"]) - 1}
        kind, field = part["type"], "refusal" if part["type"] == "refusal" else "text"
        yield self._event(f"response.{kind}.done", **where, **{field: part[field]}, **_logprobs(kind))
        yield self._event("response.content_part.done", **where, part=dict(part))

    def _close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """The item that is being written ends."""
        item = self._open
        if item is None:
            return
        yield from self._end_part()
        self._open, item["status"] = None, status
        if item["type"] == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **self._where(item), **told)
        index = self._where(item)["output_index"]
        yield self._event("response.output_item.done", output_index=index, item=dict(item))


def _sent(events: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    return (event(one, one["type"]) for one in events)


def _logprobs(kind: str) -> dict[str, Any]:
    return {"logprobs": []} if kind == "output_text" else {}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Names of responses; what else there is, such as ``cost_usd``, keeps its name."""
    names = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}
    details = {"prompt_tokens_details": "input_tokens_details", "completion_tokens_details": "output_tokens_details"}
    found = {**names, **details}
    least = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    told = {found.get(name, name): value for name, value in usage.items() if value is not None}
    for name, zero in least.items():
        told[name] = {**zero, **told[name]} if isinstance(told.get(name), dict) else zero
    return told
