"""``/v1/evals``: evals, runs of them, and what came out."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from luthier.api.paging import list_of
from luthier.api.service import Reader, TheService, Writer
from luthier.records.eval import EvalRunStatus
from luthier.records.stored import Metadata
from luthier.store.collection import Order
from luthier.workflows import eval_runs, evals

router = APIRouter(prefix="/v1/evals", tags=["evals"])
Limit = Annotated[int, Query(ge=1, le=100)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class EvalRequest(BaseModel):
    """What is to be tested, and by which graders."""

    model_config = ConfigDict(extra="allow")

    data_source_config: dict[str, Any]
    testing_criteria: list[dict[str, Any]]
    name: Name | None = None
    metadata: Metadata | None = None


class EvalChange(BaseModel):
    """A new name, new labels in the place of the old ones, or both."""

    model_config = ConfigDict(extra="allow")

    name: Name | None = None
    metadata: Metadata | None = None


class RunRequest(BaseModel):
    """What a run evaluates: rows as they are, or a model's answers to them."""

    model_config = ConfigDict(extra="allow")

    data_source: dict[str, Any]
    name: Name | None = None
    metadata: Metadata | None = None


@router.post("", status_code=201)
async def create_eval(body: EvalRequest, caller: Writer, service: TheService) -> dict[str, Any]:
    """Make an eval."""
    made = await evals.create_eval(
        service.store, caller.project, body.name, body.data_source_config, body.testing_criteria, body.metadata
    )
    return evals.eval_object(made)


@router.get("")
def list_evals(
    caller: Reader,
    service: TheService,
    after: str | None = None,
    limit: Limit = 20,
    order: Order = "asc",
    order_by: Literal["created_at", "updated_at"] = "created_at",
) -> dict[str, Any]:
    """List evals."""
    page = evals.list_evals(service.store, caller.project, after=after, limit=limit, order=order, order_by=order_by)
    return list_of(page, evals.eval_object)


@router.get("/{eval_id}")
def retrieve_eval(eval_id: str, caller: Reader, service: TheService) -> dict[str, Any]:
    """Describe an eval."""
    return evals.eval_object(service.store.evals.evals.get(caller.project, eval_id))


@router.post("/{eval_id}")
def update_eval(eval_id: str, body: EvalChange, caller: Writer, service: TheService) -> dict[str, Any]:
    """Give an eval another name or other labels."""
    changes: dict[str, Any] = {
        field: getattr(body, field) for field in ("name", "metadata") if field in body.model_fields_set
    }
    if changes.get("name", "") is None:
        del changes["name"]
    return evals.eval_object(evals.change_eval(service.store, caller.project, eval_id, changes))


@router.delete("/{eval_id}")
def remove_eval(eval_id: str, caller: Writer, service: TheService) -> dict[str, Any]:
    """Delete an eval and its runs."""
    evals.delete_eval(service.store, caller.project, eval_id)
    return {"object": "eval.deleted", "deleted": True, "eval_id": eval_id}


@router.post("/{eval_id}/runs", status_code=201)
def create_run(eval_id: str, body: RunRequest, request: Request, caller: Writer, service: TheService) -> dict[str, Any]:
    """Put a run of an eval into the queue."""
    check_model = partial(service.pool.writer, project=caller.project)
    run = eval_runs.create_run(
        service.store, caller.project, eval_id, body.name, body.data_source, body.metadata, check_model
    )
    return eval_runs.run_object(service.store, run, str(request.base_url))


@router.get("/{eval_id}/runs")
def list_runs(
    eval_id: str,
    request: Request,
    caller: Reader,
    service: TheService,
    after: str | None = None,
    limit: Limit = 20,
    order: Order = "asc",
    status: EvalRunStatus | None = None,
) -> dict[str, Any]:
    """List the runs of an eval."""
    page = eval_runs.list_runs(
        service.store, caller.project, eval_id, after=after, limit=limit, order=order, status=status
    )
    return list_of(page, lambda run: eval_runs.run_object(service.store, run, str(request.base_url)))


@router.get("/{eval_id}/runs/{eval_run_id}")
def retrieve_run(
    eval_id: str, eval_run_id: str, request: Request, caller: Reader, service: TheService
) -> dict[str, Any]:
    """Describe a run, with what came out so far."""
    run = eval_runs.find_run(service.store, caller.project, eval_id, eval_run_id)
    return eval_runs.run_object(service.store, run, str(request.base_url))


@router.post("/{eval_id}/runs/{eval_run_id}/cancel")
@router.post("/{eval_id}/runs/{eval_run_id}")  # where the package has it in its majors 1 and 2
def cancel_run(eval_id: str, eval_run_id: str, request: Request, caller: Writer, service: TheService) -> dict[str, Any]:
    """End a run."""
    run = eval_runs.cancel_run(service.store, caller.project, eval_id, eval_run_id)
    return eval_runs.run_object(service.store, run, str(request.base_url))


@router.delete("/{eval_id}/runs/{eval_run_id}")
def remove_run(eval_id: str, eval_run_id: str, caller: Writer, service: TheService) -> dict[str, Any]:
    """Delete a run and what came out."""
    eval_runs.delete_run(service.store, caller.project, eval_id, eval_run_id)
    return {"object": "eval.run.deleted", "deleted": True, "run_id": eval_run_id}


@router.get("/{eval_id}/runs/{eval_run_id}/output_items")
def list_items(
    eval_id: str,
    eval_run_id: str,
    caller: Reader,
    service: TheService,
    after: str | None = None,
    limit: Limit = 20,
    order: Order = "asc",
    status: Literal["pass", "fail", "failed", "error"] | None = None,
) -> dict[str, Any]:
    """List what came out, item by item."""
    page = eval_runs.list_items(
        service.store,
        caller.project,
        eval_id,
        eval_run_id,
        after=after,
        limit=limit,
        order=order,
        status="fail" if status == "failed" else status,
    )
    return list_of(page, eval_runs.item_object)


@router.get("/{eval_id}/runs/{eval_run_id}/output_items/{output_item_id}")
def retrieve_item(
    eval_id: str, eval_run_id: str, output_item_id: str, caller: Reader, service: TheService
) -> dict[str, Any]:
    """Show what came out of one item."""
    return eval_runs.item_object(
        eval_runs.find_item(service.store, caller.project, eval_id, eval_run_id, output_item_id)
    )
