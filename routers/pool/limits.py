"""How a member may be called: spacing of requests, tokens per minute, a circuit breaker, and when to try again.

All state is plain numbers on the monotonic clock, so that it outlives an event loop.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

_jitter = random.Random()  # our own: the global generator belongs to the training's seeds


@dataclass(frozen=True)
class Retry:
    """Attempts of one call, and the pauses between them: ``base * 2^n`` up to ``longest`` seconds, each times a random
    factor in [0.5, 1], so that calls that failed together do not return together."""

    attempts: int = 5
    base: float = 0.5
    longest: float = 8.0

    def pause(self, failures: int) -> float:
        """Seconds before the next attempt, after ``failures`` >= 1 of them."""
        return float(min(self.longest, self.base * 2 ** (failures - 1)) * _jitter.uniform(0.5, 1.0))


class Spacing:
    """At most one start per ``1 / per_second`` seconds, without bursts; None: no limit of its own. ``pause`` holds
    everybody back, as a server's Retry-After asks."""

    def __init__(self, per_second: float | None) -> None:
        self._gap = 0.0 if per_second is None else 1.0 / per_second
        self._next = 0.0
        self._paused_until = 0.0

    def pause(self, seconds: float) -> None:
        """Nobody starts for this long."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    async def wait(self) -> None:
        """Return when it is this call's turn, first come first served."""
        while True:
            now = time.monotonic()
            if now < self._paused_until:
                await asyncio.sleep(self._paused_until - now)
                continue
            start = max(now, self._next)
            self._next = start + self._gap
            if start > now:
                await asyncio.sleep(start - now)
            if time.monotonic() >= self._paused_until:  # else somebody was told to pause meanwhile
                return


class TokenBucket:
    """Tokens per minute: a bucket that holds one minute's tokens and fills evenly. None: no limit."""

    def __init__(self, per_minute: int | None) -> None:
        self._capacity = float(per_minute or 0)
        self._level = self._capacity
        self._filled_at = time.monotonic()

    def _fill(self) -> None:
        now = time.monotonic()
        self._level = min(self._capacity, self._level + (now - self._filled_at) * self._capacity / 60)
        self._filled_at = now

    async def take(self, tokens: int) -> float:
        """Wait for ``tokens`` (at most a full bucket) and take them; returns what was taken, for ``give_back``."""
        if not self._capacity:
            return 0.0
        wanted = min(float(tokens), self._capacity)
        while True:
            self._fill()
            if self._level >= wanted:
                self._level -= wanted
                return wanted
            await asyncio.sleep((wanted - self._level) * 60 / self._capacity + 1e-3)

    def give_back(self, taken: float, used: int) -> None:
        """Correct an estimate by what was used; the level may fall below zero."""
        if self._capacity:
            self._level = min(self._capacity, self._level + taken - used)


class CircuitOpen(Exception):
    """The member failed too often and is left alone for a while."""


@dataclass(frozen=True)
class Entry:
    """An attempt that the breaker let through."""

    at: float
    probe: bool


class Breaker:
    """Leaves a member alone that does not work.

    Closed, it lets everybody through. It opens for ``cooldown`` seconds after at least ``failures`` failed attempts in
    a row that span at least ``patience`` seconds: many calls at once fail together in a moment's hiccup, which is what
    retries are for. Then one probe may pass, whose outcome closes or opens it again. ``trip`` opens it at once, for a
    failure that is no hiccup.
    """

    def __init__(self, failures: int = 10, patience: float = 10.0, cooldown: float = 30.0) -> None:
        self._limit = failures
        self._patience = patience
        self._cooldown = cooldown
        self._count = 0
        self._since = 0.0
        self._open_until: float | None = None
        self._probing = False
        self._cause = ""

    def enter(self) -> Entry:
        """Ask to make an attempt; its outcome is reported by ``ended``.

        Raises:
            CircuitOpen: not now; the message says why.
        """
        now = time.monotonic()
        if self._open_until is None:
            return Entry(now, probe=False)
        left = self._open_until - now
        if left > 0 or self._probing:
            cause = self._cause or f"{self._count} attempts failed in a row"
            raise CircuitOpen(f"{cause}, next probe in {max(left, 0.0):.0f} s")
        self._probing = True
        return Entry(now, probe=True)

    def ended(self, entry: Entry, worked: bool | None) -> None:
        """Report an attempt; None says nothing about the member (cancelled, or its request was wrong)."""
        if entry.probe:
            self._probing = False
        if worked:
            self._count, self._open_until, self._cause = 0, None, ""
        elif worked is False:
            self._since = min(self._since, entry.at) if self._count else entry.at
            self._count += 1
            now = time.monotonic()
            if self._count >= self._limit and now - self._since >= self._patience:
                self._open_until = now + self._cooldown

    def trip(self, cause: str) -> None:
        """Open now, whatever came before; ``cause`` is what those are told who want in."""
        self._open_until, self._cause = time.monotonic() + self._cooldown, cause
