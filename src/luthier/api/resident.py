"""The runs that the server process executes beside the requests: each is a client of the service's own routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI

from luthier.api.loopback import call
from luthier.api.service import Service
from luthier.jobs.resident import Ending, Executor, Residents
from luthier.records.run import RunKind
from luthier.workflows.batch_execution import end_batch, execute_batch
from luthier.workflows.eval_execution import execute_eval_run

EXECUTORS: Mapping[RunKind, Executor] = {"batch": execute_batch, "eval_run": execute_eval_run}
ENDINGS: Mapping[RunKind, Ending] = {"batch": end_batch}


@asynccontextmanager
async def residence(app: FastAPI) -> AsyncIterator[None]:
    """Execute the batches and runs of evals that wait in the queue; at the end they go back into it."""
    service: Service = app.state.service
    residents = app.state.residents = Residents(
        service.store, EXECUTORS, partial(call, app), endings=ENDINGS, at_once=service.resident_runs
    )
    residents.start()
    try:
        yield
    finally:
        await residents.stop()
