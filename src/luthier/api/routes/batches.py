"""``/v1/batches``: files of requests that are answered when there is time."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from luthier.api.paging import list_of
from luthier.api.routes.uploads import ExpiresAfter
from luthier.api.service import Reader, TheService, Writer
from luthier.records.batch import BatchEndpoint, BatchRequest
from luthier.records.stored import Metadata
from luthier.workflows.batches import batch_object, cancel_batch, create_batch, find_batch, list_batches

router = APIRouter(prefix="/v1/batches", tags=["batches"])


class BatchBody(BaseModel):
    """A request for a batch."""

    model_config = ConfigDict(extra="allow")

    input_file_id: str = Field(min_length=1)
    endpoint: BatchEndpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


@router.post("")
def make_batch(body: BatchBody, caller: Writer, service: TheService) -> dict[str, Any]:
    """Put a batch into the queue."""
    seconds = body.output_expires_after.seconds if body.output_expires_after else None
    request = BatchRequest(
        input_file_id=body.input_file_id, endpoint=body.endpoint, output_expires_after_seconds=seconds
    )
    return batch_object(service.store, create_batch(service.store, caller.project, request, body.metadata))


@router.get("")
def find_batches(
    caller: Reader,
    service: TheService,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """List batches, the newest first."""
    found = list_batches(service.store, caller.project, after, limit)
    return list_of(found, partial(batch_object, service.store))


@router.get("/{batch}")
def retrieve_batch(batch: str, caller: Reader, service: TheService) -> dict[str, Any]:
    """Describe a batch."""
    return batch_object(service.store, find_batch(service.store, caller.project, batch))


@router.post("/{batch}/cancel")
def stop_batch(batch: str, caller: Writer, service: TheService) -> dict[str, Any]:
    """End a batch."""
    return batch_object(service.store, cancel_batch(service.store, caller.project, batch))
