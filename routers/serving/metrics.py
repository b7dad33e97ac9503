"""What a server of a router counts, as Prometheus reads it: its text format, or OpenMetrics where that is asked for.

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
    process_resident_memory_bytes, and the other process_* of prometheus_client

The names of keys appear here, keys never do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from routers.data.billing import shown_usd
from routers.pool.ledger import Ledger, Spending
from routers.router import Answer

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
BATCH = (1, 2, 4, 8, 16, 32, 64)
POLICY = "policy"
OTHER = "other"
"""Kind of the requests that ask for no work: scrapes of these numbers among them."""
Labels = tuple[str, ...]
disable_created_metrics()  # when each series began: as many series again


class _Watched(Collector):
    """Numbers that others keep, by the values of their labels."""

    def __init__(self, name: str, help: str, read: Callable[[], Mapping[Labels, float]], labels: Labels) -> None:
        self._name, self._help, self._read, self._labels = name, help, read, labels

    def collect(self) -> Iterator[Metric]:
        kind = CounterMetricFamily if self._name.endswith("_total") else GaugeMetricFamily
        family = kind(self._name, self._help, labels=self._labels)
        for labels, value in self._read().items():
            family.add_metric(labels, shown_usd(value) if "_usd" in self._name else value)
        yield family


class ServerMetrics:
    """Counters of one server process. Safe from several threads."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def count(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, registry=registry)

        def observe(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, help, labels, buckets=buckets, registry=registry)

        self._requests = count("router_requests_total", "HTTP requests by endpoint and status.", "kind", "status")
        self._in_flight = Gauge("router_in_flight", "Requests in work.", registry=registry)
        self._seconds = observe("router_request_seconds", "From a request's head to its last byte.", SECONDS, "kind")
        self._decisions = count("router_decisions_total", "Decisions by member; none: abstained.", "member")
        self._decision_seconds = observe("router_decision_seconds", "Of a decision, waiting included.", SECONDS)
        self._batch = observe("router_decision_batch", "Queries that were decided together.", BATCH)
        self._answers = count("router_answers_total", "Questions by how their episode ended.", "stop")
        self._calls = count("router_member_calls_total", "Calls of each member by outcome.", "member", "outcome")
        self._call_seconds = observe("router_member_seconds", "Of a member's call.", SECONDS, "member")
        self._tokens = count("router_tokens_total", "Tokens of members and policy.", "owner", "kind")
        self._usd: dict[Labels, float] = {}
        self._booking = threading.Lock()
        usd = "Dollars spent at members and by the policy."
        self.watch("router_cost_usd_total", usd, lambda: dict(self._usd), "owner")
        self._broken = count("router_streams_broken_total", "Streams that ended by an error.", "status")
        self._refused = count("router_refused_total", "Requests that were not let in.", "reason")
        self._dropped = count("router_dropped_total", "Requests that were cut off.", "state")
        self._closed = count("router_connections_closed_total", "Connections that the server closed.", "reason")

    def watch(self, name: str, help: str, read: Callable[[], Mapping[Labels, float]], *labels: str) -> None:
        """A number that others keep; `read` is asked, from the thread of `text`, for its values by label values."""
        self.registry.register(_Watched(name, help, read, labels))

    def began(self, kind: str) -> None:
        """A request's head was read."""
        self._in_flight.inc(kind != OTHER)

    def finished(self, kind: str, status: int, seconds: float) -> None:
        """A request that `began` is over, with this HTTP status."""
        self._in_flight.dec(kind != OTHER)
        self._requests.labels(kind, str(status)).inc()
        self._seconds.labels(kind).observe(seconds)

    def decided(self, member: str | None, seconds: float) -> None:
        """A router of queries chose this member, or abstained."""
        self._decisions.labels(member or "").inc()
        self._decision_seconds.observe(seconds)

    def batched(self, size: int) -> None:
        """So many queries were decided together."""
        self._batch.observe(size)

    def follow(self, ledger: Ledger) -> None:
        """Count calls, seconds, tokens and dollars of members and policy as the ledger books them."""
        ledger.on_book = self._booked

    def answered(self, found: Answer) -> None:
        """An agent's question came to an end, with or without an answer."""
        self._answers.labels(found.stop).inc()

    def broke_off(self, status: int) -> None:
        """A stream, whose status 200 was sent, ended by an error that has this one."""
        self._broken.labels(str(status)).inc()

    def refused(self, reason: str) -> None:
        """A request was not let in."""
        self._refused.labels(reason).inc()

    def dropped(self, state: str, number: int = 1) -> None:
        """Requests in this state were cut off."""
        self._dropped.labels(state).inc(number)

    def closed(self, reason: str) -> None:
        """A connection was closed because of this."""
        self._closed.labels(reason).inc()

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """All of it in the format that an Accept header asks for, and the type of that."""
        try:
            encoder, kind = choose_encoder(accept)
        except TypeError:  # a version that is no number
            encoder, kind = choose_encoder("")
        return encoder(self.registry), kind

    def _booked(self, member: str | None, used: Spending) -> None:
        if member is None:
            tokens = (used.policy_prompt_tokens, 0, used.policy_completion_tokens)
        else:
            tokens = (used.prompt_tokens, used.cached_tokens, used.completion_tokens)
            outcomes = {"failed": used.failed, "cached": used.cached, "ok": used.calls - used.failed}
            for outcome, number in outcomes.items():
                if number:
                    self._calls.labels(member, outcome).inc(number)
            if used.calls > used.failed:
                self._call_seconds.labels(member).observe(used.seconds)
        owner = member or POLICY
        with self._booking:
            self._usd[(owner,)] = self._usd.get((owner,), 0.0) + used.usd
        for kind, amount in zip(("prompt", "cached", "completion"), tokens, strict=True):
            self._tokens.labels(owner, kind).inc(amount)
