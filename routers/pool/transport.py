"""One POST to an endpoint of somebody else's: what comes back is bounded in size, and the key stays at its address.

The body is read as a stream and unpacked piece by piece, so that neither a long body nor a small one that unpacks to
gigabytes gets into memory. A redirect is followed within the same scheme, host and port only: the request carries a
key, and a question that may be private.
"""

from __future__ import annotations

import ssl
import zlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx

LONGEST_BODY = 8 * 2**20
"""Bytes of a reply after unpacking. The longest replies of models have some hundred kilobytes."""
MOST_REDIRECTS = 3
_HEADERS = {"Accept": "application/json", "Accept-Encoding": "gzip, deflate", "User-Agent": "srpo"}


class Refused(Exception):
    """The answer is not taken; the message says why. Asking again would bring the same."""


class Redirected(Refused):
    """To a place where the request does not go."""


class Broken(Exception):
    """The body does not unpack; another attempt may help."""


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer that is no redirect."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def new_client() -> httpx.AsyncClient:
    """A client for one event loop. How many calls run at once is limited elsewhere, by the catalogue."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    return httpx.AsyncClient(headers=_HEADERS, limits=limits, follow_redirects=False, verify=_certificates())


@cache
def _certificates() -> ssl.SSLContext:
    """Reading them takes longer than many a call."""
    return httpx.create_ssl_context()


async def post(client: httpx.AsyncClient, url: httpx.URL, body: Any, key: str | None, timeout: float) -> Answer:
    """POST ``body`` as JSON. ``timeout`` bounds each wait; the caller bounds the whole.

    Raises:
        Redirected: elsewhere, too often, or to nowhere.
        Refused: too long, or packed in a way that was not asked for.
        Broken: damaged packing.
        httpx.HTTPError: no connection, or no HTTP.
    """
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    for _ in range(MOST_REDIRECTS + 1):
        async with client.stream("POST", url, json=body, headers=headers, timeout=timeout) as response:
            status = response.status_code
            if not 300 <= status < 400:
                try:
                    content = await _read(response)
                except (Refused, Broken) as error:
                    if status < 400:
                        raise
                    content = str(error).encode()  # the status says enough
                return Answer(status, response.headers, content)
            url = _next(response, url)
    raise Redirected(f"more than {MOST_REDIRECTS} redirects; write the last address as base_url")


def _next(response: httpx.Response, url: httpx.URL) -> httpx.URL:
    status, location = response.status_code, response.headers.get("location")
    if not location:
        raise Redirected(f"status {status} without an address to go to")
    try:
        target = url.join(location)
        here, there = _origin(url), _origin(target)
    except (httpx.InvalidURL, ValueError) as error:
        raise Redirected(f"status {status}: a redirect to an address that cannot be read") from error
    if here != there:
        raise Redirected(
            f"status {status}: a redirect from {here} to {there}; neither key nor question is sent to another "
            "address: if it is the right one, write it as base_url"
        )
    if status not in (301, 302, 307, 308):
        raise Redirected(f"status {status}: a redirect that asks for something else than the same request elsewhere")
    return target


def _origin(url: httpx.URL) -> str:
    return f"{url.scheme}://{url.host}:{url.port or {'http': 80, 'https': 443}.get(url.scheme, 0)}"


async def _read(response: httpx.Response) -> bytes:
    declared = response.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > LONGEST_BODY):
        raise Refused(_TOO_LONG)
    packing = [word.strip().lower() for word in response.headers.get("content-encoding", "").split(",")]
    packing = [word for word in packing if word not in ("", "identity")]
    if not packing:
        return await _joined(response.aiter_raw())
    if len(packing) > 1 or packing[0] not in ("gzip", "x-gzip", "deflate"):
        raise Refused(f"the body is packed as {', '.join(packing)[:60]!r}, and only gzip or deflate was asked for")
    return await _joined(_unpacked(response.aiter_raw(), packing[0]))


async def _joined(pieces: AsyncIterator[bytes]) -> bytes:
    body = bytearray()
    async for piece in pieces:
        body += piece
        if len(body) > LONGEST_BODY:
            raise Refused(_TOO_LONG)
    return bytes(body)


async def _unpacked(pieces: AsyncIterator[bytes], packing: str) -> AsyncIterator[bytes]:
    """Pieces of at most ``LONGEST_BODY`` + 1 bytes, however far one of them would unpack."""
    unpacker = None
    async for piece in pieces:
        if unpacker is None and piece:
            zipped = packing != "deflate" or piece[0] & 0x0F == 8  # some servers call the raw format "deflate" too
            unpacker = zlib.decompressobj((zlib.MAX_WBITS | 32) if zipped else -zlib.MAX_WBITS)
        if unpacker is not None:
            try:
                yield unpacker.decompress(piece, LONGEST_BODY + 1)
            except zlib.error as error:
                raise Broken(f"the body is no {packing}: {error}") from error
    if unpacker is not None and not unpacker.eof:
        raise Broken(f"the body's {packing} ends in the middle")


_TOO_LONG = f"the body is longer than {LONGEST_BODY // 2**20} MiB"
