"""Traces for OpenTelemetry: a span for every request and every run, with the names of the GenAI conventions.

Nothing is imported, made or sent unless the operator names a collector (``OTEL_EXPORTER_OTLP_ENDPOINT``) and the
``opentelemetry`` packages are installed (``pip install 'luthier[telemetry]'``). A span is made when all about it is
known, at the end; prompts and answers are no part of it.
"""

from __future__ import annotations

import logging
import os
import threading
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

import luthier
from luthier.api.requests import Exchange
from luthier.records.run import Run

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
CLOSING_SECONDS = 3.0
# What the routes that ask models do, in the words of the conventions.
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
}

log = logging.getLogger("luthier.api")


class Tracing(Protocol):
    """What is told of requests and runs that are over."""

    def trace_request(self, exchange: Exchange) -> None:
        """Tell of a request."""
        ...

    def trace_run(self, run: Run) -> None:
        """Tell of a run."""
        ...

    def close(self) -> None:
        """Send what is left, for a moment at most."""
        ...


def tracing() -> Tracing | None:
    """Return what traces, where the environment names a collector; None otherwise."""
    if not any(os.environ.get(name) for name in ENDPOINTS) or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        return _OpenTelemetry()
    except ImportError as error:
        log.warning("no traces are sent: %s (pip install 'luthier[telemetry]')", error)
        return None


class _OpenTelemetry:
    """Spans through a provider of our own; what else in this process uses OpenTelemetry is left alone."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = os.environ.get("OTEL_SERVICE_NAME", "luthier")
        resource = Resource.create({"service.name": name, "service.version": luthier.__version__})
        self._provider: TracerProvider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("luthier", luthier.__version__)

    def trace_request(self, exchange: Exchange) -> None:
        """Tell of a request; a caller's ``traceparent`` makes it a part of the caller's trace."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        operation = OPERATIONS.get(exchange.route)
        model = exchange.usage.model
        name = f"{operation} {model}" if operation and model else f"{exchange.method} {exchange.route}"
        span = self._tracer.start_span(
            name,
            context=TraceContextTextMapPropagator().extract(dict(exchange.headers)),
            kind=SpanKind.SERVER,
            attributes=_request_attributes(exchange, operation),
            start_time=exchange.started_at_ns,
        )
        if exchange.status >= 500:
            _fail(span, str(exchange.status))
        span.end(exchange.started_at_ns + int(exchange.seconds * 1e9))

    def trace_run(self, run: Run) -> None:
        """Tell of a run, from when it was first taken up."""
        attributes: dict[str, str | int] = {
            "luthier.run.id": run.id,
            "luthier.run.kind": run.kind,
            "luthier.run.status": run.status,
            "luthier.run.attempts": run.attempts,
            "luthier.project": run.project,
        }
        start = run.started_at or run.created_at
        span = self._tracer.start_span(f"run {run.kind}", attributes=attributes, start_time=_nanoseconds(start))
        if run.status == "failed":
            _fail(span, "failed")
        span.end(_nanoseconds(run.finished_at or start))

    def close(self) -> None:
        """Send what is left, for a moment at most."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)  # a collector that is gone holds it up
        closing.start()
        closing.join(CLOSING_SECONDS)


def _request_attributes(exchange: Exchange, operation: str | None) -> dict[str, Any]:
    usage, caller = exchange.usage, exchange.caller
    attributes: dict[str, Any] = {
        "http.request.method": exchange.method,
        "http.route": exchange.route,
        "http.response.status_code": exchange.status,
        "url.path": exchange.scope["path"],
        "luthier.request.id": exchange.id,
    }
    if caller is not None:
        attributes |= {"luthier.project": caller.project, "luthier.key": caller.key or ""}
    if operation is not None and usage.model is not None:
        attributes |= {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "luthier",
            "gen_ai.request.model": usage.model,
            "gen_ai.response.model": usage.model,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
        }
        if usage.first_token_seconds is not None:
            attributes["luthier.first_token_seconds"] = usage.first_token_seconds
    return attributes


def _fail(span: Any, kind: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_status(StatusCode.ERROR)
    span.set_attribute("error.type", kind)


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1e9)
