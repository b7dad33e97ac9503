"""A server process under attack and at its end: real processes, real sockets."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h11
import httpx
import pytest
import uvicorn
from test_serving_gate import digest, written
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

SUPPORT = Path(__file__).resolve().parents[1] / "support"
SECRET = "canary-key-5e1d-secret"
CHAT = "/v1/chat/completions"


class Server:
    """A process that serves `gated_app`."""

    def __init__(self, process: "subprocess.Popen[str]", port: int) -> None:
        self.process, self.port, self.url = process, port, f"http://127.0.0.1:{port}"

    def ask(self, text: str, key: str | None = None, **more: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], **more}
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.post(self.url + CHAT, json=body, headers=headers, timeout=60)

    def numbers(self) -> str:
        return httpx.get(f"{self.url}/metrics", timeout=60).text

    def raw(self, data: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(data)
        return connection

    def post(self, text: str) -> socket.socket:
        return self.raw(request(json.dumps({"messages": [{"role": "user", "content": text}]}).encode()))

    def end(self) -> tuple[int, str]:
        """(exit status, what it printed) when it has ended."""
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


def request(body: bytes, length: int | None = None, more: str = "") -> bytes:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) if length is None else length}\r\n{more}\r\n"
    )
    return head.encode() + body


def until(true: Callable[[], Any]) -> Any:
    """What it is, when it is true."""
    for _ in range(600):
        if found := true():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come to that within a minute")


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes; nothing where it was reset."""
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionError:
        pass
    return data


@contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])}
    process = subprocess.Popen(
        [sys.executable, SUPPORT / "gated_app.py", json.dumps({"idle": 1, **settings})],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "listening on http://127.0.0.1:" in line, line + process.stdout.read()
        yield Server(process, int(line.rpartition(":")[2]))
    finally:
        process.kill()
        process.wait()


def test_the_seams_of_uvicorn() -> None:
    """What `routers.serving.lifecycle` relies on beyond uvicorn's documentation."""

    async def app(*_: Any) -> None: ...

    config = uvicorn.Config(app, http=H11Protocol, ws="none")
    config.load()
    server = uvicorn.Server(config)
    assert config.http_protocol_class is H11Protocol
    assert server.server_state.connections == server.server_state.tasks == set() and server.should_exit is False
    for name in ("startup", "shutdown", "handle_exit", "run", "capture_signals"):
        assert callable(getattr(uvicorn.Server, name))
    loop = asyncio.new_event_loop()
    protocol = H11Protocol(config=config, server_state=server.server_state, app_state={}, _loop=loop)
    loop.close()
    assert protocol.connections is server.server_state.connections and protocol.cycle is None
    assert protocol.timeout_keep_alive_task is None and protocol.conn.their_state is h11.IDLE
    for name in ("connection_made", "send_400_response", "shutdown"):
        assert callable(getattr(H11Protocol, name))
    assert callable(RequestResponseCycle.run_asgi)


@pytest.fixture(scope="module")
def hasty() -> Iterator[Server]:
    """Deadlines of a second."""
    with serving(head=1.0, body=2.0, body_seconds=1.0, write=1.0, drain=1.0) as server:
        yield server


def test_half_open_bodies_heads_and_silent_connections_are_closed(hasty: Server) -> None:
    bodies = [hasty.raw(request(b"{", 100)) for _ in range(400)]
    heads = [hasty.raw(b"POST / HTTP/1.1\r\nHost:") for _ in range(20)]
    silent = [hasty.raw() for _ in range(20)]
    unread = [
        hasty.raw(f"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{i}".encode()) for i in range(5)
    ]
    assert hasty.ask("meanwhile").status_code == 200
    assert {answer(connection).split(b"\r\n")[0] for connection in bodies} == {b"HTTP/1.1 408 Request Timeout"}
    assert {answer(connection) for connection in [*heads, *silent]} == {b""}
    assert all(answer(connection).startswith(b"HTTP/1.1 404") for connection in unread)
    numbers = hasty.numbers()
    assert 'router_refused_total{reason="slow"} 400' in numbers
    assert 'router_connections_closed_total{reason="head"} 40' in numbers
    until(lambda: "router_connections 1.0\n" in hasty.numbers())


@pytest.mark.parametrize("path", [CHAT, "/nowhere"])
def test_a_body_that_trickles_does_not_live_on_every_byte(hasty: Server, path: str) -> None:
    connection = hasty.raw(request(b"{", 1000).replace(CHAT.encode(), path.encode()))
    with pytest.raises(OSError):
        for _ in range(600):
            connection.sendall(b" ")
            time.sleep(0.1)
    connection.close()
    if path != CHAT:  # it was answered, and sent on
        assert 'router_connections_closed_total{reason="body"} 1' in hasty.numbers()


def test_an_answer_that_is_not_taken_is_given_up(hasty: Server) -> None:
    before = hasty.numbers().count('closed_total{reason="write"}')
    connection = hasty.post("stream 400")  # 25 MiB: more than all buffers between us
    until(lambda: 'closed_total{reason="write"} 1' in hasty.numbers())
    until(lambda: "router_in_flight 0" in hasty.numbers())
    assert before == 0 and len(answer(connection)) < 400 * 65536
    slow = hasty.post("stream 100")  # taken slowly, but taken
    taken = 0
    while part := slow.recv(1 << 20):
        taken += len(part)
        time.sleep(0.01)
        if taken >= 100 * 65536:
            break
    assert taken >= 100 * 65536


def test_broken_http_breaks_nothing(hasty: Server) -> None:
    draw = random.Random(3)
    whole = request(b'{"messages": [{"content": "hello"}]}', more="Transfer-Encoding: chunked\r\n" * draw.randrange(2))
    hostile = [
        b"\x00" * 1000, b"GET " + b"a" * 100_000, b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        request(b"", -5), request(b"{}", 10**30), b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000,
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        request(b"{}") + request(b"{}") + b"rubbish\r\n\r\n",
        b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\nzz\r\n",
    ]  # fmt: skip
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        hostile.append(bytes(data[: draw.randrange(len(data)) + 1]))
    connections = []
    for data in hostile:
        connection = hasty.raw()
        connections.append(connection)
        with suppress(ConnectionError):
            connection.sendall(data)
    answers = [answer(connection) for connection in connections]
    assert not any(f"HTTP/1.1 {status}".encode() in text for text in answers for status in range(500, 600))
    assert hasty.ask("fine").status_code == 200


def test_more_connections_than_there_may_be_are_closed_unheard() -> None:
    with serving(connections=20, drain=0.0) as server:
        held = [server.raw() for _ in range(20)]
        assert {answer(server.raw()) for _ in range(5)} == {b""}
        for connection in held:
            connection.close()
        until(lambda: 'closed_total{reason="limit"} 5' in (server.numbers() if server.process.poll() is None else ""))


def test_who_leaves_is_not_worked_for(hasty: Server) -> None:
    deciding = hasty.post("sleep 3")  # all have left before it is decided, on a busy machine too
    until(lambda: "router_decision_batch_count 0.0" not in hasty.numbers())
    for number in range(200):
        hasty.post(f"left {number}").close()
    assert answer(deciding).startswith(b"HTTP/1.1 200")
    waiting = hasty.post("wait 600")
    until(lambda: "wait 600" in httpx.get(f"{hasty.url}/done").json()[0])
    waiting.close()
    until(lambda: "router_in_flight 0" in hasty.numbers())
    done, ended = httpx.get(f"{hasty.url}/done").json()
    assert not any(text.startswith(("left", "wait")) for text in ended)
    assert sum(text.startswith("left") for text in done) <= 4  # one batch, that was taken before they left


def test_the_end_of_a_server_that_was_attacked(hasty: Server) -> None:
    """The last test on it."""
    hasty.process.send_signal(signal.SIGTERM)
    status, output = hasty.end()
    assert status == 0 and "Traceback" not in output and "stopped; nothing was dropped" in output, output


def test_sigterm_lets_what_runs_end_and_drops_the_rest_by_name() -> None:
    with serving(drain=4.0, working=1) as server:
        half_sent = [server.raw(request(b"{", 100)) for _ in range(3)]
        running = server.post("wait 3")
        until(lambda: "wait 3" in httpx.get(f"{server.url}/done").json()[0])
        backlog = [server.post(f"wait {600 + i}") for i in range(5)]
        until(lambda: 'router_waiting{key="anyone"} 5' in server.numbers())
        idle = server.raw()
        server.process.send_signal(signal.SIGTERM)
        assert answer(idle) == b""
        until(lambda: refuses(server.port))
        assert answer(running).startswith(b"HTTP/1.1 200")
        replies = [answer(connection) for connection in [*half_sent, *backlog]]
        status, output = server.end()
    assert status == 0 and "Traceback" not in output, output
    assert "stopped; 8 requests dropped: 3 reading, 4 waiting, 1 working" in output
    assert all(b" 503 " in reply and b"the server is stopping" in reply for reply in replies)


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionError:
        return True
    return False


def test_a_policy_that_computes_for_ever_does_not_hold_up_the_end() -> None:
    with serving(drain=0.5) as server:
        stuck = server.post("sleep 3600")
        until(lambda: "router_decision_batch_count 0.0" not in server.numbers())
        behind = server.post("behind")
        until(lambda: 'router_waiting{key="anyone"} 2' in server.numbers())
        server.process.send_signal(signal.SIGTERM)
        assert b" 503 " in answer(stuck) and b" 503 " in answer(behind)
        status, output = server.end()
    assert status == 0 and "2 requests dropped: 2 waiting" in output
    assert "a thread that still computes is left behind" in output and "Traceback" not in output


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(second: signal.Signals) -> None:
    with serving(drain=600.0) as server:
        waiting = server.post("wait 600")
        until(lambda: httpx.get(f"{server.url}/done").json()[0])
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refuses(server.port))
        server.process.send_signal(second)
        status, output = server.end()
        assert answer(waiting) == b""
    assert status == 128 + second and "a second signal; 1 request dropped: 1 working" in output


