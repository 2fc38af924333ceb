"""Batches as OpenAI's clients handle them: create, find, cancel; each is a run that the server process executes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from luthier.errors import ConflictError, NotFoundError
from luthier.jobs.launch import submit
from luthier.records.batch import BatchRequest, BatchState, BatchStatus
from luthier.records.run import Run, RunKind
from luthier.records.stored import Metadata, Page, now
from luthier.store.store import Store
from luthier.workflows.files import file_for

KINDS: tuple[RunKind, ...] = ("batch",)
RUN, BATCH = "batch-", "batch_"
WINDOW, WINDOW_SECONDS = "24h", 24 * 3600
STATE_FILE = "state.json"


def create_batch(store: Store, project: str, request: BatchRequest, metadata: Metadata | None) -> Run:
    """Put a batch into the queue. Its file is checked when it is taken up.

    Raises:
        ApiError: 404 where the file is not there, 400 where it has another purpose.
    """
    file_for(store, project, request.input_file_id, "batch", "input_file_id")
    return submit(store, "batch", request, project=project, metadata=metadata)


def find_batch(store: Store, project: str, batch: str) -> Run:
    """Return the run of a project's batch.

    Raises:
        NotFoundError: the project has no such batch.
    """
    missing = NotFoundError(f"There is no batch {batch!r}.")
    if not batch.startswith(BATCH):
        raise missing
    try:
        run = store.runs.get(RUN + batch.removeprefix(BATCH), project=project)
    except NotFoundError:
        raise missing from None
    if run.kind not in KINDS:
        raise missing
    return run


def list_batches(store: Store, project: str, after: str | None, limit: int) -> Page[Run]:
    """Return a part of a project's batches, the newest first.

    Raises:
        NotFoundError: the project has no batch ``after``.
    """
    last = find_batch(store, project, after).id if after is not None else None
    return store.runs.page(project, KINDS, after=last, limit=limit)


def cancel_batch(store: Store, project: str, batch: str) -> Run:
    """Ask a batch to end; what has been answered is in its files then, even if nothing runs it now.

    Raises:
        NotFoundError: the project has no such batch.
        ConflictError: it has ended.
    """
    run = find_batch(store, project, batch)
    if run.is_finished:
        status = batch_object(store, run)["status"]
        raise ConflictError(f"The batch {batch} has ended already: it is {status}.")
    return store.runs.request(run.id, "cancel")


def batch_id(run_id: str) -> str:
    """Return the id of a run as a batch."""
    return BATCH + run_id.removeprefix(RUN)


def read_state(folder: Path) -> BatchState:
    """Return how far a batch has come, by the folder of its run."""
    path = folder / STATE_FILE
    return BatchState.model_validate_json(path.read_bytes()) if path.exists() else BatchState()


def write_state(folder: Path, state: BatchState) -> None:
    """Keep how far a batch has come; a reader sees the state before or this one."""
    fresh = folder / f"{STATE_FILE}.new"
    with fresh.open("w") as file:
        file.write(state.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(folder / STATE_FILE)


def expiry_of(run: Run) -> int:
    """Return when a batch must have ended, in Unix seconds."""
    return int(run.created_at.timestamp()) + WINDOW_SECONDS


def batch_object(store: Store, run: Run) -> dict[str, Any]:
    """Return a run as ``batch``."""
    request = BatchRequest.model_validate(run.config)
    state = read_state(store.run_folder(run.id))
    status = _status(run, state)
    has_files = run.is_finished and state.outcome is not None
    ended_at = int(run.finished_at.timestamp()) if run.finished_at else None
    ends = {f"{end}_at": ended_at if status == end else None for end in ("completed", "failed", "expired", "cancelled")}
    return {
        "id": batch_id(run.id),
        "object": "batch",
        "endpoint": request.endpoint,
        "model": state.model,
        "errors": _errors(run, state, status),
        "input_file_id": request.input_file_id,
        "completion_window": WINDOW,
        "status": status,
        "output_file_id": state.output_file_id if has_files else None,
        "error_file_id": state.error_file_id if has_files else None,
        "created_at": int(run.created_at.timestamp()),
        "in_progress_at": state.in_progress_at,
        "expires_at": expiry_of(run),
        "finalizing_at": state.finalizing_at,
        "cancelling_at": state.cancelling_at or (now() if status == "cancelling" else None),
        **ends,
        "request_counts": {"total": state.total, "completed": state.completed, "failed": state.failed},
        "usage": _usage(state),
        "metadata": run.metadata,
    }


def _status(run: Run, state: BatchState) -> BatchStatus:
    """Return OpenAI's word; a paused batch is one that is in progress."""
    if run.status == "succeeded":
        return "completed"
    if run.status == "failed":
        return "expired" if state.outcome == "expired" else "failed"
    if run.status == "cancelled":
        return "cancelled"
    if run.request == "cancel":
        return "cancelling"
    if state.finalizing_at is not None:
        return "finalizing"
    return "validating" if state.in_progress_at is None else "in_progress"


def _errors(run: Run, state: BatchState, status: BatchStatus) -> dict[str, Any] | None:
    if status != "failed":
        return None
    found = [problem.model_dump() for problem in state.problems]
    whole = {"code": "batch_failed", "message": run.error or "", "line": None, "param": None}
    return {"object": "list", "data": found or [whole]}


def _usage(state: BatchState) -> dict[str, Any]:
    return {
        "input_tokens": state.input_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": state.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": state.input_tokens + state.output_tokens,
    }
