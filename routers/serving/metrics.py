"""What a server of a router counts, as Prometheus reads it (text format 0.0.4).

    router_requests_total{kind,status}   HTTP requests; kind: the path of an endpoint, or "other"; status 499: the
                                         client left before the answer was whole, 503: dropped as the server stopped
    router_in_flight                     of those with a kind, between their head and the end of their answer
    router_request_seconds{kind}         histogram of the whole of them
    router_waiting{key}                  requests that wait for their turn
    router_waiting_tokens{key}           tokens of their questions
    router_budget_usd{key,period}        of keys with one; period: day, total
    router_budget_spent_usd{key,period}  spent of it, and set aside
    router_decisions_total{member}       by member; none: the router abstained
    router_decision_seconds              histogram, waiting included
    router_decision_batch                histogram of how many queries were decided together
    router_answers_total{stop}           ends of agents' episodes
    router_member_calls_total{member,outcome}   outcome: ok, failed, or cached (ours)
    router_member_seconds{member}        histogram of calls, until their last byte
    router_tokens_total{owner,kind}      owner: a member, or policy; kind: prompt, cached (part of it), completion
    router_cost_usd_total{owner}         USD at catalogue prices
    router_streams_broken_total{status}  streams that ended by an error after their status 200 was sent
    router_refused_total{reason}         not let in: key, body, size, slow, rate, budget, set_aside, queue
    router_dropped_total{state}          cut off: left (the client), and at the end reading, waiting, working
    router_connections                   open ones
    router_connections_closed_total{reason}   by the server: head, body, write (too slow), limit (too many)
    router_keys_reloads_total{result}    of the file of keys: read, refused
    process_resident_memory_bytes

The names of keys appear here, keys never do.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from routers.pool.ledger import Ledger, Spending
from routers.router import Answer

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
BATCH = (1, 2, 4, 8, 16, 32, 64)
POLICY = "policy"
OTHER = "other"
"""Kind of the requests that ask for no work: scrapes of these numbers among them."""
Labels = tuple[str, ...]


@dataclass
class _Family:
    """A counter or gauge with labels."""

    name: str
    kind: str
    help: str
    labels: Sequence[str] = ()
    read: Callable[[], Mapping[Labels, float]] | None = None
    """Asked when the numbers are; None: they are added up here."""
    values: dict[Labels, float] = field(default_factory=dict)

    def add(self, amount: float = 1.0, *labels: str) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + amount

    def lines(self) -> Iterator[str]:
        values = self.values if self.read is None else self.read()
        for labels, value in sorted(values.items() if values or self.labels else [((), 0.0)]):
            yield f"{self.name}{_labels(self.labels, labels)} {_number(value)}"


@dataclass
class _Histogram:
    """Counts by upper bound, cumulative when they are read, with their sum."""

    name: str
    help: str
    bounds: Sequence[float]
    labels: Sequence[str] = ()
    counts: dict[Labels, list[int]] = field(default_factory=dict)
    sums: dict[Labels, float] = field(default_factory=dict)
    kind: str = "histogram"

    def observe(self, value: float, *labels: str) -> None:
        counts = self.counts.setdefault(labels, [0] * (len(self.bounds) + 1))
        counts[bisect_left(self.bounds, value)] += 1
        self.sums[labels] = self.sums.get(labels, 0.0) + value

    def lines(self) -> Iterator[str]:
        for labels, counts in sorted(self.counts.items()):
            total = 0
            for bound, count in zip([*map(str, self.bounds), "+Inf"], counts, strict=True):
                total += count
                yield f"{self.name}_bucket{_labels((*self.labels, 'le'), (*labels, bound))} {total}"
            yield f"{self.name}_sum{_labels(self.labels, labels)} {_number(self.sums[labels])}"
            yield f"{self.name}_count{_labels(self.labels, labels)} {total}"


class ServerMetrics:
    """Counters of one server process. Safe from several threads."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._lock = threading.Lock()
        self._families: list[_Family | _Histogram] = []
        count, observe = self._counter, self._histogram
        self._requests = count("router_requests_total", "HTTP requests by endpoint and status.", "kind", "status")
        self.watch("router_in_flight", "Requests in work.", lambda: {(): self.in_flight})
        self._seconds = observe("router_request_seconds", "From a request's head to its last byte.", SECONDS, "kind")
        self._decisions = count("router_decisions_total", "Decisions by member; none: abstained.", "member")
        self._decision_seconds = observe("router_decision_seconds", "Of a decision, waiting included.", SECONDS)
        self._batch = observe("router_decision_batch", "Queries that were decided together.", BATCH)
        self._answers = count("router_answers_total", "Questions by how their episode ended.", "stop")
        self._calls = count("router_member_calls_total", "Calls of each member by outcome.", "member", "outcome")
        self._call_seconds = observe("router_member_seconds", "Of a member's call.", SECONDS, "member")
        self._tokens = count("router_tokens_total", "Tokens of members and policy.", "owner", "kind")
        self._usd = count("router_cost_usd_total", "Dollars spent at members and by the policy.", "owner")
        self._broken = count("router_streams_broken_total", "Streams that ended by an error.", "status")
        self._refused = count("router_refused_total", "Requests that were not let in.", "reason")
        self._dropped = count("router_dropped_total", "Requests that were cut off.", "state")
        self._closed = count("router_connections_closed_total", "Connections that the server closed.", "reason")
        self.watch("process_resident_memory_bytes", "Resident memory.", _resident)

    def watch(self, name: str, help: str, read: Callable[[], Mapping[Labels, float]], *labels: str) -> None:
        """A number that others keep; `read` is asked, from the thread of `text`, for its values by label values."""
        kind = "counter" if name.endswith("_total") else "gauge"
        self._families.append(_Family(name, kind, help, labels, read))

    def began(self, kind: str) -> None:
        """A request's head was read."""
        with self._lock:
            self.in_flight += kind != OTHER

    def finished(self, kind: str, status: int, seconds: float) -> None:
        """A request that `began` is over, with this HTTP status."""
        with self._lock:
            self.in_flight -= kind != OTHER
            self._requests.add(1, kind, str(status))
            self._seconds.observe(seconds, kind)

    def decided(self, member: str | None, seconds: float) -> None:
        """A router of queries chose this member, or abstained."""
        with self._lock:
            self._decisions.add(1, member or "")
            self._decision_seconds.observe(seconds)

    def batched(self, size: int) -> None:
        """So many queries were decided together."""
        with self._lock:
            self._batch.observe(size)

    def follow(self, ledger: Ledger) -> None:
        """Count calls, seconds, tokens and dollars of members and policy as the ledger books them."""
        ledger.on_book = self._booked

    def answered(self, found: Answer) -> None:
        """An agent's question came to an end, with or without an answer."""
        with self._lock:
            self._answers.add(1, found.stop)

    def broke_off(self, status: int) -> None:
        """A stream, whose status 200 was sent, ended by an error that has this one."""
        with self._lock:
            self._broken.add(1, str(status))

    def refused(self, reason: str) -> None:
        """A request was not let in."""
        with self._lock:
            self._refused.add(1, reason)

    def dropped(self, state: str, number: int = 1) -> None:
        """Requests in this state were cut off."""
        with self._lock:
            self._dropped.add(number, state)

    def closed(self, reason: str) -> None:
        """A connection was closed because of this."""
        with self._lock:
            self._closed.add(1, reason)

    def text(self) -> str:
        """Prometheus' text format."""
        with self._lock:
            lines: list[str] = []
            for one in self._families:
                lines += [f"# HELP {one.name} {one.help}", f"# TYPE {one.name} {one.kind}", *one.lines()]
        return "\n".join(lines) + "\n"

    def _booked(self, member: str | None, used: Spending) -> None:
        with self._lock:
            if member is None:
                tokens = (used.policy_prompt_tokens, 0, used.policy_completion_tokens)
            else:
                tokens = (used.prompt_tokens, used.cached_tokens, used.completion_tokens)
                outcomes = {"failed": used.failed, "cached": used.cached, "ok": used.calls - used.failed}
                for outcome, number in outcomes.items():
                    if number:
                        self._calls.add(number, member, outcome)
                if used.calls > used.failed:
                    self._call_seconds.observe(used.seconds, member)
            owner = member or POLICY
            self._usd.add(used.usd, owner)
            for kind, amount in zip(("prompt", "cached", "completion"), tokens, strict=True):
                self._tokens.add(amount, owner, kind)

    def _counter(self, name: str, help: str, *labels: str) -> _Family:
        self._families.append(made := _Family(name, "counter", help, labels))
        return made

    def _histogram(self, name: str, help: str, bounds: Sequence[float], *labels: str) -> _Histogram:
        self._families.append(made := _Histogram(name, help, bounds, labels))
        return made


def _labels(names: Iterable[str], values: Iterable[str]) -> str:
    pairs = [f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True)]
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _resident() -> dict[Labels, float]:
    try:
        with open("/proc/self/statm", encoding="ascii") as numbers:
            return {(): float(int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))}
    except OSError:  # not on this system
        return {}
