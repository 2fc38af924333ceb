"""The HTTP door: an application of all routes, that any ASGI server runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from luthier.api.errors import answer_errors
from luthier.api.middleware import BodyLimit, RequestIds
from luthier.api.routes import ROUTERS
from luthier.api.service import Service


def create_app(service: Service) -> FastAPI:
    """Return the application of a service. It closes the service's engines when it shuts down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.pool.close()

    app = FastAPI(title="Luthier", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(BodyLimit, limits=service.limits)
    app.add_middleware(RequestIds)
    answer_errors(app)
    app.add_api_route("/health", health, methods=["GET"])
    for router in ROUTERS:
        app.include_router(router)
    return app


async def health() -> dict[str, str]:
    """Say that the server is up."""
    return {"status": "ok"}
