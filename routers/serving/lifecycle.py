"""One server process from its start to its end: uvicorn, with the deadlines that it lacks and an end that comes.

uvicorn closes idle connections, but waits for ever for a request that does not arrive or an answer that is not taken,
at its end too. Here every connection that waits for its client has a deadline (`ConnectionLimits`):

    head     the first byte of a connection, or of its next request, to the end of the head
    body     the end of the head to the end of the body
    write    an answer that the client does not take: nothing of what is buffered went out for so long

SIGTERM and SIGINT stop the server: it accepts nothing more, answers what has arrived, and after `drain` seconds cuts
off what is left (status 503) and says what that was. It then ends with exit status 0, also if a thread still computes.
A second signal ends it at once, with the status that signals have. SIGHUP reads the file of keys again.

The seams of uvicorn that this relies on are pinned in tests/routers/test_serving_lifecycle.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from routers.serving.keys import Keys
from routers.serving.metrics import ServerMetrics
from routers.serving.watch import Watch
from srpo.ranges import Ranges, above, at_least, check_numbers

_log = logging.getLogger(__name__)

_TICK = 0.25
_GRACE = 5.0
"""Seconds after `drain` for the router to close; then the process ends without it."""
_ARRIVING = 2.0
"""Seconds that a request which is arriving still has when the server begins to stop."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Deadlines, in seconds, and a number.

    Raises:
        ValueError: a number out of its range.
    """

    RANGES: ClassVar[Ranges] = {
        "head": above(0),
        "body": above(0),
        "write": above(0),
        "idle": above(0),
        "drain": at_least(0),
        "connections": at_least(1),
    }

    head: float = 10.0
    body: float = 30.0
    """Later than `GateLimits.body_seconds`, which answers the client before this closes."""
    write: float = 30.0
    idle: int = 15
    """Between the requests of one connection."""
    drain: float = 30.0
    connections: int = 1000
    """Open at once; what comes on top is closed unheard."""

    def __post_init__(self) -> None:
        check_numbers(self)


def serve(
    app: Watch,
    keys: Keys,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: ConnectionLimits | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, which end the process. Called in the main thread.

    Args:
        app: the application, whose metrics count what is closed and dropped.
        keys: read again and saved while the server runs.
        host, port: where it listens.
        limits: None: the defaults.

    Raises:
        SystemExit: the port cannot be opened.
    """
    server = _Server(app, keys, host, port, limits or ConnectionLimits())
    server.run()
    if server.ended:  # all is closed and written; what Python would tidy up now takes seconds with a large model
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class _Connection(H11Protocol):
    """A connection; one more than there may be is closed."""

    def __init__(self, *, most: int, metrics: ServerMetrics, **given: Any) -> None:
        super().__init__(**given)
        self._most, self._metrics = most, metrics

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > self._most:
            self._metrics.closed("limit")
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Of HTTP that cannot be read; uvicorn would let the application answer a second time, or do so itself."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()


@dataclass
class _Stage:
    """What a connection waits for, and since when."""

    what: str
    since: float
    buffered: int = 0


