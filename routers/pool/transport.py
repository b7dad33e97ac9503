"""POSTs to an endpoint of somebody else's: what comes back is bounded in size, and the key stays at its address.

The body is read as a stream and unpacked piece by piece, so that neither a long body nor a small one that unpacks to
gigabytes gets into memory. A redirect is followed within the same scheme, host and port only: the request carries a
key, and a question that may be private. Nothing is taken from the environment but proxies and certificate authorities:
no netrc, and cookies are not kept.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import ssl
import urllib.request
import weakref
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import aiohttp
import httpx
from yarl import URL

LONGEST_BODY = 8 * 2**20
"""Bytes of a reply after unpacking. The longest replies of models have some hundred kilobytes."""
MOST_REDIRECTS = 3
LONGEST_HEADER = 64 * 2**10
"""Bytes of one header; some gateways send long ones with their error pages."""
IDLE_SECONDS = 4.0
"""A connection that nobody used for so long is not used again: uvicorn, and so vLLM, closes after 5 seconds, and a
request that meets a closing connection is lost."""
_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip, deflate",
    "Content-Type": "application/json",
    "User-Agent": "srpo",
}
TRACE: ContextVar[Mapping[str, str]] = ContextVar("trace", default={})  # noqa: B039  (nobody writes into it)
"""Headers of the requests that this task sends: who asks, for whoever follows calls through several servers
(`routers.serving.tracing`)."""


class Refused(Exception):
    """The answer is not taken; the message says why. Asking again would bring the same."""


class Redirected(Refused):
    """To a place where the request does not go."""


class Broken(Exception):
    """The body does not unpack; another attempt may help."""


class Unreachable(Exception):
    """No connection, a connection that ended early, or no HTTP; another attempt may help."""


class Secret(str):
    """A text that shows itself to nobody who prints what holds it: objects, headers, the locals of a traceback."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<secret>"


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer that is no redirect."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Opened:
    """An HTTP answer that is no redirect, before its body is read."""

    status: int
    headers: Mapping[str, str]
    _response: aiohttp.ClientResponse

    def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, unpacked; all pieces together may have any number of bytes.

        Raises:
            Refused: packed in a way that was not asked for, or a small piece unpacks to more than ``LONGEST_BODY``.
            Broken: damaged packing.
            Unreachable: the connection ended early.
            TimeoutError: the time of the request is over.
        """
        packing = [word.strip().lower() for word in ",".join(self._response.headers.getall(_PACKING, ())).split(",")]
        packing = [word for word in packing if word not in ("", "identity")]
        if not packing:
            return _received(self._response)
        if len(packing) > 1 or packing[0] not in ("gzip", "x-gzip", "deflate"):
            raise Refused(f"the body is packed as {', '.join(packing)[:60]!r}, and only gzip or deflate was asked for")
        return _unpacked(_received(self._response), packing[0])

    async def whole(self) -> bytes:
        """The body, of at most ``LONGEST_BODY`` bytes; raises what ``pieces`` raises, and Refused if it is longer."""
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > LONGEST_BODY):
            raise Refused(_TOO_LONG)
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > LONGEST_BODY:
                raise Refused(_TOO_LONG)
        return bytes(body)


@dataclass(frozen=True)
class _Connections:
    """Of one event loop."""

    session: aiohttp.ClientSession
    proxy: URL | None
    proxy_headers: Mapping[str, str] | None


class Transport:
    """POSTs to one address over connections that are kept and used again, for each event loop its own.

    How many requests run at once is limited elsewhere, by the catalogue.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        self._connections: dict[asyncio.AbstractEventLoop, _Connections] = {}
        weakref.finalize(self, _leave_ended, self._connections)  # of somebody who forgot `aclose`

    async def post(self, body: Any, key: str | None, timeout: float) -> Answer:
        """POST ``body`` as JSON and read the whole answer, within ``timeout`` seconds.

        Raises:
            Redirected: elsewhere, too often, or to nowhere.
            Refused: too long, packed in a way that was not asked for, or a proxy that is none.
            Broken: damaged packing.
            Unreachable: no connection, or no HTTP.
            TimeoutError: as it says.
        """
        async with self.opened(body, key, timeout) as answer:
            try:
                content = await answer.whole()
            except (Refused, Broken) as error:
                if answer.status < 400:
                    raise
                content = str(error).encode()  # the status says enough
            return Answer(answer.status, answer.headers, content)

    @asynccontextmanager
    async def opened(self, body: Any, key: str | None, timeout: float | None) -> AsyncIterator[Opened]:
        """``post`` for a body that is read piece by piece; ``timeout`` covers the reading too (None: no limit of its
        own), and bytes are sent as they are. Leaving the context before the end of the body, or being cancelled,
        closes the connection."""
        headers = {**TRACE.get(), **({} if key is None else {"Authorization": Secret(f"Bearer {key}")})}
        data = body if isinstance(body, bytes) else _written(body)
        limit = aiohttp.ClientTimeout(total=timeout, ceil_threshold=math.inf)
        here, url = self._here(), self.url
        for _ in range(MOST_REDIRECTS + 1):
            with _named_errors():
                response = await here.session.post(
                    url,
                    data=data,
                    headers=headers,
                    timeout=limit,
                    proxy=here.proxy,
                    proxy_headers=here.proxy_headers,
                    allow_redirects=False,
                )
            async with response:
                if not 300 <= response.status < 400:
                    yield Opened(response.status, response.headers, response)
                    return
                url = _next(response, url)
        raise Redirected(f"more than {MOST_REDIRECTS} redirects; write the last address as base_url")

    def _here(self) -> _Connections:
        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            _leave_ended(self._connections)
            proxy, login = _proxy(self.url)
            tunnelled = self.url.scheme == "https"  # then the login is no part of the request to the member
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=_certificates(), keepalive_timeout=IDLE_SECONDS),
                headers=_HEADERS if tunnelled else {**_HEADERS, **login},
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                max_line_size=LONGEST_HEADER,
                max_field_size=LONGEST_HEADER,
            )
            self._connections[loop] = _Connections(session, proxy, login if tunnelled else None)
        return self._connections[loop]

    async def aclose(self) -> None:
        """Close the running event loop's connections. The transport can be used again."""
        here = self._connections.pop(asyncio.get_running_loop(), None)
        if here is not None:
            await here.session.close()


