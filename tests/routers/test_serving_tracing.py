"""Spans of a server, as a receiver of OTLP on loopback reads them."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_server import ChatServer, Said, cut, events, said, usage, whole
from serving_helpers import ByName, running, until

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is missing")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from routers.data.catalogue import Member
from routers.pool import Ledger
from routers.serving.keys import Keys
from routers.serving.proxy import Proxy
from routers.serving.server import create_app, make_gate
from routers.serving.tracing import Tracing

PARENT = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT = f"00-{PARENT}-00f067aa0ba902b7-01"
KEY = "sk-secret-0123456789abcdef"
SECRET = "my password is swordfish"


class Receiver:
    """Takes spans at `/v1/traces`, as a collector does."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
                receiver.bodies.append(body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self) -> list[dict[str, Any]]:
        """In the order in which they began."""
        found = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                about = {one.key: one.value.string_value for one in resource.resource.attributes}
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    told = {one.key: value_of(one.value) for one in span.attributes}
                    found.append(
                        {"name": span.name, "kind": span.kind, "trace": span.trace_id.hex(), "id": span.span_id.hex(),
                         "parent": span.parent_span_id.hex(), "error": span.status.code == 2, "told": told,
                         "service": about["service.name"], "began": span.start_time_unix_nano,
                         "words": span.status.message}
                    )  # fmt: skip
        return sorted(found, key=lambda span: span["began"])


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [value_of(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)


SERVER, SENDER = 2, 3  # kinds of spans


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with closing(Receiver()) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        yield receiver


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, ChatServer]]:
    with ChatServer(said("small says", usage(30, 4))) as small, ChatServer(said("large says", usage(50, 8))) as large:
        yield {"small": small, "large": large}


class Traced:
    """A proxy in front of two members; when the block ends, its spans are at the receiver."""

    def __init__(
        self, servers: dict[str, ChatServer], monkeypatch: pytest.MonkeyPatch, keys: Keys | None = None
    ) -> None:
        monkeypatch.setenv("MEMBER_KEY", KEY)
        tracing, ledger = Tracing(), Ledger()
        members = [
            Member(name, name, 1.0, 2.0, max_tokens=100, timeout=5.0, base_url=server.url, model=f"{name}-model",
                   api_key_env="MEMBER_KEY")
            for name, server in servers.items()
        ]  # fmt: skip
        proxy = Proxy(ByName(members), {m.name: tracing.passthrough(m, ledger) for m in members}, ledger)
        self._running = running(create_app(proxy, gate=make_gate(proxy, keys), tracing=tracing))

    def __enter__(self) -> "Traced":
        self.address = self._running.__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        self._running.__exit__(*why)

    def ask(self, text: str, key: str = "none", **fields: Any) -> httpx.Response:
        body = json.dumps({"model": "router", "messages": [{"role": "user", "content": text}], **fields})
        heads = {"traceparent": CLIENT, "baggage": f"user={KEY}", "authorization": f"Bearer {key}"}
        return httpx.post(f"{self.address}/v1/chat/completions", content=body, headers=heads, timeout=60)


