"""``/metrics`` for Prometheus: requests, tokens, the queue, engines, webhooks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from luthier.api.requests import Exchange
from luthier.api.service import Admin, Service, TheService
from luthier.records.run import Run
from luthier.records.webhook import WebhookDelivery
from luthier.serve.pool import EngineInfo
from luthier.store.store import Store

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

router = APIRouter(tags=["operation"])


class ServiceMetrics:
    """What the service counts itself; models are counted where they run."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "luthier_requests",
            "Requests that are over. Internal ones are those that batches and evals make.",
            ("method", "route", "status", "origin"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "luthier_request_seconds",
            "From the arrival of a request to the end of its answer.",
            ("route",),
            registry=self.registry,
            buckets=SECONDS_BUCKETS,
        )
        self._runs = Counter("luthier_runs", "Runs that ended.", ("kind", "status"), registry=self.registry)
        self._attempts = Counter(
            "luthier_webhook_attempts", "Attempts to tell an endpoint.", ("outcome",), registry=self.registry
        )

    def count_request(self, exchange: Exchange) -> None:
        """Count a request that is over."""
        origin = "internal" if exchange.internal else "client"
        method = exchange.method if exchange.method in METHODS else "other"
        self._requests.labels(method, exchange.route, exchange.status, origin).inc()
        self._seconds.labels(exchange.route).observe(exchange.seconds)

    def count_run(self, run: Run) -> None:
        """Count a run that ended."""
        self._runs.labels(run.kind, run.status).inc()

    def count_attempt(self, delivery: WebhookDelivery) -> None:
        """Count an attempt by what became of its delivery."""
        self._attempts.labels(delivery.status).inc()


METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"})


class Snapshot(Collector):
    """What is looked up when somebody asks: the queue, the engines, and what webhooks wait for."""

    def __init__(self, store: Store, engines: list[EngineInfo]) -> None:
        self._store = store
        self._engines = engines

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the families."""
        runs = GaugeMetricFamily("luthier_runs_unfinished", "Runs in the queue.", labels=("kind", "status"))
        for (kind, status), number in self._store.runs.unfinished().items():
            runs.add_metric((kind, status), number)
        yield runs
        waiting = self._store.outbox.counts().get("pending", 0)
        yield GaugeMetricFamily("luthier_webhook_deliveries_pending", "What is still to be told.", waiting)
        labels = ("model",)
        memory = GaugeMetricFamily("luthier_engine_memory_bytes", "Memory that an engine holds here.", labels=labels)
        busy = GaugeMetricFamily("luthier_engine_answers", "Answers that an engine makes or queues.", labels=labels)
        for engine in self._engines:
            memory.add_metric((engine.model,), engine.memory_bytes)
            busy.add_metric((engine.model,), engine.in_flight)
        yield memory
        yield busy
        yield GaugeMetricFamily("luthier_engines_loaded", "Engines that run.", len(self._engines))


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request, caller: Admin, service: TheService) -> Response:
    """Return all metrics in Prometheus's text format."""
    own: ServiceMetrics = request.app.state.metrics
    return Response(await asyncio.to_thread(_text, service, own, service.pool.engines), media_type=CONTENT_TYPE)


def _text(service: Service, own: ServiceMetrics, engines: list[EngineInfo]) -> bytes:
    looked_up = CollectorRegistry()
    looked_up.register(Snapshot(service.store, engines))
    registries = (own.registry, service.pool.metrics.registry, looked_up)
    return b"".join(generate_latest(registry) for registry in registries)
