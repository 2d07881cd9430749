"""Numbers for Prometheus: requests by route and status, and what the engine counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...extras import extra
from ..engine import EngineThread

with extra("serve"):
    import prometheus_client as prometheus
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily


COUNTS = {
    "requests": "requests that the engine has answered",
    "failed": "requests that failed, by the model or past their deadline",
    "cancelled": "requests whose client hung up",
    "refused": "requests that found the queue full",
    "texts": "queries and documents encoded",
    "prompt_tokens": "tokens read",
    "reasoning_tokens": "tokens of reasoning written",
    "busy_milliseconds": "milliseconds that the engine was at work",
}


class Metrics:
    """A registry of its own, so that several apps in one process keep apart."""

    def __init__(self, engine: EngineThread) -> None:
        class Engine:
            def collect(self) -> Iterator[Any]:
                for name, what in COUNTS.items():
                    yield CounterMetricFamily(f"search_r3_{name}", what, engine.counts[name])
                for name, value in engine.load().items():
                    yield GaugeMetricFamily(f"search_r3_{name}_in_work", f"{name} waiting or in work", value)

        self._registry = prometheus.CollectorRegistry()
        self._registry.register(Engine())
        self._answers = prometheus.Counter(
            "search_r3_http_answers", "answers", ["route", "status"], registry=self._registry
        )
        self._seconds = prometheus.Histogram(
            "search_r3_http_seconds", "seconds to the end of an answer", ["route"], registry=self._registry
        )
        self._write = prometheus.generate_latest

    def count(self, route: str, status: int, seconds: float) -> None:
        """One answer more."""
        self._answers.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return self._write(self._registry)
