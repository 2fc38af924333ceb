"""The HTTP door: an application of all routes, that any ASGI server runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from luthier.api import metrics
from luthier.api.announcements import announcements
from luthier.api.background import Background, housekeeping, supervision, unready
from luthier.api.description import describe
from luthier.api.errors import answer_errors
from luthier.api.identity import Identity
from luthier.api.json_bodies import JsonBodies
from luthier.api.logs import PromptLog, log_request
from luthier.api.metrics import ServiceMetrics
from luthier.api.middleware import BodyLimit
from luthier.api.rate_limits import RateLimiter
from luthier.api.requests import Observer, Requests
from luthier.api.resident import residence
from luthier.api.routes import ROUTERS
from luthier.api.service import Service
from luthier.api.tracing import Tracing, tracing


def create_app(service: Service) -> FastAPI:
    """Return the application of a service. It closes the service's engines when it shuts down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as running:
            running.enter_context(_traced(app))
            running.push_async_callback(service.pool.close)
            for background in _background(service):
                await running.enter_async_context(background(app))
            yield

    app = FastAPI(title="Luthier", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    _guard(app, service)
    answer_errors(app)
    app.add_api_route("/health", health, methods=["GET"], tags=["operation"])
    app.add_api_route("/ready", ready, methods=["GET"], tags=["operation"], responses={503: {}})
    for router in (*ROUTERS, metrics.router):
        app.include_router(router)
    describe(app)
    return app


def _guard(app: FastAPI, service: Service) -> None:
    """Let requests through, from the last line to the first: sound, not too large, by somebody known, with an id."""
    app.add_middleware(JsonBodies)
    if service.log_prompts:
        app.add_middleware(PromptLog)
    app.add_middleware(BodyLimit, limits=service.limits)
    limiter = RateLimiter(service.rates)
    app.add_middleware(Identity, service=service, limiter=limiter)
    app.state.metrics = ServiceMetrics()
    app.state.observers = [limiter.settle_exchange, app.state.metrics.count_request, log_request]
    app.add_middleware(Requests, observers=app.state.observers)


@contextmanager
def _traced(app: FastAPI) -> Iterator[None]:
    """Send traces, where the environment says where to."""
    tracer: Tracing | None = tracing()
    app.state.tracing = tracer
    if tracer is None:
        yield
        return
    observers: list[Observer] = app.state.observers
    observers.append(tracer.trace_request)
    try:
        yield
    finally:
        observers.remove(tracer.trace_request)
        tracer.close()


def _background(service: Service) -> list[Background]:
    return [housekeeping, announcements, supervision, residence] if service.executes_runs else []


async def health() -> dict[str, str]:
    """Say that the server is up."""
    return {"status": "ok"}


def ready(request: Request) -> JSONResponse:
    """Say whether the server can do its work, and if not, why."""
    reasons = unready(request.app)
    body: dict[str, Any] = {"status": "unready" if reasons else "ready", "reasons": reasons}
    return JSONResponse(body, status_code=503 if reasons else 200)
