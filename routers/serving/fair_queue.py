"""Work that waits, of several keys: the key that has had the least so far comes next.

Each key has a queue of its own, in order of arrival, and an account of the work it was given. Virtual time V is the
account of the key that was served last; with w the work of the item that is taken,

    begins to wait     account = max(account, V)        nobody saves up time in which it asked for nothing
    taken              V = account;  account += w       the smallest account first, of equals who began to wait first

so keys that wait at the same time get equal work whatever the size of their items and the length of their queues, and
none waits longer than one item of every other key for each of its own (start-time fair queueing, Goyal et al. 1996).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Waiting(Generic[T]):
    """One item in the queue."""

    key: str
    work: float
    item: T


class FairQueue(Generic[T]):
    """Not safe from several threads: it belongs to an event loop."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Waiting[T]]] = {}
        """Of keys that wait; a dict, so in the order in which they began to."""
        self._accounts: dict[str, float] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def push(self, key: str, work: float, item: T) -> Waiting[T]:
        """Add an item of `work` > 0, in any unit."""
        if key not in self._queues:
            self._queues[key] = deque()
            self._accounts[key] = max(self._accounts.get(key, 0.0), self._now)
        waiting = Waiting(key, work, item)
        self._queues[key].append(waiting)
        return waiting

    def pop(self) -> T:
        """The next item.

        Raises:
            IndexError: nothing waits.
        """
        if not self._queues:
            raise IndexError("nothing waits")
        key = min(self._queues, key=lambda name: self._accounts[name])
        waiting = self._queues[key].popleft()
        self._now = self._accounts[key]
        self._accounts[key] += waiting.work
        self._tidy(key)
        return waiting.item

    def discard(self, waiting: Waiting[T]) -> None:
        """Take an item out that nobody wants any more; its key is not charged. Nothing happens if it was taken."""
        queue = self._queues.get(waiting.key)
        if queue is not None and waiting in queue:
            queue.remove(waiting)
            self._tidy(waiting.key)

    def _tidy(self, key: str) -> None:
        if not self._queues[key]:
            del self._queues[key]
            for name in [n for n, account in self._accounts.items() if account <= self._now and n not in self._queues]:
                del self._accounts[name]  # it would start at V in any case