class _Server(uvicorn.Server):
    def __init__(self, app: Watch, keys: Keys, host: str, port: int, limits: ConnectionLimits) -> None:
        self._watch, self._keys, self._limits = app, keys, limits
        kind: Any = partial(_Connection, most=_possible(limits.connections), metrics=app.metrics)
        super().__init__(
            uvicorn.Config(
                app, host, port, http=kind, ws="none", loop="asyncio", log_level="error", access_log=False,
                timeout_keep_alive=limits.idle, server_header=False, proxy_headers=False, backlog=2048,
            )
        )  # fmt: skip
        self._stages: dict[Any, _Stage] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping_since: float | None = None
        self._dropped: Counter[str] = Counter()
        self._save_failed = False
        self.ended = False
        """All is closed."""
        app.metrics.watch("router_connections", "Open connections.", lambda: {(): len(self.server_state.connections)})
        app.metrics.watch(
            "router_keys_reloads_total",
            "Of the file of keys.",
            lambda: {(result,): number for result, number in keys.reloads.items()},
            "result",
        )

    def run(self, sockets: Any = None) -> None:
        hung_up = getattr(signal, "SIGHUP", None)
        before = None if hung_up is None else signal.signal(hung_up, self._hung_up)
        try:
            super().run(sockets)
        finally:
            if hung_up is not None:
                signal.signal(hung_up, before)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._sweeper = asyncio.create_task(self._sweep())
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        _say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # not as uvicorn does, which keeps a signal to raise it again at the end: a good end has the status 0
        if self._stopping_since is not None:
            self._end_now(128 + sig, "a second signal", self._states())
        self._stopping_since = time.monotonic()
        self.should_exit = True
        threading.Thread(target=self._make_sure, name="server-end", daemon=True).start()

    async def shutdown(self, sockets: Any = None) -> None:
        started = time.monotonic() if self._stopping_since is None else self._stopping_since
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            try:
                connection.shutdown()  # at once, or after the answer under way
            except h11.LocalProtocolError:  # it was broken already
                connection.transport.abort()
        await self._until_idle(started + min(_ARRIVING, self._limits.drain))
        self._dropped += self._watch.drop(everything=False)
        await self._until_idle(started + self._limits.drain)
        self._dropped += self._watch.drop(everything=True)
        await self._until_idle(time.monotonic() + _GRACE / 2)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        self._sweeper.cancel()
        await self.lifespan.shutdown()
        self._save()
        self.ended = True
        _say(f"stopped; {_told(self._dropped)}")

    async def _until_idle(self, end: float) -> None:
        while (self.server_state.connections or self.server_state.tasks) and time.monotonic() < end:
            await asyncio.sleep(0.05)

    async def _sweep(self) -> None:
        saved = time.monotonic()
        while True:
            await asyncio.sleep(_TICK)
            now = time.monotonic()
            self._close_late(now)
            if now - saved >= 1.0:
                self._save()
                saved = now

    def _close_late(self, now: float) -> None:
        stages: dict[Any, _Stage] = {}
        for connection in list(self.server_state.connections):
            what, buffered = _waits_for(connection)
            if what is None:
                continue
            stage = self._stages.get(connection)
            if stage is None or stage.what != what or (what == "write" and buffered < stage.buffered):
                stage = _Stage(what, now)
            stage.buffered = buffered
            stages[connection] = stage
            if now - stage.since > getattr(self._limits, what):
                self._watch.metrics.closed(what)
                connection.transport.abort()
        self._stages = stages

    def _hung_up(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._keys.reload)

    def _save(self) -> None:
        try:
            self._keys.save()
            self._save_failed = False
        except OSError as error:  # a full disk: what was spent is known here, and is tried again
            if not self._save_failed:
                _log.error("what was spent could not be written down: %s", error)
            self._save_failed = True

    def _make_sure(self) -> None:
        """In a thread: an end that does not depend on the event loop, or on threads that compute."""
        time.sleep(self._limits.drain + _GRACE)
        self._end_now(0, "a thread that still computes is left behind", self._dropped + self._states())

    def _states(self) -> Counter[str]:
        for _ in range(3):
            with suppress(RuntimeError):  # the event loop changes them meanwhile
                return self._watch.states()
        return Counter()

    def _end_now(self, status: int, why: str, dropped: Counter[str]) -> None:
        with suppress(Exception):
            self._keys.save()
        with suppress(Exception):
            _say(f"ended: {why}" + ("" if self.ended else f"; {_told(dropped)}"))
        os._exit(status)


def _waits_for(connection: Any) -> tuple[str | None, int]:
    """What a connection waits for its client to do ("head", "body", "write"), and bytes that are not taken yet."""
    buffered = connection.transport.get_write_buffer_size()
    if buffered:
        return "write", buffered
    state = connection.conn.their_state
    if state is h11.SEND_BODY:
        return "body", 0
    if state is h11.IDLE and connection.timeout_keep_alive_task is None:
        return "head", 0
    return None, 0


def _possible(connections: int) -> int:
    """No more than there can be open files, with some to spare for members, policy and logs."""
    try:
        import resource
    except ImportError:  # not on this system
        return connections
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft // 2))


def _told(states: Counter[str]) -> str:
    number = sum(states.values())
    if not number:
        return "nothing was dropped"
    parts = ", ".join(f"{states[state]} {state}" for state in ("reading", "waiting", "working") if states[state])
    return f"{number} request{'s' if number > 1 else ''} dropped: {parts}"


def _say(words: str) -> None:
    print(f"srpo serve: {words}", file=sys.stderr, flush=True)
