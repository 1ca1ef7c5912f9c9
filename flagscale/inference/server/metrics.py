"""What Prometheus reads: the engine's own counters, and how long requests took."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flagscale.inference.engine import EngineMetrics

PREFIX = "flagscale"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAUGES = {
    "num_running": ("requests_running", "samples that are computed now"),
    "num_waiting": ("requests_waiting", "samples that wait for a place or for memory"),
    "num_pages": ("cache_pages", "pages of the cache for keys and values"),
    "num_pages_used": ("cache_pages_used", "pages that a sample holds"),
    "num_pages_idle": ("cache_pages_idle", "pages that no sample holds, kept for prefixes to come"),
}
COUNTERS = {
    "num_requests": ("engine_requests", "requests that the engine took"),
    "num_steps": ("engine_steps", "runs of the model"),
    "num_preemptions": ("preemptions", "samples that lost their pages and are computed again"),
    "num_computed_tokens": ("computed_tokens", "tokens that went through the model"),
    "num_output_tokens": ("output_tokens", "tokens that were sampled"),
    "num_prefix_hit_pages": ("prefix_hit_pages", "pages found in the prefix cache"),
    "num_prefix_asked_pages": ("prefix_asked_pages", "pages looked for in the prefix cache"),
    "busy_s": ("engine_busy_seconds", "time within runs of the model"),
}


class _EngineCollector(Collector):
    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, float(getattr(self._metrics, field)))
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, float(getattr(self._metrics, field)))


class RequestMeter:
    """Times and outcomes of HTTP requests; `path` is one of the routes."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        names = ["path"]
        self.num_answered = Counter(
            f"{PREFIX}_http_requests", "requests by route and status", [*names, "status"], registry=self._registry
        )
        self.first_token_s = Histogram(
            f"{PREFIX}_first_token_seconds",
            "request to its first token",
            names,
            buckets=SECONDS,
            registry=self._registry,
        )
        self.duration_s = Histogram(
            f"{PREFIX}_request_seconds", "request to its last token", names, buckets=SECONDS, registry=self._registry
        )

    def render(self, engine: EngineMetrics | None) -> bytes:
        """Everything in Prometheus' text format; without an engine yet, what there is without one."""
        if engine is None:
            return generate_latest(self._registry)
        of_engine = CollectorRegistry()
        of_engine.register(_EngineCollector(engine))
        return generate_latest(of_engine) + generate_latest(self._registry)
