"""What a server of a router counts, as Prometheus reads it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from routers.router import Answer


class ServerMetrics:
    """Counters of one server process. Safe from several threads."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._statuses: Counter[int] = Counter()
        self._stops: Counter[str] = Counter()
        self._members: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def working(self) -> Iterator[None]:
        """While a question is in work; its seconds are added up."""
        started = time.monotonic()
        with self._lock:
            self.in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= 1
                self._sums["seconds"] += time.monotonic() - started  # type: ignore[assignment]
                self._sums["questions"] += 1

    def answered(self, found: Answer) -> None:
        """A question that came to an end, with or without an answer."""
        with self._lock:
            self._stops[found.stop] += 1
            self._members.update(found.members)
            self._sums["cost"] += found.cost_usd  # type: ignore[assignment]
            self._sums["prompt"] += found.prompt_tokens
            self._sums["completion"] += found.completion_tokens

    def finished(self, status: int) -> None:
        """A request was answered with this HTTP status (499: the client went away)."""
        with self._lock:
            self._statuses[status] += 1

    def text(self) -> str:
        """Prometheus' text format."""
        with self._lock:
            lines = [*_head("router_requests_total", "counter", "HTTP requests by status.")]
            lines += [f'router_requests_total{{status="{s}"}} {n}' for s, n in sorted(self._statuses.items())]
            lines += _head("router_answers_total", "counter", "Questions by how their episode ended.")
            lines += [f'router_answers_total{{stop="{s}"}} {n}' for s, n in sorted(self._stops.items())]
            lines += _head("router_member_calls_total", "counter", "Calls of each member.")
            lines += [
                f'router_member_calls_total{{member="{_label(m)}"}} {n}' for m, n in sorted(self._members.items())
            ]
            lines += _head("router_cost_usd_total", "counter", "Dollars spent for answers.")
            lines += [f"router_cost_usd_total {float(self._sums['cost'])!r}"]
            lines += _head("router_tokens_total", "counter", "The policy's own tokens.")
            lines += [f'router_tokens_total{{kind="{k}"}} {self._sums[k]}' for k in ("prompt", "completion")]
            lines += _head("router_seconds", "summary", "Time from question to answer.")
            lines += [f"router_seconds_sum {float(self._sums['seconds'])!r}"]
            lines += [f"router_seconds_count {self._sums['questions']}"]
            lines += _head("router_in_flight", "gauge", "Questions in work or waiting.")
            lines += [f"router_in_flight {self.in_flight}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, words: str) -> list[str]:
    return [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
