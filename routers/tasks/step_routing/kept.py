"""What a server knows of its conversations, in a file that outlives it: their money, and where they stood.

One file of SQLite: what is written is there whole or not at all, also where the server is killed in the middle. Money
is written before a member is asked, what is set aside as spent: a conversation that goes on after a restart has spent
at least what it has. What the policy read is in the file, hence parts of the conversations' texts; only its owner can
read it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from routers.data.prompt_cache import Conversation as PromptCaches
from routers.data.prompt_cache import Message, Sent
from routers.tasks.step_routing.environment import RoutedStep
from routers.tasks.step_routing.session import StepState
from srpo.types import Usage

_log = logging.getLogger(__name__)
_TABLES = """
CREATE TABLE about (what TEXT PRIMARY KEY, value TEXT);
CREATE TABLE conversations (key TEXT PRIMARY KEY, used REAL, first BLOB, listed INTEGER, held REAL, usd REAL,
    calls INTEGER);
CREATE TABLE points (number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT, request BLOB, document TEXT,
    UNIQUE (key, request));
"""


def hashes(messages: Sequence[Any], owner: str = "") -> list[bytes]:
    """Per message the hash of all messages up to it, of this owner. Linear in their size.

    Raises:
        ValueError: what is no JSON, or nested too deeply.
    """
    chain, found = hashlib.sha256(json.dumps(owner).encode()), list[bytes]()
    for message in messages:
        try:
            chain.update(json.dumps(_plain(message), sort_keys=True).encode() + b"\n")
        except (TypeError, RecursionError):
            raise ValueError("the messages are no JSON, or nested too deeply") from None
        found.append(chain.digest())
    return found


def _plain(message: Any) -> Any:
    """A message without what clients change from call to call: marks of prompt caches, and how one text is written."""
    if not isinstance(message, Mapping):
        return message
    found = {key: value for key, value in message.items() if key != "cache_control" and value is not None}
    content = found.get("content")
    if isinstance(content, list):
        parts = [
            {k: v for k, v in part.items() if k != "cache_control"} if isinstance(part, Mapping) else part
            for part in content
        ]
        texts = [p["text"] for p in parts if isinstance(p, Mapping) and p.keys() == {"type", "text"}]
        found["content"] = texts[0] if len(parts) == 1 and len(texts) == 1 else parts
    return found


@dataclass(frozen=True)
class Point:
    """Where a conversation stood before and after a decision."""

    before: StepState
    after: StepState
    caches: PromptCaches
    """After it: what every member has in its prompt cache."""


@dataclass(frozen=True)
class Entry:
    """A conversation as the file has it."""

    key: tuple[str, str]
    """(owner, name)."""
    used: float
    """When, in seconds since 1970."""
    first: bytes
    listed: bool
    held: float
    """Spent and set aside, in the unit of its budget."""
    usd: float
    calls: int
    points: Sequence[tuple[bytes, Point]] = ()
    """By hash of a request, the latest last."""


class Kept:
    """The file. Not safe from several threads at once.

    Args:
        path: a file that is not there, or that an earlier server wrote.
        of: says whose conversations these are: a router, and the unit of their budgets.

    Raises:
        ValueError: the file is another router's, in use, or no such file.
    """

    def __init__(self, path: str | Path, of: str) -> None:
        self.path = Path(path)
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        self._file = sqlite3.connect(self.path, timeout=1.0, isolation_level=None, check_same_thread=False)
        try:
            found = self._opened(of)
        except sqlite3.Error as error:
            used = "locked" in str(error)
            why = "another server uses it" if used else "it is no file of conversations; move it away to begin anew"
            self.close()
            raise ValueError(f"{path}: {why}") from None
        if found != of:
            self.close()
            raise ValueError(
                f"{path}: holds conversations of another router, or budgets in another unit; give another file"
            )
        self._troubled = False

    def _opened(self, of: str) -> str:
        """Whose it is; a new one is made."""
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL"):
            self._file.execute(f"PRAGMA {pragma}")
        with self._whole():
            if not self._file.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in _TABLES.split(";"):
                    self._file.execute(statement)
                self._file.execute("INSERT INTO about VALUES ('of', ?)", (of,))
            return str(self._file.execute("SELECT value FROM about WHERE what = 'of'").fetchone()[0])

    def put(self, entry: Entry, gone: Sequence[bytes] = ()) -> None:
        """Write a conversation down, with those of its points that are given; the `gone` ones are taken out."""
        key = json.dumps(entry.key)
        row = (key, entry.used, entry.first, entry.listed, entry.held, entry.usd, entry.calls)
        points = [(key, request, _written(point)) for request, point in entry.points]
        try:
            with self._whole():
                self._file.execute("REPLACE INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                self._file.executemany("REPLACE INTO points (key, request, document) VALUES (?, ?, ?)", points)
                taken = [(key, request) for request in gone]
                self._file.executemany("DELETE FROM points WHERE key = ? AND request = ?", taken)
            self._troubled = False
        except sqlite3.Error as error:
            self._trouble(error)

    def forget(self, key: tuple[str, str]) -> None:
        """Take a conversation out."""
        try:
            with self._whole():
                for table in ("conversations", "points"):
                    self._file.execute(f"DELETE FROM {table} WHERE key = ?", (json.dumps(key),))
        except sqlite3.Error as error:
            self._trouble(error)

    def entries(self) -> Iterator[Entry]:
        """All, the latest used last.

        Raises:
            ValueError: one that cannot be read.
        """
        try:
            for key, *row in self._file.execute("SELECT * FROM conversations ORDER BY used").fetchall():
                asked = "SELECT request, document FROM points WHERE key = ? ORDER BY number"
                points = [(request, _read(text)) for request, text in self._file.execute(asked, (key,))]
                used, first, listed, held, usd, calls = row
                owner, name = json.loads(key)
                yield Entry((owner, name), used, first, bool(listed), held, usd, calls, points)
        except (sqlite3.Error, ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path}: a conversation cannot be read; move the file away to begin anew") from None

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A transaction: all of it or nothing."""
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._file.execute("ROLLBACK")
            raise
        self._file.execute("COMMIT")

    def _trouble(self, error: sqlite3.Error) -> None:
        """A full disk: what was spent is known here, and the next call of the conversation writes it again."""
        if not self._troubled:
            _log.error("%s: conversations could not be written down: %s", self.path, error)
        self._troubled = True


