"""What is counted, for Prometheus: each request once, when it ends; what is now, from the pool, when it is asked.

So the way of a chunk through the router touches no metric. The series of a replica end with it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flagscale.serve.router.pool import Pool

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_USAGE = {kind: re.compile(rb'"%s_tokens"\s*:\s*(\d+)' % kind.encode()) for kind in ("prompt", "completion")}


@dataclass(slots=True)
class Record:
    """What became of one request that was complete at `started`, on the loop's clock. `replica` is the last that had
    it, `model` is empty until it is known to exist."""

    started: float
    model: str = ""
    replica: str = ""
    code: int = 0
    first_byte_s: float | None = None
    usage: bytes = b""
    """the last piece of the answer that has the word usage in it"""


class Metrics:
    """The counters of one router."""

    def __init__(self, pool: Pool) -> None:
        self.registry = CollectorRegistry()
        names = ("model", "replica")
        prefix = "flagscale_router"
        self._requests = Counter(
            f"{prefix}_requests", "Requests by the code they ended with; 499: the caller left, 599: broken off",
            (*names, "code"), registry=self.registry,
        )  # fmt: skip
        self._retries = Counter(
            f"{prefix}_retries", "Requests that a replica failed before the first byte", names, registry=self.registry
        )
        self._first_byte = Histogram(
            f"{prefix}_first_byte_seconds", "From the request's last byte to the answer's first",
            names, registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip
        self._total = Histogram(
            f"{prefix}_request_seconds", "From the request's last byte to the answer's last",
            names, registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip
        self._tokens = Counter(
            f"{prefix}_tokens", "Tokens as the answers' `usage` tells them", (*names, "kind"), registry=self.registry
        )
        self.registry.register(_PoolCollector(pool))
        self._pool = pool
        self._seen: set[str] = set()

    def count(self, record: Record, total_s: float) -> None:
        """A request has ended."""
        names = (record.model, record.replica)
        self._seen.add(record.replica)
        self._requests.labels(*names, str(record.code)).inc()
        if record.first_byte_s is not None:
            self._first_byte.labels(*names).observe(record.first_byte_s)
            self._total.labels(*names).observe(total_s)
        for kind, tokens in read_usage(record.usage):
            self._tokens.labels(*names, kind).inc(tokens)

    def count_retry(self, model: str, replica: str) -> None:
        self._retries.labels(model, replica).inc()

    def render(self) -> bytes:
        """All series in Prometheus' text format; those of replicas that have left the pool are forgotten first."""
        gone = self._seen - {state.id for state in self._pool.states()} - {""}
        for replica in gone:
            for family in (self._requests, self._retries, self._first_byte, self._total, self._tokens):
                family.remove_by_labels({"replica": replica})
        self._seen -= gone
        return generate_latest(self.registry)


def read_usage(piece: bytes) -> Iterator[tuple[str, int]]:
    """(`prompt` or `completion`, tokens) of the last `usage` in a piece of an answer. Text that an answer quotes is not
    taken for it: there the quotation marks are escaped."""
    if piece:
        tail = piece[piece.rfind(b'"usage"') :]
        for kind, pattern in _USAGE.items():
            if found := pattern.search(tail):
                yield kind, int(found[1])


class _PoolCollector(Collector):
    """Gauges, made from the pool at the moment of the question."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        names = ("model", "replica")
        in_flight = GaugeMetricFamily("flagscale_router_in_flight", "Requests at a replica", labels=names)
        breaker = GaugeMetricFamily(
            "flagscale_router_breaker_state", "1 for the state that a replica's breaker is in", labels=(*names, "state")
        )
        ready = GaugeMetricFamily("flagscale_router_ready", "Whether a replica takes requests", labels=names)
        for it in self._pool.states():
            in_flight.add_metric((it.model, it.id), it.in_flight)
            ready.add_metric((it.model, it.id), it.is_ready)
            for state in ("closed", "open", "half_open"):
                breaker.add_metric((it.model, it.id, state), it.breaker == state)
        held = GaugeMetricFamily("flagscale_router_held", "Requests that wait for a ready replica", labels=("model",))
        for model in self._pool.models():
            held.add_metric((model,), self._pool.held(model))
        yield from (in_flight, ready, breaker, held)