def test_keys_change_while_it_serves_and_none_is_shown(tmp_path: Path) -> None:
    path = written(tmp_path / "keys.yaml", a={"sha256": digest(SECRET), "usd_total": 1.0, "usd_per_request": 0.25})
    spending = tmp_path / "spending.json"
    settings = {"keys": str(path), "spending": str(spending), "drain": 5.0}
    with serving(**settings) as server:
        under_way = server.raw(
            request(b'{"messages": [{"content": "wait 2"}]}', more=f"Authorization: bearer {SECRET}\r\n")
        )
        until(lambda: httpx.get(f"{server.url}/done").json()[0])
        assert server.ask("cost 0.25", SECRET).json()["usd"] == 0.25
        written(path, a={"sha256": digest(SECRET + "-2"), "usd_total": 1.0, "usd_per_request": 0.25})
        refused = server.ask("q", SECRET)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert server.ask("cost 0.25", SECRET + "-2").status_code == 200
        path.write_text(f"keys: {SECRET}")
        server.process.send_signal(signal.SIGHUP)
        assert server.ask("q", SECRET + "-2").status_code == 200
        assert answer(under_way).startswith(b"HTTP/1.1 200")
        for wrong in (SECRET[:-1], "x", "\u00e9" * 1000, ""):
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            reply = answer(server.raw(head + b"Authorization: Bearer " + wrong.encode() + b"\r\n\r\n"))
            assert reply.startswith(b"HTTP/1.1 401")
        numbers = server.numbers()
        server.process.send_signal(signal.SIGTERM)
        status, output = server.end()
    assert status == 0 and "the keys stay as they were" in output and "Traceback" not in output
    assert (
        'router_refused_total{reason="key"} 5' in numbers and 'router_keys_reloads_total{result="read"} 1' in numbers
    )
    for text in (output, numbers, spending.read_text()):
        assert SECRET not in text and digest(SECRET) not in text
    assert json.loads(spending.read_text())["spending"]["a"]["total_usd"] == 0.5
    written(path, a={"sha256": digest(SECRET), "usd_total": 0.5})
    with serving(**settings) as server:  # what was spent outlives the server
        assert server.ask("q", SECRET).json()["error"]["code"] == "insufficient_quota"
