"""Spans of a server for OpenTelemetry, by its conventions for HTTP and for generative AI. Needs the extra `otel`.

    OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 srpo serve ROUTER --catalogue pool.yaml

    POST /v1/chat/completions    a request (kind SERVER), below the client's own span where it sends a `traceparent`
        srpo.member  srpo.scores.NAME  srpo.tried  srpo.reason  srpo.key  srpo.cost_usd  srpo.policy_usd
    chat MODEL                   every attempt at a member (kind CLIENT), which gets a `traceparent` in its turn
        gen_ai.operation.name  gen_ai.request.*  gen_ai.response.*  gen_ai.usage.*  server.address  error.type
        srpo.member  srpo.cost_usd  srpo.usage_estimated (the member reported none, or none that is possible)

`error.type` is an HTTP status, a kind of `routers.pool.protocol.KINDS` with `_` for spaces, or `cancelled` where the
client left. A member that was not asked, for want of money or of a place, is such a span as well: it says why.

What was said is in no span, errors' words included, unless OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT is
`span_only`, `span_and_event` or `true`; then `gen_ai.input.messages` and `gen_ai.output.messages` of the members'
spans hold it as JSON. Of a client's context only the trace goes on to members, which are others' servers: no baggage.

Source: https://github.com/open-telemetry/semantic-conventions-genai, docs/gen-ai/gen-ai-spans.md of v1.41
(status: development).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from typing import Any

from opentelemetry.context import attach, detach
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from yarl import URL

from routers.data.billing import price, shown_usd
from routers.data.catalogue import Member
from routers.pool.call import Call, Declined, Failed
from routers.pool.completion import choices_of
from routers.pool.endpoint import AGENT_PROMPT, Endpoint
from routers.pool.ledger import Ledger
from routers.pool.passthrough import Passthrough
from routers.pool.protocol import Attempt
from routers.pool.transport import TRACE
from routers.serving.served import Spent
from srpo.texts import well_formed
from srpo.types import Usage

_log = logging.getLogger(__name__)
_CONTEXT = TraceContextTextMapPropagator()
_SCHEMA = "https://opentelemetry.io/schemas/1.41.0"
_CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_LAST_SECONDS = 3.0
"""For the spans that are left when the server ends; the receiver may be gone."""
_REQUEST = {
    "frequency_penalty": "frequency_penalty",
    "max_completion_tokens": "max_tokens",
    "max_tokens": "max_tokens",
    "n": "choice.count",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
    "stop": "stop_sequences",
    "temperature": "temperature",
    "top_p": "top_p",
}
"""Fields of a request, and what the conventions call them below ``gen_ai.request.``"""


class Tracing:
    """Makes the spans of one server. Close it at the end.

    Args:
        provider: sends them; None: as OpenTelemetry's own variables say, over OTLP (HTTP, protobuf).
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider or _provider()
        self._tracer = self._provider.get_tracer("srpo", schema_url=_SCHEMA)
        self.content = os.environ.get(_CONTENT, "").strip().lower() in ("span_only", "span_and_event", "true")

    @contextmanager
    def request(self, scope: Mapping[str, Any], served: Any) -> Iterator[None]:
        """The span of a request (`scope` of ASGI), whose `served.status` is known in the end."""
        heads = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        told = {"http.request.method": scope["method"], "http.route": scope["path"], "url.path": scope["path"]}
        told |= {"url.scheme": scope["scheme"], "network.protocol.version": scope["http_version"]}
        if scope.get("server"):
            told |= {"server.address": scope["server"][0], "server.port": scope["server"][1]}
        name = f"{scope['method']} {scope['path']}"
        with self._span(name, SpanKind.SERVER, told, _CONTEXT.extract(heads)) as span:
            try:
                yield
            finally:
                span.set_attribute("http.response.status_code", served.status)
                if served.status >= 500:
                    _failed(span, str(served.status))

    def add(self, key: str, spent: Spent, seconds: float, status: int) -> None:
        """A request was decided, and is over: its span says what became of it. As `page.Recent.add`."""
        span, told = get_current_span(), spent.told
        found = {"srpo.member": told.get("member"), "srpo.reason": told.get("reason"), "srpo.key": key}
        found |= {f"srpo.scores.{name}": score for name, score in told.get("scores", {}).items()}
        found |= {"srpo.tried": [one["member"] for one in told.get("tried", ())] or None}
        found |= {"srpo.cost_usd": shown_usd(spent.usd), "srpo.policy_usd": shown_usd(spent.policy_usd)}
        found |= {"gen_ai.conversation.id": told.get("conversation")}
        _note(span, found)
        if status >= 500:  # of a stream too, which had its status 200 before it broke off
            _failed(span, str(status))

    def passthrough(self, member: Member, ledger: Ledger) -> Passthrough:
        """`Passthrough` with a span for each call."""
        return _Passthrough(self, member, ledger)

    def endpoint(self, member: Member, agent_prompt: str = AGENT_PROMPT) -> Endpoint:
        """`Endpoint` with a span for each attempt."""
        return _Endpoint(self, member, agent_prompt)

    @contextmanager
    def attempt(self, member: Member, fields: Mapping[str, Any]) -> Iterator[Span]:
        """The span of an attempt at a member, which `fields` are sent to.

        What is raised within is its error.
        """
        model = member.model or member.name
        told = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": model}
        told |= {"srpo.member": member.name, **_place(member), **_asked(fields)}
        if self.content:
            told["gen_ai.input.messages"] = _messages(fields.get("messages", ()))
        with self._span(f"chat {model}", SpanKind.CLIENT, told) as span:
            try:
                yield span
            except Declined as error:
                _failed(span, error.kind.replace(" ", "_"))
                raise
            except Failed as error:
                _failed(span, str(error.status))
                raise
            except (asyncio.CancelledError, GeneratorExit):
                _failed(span, "cancelled")
                raise

    @contextmanager
    def _span(self, name: str, kind: SpanKind, told: Mapping[str, Any], context: Any = None) -> Iterator[Span]:
        """Current while it lasts."""
        span = self._tracer.start_span(well_formed(name), context, kind, _fit(told))
        token = attach(set_span_in_context(span, context))
        try:
            yield span
        finally:
            detach(token)
            span.end()

    async def aclose(self) -> None:
        """Send what is left, for a few seconds."""
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        end = time.monotonic() + _LAST_SECONDS
        while sending.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if sending.is_alive():
            _log.warning("the last spans could not be sent within %g seconds", _LAST_SECONDS)


