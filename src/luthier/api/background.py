"""What runs beside the requests for as long as the application does."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI

from luthier.api.service import Service
from luthier.jobs.resident import Residents
from luthier.jobs.supervise import Supervisor
from luthier.store.store import Store
from luthier.workflows.deliveries import expire_deliveries
from luthier.workflows.files import expire_files
from luthier.workflows.responses import expire_responses
from luthier.workflows.uploads import expire_uploads

Background = Callable[[FastAPI], AbstractAsyncContextManager[Any]]
HOUSEKEEPING: tuple[Callable[[Store], None], ...] = (
    expire_files,
    expire_uploads,
    expire_deliveries,
    expire_responses,
    lambda store: store.artifacts.clear_stale_staging(),
)
HOUSEKEEPING_SECONDS = 300.0
MIN_FREE_BYTES = 500 * 2**20

log = logging.getLogger("luthier.api")


@asynccontextmanager
async def housekeeping(app: FastAPI) -> AsyncIterator[None]:
    """Delete what has expired, every few minutes."""

    async def keep() -> None:
        while True:
            for job in HOUSEKEEPING:
                try:
                    await asyncio.to_thread(job, app.state.service.store)
                except Exception:
                    log.exception("housekeeping failed; it is tried again in %g seconds", HOUSEKEEPING_SECONDS)
            await asyncio.sleep(HOUSEKEEPING_SECONDS)

    task = asyncio.create_task(keep())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def supervision(app: FastAPI) -> AsyncIterator[None]:
    """Execute the runs that wait in the queue, each in a process; at the end they go back into it."""
    service: Service = app.state.service
    supervisor = app.state.supervisor = Supervisor(service.store, service.processes)
    supervisor.start()
    try:
        yield
    finally:
        await asyncio.to_thread(supervisor.stop)


def unready(app: FastAPI) -> list[str]:
    """Return why the service cannot do its work now; nothing where it can."""
    service: Service = app.state.service
    reasons = []
    try:
        service.store.runs.unfinished()
    except Exception as error:  # noqa: BLE001 - any failure is the answer
        reasons.append(f"the database does not answer ({type(error).__name__})")
    free = shutil.disk_usage(service.store.home).free
    if free < MIN_FREE_BYTES:
        reasons.append(f"the disk has {free // 2**20} MiB free, less than {MIN_FREE_BYTES // 2**20}")
    supervisor: Supervisor | None = getattr(app.state, "supervisor", None)
    if supervisor is not None and not supervisor.alive:
        reasons.append("nobody watches the queue of runs")
    residents: Residents | None = getattr(app.state, "residents", None)
    if residents is not None and not residents.alive:
        reasons.append("nobody watches the queue of batches")
    return reasons
