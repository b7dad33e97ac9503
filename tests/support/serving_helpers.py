"""A server of a router on loopback, in a thread of the test; and a router whose choices are foretold."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from routers.data.catalogue import Member
from routers.pool import Ledger
from routers.pool.passthrough import Passthrough
from routers.router import Decision, Router
from routers.serving.keys import Keys
from routers.serving.proxy import Proxy
from routers.serving.server import create_app, make_gate


class ByName(Router):
    """Chooses the member whose name the query holds, else the first; the others by their order, less and less."""

    kind = "test"

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.read: list[str] = []

    def route(
        self,
        query: str,
        *,
        context: Any = None,
        cost_weight: float | None = None,
        members: Sequence[str] | None = None,
    ) -> Decision:
        self.read.append(query)
        if "nobody" in query:
            return Decision((), {}, error="it abstains")
        names = [m.name for m in self.members]
        first = next((name for name in names if name in query), names[0])
        names.remove(first)
        weights = dict(zip([first, *names], (0.5, 0.25, 0.125), strict=False))
        return Decision((first,), weights, policy_usd=0.0, text="because")


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of a server of the app, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: server.started)
        yield address
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def proxied(
    members: Mapping[str, Any],
    *,
    ledger: Ledger | None = None,
    keys: Keys | None = None,
    ui: bool = False,
    safe: str | None = None,
) -> Iterator["Proxied"]:
    """A running proxy in front of loopback members: name -> (its server, fields of the catalogue)."""
    made = [
        Member(**{"name": name, "descriptor": name, "price_in": 1.0, "price_out": 2.0, "max_tokens": 100,
                  "timeout": 5.0, "base_url": server.url, **fields})
        for name, (server, fields) in members.items()
    ]  # fmt: skip
    ledger = ledger or Ledger()
    router = ByName(made)
    proxy = Proxy(router, {m.name: Passthrough(m, ledger) for m in made}, ledger, safe=safe)
    with running(create_app(proxy, gate=make_gate(proxy, keys), ui=ui)) as address:
        yield Proxied(address, router, ledger, {m.name: m for m in made})


class Proxied:
    def __init__(self, address: str, router: ByName, ledger: Ledger, members: Mapping[str, Member]) -> None:
        self.address, self.router, self.ledger, self.members = address, router, ledger, members

    def post(self, body: dict[str, Any] | bytes, path: str = "chat/completions") -> httpx.Response:
        data: Any = {"content": body} if isinstance(body, bytes) else {"json": {"model": "router", **body}}
        return httpx.post(f"{self.address}/v1/{path}", **data, timeout=60)


def until(true: Any, seconds: float = 60.0) -> None:
    """Wait for something that comes soon."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