@contextmanager
def _named_errors() -> Iterator[None]:
    """aiohttp's errors as ours, without a cause: theirs hold the request with its headers."""
    try:
        yield
    except TimeoutError:
        raise
    except (aiohttp.ClientError, OSError) as error:
        raise Unreachable(str(error) or type(error).__name__) from None


async def _received(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    with _named_errors():
        async for piece in response.content.iter_any():
            yield piece


def _leave_ended(connections: dict[asyncio.AbstractEventLoop, _Connections]) -> None:
    """Let go of those whose loop is closed, where nobody can await their closing any more."""
    for loop in [loop for loop in connections if loop.is_closed()]:
        with suppress(StopIteration):  # at its first step: there is nothing to wait for without a loop
            connections.pop(loop).session.close().send(None)


@cache
def _certificates() -> ssl.SSLContext:
    """Those of certifi, or of SSL_CERT_FILE or SSL_CERT_DIR. Reading them takes longer than many a call."""
    context = httpx.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _proxy(url: URL) -> tuple[URL | None, dict[str, str]]:
    """Of the environment, and the header with its login: HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, in small letters too,
    but for the hosts of NO_PROXY."""
    proxies = urllib.request.getproxies()
    found = proxies.get(url.scheme) or proxies.get("all")
    if not found or urllib.request.proxy_bypass(f"{url.host}:{url.port}"):
        return None, {}
    try:
        proxy = URL(found if "://" in found else f"http://{found}")
    except ValueError:
        proxy = URL()
    if proxy.scheme not in ("http", "https") or not proxy.host:
        raise Refused(
            f"the environment's proxy for {url.scheme}:// is no http:// or https:// address; set "
            f"{url.scheme.upper()}_PROXY to one, or name {url.host} in NO_PROXY"
        )
    if proxy.user is None:
        return proxy, {}
    login = base64.b64encode(f"{proxy.user}:{proxy.password or ''}".encode()).decode()
    return proxy.with_user(None), {"Proxy-Authorization": Secret(f"Basic {login}")}


def _written(body: Any) -> bytes:
    """Without ASCII escapes: the prompt's bound counts the bytes of the texts themselves."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _next(response: aiohttp.ClientResponse, url: URL) -> URL:
    status, location = response.status, response.headers.get("location")
    if not location:
        raise Redirected(f"status {status} without an address to go to")
    try:
        target = url.join(URL(location))
        here, there = _origin(url), _origin(target)
    except ValueError as error:
        raise Redirected(f"status {status}: a redirect to an address that cannot be read") from error
    if here != there:
        raise Redirected(
            f"status {status}: a redirect from {here} to {there}; neither key nor question is sent to another "
            "address: if it is the right one, write it as base_url"
        )
    if status not in (301, 302, 307, 308):
        raise Redirected(f"status {status}: a redirect that asks for something else than the same request elsewhere")
    return target.with_user(None)


def _origin(url: URL) -> str:
    return f"{url.scheme}://{url.host}:{url.port or 0}"


async def _unpacked(pieces: AsyncIterator[bytes], packing: str) -> AsyncIterator[bytes]:
    unpacker = None
    async for piece in pieces:
        if unpacker is None and piece:
            zipped = packing != "deflate" or piece[0] & 0x0F == 8  # some servers call the raw format "deflate" too
            unpacker = zlib.decompressobj((zlib.MAX_WBITS | 32) if zipped else -zlib.MAX_WBITS)
        if unpacker is not None:
            try:
                unpacked = unpacker.decompress(piece, LONGEST_BODY)
            except zlib.error as error:
                raise Broken(f"the body is no {packing}: {error}") from error
            if unpacker.unconsumed_tail:
                raise Refused(_TOO_LONG)
            yield unpacked
    if unpacker is not None and not unpacker.eof:
        raise Broken(f"the body's {packing} ends in the middle")


_PACKING = "Content-Encoding"
_TOO_LONG = f"the body is longer than {LONGEST_BODY // 2**20} MiB"
