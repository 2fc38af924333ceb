"""``/v1/fine_tuning``: jobs, their events and checkpoints, and who else may ask a checkpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request

from luthier.api.paging import list_of, metadata_filter
from luthier.api.service import Admin, Reader, TheService, Writer
from luthier.records.fine_tuning import CheckpointPermission, JobRequest, PermissionRequest
from luthier.records.stored import Page
from luthier.workflows import fine_tuning_jobs, sharing
from luthier.workflows.fine_tuning import checkpoint_object, event_object, job_object

router = APIRouter(prefix="/v1/fine_tuning", tags=["fine-tuning"])
Limit = Annotated[int, Query(ge=1, le=100)]
ORDERS: dict[str, Literal["asc", "desc"]] = {"ascending": "asc", "descending": "desc"}


@router.post("/jobs")
def create_job(body: JobRequest, caller: Writer, service: TheService) -> dict[str, Any]:
    """Put a fine-tuning job into the queue."""
    return job_object(service.store, fine_tuning_jobs.create_job(service.store, caller.project, body))


@router.get("/jobs")
def list_jobs(
    request: Request, caller: Reader, service: TheService, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """List the project's jobs, the newest first."""
    page = fine_tuning_jobs.list_jobs(service.store, caller.project, after, limit, metadata_filter(request))
    return list_of(page, lambda run: job_object(service.store, run))


@router.get("/jobs/{job}")
def retrieve_job(job: str, caller: Reader, service: TheService) -> dict[str, Any]:
    """Describe a job."""
    return job_object(service.store, fine_tuning_jobs.find_job(service.store, caller.project, job))


@router.post("/jobs/{job}/cancel")
def cancel_job(job: str, caller: Writer, service: TheService) -> dict[str, Any]:
    """Stop a job for good."""
    return job_object(service.store, fine_tuning_jobs.stop_job(service.store, caller.project, job, "cancel"))


@router.post("/jobs/{job}/pause")
def pause_job(job: str, caller: Writer, service: TheService) -> dict[str, Any]:
    """Stop a job, to go on later."""
    return job_object(service.store, fine_tuning_jobs.stop_job(service.store, caller.project, job, "pause"))


@router.post("/jobs/{job}/resume")
def resume_job(job: str, caller: Writer, service: TheService) -> dict[str, Any]:
    """Go on with a paused job."""
    return job_object(service.store, fine_tuning_jobs.resume_job(service.store, caller.project, job))


@router.get("/jobs/{job}/events")
def list_events(
    job: str, caller: Reader, service: TheService, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """List what a job said, the newest first."""
    page = fine_tuning_jobs.job_events(service.store, caller.project, job, after, limit)
    return list_of(page, event_object)


@router.get("/jobs/{job}/checkpoints")
def list_checkpoints(
    job: str, caller: Reader, service: TheService, after: str | None = None, limit: Limit = 10
) -> dict[str, Any]:
    """List a job's checkpoints, the newest first."""
    page = fine_tuning_jobs.job_checkpoints(service.store, caller.project, job, after, limit)
    return list_of(page, checkpoint_object)


@router.post("/checkpoints/{checkpoint:path}/permissions")
def create_permissions(checkpoint: str, body: PermissionRequest, caller: Admin, service: TheService) -> dict[str, Any]:
    """Let other projects ask a checkpoint."""
    made = sharing.share(service.store, caller.project, checkpoint, body.project_ids)
    return list_of(Page(items=tuple(made), has_more=False), _permission)


@router.get("/checkpoints/{checkpoint:path}/permissions")
def list_permissions(
    checkpoint: str,
    caller: Admin,
    service: TheService,
    project_id: str | None = None,
    after: str | None = None,
    limit: Limit = 10,
    order: Literal["ascending", "descending"] = "descending",
) -> dict[str, Any]:
    """List the projects that may ask a checkpoint."""
    page = sharing.permissions(
        service.store,
        caller.project,
        checkpoint,
        with_project=project_id,
        after=after,
        limit=limit,
        order=ORDERS[order],
    )
    return list_of(page, _permission)


@router.delete("/checkpoints/{checkpoint:path}/permissions/{permission}")
def delete_permission(checkpoint: str, permission: str, caller: Admin, service: TheService) -> dict[str, Any]:
    """Take a permission back."""
    sharing.unshare(service.store, caller.project, checkpoint, permission)
    return {"id": permission, "object": "checkpoint.permission", "deleted": True}


def _permission(permission: CheckpointPermission) -> dict[str, Any]:
    return {
        "id": permission.id,
        "object": "checkpoint.permission",
        "created_at": permission.created_at,
        "project_id": permission.project_id,
    }