class _Passthrough(Passthrough):
    def __init__(self, tracing: Tracing, member: Member, ledger: Ledger) -> None:
        super().__init__(member, ledger)
        self._tracing = tracing

    @asynccontextmanager
    async def call(
        self, fields: Mapping[str, Any], *, stream: bool = False, max_cost: float = math.inf
    ) -> AsyncIterator[Call]:
        with self._tracing.attempt(self.member, {**fields, "stream": stream}) as span:
            started, said = time.monotonic(), _Said(span, self._tracing.content)
            async with AsyncExitStack() as stack:
                token = TRACE.set(_carried())
                try:
                    call = await stack.enter_async_context(super().call(fields, stream=stream, max_cost=max_cost))
                finally:
                    TRACE.reset(token)
                if call.document is not None:
                    said.read(call.document)
                else:
                    span.set_attribute("gen_ai.response.time_to_first_chunk", time.monotonic() - started)
                    call.events = said.events(call.events)
                try:
                    yield call
                finally:
                    billed = call.bill()
                    if billed is not None:
                        _used(span, self.member, billed.usage, billed.estimated or billed.bounded)
                    said.end()


class _Endpoint(Endpoint):
    def __init__(self, tracing: Tracing, member: Member, agent_prompt: str) -> None:
        super().__init__(member, agent_prompt)
        self._tracing = tracing

    async def send(self, query: str, timeout: float, query_id: str) -> Attempt:
        fields = {**self._request, "messages": [*self._system, {"role": "user", "content": query}]}
        with self._tracing.attempt(self._member, fields) as span:
            token = TRACE.set(_carried())
            try:
                attempt = await super().send(query, timeout, query_id)
            finally:
                TRACE.reset(token)
            if attempt.usage != Usage():
                _used(span, self._member, attempt.usage, attempt.estimated or attempt.bounded)
            if attempt.error is not None:
                _failed(span, attempt.error.partition(":")[0].replace(" ", "_"))
            elif self._tracing.content:
                parts = [{"type": "text", "content": attempt.text}]
                _note(span, {"gen_ai.output.messages": _written([{"role": "assistant", "parts": parts}])})
            return attempt


