"""The HTTP door: an application of all routes, that any ASGI server runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from luthier.api.background import Background, housekeeping, supervision, unready
from luthier.api.errors import answer_errors
from luthier.api.middleware import BodyLimit, RequestIds
from luthier.api.resident import residence
from luthier.api.routes import ROUTERS
from luthier.api.service import Service


def create_app(service: Service) -> FastAPI:
    """Return the application of a service. It closes the service's engines when it shuts down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as running:
            running.push_async_callback(service.pool.close)
            for background in _background(service):
                await running.enter_async_context(background(app))
            yield

    app = FastAPI(title="Luthier", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(BodyLimit, limits=service.limits)
    app.add_middleware(RequestIds)
    answer_errors(app)
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/ready", ready, methods=["GET"])
    for router in ROUTERS:
        app.include_router(router)
    return app


def _background(service: Service) -> list[Background]:
    return [housekeeping, supervision, residence] if service.executes_runs else []


async def health() -> dict[str, str]:
    """Say that the server is up."""
    return {"status": "ok"}


def ready(request: Request) -> JSONResponse:
    """Say whether the server can do its work, and if not, why."""
    reasons = unready(request.app)
    body: dict[str, Any] = {"status": "unready" if reasons else "ready", "reasons": reasons}
    return JSONResponse(body, status_code=503 if reasons else 200)