def _written(point: Point) -> str:
    caches = point.caches
    told = {
        "before": _state(point.before),
        "after": _state(point.after),
        "messages": caches.messages,
        "now": caches.now,
        "sent": {name: [sent.messages, sent.at] for name, sent in caches.sent.items()},
        "last": caches.last,
    }
    return json.dumps(told)


def _state(state: StepState) -> dict[str, Any]:
    steps = [{**vars(step), "bounds": dict(step.bounds), "usage": asdict(step.usage)} for step in state.steps]
    return {"first": state.first, "ids": state.ids, "steps": steps}


def _read(text: str) -> Point:
    told = json.loads(text)
    sent = {name: Sent(_messages(messages), at) for name, (messages, at) in told["sent"].items()}
    caches = PromptCaches(_messages(told["messages"]), told["now"], sent, told["last"])
    return Point(_state_of(told["before"]), _state_of(told["after"]), caches)


def _messages(told: Sequence[Any]) -> tuple[Message, ...]:
    return tuple(one if isinstance(one, int) else (one[0], one[1]) for one in told)


def _state_of(told: Mapping[str, Any]) -> StepState:
    """Without its row: the policy's cache of it is gone with the server that had it."""
    steps = [
        RoutedStep(**{**step, "allowed": tuple(step["allowed"]), "usage": Usage(**step["usage"])})
        for step in told["steps"]
    ]
    return StepState(told["first"], tuple(told["ids"]), tuple(steps))