class _Said:
    """What a member answered: its model, id and ends, and its words where they are wanted."""

    def __init__(self, span: Span, content: bool) -> None:
        self._span, self._content = span, content
        self._ends: dict[int, str] = {}
        self._words: dict[int, dict[str, Any]] = {}

    def read(self, document: dict[str, Any]) -> None:
        """A completion, or a chunk of one."""
        _note(self._span, {"gen_ai.response.model": _text(document.get("model"))})
        _note(self._span, {"gen_ai.response.id": _text(document.get("id"))})
        for number, choice in enumerate(choices_of(document)):
            place: Any = choice.get("index", number)
            if not isinstance(place, int):
                continue
            if isinstance(choice.get("finish_reason"), str):
                self._ends[place] = choice["finish_reason"]
            said = choice.get("message") or choice.get("delta")
            if self._content and isinstance(said, dict):
                _add(self._words.setdefault(place, {"role": "assistant", "content": "", "tool_calls": []}), said)

    async def events(
        self, chunks: AsyncGenerator[dict[str, Any] | None, None]
    ) -> AsyncGenerator[dict[str, Any] | None, None]:
        """The same, read on their way."""
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    if chunk is not None:
                        self.read(chunk)
                    yield chunk
        except Failed as error:
            _failed(self._span, str(error.status))
            raise

    def end(self) -> None:
        ends = [end for _, end in sorted(self._ends.items())]
        _note(self._span, {"gen_ai.response.finish_reasons": ends or None})
        if self._words:
            told = [
                {**_message(said), "finish_reason": self._ends.get(place, "error")}
                for place, said in sorted(self._words.items())
            ]
            _note(self._span, {"gen_ai.output.messages": _written(told)})


def _provider() -> TracerProvider:
    """As the variables say; `srpo` where they give the service no name."""
    own: dict[str, str] = {}
    if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        own["service.name"] = "srpo"
    provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _carried() -> dict[str, str]:
    """Headers that tell a member which span asks it."""
    heads: dict[str, str] = {}
    _CONTEXT.inject(heads)
    return heads


def _failed(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


def _used(span: Span, member: Member, usage: Usage, estimated: bool) -> None:
    """Cached and reasoning tokens are parts of input and output, as the conventions have it."""
    found = {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens or None,
        "gen_ai.usage.cache_creation.input_tokens": usage.cache_write_tokens or None,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens or None,
        "srpo.cost_usd": shown_usd(price(member, usage)),
        "srpo.usage_estimated": estimated or None,
    }
    _note(span, found)


def _place(member: Member) -> dict[str, Any]:
    url = URL(member.base_url or "")
    return {"server.address": url.host, "server.port": url.port}


def _asked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of a request, without what it says."""
    found: dict[str, Any] = {
        f"gen_ai.request.{name}": fields[field] for field, name in _REQUEST.items() if field in fields
    }
    if isinstance(stops := fields.get("stop"), str):
        found["gen_ai.request.stop_sequences"] = [stops]
    if fields.get("n") == 1:
        del found["gen_ai.request.choice.count"]
    if fields.get("stream"):
        found["gen_ai.request.stream"] = True
    if isinstance(shape := fields.get("response_format"), Mapping):
        found["gen_ai.output.type"] = "text" if shape.get("type") == "text" else "json"
    return found


def _note(span: Span, told: Mapping[str, Any]) -> None:
    span.set_attributes(_fit(told))


def _fit(told: Mapping[str, Any]) -> dict[str, Any]:
    """As OTLP can carry it: no None, no half of a surrogate pair."""
    return {well_formed(name): _value(value) for name, value in told.items() if value is not None}


def _value(value: Any) -> Any:
    if isinstance(value, str):
        return well_formed(value)
    return [_value(one) for one in value] if isinstance(value, (list, tuple)) else value


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _messages(messages: Sequence[Any]) -> str:
    """OpenAI's messages in the conventions' shape."""
    return _written([_message(message) for message in messages])


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role == "tool":
        answer = {"type": "tool_call_response", "id": message.get("tool_call_id"), "response": content}
        return {"role": "tool", "parts": [answer]}
    texts = [{"type": "text", "text": content}] if isinstance(content, str) and content else content or ()
    parts: list[dict[str, Any]] = []
    for part in texts:
        if part.get("type") == "text":
            parts.append({"type": "text", "content": part.get("text")})
        else:  # images and sound, however large: only that they are there
            parts.append({"type": part.get("type")})
    for call in message.get("tool_calls") or ():
        asked = call.get("function") or {}
        parts.append(
            {"type": "tool_call", "id": call.get("id"), "name": asked.get("name"), "arguments": asked.get("arguments")}
        )
    return {"role": role, "parts": parts}


def _written(messages: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(messages, ensure_ascii=False)


def _add(message: dict[str, Any], said: Mapping[str, Any]) -> None:
    """A message, or what a chunk adds to it."""
    if isinstance(said.get("content"), str):
        message["content"] += said["content"]
    for number, call in enumerate(said.get("tool_calls") or ()):
        place = call.get("index", number)
        while len(message["tool_calls"]) <= place:
            message["tool_calls"].append({"id": None, "function": {"name": "", "arguments": ""}})
        known, asked = message["tool_calls"][place], call.get("function") or {}
        known["id"] = call.get("id") or known["id"]
        for name in ("name", "arguments"):
            known["function"][name] += asked.get(name) or ""
