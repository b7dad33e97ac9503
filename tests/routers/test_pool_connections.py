"""Connections to members: kept, closed, proxied and encrypted as promised, against real servers and proxies."""

import asyncio
import base64
import gc
import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai_server import Fault, OpenAIServer
from yarl import URL

from routers.data.catalogue import Member
from routers.pool import Pool, Retry, kind, live_pool
from routers.pool.endpoint import Endpoint
from routers.pool.transport import Transport
from srpo.types import Reply

KEY = "sk-canary-5d6e7f8a9b"
PROXIES = [
    name for scheme in ("http", "https", "all", "no") for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper())
]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("POOL_TEST_KEY", KEY)
    with OpenAIServer() as running:
        yield running


def pool_at(url: str, **fields: Any) -> Pool:
    fields = {"base_url": url, "api_key_env": "POOL_TEST_KEY", **fields}
    return live_pool({"a": Member("a", "x", 1.0, 2.0, **fields)}, retry=Retry(base=0.01))


def ask(pool: Pool, times: int = 1, deadline: float = 10.0) -> list[Reply]:
    async def main() -> list[Reply]:
        async with pool:
            return [await pool.ask("a", f"who? {i}", deadline) for i in range(times)]

    return asyncio.run(main())


# ---------------------------------------------------------------------------------------------------------- proxies


