"""Replies on disk, so that a second epoch or a resumed run asks nobody and reads the same words.

One small JSON file per key, written beside and renamed: a reader sees a whole reply or none, any number of processes
may write (the last one wins), and it works on network file systems, which locks of databases often do not. Delete the
folder to forget everything.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from routers.data.billing import total
from srpo.types import Reply, Usage

_COUNTS = ("prompt_tokens", "completion_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")
_LATER = "cache_write_1h_tokens"
"""What files of this format did not hold from the beginning; 0 where it is missing."""


def cache_key(identity: Mapping[str, Any], query: str, sample: str = "") -> str:
    """SHA-256 over everything that decides a reply. Equal only for equal content, in whatever order of fields."""
    text = json.dumps([dict(identity), query, *([sample] if sample else [])], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


FORMAT = 2
"""Of a file. The first, without a number, kept texts of replies that broke off, and reasoning as part of the text."""


class ReplyCache:
    """Replies by key. A file of another format is not used, with one warning, and written again.

    Args:
        folder: made if need be. It holds members' texts and token counts, no queries and no keys of endpoints.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._warned = False

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Reply | None:
        """The reply as it came, but with ``cached=True`` and cost 0; None: not there, or not readable."""
        try:
            stored = json.loads(self._path(key).read_bytes())
            if (found := stored.get("format", 1)) != FORMAT:
                self._other_format(found, self._path(key))
                return None
            usage = total(_request(request) for request in stored["requests"])
            text, reasoning = str(stored["text"]), str(stored["reasoning"])
            return Reply(text, usage, seconds=float(stored["seconds"]), cached=True, reasoning=reasoning)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None  # half a file of a crashed disk is a miss, and overwritten

    def _other_format(self, found: object, path: Path) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{path} was written by another version of this library (format {str(found)[:20]}, this one reads "
                f"{FORMAT}): replies like it are asked for again, and paid for again",
                stacklevel=4,
            )

    def put(self, key: str, reply: Reply) -> None:
        """Keep an answer.

        Raises:
            OSError: the folder cannot be written.
            ValueError: the reply is an error.
        """
        if reply.error is not None:
            raise ValueError(f"no error is kept in the cache: {reply.error}")
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        requests = reply.usage.calls or (reply.usage,)
        stored = {
            "format": FORMAT,
            "text": reply.text,
            "reasoning": reply.reasoning,
            "prompt_tokens": reply.usage.prompt_tokens,
            "completion_tokens": reply.usage.completion_tokens,
            "requests": [{n: getattr(u, n) for n in (*_COUNTS, _LATER, "usd")} for u in requests],
            "seconds": reply.seconds,
        }
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(stored, file)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def _request(stored: Mapping[str, Any]) -> Usage:
    prompt, completion, cached, written, reasoning = (int(stored[name]) for name in _COUNTS)
    usd, long = stored.get("usd"), int(stored.get(_LATER, 0))
    parts = (prompt - cached - written, completion - reasoning, cached, written, reasoning, 0 if usd is None else usd)
    if not all(0 <= part < math.inf for part in (*parts, long, written - long)):
        raise ValueError("no usage")
    return Usage(prompt, completion, cached, written, reasoning, None if usd is None else float(usd), long)


def hit(reply: Reply) -> Reply:
    """The same reply for somebody who did not pay for it."""
    return replace(reply, cost=0.0, cached=True)