def test_a_request_is_a_span_and_so_is_each_attempt(
    receiver: Receiver, servers: dict[str, ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = servers["small"], servers["large"]
    large.replies = [Said(503, body=b'{"error": {"message": "busy with ' + SECRET.encode() + b'"}}')]
    small.replies = [Said(body=whole({"content": SECRET}, usage(30, 9, cached=10, reasoning=5)))]
    with Traced(servers, monkeypatch) as traced:
        reply = traced.ask(f"large: {SECRET}", max_tokens=50, seed=2**63 - 1, stop="END", temperature=0.5)
    assert reply.status_code == 200
    request, first, second = receiver.spans()
    assert request["name"] == "POST /v1/chat/completions" and request["kind"] == SERVER
    assert request["trace"] == PARENT and request["parent"] == CLIENT.split("-")[2]
    told = request["told"]
    assert told["srpo.member"] == "small" and told["srpo.tried"] == ["large"] and not request["error"]
    assert told["srpo.scores.large"] == 0.5 and told["srpo.scores.small"] == 0.25
    assert told["http.response.status_code"] == 200 and told["srpo.key"] == "anyone"
    assert told["srpo.cost_usd"] == pytest.approx(reply.json()["usage"]["cost_usd"]) == pytest.approx(48e-6)
    for span in (first, second):
        assert span["kind"] == SENDER and span["trace"] == PARENT and span["parent"] == request["id"]
        assert span["service"] == "srpo"
    assert (first["name"], first["told"]["error.type"], first["error"]) == ("chat large-model", "503", True)
    assert "gen_ai.usage.input_tokens" not in first["told"]
    assert second["name"] == "chat small-model" and not second["error"]
    port = int(small.url.split(":")[-1].split("/")[0])
    assert second["told"] == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "small-model",
        "gen_ai.request.max_tokens": 50, "gen_ai.request.seed": 2**63 - 1, "gen_ai.request.temperature": 0.5,
        "gen_ai.request.stop_sequences": ["END"], "gen_ai.response.model": "theirs",
        "gen_ai.response.id": "chatcmpl-7", "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 30, "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": 10, "gen_ai.usage.reasoning.output_tokens": 5,
        "server.address": "127.0.0.1", "server.port": port, "srpo.member": "small",
        "srpo.cost_usd": pytest.approx(48e-6),
    }  # fmt: skip
    for server, span in ((large, first), (small, second)):  # what the member got leads to the span that asked it
        heads = {name.lower(): value for name, value in server.headers[-1].items()}
        assert heads["traceparent"] == f"00-{PARENT}-{span['id']}-01" and "baggage" not in heads
        assert heads["authorization"] == f"Bearer {KEY}"
    sent = b"".join(receiver.bodies)
    assert KEY.encode() not in sent and SECRET.encode() not in sent


def test_a_stream_is_a_span_until_its_end(
    receiver: Receiver, servers: dict[str, ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = servers["small"], servers["large"]
    halves = [{"role": "assistant", "content": "one"}, {"content": " two"}]
    small.replies = [Said(pieces=cut(events(halves, usage(30, 4)), 100), pause=0.02)]
    large.replies = [Said(pieces=[events(halves, None).split(b"data: [DONE]")[0][:-20]])]  # breaks off
    with Traced(servers, monkeypatch) as traced:
        assert traced.ask("small", stream=True).text.endswith("data: [DONE]\n\n")
        assert "broke off" in traced.ask("large", stream=True).text
    whole_request, whole_call, broken_request, broken_call = receiver.spans()
    told = whole_call["told"]
    assert told["gen_ai.request.stream"] is True and told["gen_ai.response.finish_reasons"] == ["stop"]
    assert told["gen_ai.response.time_to_first_chunk"] > 0 and told["gen_ai.usage.output_tokens"] == 4
    assert not whole_request["error"] and not whole_call["error"]
    assert broken_call["told"]["error.type"] == broken_request["told"]["error.type"] == "502"
    assert broken_request["told"]["http.response.status_code"] == 200 and broken_request["error"]
    assert broken_call["told"]["srpo.usage_estimated"] is True


def test_what_was_said_is_told_when_it_is_asked_for(
    receiver: Receiver, servers: dict[str, ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "SPAN_ONLY")
    calls = [{"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": ""}}]
    more = [{"index": 0, "function": {"arguments": '{"q": 1}'}}]
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": "he"}, {"content": "llo HALF"}]
    deltas += [{"tool_calls": calls}, {"tool_calls": more}]
    body = events(deltas, usage(3, 4), "tool_calls").replace(b"HALF", b"\\ud83d")  # of a pair of surrogates
    servers["small"].replies = [Said(pieces=cut(body, 50))]
    with Traced(servers, monkeypatch) as traced:
        assert traced.ask(f"small: {SECRET} \ud83d", stream=True).status_code == 200
    told = receiver.spans()[1]["told"]
    [asked] = json.loads(told["gen_ai.input.messages"])
    assert asked == {"role": "user", "parts": [{"type": "text", "content": f"small: {SECRET} \ufffd"}]}
    [answer] = json.loads(told["gen_ai.output.messages"])
    call = {"type": "tool_call", "id": "c1", "name": "look", "arguments": '{"q": 1}'}
    assert answer["parts"] == [{"type": "text", "content": "hello \ufffd"}, call]
    assert answer["finish_reason"] == "tool_calls"


def test_refusals_and_clients_that_leave(
    receiver: Receiver, servers: dict[str, ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers["small"].replies = [Said(pieces=[b": wait\n\n"], hang=True)]
    with Traced(servers, monkeypatch, Keys.single("right")) as traced:
        assert traced.ask("small", key="wrong").status_code == 401
        assert httpx.get(f"{traced.address}/health").status_code == 200
        asked = len(servers["small"].requests)
        body = json.dumps({"model": "router", "messages": [{"role": "user", "content": "small"}], "stream": True})
        heads = {"authorization": "Bearer right"}
        with httpx.Client(timeout=60) as client, suppress(httpx.ReadTimeout):
            address = f"{traced.address}/v1/chat/completions"
            client.post(address, content=body, headers=heads, timeout=httpx.Timeout(60, read=0.5))
        until(lambda: len(servers["small"].requests) > asked)
        time.sleep(0.1)
    refused, request, call = receiver.spans()
    assert refused["told"]["http.response.status_code"] == 401 and not refused["error"]
    assert "srpo.key" not in refused["told"] and refused["trace"] == PARENT
    assert request["told"]["http.response.status_code"] == 499 and call["told"]["error.type"] == "cancelled"
    assert request["trace"] == call["trace"] != PARENT


def serve(tmp_path: Path, **variables: str) -> tuple[str, int]:
    """What `srpo serve` says on its error channel until it has been stopped, and its status."""
    from routers.baselines.ridge import Ridge
    from routers.data.table import quickstart_table

    Ridge().fit(quickstart_table()).save(tmp_path / "router")
    env = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")} | variables
    command = [sys.executable, "-m", "srpo", "serve", str(tmp_path / "router"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if "listening on" in line:
                address = line.split()[-1]
                body = {"model": "router", "messages": [{"role": "user", "content": "hello"}]}
                assert httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).status_code == 200
                process.terminate()
        return "".join(told), process.wait(60)


def test_a_server_sends_its_spans_where_the_variables_say(tmp_path: Path, receiver: Receiver) -> None:
    told, status = serve(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, OTEL_SERVICE_NAME="mine")
    assert status == 0 and "spans" not in told
    [span] = receiver.spans()  # the last ones are sent as it ends
    assert span["service"] == "mine" and span["told"]["srpo.member"]


def test_a_server_serves_and_ends_without_a_receiver_too(tmp_path: Path) -> None:
    told, status = serve(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert status == 0 and "stopped" in told


def test_without_the_extra_it_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from routers.serving.commands import make_tracing

    assert make_tracing() is None and capsys.readouterr().err == ""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "routers.serving.tracing", None)
    assert make_tracing() is None
    assert "pip install 'srpo[otel]'" in capsys.readouterr().err
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert make_tracing() is None and "only otlp over http/protobuf" in capsys.readouterr().err
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert make_tracing() is None and capsys.readouterr().err == ""


def test_members_of_an_agent_have_spans_too(tmp_path: Path, receiver: Receiver) -> None:
    """Asked in another thread and event loop than their request's."""
    from agent_helpers import MEMBERS, train_policy

    from routers.pool import live_pool
    from routers.serving.agent import AgentWorker
    from routers.tasks.think_route.agent import RouterAgent

    with ChatServer(said(SECRET, usage(5, 2))) as server:
        tracing = Tracing()
        members = {m.name: replace(m, base_url=server.url, max_tokens=10) for m in MEMBERS}
        agent = RouterAgent.from_pretrained(train_policy(tmp_path), live_pool(members, endpoint=tracing.endpoint))
        with running(create_app(AgentWorker(agent), tracing=tracing)) as address:
            body = {"model": "router", "messages": [{"role": "user", "content": "Is this beta?"}]}
            assert httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).status_code == 200
    request, call = receiver.spans()
    assert call["parent"] == request["id"] and call["name"] == "chat beta" and call["kind"] == SENDER
    assert call["told"]["gen_ai.usage.input_tokens"] == 5 and call["told"]["gen_ai.request.max_tokens"] == 10
    assert request["told"]["srpo.member"] == "beta" and server.headers[-1]["traceparent"].split("-")[2] == call["id"]
    assert SECRET.encode() not in b"".join(receiver.bodies)