class Proxy:
    """An HTTP proxy that forwards plain requests and tunnels others; it keeps the heads of what it was asked."""

    def __init__(self) -> None:
        self.heads: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += client.recv(65536)
        head, _, rest = data.partition(b"\r\n\r\n")
        self.heads.append(head.decode())
        method, target, _ = head.decode().split("\r\n")[0].split(" ")
        place = target if method == "CONNECT" else target.split("/")[2]
        host, port = place.rsplit(":", 1)
        upstream = socket.create_connection((host, int(port)))
        if method == "CONNECT":
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            path = "/" + target.split("/", 3)[3]
            upstream.sendall(head.replace(target.encode(), path.encode(), 1) + b"\r\n\r\n" + rest)
        threading.Thread(target=self._pump, args=(client, upstream), daemon=True).start()
        self._pump(upstream, client)

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        target.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    running = Proxy()
    yield running
    running.close()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_the_environments_proxy_is_used_and_its_password_goes_to_nobody_else(server, proxy, monkeypatch, variable):
    monkeypatch.setenv(variable, f"http://user:pass%21word@{proxy.address}")
    assert ask(pool_at(server.url))[0].error is None
    (head,) = proxy.heads
    assert head.startswith(f"POST {server.url}/chat/completions HTTP/1.1\r\n")
    assert f"Proxy-Authorization: Basic {base64.b64encode(b'user:pass!word').decode()}" in head
    assert server.requests[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("without", ["127.0.0.1", "other,127.0.0.1:PORT", "*"])
def test_hosts_of_no_proxy_are_asked_directly(server, proxy, monkeypatch, without):
    monkeypatch.setenv("HTTP_PROXY", proxy.address)  # without http://, as many write it
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert ask(pool_at(server.url))[0].error is None and len(proxy.heads) == 1
    monkeypatch.setenv("NO_PROXY", without.replace("PORT", server.url.split(":")[2].split("/")[0]))
    assert ask(pool_at(server.url))[0].error is None and len(proxy.heads) == 1


@pytest.mark.parametrize("address", ["socks5://127.0.0.1:1080", "http://["])
def test_a_proxy_that_is_none_is_told_by_name_and_nothing_is_sent(server, monkeypatch, address):
    monkeypatch.setenv("ALL_PROXY", address)
    (reply,) = ask(pool_at(server.url))
    assert "HTTP_PROXY" in reply.error and "127.0.0.1 in NO_PROXY" in reply.error and not server.requests


# ------------------------------------------------------------------------------------------------------------- TLS


@contextmanager
def encrypted(folder: Path, server: OpenAIServer) -> Iterator[tuple[str, str]]:
    """Address and certificate of a TLS front of the server."""
    subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost "
        f"-keyout {folder}/key.pem -out {folder}/cert.pem".split(),
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client = context.wrap_socket(listener.accept()[0], server_side=True)
            except ssl.SSLError:
                continue
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", int(server.url.split(":")[2].split("/")[0])))
            threading.Thread(target=Proxy._pump, args=(client, upstream), daemon=True).start()
            threading.Thread(target=Proxy._pump, args=(upstream, client), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"https://localhost:{listener.getsockname()[1]}/v1", f"{folder}/cert.pem"
    finally:
        listener.close()


ASK = """
import asyncio, sys
from routers.data.catalogue import Member
from routers.pool import Retry, live_pool

async def main():
    member = Member("a", "x", 1.0, 2.0, base_url=sys.argv[1], api_key_env="POOL_TEST_KEY")
    pool = live_pool({"a": member}, retry=Retry(attempts=1))
    reply = await pool.ask("a", "who?", 30.0)
    print(reply.error or reply.text)
    await pool.aclose()

asyncio.run(main())
"""


def in_a_process(url: str, **environment: str) -> tuple[str, str]:
    """What it prints, and what it complains about."""
    command = [sys.executable, "-W", "always", "-W", "ignore::DeprecationWarning", "-c", ASK, url]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    return done.stdout.strip(), done.stderr.strip()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_certificates_are_checked_against_the_environments_also_through_a_proxy(server, proxy, tmp_path):
    with encrypted(tmp_path, server) as (url, certificate):
        refused, _ = in_a_process(url)
        assert refused.startswith("connection:") and "certificate" in refused.lower() and not server.requests
        assert in_a_process(url, SSL_CERT_FILE=certificate) == ("a plain reply", "")
        tunnelled = in_a_process(url, SSL_CERT_FILE=certificate, HTTPS_PROXY=f"http://{proxy.address}")
        assert tunnelled == ("a plain reply", "") and len(server.requests) == 2
        assert proxy.heads[0].startswith("CONNECT localhost:") and KEY not in proxy.heads[0]


# ------------------------------------------------------------------------------------------------------ connections


def test_a_connection_is_used_again_and_nothing_of_an_answer_is_kept(server, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.always = Fault(headers=(("Set-Cookie", "tracked=1; Path=/"),))
    assert [reply.error for reply in ask(pool_at(server.url, api_key_env=None), times=5)] == [None] * 5
    assert server.connections == 1
    assert all(request["authorization"] is None for request in server.requests)
    assert all("cookie" not in headers for headers in server.headers)


def test_a_connection_that_the_server_closed_meanwhile_costs_no_attempt(server):
    pool = pool_at(server.url)

    async def main() -> list[Reply]:
        async with pool:
            first = await pool.ask("a", "one", 10.0)
            server.hang_up()
            await asyncio.sleep(0.1)
            return [first, await pool.ask("a", "two", 10.0)]

    assert [reply.error for reply in asyncio.run(main())] == [None, None] and len(server.requests) == 2


def test_a_cancelled_call_closes_its_connection_and_its_key_is_in_no_frame(server):
    server.always = Fault(hang=True)
    pool = pool_at(server.url)

    async def main() -> str:
        async with pool:
            call = asyncio.create_task(pool.ask("a", "one", 30.0))
            while not server.in_flight:
                await asyncio.sleep(0.01)
            call.cancel()
            try:
                await call
            except asyncio.CancelledError as error:
                frames = traceback.TracebackException.from_exception(error, capture_locals=True)
            while server.in_flight:  # until the server sees that the client has gone
                await asyncio.sleep(0.01)
            return "".join(frames.format())

    words = asyncio.run(asyncio.wait_for(main(), 60))
    assert "aiohttp" in words and "Authorization" in words and KEY not in words


def test_connections_of_ended_loops_are_let_go_without_a_word(server, caplog):
    """Also where nobody closed the pool."""
    pool = pool_at(server.url)

    async def forget(pool: Pool) -> None:
        assert (await pool.ask("a", "one", 10.0)).error is None

    for _ in range(3):
        asyncio.run(forget(pool))
    assert len(pool._callers["a"].backend.transport._connections) == 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        del pool
        gc.collect()
    assert not [warning for warning in said if "aiohttp" in warning.filename or "client" in str(warning.message)]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_body_is_read_while_it_comes(server):
    server.always = Fault(slow=0.05)

    async def main() -> bytes:
        transport = Transport(URL(f"{server.url}/chat/completions"))
        message = {"model": "m", "messages": [{"role": "user", "content": "who?"}]}
        async with transport.opened(message, KEY, 60.0) as answer:
            assert answer.status == 200 and answer.headers["content-type"] == "application/json"
            first = await anext(aiter(answer.pieces()))
            assert server.in_flight == 1  # it is still writing
        await transport.aclose()
        return first

    assert b'{"id": "chatcmpl-1"'.startswith(asyncio.run(main()))


def test_an_answer_that_is_cut_off_is_an_error_and_not_a_short_answer():
    def serve() -> None:
        for _ in range(2):
            client, _ = listener.accept()
            client.recv(65536)
            client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"choices": [')
            client.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        pool = live_pool({"a": Member("a", "x", 1.0, 2.0, base_url=url)}, retry=Retry(attempts=2, base=0.01))
        (reply,) = ask(pool)
        thread.join(60)
    assert kind(reply) == "connection" and not reply.text


def test_an_address_that_is_none_names_its_member():
    with pytest.raises(ValueError, match=r"'a'.*base_url.*https://host/v1"):
        Endpoint(Member("a", "x", 1.0, 2.0, base_url="http://[/v1"))
