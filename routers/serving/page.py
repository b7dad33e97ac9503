"""A page to watch a server by: `srpo serve --ui`, then `/ui`. One file that loads nothing; its numbers are `/metrics`.

The page itself is for everybody. What it shows is for admins' keys like `/metrics`, and it asks for one.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections import deque
from importlib.resources import files
from typing import Any

from routers.data.billing import shown_usd
from routers.serving.served import Spent

KEPT = 100
"""Decisions that the page can show."""


class Recent:
    """The latest requests that were decided, the newest first."""

    def __init__(self) -> None:
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def add(self, key: str, spent: Spent, seconds: float, status: int) -> None:
        """A request is over.

        Args:
            key: name of the client's.
            spent: what became of it.
            seconds: since it was admitted.
            status: of HTTP; of a stream that broke off what it would have been, 499 where the client left.
        """
        told = spent.told
        self._kept.appendleft(
            {
                "member": told.get("member"),
                "scores": told.get("scores", {}),
                "tried": [{"member": one["member"]} for one in told.get("tried", ())],  # not the words of their errors
                "time": time.time(),
                "key": key,
                "seconds": seconds,
                "cost_usd": shown_usd(spent.usd),
                "status": status,
            }
        )

    def listed(self) -> list[dict[str, Any]]:
        return list(self._kept)


def page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers by which a browser runs its own script and style, and asks nobody but this server."""
    html = files("routers.serving").joinpath("page.html").read_text(encoding="utf-8")
    own = {
        part: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for part in ("script", "style")
        for text in re.findall(f"<{part}>(.*?)</{part}>", html, re.DOTALL)
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{own['script']}'; style-src 'sha256-{own['style']}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    heads = {"content-security-policy": policy, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
    return html.encode(), heads
